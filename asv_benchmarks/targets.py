"""The targets on a CPU that compare xce with itself: dtypes, options, layouts, threads, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from benchmarks.common import (
    DTYPES,
    LAYERS,
    import_seconds,
    layer_call,
    loss_call,
    make_logits,
    numpy_dtype,
    peak_growth,
)
from benchmarks.cross_entropy import segmentation_call, variant_call
from benchmarks.linear import products
from contenders import copy_floors, torch_of
from measure import Call, Times, race

import xce

SEGMENTATION = (2, 19, 512, 512)
LAYER = (512, 512, 32000)  # rows, width, classes
BINARY = ((1024, 1000), (16384, 1000))  # in a second-level cache or nearly so, and far from it


class Target(NamedTuple):
    """One line of the table: what, the bound, and what was reached."""

    what: str
    bound: float
    reached: float
    at_least: bool  # else at most
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound

    def cells(self) -> list[str]:
        """Target, reached, met."""
        sign = ">=" if self.at_least else "<="
        reached = f"{self.reached:.3g} {self.unit}"
        return [self.what, f"{sign} {self.bound:g} {self.unit}", reached, "yes" if self.met else "no"]


def option_targets(shape: tuple[int, int], threads: int, rounds: int) -> Iterator[Target]:
    """Every target that needs no peer, the arrays of one group in memory at a time."""
    for returns in ("value", "grad"):
        where = f"{shape[0]}x{shape[1]} {returns}"
        yield from _dtypes(shape, returns, where, rounds)
        yield from _options(shape, returns, where, rounds)
        yield from _threads(shape, returns, where, threads, rounds)
        yield from _segmentation(returns, rounds)
    yield from _layer(rounds)
    yield from _binary(threads, rounds)
    yield from _memory(shape, threads)
    yield Target("import xce, over NumPy's import", 60, 1e3 * import_seconds(), False, "ms")


def _race(make: Callable[[str], Call], names: list[str], rounds: int) -> dict[str, Times]:
    return race({name: make(name) for name in names}, rounds)


def _dtypes(shape: tuple[int, int], returns: str, where: str, rounds: int) -> Iterator[Target]:
    def make(dtype: str) -> Call:
        return loss_call("cross_entropy", make_logits(shape, dtype), returns)

    times = _race(make, [dtype for dtype in DTYPES if _exists(dtype)], rounds)
    bounds = {"float16": 1.5, "bfloat16": 1.5, "float64": 0.45}
    for dtype, bound in bounds.items():
        if dtype in times:
            speed = times["float32"].best / times[dtype].best
            yield Target(f"{where}: rows per second of {dtype} over float32", bound, speed, True)


def _options(shape: tuple[int, int], returns: str, where: str, rounds: int) -> Iterator[Target]:
    logits = make_logits(shape)
    bounds = {"label_smoothing": 1.05, "weight": 1.05, "ignore_index": 1.05, "probabilities": 1.6}
    times = _race(partial(variant_call, logits=logits, returns=returns), ["plain", *bounds], rounds)
    for variant, bound in bounds.items():
        ratio = times[variant].best / times["plain"].best
        if variant == "probabilities":  # two arrays are read, not one
            yield Target(f"{where}: probabilities over plain, per byte read", bound, ratio / 2, False)
        else:
            yield Target(f"{where}: {variant} over plain", bound, ratio, False)


def _threads(shape: tuple[int, int], returns: str, where: str, threads: int, rounds: int) -> Iterator[Target]:
    if threads < 2:
        return
    call = loss_call("cross_entropy", make_logits(shape), returns)
    times = race({str(n): partial(call, n_threads=n) for n in (1, 2)}, rounds)
    yield Target(f"{where}: two threads over one", 1.8, times["1"].best / times["2"].best, True)


def _segmentation(returns: str, rounds: int) -> Iterator[Target]:
    layouts = ["axis=1", "moved"]
    times = _race(partial(segmentation_call, shape=SEGMENTATION, returns=returns), layouts, rounds)
    name = "x".join(map(str, SEGMENTATION))
    ratio = times["moved"].best / times["axis=1"].best
    yield Target(f"{name} {returns}: speed on axis 1 over moving it first", 1, ratio, True)


def _layer(rounds: int) -> Iterator[Target]:
    where, (loss,) = f"{'x'.join(map(str, LAYER))} linear", LAYERS
    call = layer_call(loss, LAYER, "float32", "grad")
    inputs, weight, _labels = LAYERS[loss](LAYER)
    times = race({"loss": call, "products": products(inputs, weight)}, rounds)
    ratio = times["loss"].best / times["products"].best
    yield Target(f"{where}: value and both gradients over the three products", 1.15, ratio, False)


def _binary(threads: int, rounds: int) -> Iterator[Target]:
    """Logits and targets are read and a gradient is written: half as many bytes again as a copy moves."""
    for shape in BINARY:
        x = make_logits(shape)
        y = (np.random.default_rng(4).random(shape) < 0.5).astype(x.dtype)
        options = {"return_grad": True, "grad_out": np.full_like(x, 1)}
        calls = copy_floors(x, threads)
        floors = list(calls)
        calls["xce"] = partial(xce.binary_cross_entropy_with_logits, x, y, **options)
        calls["unchecked"] = partial(calls["xce"], validate=False)
        if torch := torch_of(threads):
            leaf, labels = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
            loss = torch.nn.functional.binary_cross_entropy_with_logits
            calls["torch"] = lambda: torch.autograd.grad(loss(leaf, labels), leaf)  # noqa: B023
        times = race(calls, rounds)
        copy = 1.5 * min(times[name].best for name in floors)
        where = f"{'x'.join(map(str, shape))} binary grad"
        yield Target(f"{where}: speed over copying as many bytes", 0.85, copy / times["xce"].best, True)
        yield Target(f"{where}: the same, validate=False", 0.85, copy / times["unchecked"].best, True)
        if torch:
            yield Target(f"{where}: speed over PyTorch", 4, times["torch"].best / times["xce"].best, True)


def _memory(shape: tuple[int, int], threads: int) -> Iterator[Target]:
    loss_call("cross_entropy", make_logits((32, 10)), "grad")()  # loads the code, which is not counted
    try:
        extra = peak_growth(loss_call("cross_entropy", make_logits(shape), "grad"))
    except NotImplementedError:
        return
    where, bound = f"{shape[0]}x{shape[1]} grad", 1 + threads / 16
    yield Target(f"{where}: memory beyond outputs", bound, extra / 2**20, False, "MiB")


def _exists(dtype: str) -> bool:
    try:
        numpy_dtype(dtype)
    except NotImplementedError:
        return False
    return True

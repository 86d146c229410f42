"""What the tests of the kernels share: instruction sets, memory layouts, and comparisons with the reference.

The tolerances are those of a correctly working kernel. A rounding error of the logits' transform is amplified
by the size of the logits, and sums whose terms cancel (smoothing, z-loss, softcap) are right relative to the
largest entry of their row; everything else is right relative to itself. A loss of elements knows its input up to a
few units in the last place: how far that moves it, near a kink or a clamp, the reference tells. How right confident
rows and elements are, and students close to their teacher, is asked by test_accuracy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cases import CASE_OF, LOSSES, TARGETS_OF_LOSSES, Case, oracle, problem

import xce
from xce import _cpu, _threads
from xce._engines import cpu

Array = np.ndarray[Any, Any]

DTYPES = ["float32", "float64", "float16", "bfloat16"]

every_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
every_target = pytest.mark.parametrize(
    ("case", "mode"), TARGETS_OF_LOSSES, ids=[f"{case.name}-{mode}" for case, mode in TARGETS_OF_LOSSES]
)


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


# Where a call runs


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Use the kernels of one instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XCE_CPU", level)
        forget_level()
        try:
            yield
        finally:
            forget_level()
    forget_level()


def forget_level() -> None:
    _cpu.level.cache_clear()
    _cpu.kernels.cache_clear()
    cpu._KERNELS.clear()


@contextmanager
def machine_of(n: int) -> Iterator[None]:
    """Let calls use `n` threads, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_threads, "hardware_limit", lambda: n)
        patch.setattr(_threads.runtime, "max_threads", lambda: n)
        patch.setattr(_threads, "_cap", None)
        yield


def dtypes_of(case: Case, seed: int) -> list[np.dtype[Any]]:
    """All of them for the loss whose kernels have the most schedules, by turns for the others."""
    names = DTYPES if case.function is xce.cross_entropy else [DTYPES[seed % len(DTYPES)]]
    return [dtype_of(name) for name in names]


# How a public function is called


Caller = Callable[..., Any]  # of a function and its arguments
_callers: list[Caller] = [lambda function, *args, **options: function(*args, **options)]


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function of the library with arrays of NumPy, here or where `called_by` says."""
    return _callers[-1](function, *args, **options)


@contextmanager
def called_by(caller: Caller) -> Iterator[None]:
    """Let `caller` make the calls: it may take the arrays elsewhere."""
    _callers.append(caller)
    try:
        yield
    finally:
        _callers.pop()


# How an array lies in memory: the same values in other places


def misaligned(a: Array) -> Array:
    result = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    result[...] = a
    return result


def spread(a: Array, axis: int) -> Array:
    """Every third place along an axis; the places between hold NaN or nonsense."""
    shape = list(a.shape)
    shape[axis] *= 3
    result = np.full(shape, np.nan if a.dtype.kind not in "biu" else 1, a.dtype)
    places = tuple(slice(None, None, 3) if k == axis % a.ndim else slice(None) for k in range(a.ndim))
    result[places] = a
    return result[places]


def swapped(a: Array) -> Array:
    """The last two axes in the other order in memory."""
    if a.ndim < 2:
        return a
    return np.ascontiguousarray(np.swapaxes(a, -1, -2)).swapaxes(-1, -2)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": np.ascontiguousarray,
    "F": lambda a: a.copy(order="F"),
    "swapped": swapped,
    "sliced rows": lambda a: spread(a, 0),
    "sliced classes": lambda a: spread(a, -1),
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "misaligned": misaligned,
    "misaligned F": lambda a: misaligned(a.T).T,
}

ALIGNED = {name: place for name, place in LAYOUTS.items() if "misaligned" not in name}  # as a GPU demands it


def laid_out(layout: Callable[[Array], Array], options: dict[str, Any]) -> dict[str, Any]:
    """Options whose arrays lie so."""
    return {k: layout(v) if isinstance(v, np.ndarray) and v.ndim else v for k, v in options.items()}


# Comparisons


def same_bits(a: Any, b: Any) -> None:
    """Equality to the bit, signs of zeros included; a NaN is a NaN, as its bits are nobody's business."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if a.dtype.kind not in "biu":
        nan = np.isnan(a)
        np.testing.assert_array_equal(nan, np.isnan(b))
        kind = f"u{a.dtype.itemsize}"
        a, b = np.where(nan, 0, a.view(kind)), np.where(nan, 0, b.view(kind))
    np.testing.assert_array_equal(a, b)


def reference(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The reference's answer in float64 to the same values."""
    options = {k: v for k, v in options.items() if k not in ("grad_out", "hess_out", "out", "n_threads")}
    return oracle(function, *map(widen, args), **{k: widen(v) for k, v in options.items()})


def widen(x: Any) -> Any:
    is_floating = isinstance(x, np.ndarray) and x.dtype.kind not in "biu"
    return x.astype(np.float64) if is_floating else x


FLAGS: dict[str, Any] = {"return_grad": True, "return_hess": True}


def check_loss(function: Callable[..., Any], x: Array, target: Any, **options: Any) -> Any:
    """Compare value, gradient and Hessian diagonal with the reference; return what the kernels say."""
    case = CASE_OF[function]
    expected = reference(function, x, target, **options, **FLAGS)
    results = call(function, x, target, **options, **FLAGS)
    assert results[0].dtype == compute_dtype(x)
    if case.kind == "elements":
        assert_elements(results, expected, x, target, case, **options)
    elif case.kind == "pairs":
        assert_divergence(results, expected, x, target, **options)
    else:
        own = {k: v for k, v in options.items() if k not in case.params[0]}
        is_dense = np.ndim(target) == x.ndim or options.get("label_smoothing", 0.0) != 0
        spread = reference(xce.cross_entropy, x, target, **own, return_hess=True)[1] if case.cancels and is_dense else 0
        assert_loss(results, expected, x, target, cancels=case.cancels, spread=spread, **options)
    return results


def assert_loss(
    results: Any, expected: Any, logits: Array, target: Any, *, cancels: bool, spread: Any, **options: Any
) -> None:
    """Compare value, gradient and Hessian diagonal of a call, each with what its terms can cancel to.

    The derivatives of a phi that is not linear have terms of both signs whatever the target is. With a dense target
    they can cancel wherever p is far from 0 and 1, by no more than `spread`, which is A p (1 - p).
    """
    axis, softcap, z_loss = options.get("axis", -1), options.get("softcap"), options.get("z_loss", 0.0)
    is_dense = np.ndim(target) == logits.ndim or options.get("label_smoothing", 0.0) != 0
    transforms = softcap is not None or options.get("temperature", 1.0) != 1.0
    is_linear = not cancels
    cancels = cancels or is_dense or z_loss != 0 or softcap is not None
    # the size of the transformed logits of each row
    size = finite(widen(logits)).max(axis, keepdims=True, initial=0.0)
    size = size.clip(max=1e100 if softcap is None else softcap) / options.get("temperature", 1.0)
    tolerance = 16 * eps_of(logits) + relative_error_of_reference(logits, axis)
    of_value = tolerance * (transforms * (1 + size) + 8 * z_loss * size**2)
    tolerance = tolerance + 16 * eps_of(logits) * transforms * size

    value, grad, hess = results
    of_value, of_rows = of_value.squeeze(axis), tolerance.squeeze(axis)
    if options.get("reduction", "mean") != "none":
        of_value, of_rows = of_value.max(initial=0.0), of_rows.max(initial=0.0)
    assert_close(value, expected[0], of_rows, of_value + underflow(logits))

    slope, curvature = (cancels * finite(d).max(axis, keepdims=True).clip(max=1e300) for d in expected[1:])
    slope = slope + finite(spread)
    assert_entries(grad, expected[1], tolerance, slope + 8 * curvature, logits)
    of_hess = curvature + (slope / softcap if softcap else 0.0) + (0.0 if is_linear else slope)
    assert_entries(hess, expected[2], tolerance, of_hess, logits)


def assert_divergence(results: Any, expected: Any, student: Array, teacher: Array, **options: Any) -> None:
    """Compare what a divergence says: the value relative to itself, derivatives to the largest one of their row."""
    axis = options.get("axis", -1)
    of_value, of_entries = (n * eps_of(student) + relative_error_of_reference(student, axis) for n in (16, 32))
    weight = float(np.max(options.get("sample_weight", 1.0), initial=1.0))
    assert_close(results[0], expected[0], of_value, weight * underflow(student))
    for result, exact in zip(results[1:], expected[1:], strict=True):
        largest = finite(exact).max(axis, keepdims=True, initial=0.0)
        assert_entries(result, exact, of_entries, largest, student)


def assert_elements(results: Any, expected: Any, x: Array, target: Array, case: Case, **options: Any) -> None:
    """Compare a loss of elements: each relative to itself, to what moves it, and to what cancels in it."""
    tolerance = 16 * eps_of(x)
    wide, y = np.asarray(widen(x)), np.asarray(target).astype(np.float64)

    def jet(x: Array, y: Array) -> Any:
        own = options | {"reduction": "none", "validate": False}
        return [np.asarray(f) for f in reference(case.function, x, y, **own, **FLAGS)]

    jets, moved = jet(wide, y), [0.0, 0.0, 0.0]
    for step in (1 - tolerance / 4, 1 + tolerance / 4):
        with np.errstate(invalid="ignore"):
            moved = [m + finite(f - g) for m, f, g in zip(moved, jets, jet(np.asarray(wide * step), y), strict=True)]
    # terms of both signs: those of either answer if the target is between, and lower derivatives' if it is focal
    cancelling = [np.zeros_like(wide), np.zeros_like(wide)]
    if (y != np.round(y)).any() or options.get("label_smoothing", 0.0):
        ends = [jet(wide, np.full_like(y, answer))[1:] for answer in (0, 1)]
        cancelling = [finite(no) + finite(yes) for no, yes in zip(*ends, strict=True)]
    if case.cancels:
        cancelling[1] = cancelling[1] + 8 * (finite(jets[0]) + finite(jets[1]))

    reduction = options.setdefault("reduction", inspect.signature(case.function).parameters["reduction"].default)
    denominator = denominator_of(wide, case, **options)
    of_value = moved[0] if reduction == "none" else np.sum(moved[0]) / denominator
    assert_close(results[0], expected[0], tolerance, of_value + underflow(x))
    for result, exact, scale, move in zip(results[1:], expected[1:], cancelling, moved[1:], strict=True):
        assert_entries(result, exact, tolerance, (scale + move / tolerance) / denominator, x)


def denominator_of(x: Array, case: Case, *, reduction: str, **options: Any) -> float:
    """What the mean of a loss of elements divides the sum of what "none" returns by; 1 if that would be nothing."""
    rows = np.delete(x.shape, options["axis"]) if case.has_classes else x.shape
    total = float(np.sum(np.broadcast_to(widen(options.get("sample_weight", 1.0)), rows)))
    if reduction == "batchmean":
        total /= max(int(np.prod(x.shape[1:])), 1)
    return total if reduction in ("mean", "batchmean") and total else 1.0


def finite(x: Any) -> Array:
    """Sizes of the entries, without those that are infinite or NaN."""
    return np.where(np.isfinite(x), np.abs(x), 0.0)


def underflow(logits: Array) -> float:
    """What a row loses at most where exp underflows: some smallest normal number in each of its entries."""
    return 400.0 * max(logits.shape, default=1) * float(np.finfo(compute_dtype(logits)).tiny)


def relative_error_of_reference(logits: Array, axis: int) -> float:
    """It computes exp(log p) in float64, and NumPy adds numbers that are not neighbours one by one."""
    return (2 * min(size_of(logits), 375.0) + logits.shape[axis] / 8) * float(np.finfo(np.float64).eps)


def assert_entries(result: Array, exact: Array, tolerance: float, scale: Any, logits: Array) -> None:
    """Compare arrays of the logits' shape and dtype; `scale` is what cancels in them."""
    assert result.dtype == logits.dtype
    tiny = underflow(logits)
    if logits.dtype.itemsize == 2:
        tolerance += eps_of(logits, storage=True) / 2
        tiny = 2.0**-24 if logits.dtype == np.float16 else tiny
    assert_close(result, exact, tolerance, tolerance * scale + tiny, logits.dtype)


def assert_close(result: Any, exact: Any, rtol: float, atol: Any, dtype: Any = None) -> None:
    """Compare with float64 numbers; one that `dtype` cannot hold must be infinite."""
    result, exact = np.asarray(result), np.asarray(exact)
    assert result.shape == exact.shape
    with np.errstate(all="ignore"):
        rounded = exact.astype(dtype or result.dtype).astype(np.float64)
        result = result.astype(np.float64)
        np.testing.assert_array_equal(np.isnan(result), np.isnan(rounded))
        error = np.abs(result - exact)
        good = (result == rounded) | np.isnan(rounded) | (error <= rtol * np.abs(exact) + atol)
        if not good.all():
            bad = tuple(int(i) for i in np.argwhere(~good)[0])
            raise AssertionError(
                f"{(~good).sum()} of {good.size} differ, first at {bad}: {result[bad]!r} for {exact[bad]!r}, "
                f"off by {error[bad]:.3g}, {error[bad] / np.abs(exact[bad]):.3g} of it"
            )


def compute_dtype(logits: Array) -> np.dtype[Any]:
    return np.dtype("float64" if logits.dtype == np.float64 else "float32")


def eps_of(logits: Array, *, storage: bool = False) -> float:
    """The relative spacing of the type that is computed with, or that is stored."""
    if storage:
        return 2.0**-10 if logits.dtype == np.float16 else 2.0**-7
    return float(np.finfo(compute_dtype(logits)).eps)


def size_of(logits: Array) -> float:
    return float(np.max(finite(widen(logits)), initial=0.0))


def check_maps(x: Array, *, axis: int = -1, temperature: float = 1.0, **options: Any) -> None:
    """Compare softmax, log_softmax and logsumexp with the reference."""
    tolerance = 16 * eps_of(x) + relative_error_of_reference(x, axis)
    scaling = tolerance * (size_of(x) / temperature if temperature != 1.0 else 0.0)
    options |= {"axis": axis, "temperature": temperature}
    assert_entries(call(xce.softmax, x, **options), reference(xce.softmax, x, **options), tolerance + scaling, 0.0, x)
    logs = reference(xce.log_softmax, x, **options)
    assert_entries(call(xce.log_softmax, x, **options), logs, tolerance, scaling / tolerance, x)
    check_lse(call(xce.logsumexp, x, axis=axis), reference(xce.logsumexp, x, axis=axis), x, axis)


def check_lse(lse: Any, exact: Any, x: Array, axis: int) -> None:
    """It is max + log(sum exp(x - max)): right relative to the larger term, not to their sum near 0."""
    assert lse.dtype == compute_dtype(x)
    tolerance = 4 * eps_of(x)
    assert_close(lse, exact, tolerance, tolerance * finite(widen(x)).max(axis).clip(max=1e300))


def check_stats(logits: Array, target: Array, **options: Any) -> None:
    """Compare the statistics of rows with the reference."""
    result = call(xce.logit_stats, logits, target, **options)
    exact = reference(xce.logit_stats, logits, target, **options)
    tolerance, axis = 16 * eps_of(logits), options.get("axis", -1)
    for name in ("lse", "target_logit", "entropy"):
        assert getattr(result, name).dtype == compute_dtype(logits)
    check_lse(result.lse, exact.lse, logits, axis)
    assert_close(
        result.entropy,
        exact.entropy,
        tolerance + relative_error_of_reference(logits, axis),
        underflow(logits),
    )
    np.testing.assert_array_equal(result.target_logit, exact.target_logit)
    for name in ("argmax", "rank"):
        assert getattr(result, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(result, name), getattr(exact, name), err_msg=name)


# Rows that count nowhere

SICK = (np.nan, np.inf, -np.inf)


def check_removed_rows(
    case: Case,
    mode: str,
    dtype: np.dtype[Any],
    n_classes: int,
    features: dict[str, Any],
    seed: int,
    *,
    axis: int = -1,
    same: Callable[[Any, Any], None],
) -> None:
    """A weight of 0, or a `where` without a class, removes a row whatever it holds: the results of a call without it.

    `same` compares rows. Weights have both signs, and add up exactly, so that denominators have the same bits.
    """
    rng = np.random.default_rng(seed)
    n = 37
    x, y, options = problem(features | {"sample_weight": False}, mode, (n, n_classes), -1, dtype, seed, case)
    options |= case.params[seed % len(case.params)]
    if "weight" in options:
        options["weight"] = (np.round(4 * widen(options["weight"])) / 4).astype(dtype)
    options["sample_weight"] = s = rng.choice([-2.0, -1.0, 0.5, 1.0, 4.0], n).astype(dtype)
    removed = rng.random(n) < 0.4
    removed[0] = True
    bare = {k: v[~removed] if k in PER_ROW else v for k, v in options.items()}
    expected = call(case.function, x[~removed], y[~removed], **bare, **FLAGS)

    by_where = removed & (rng.random(n) < 0.5) if "where" in options else np.zeros(n, bool)
    s[removed & ~by_where] = rng.choice([0.0, -0.0], (removed & ~by_where).sum())
    x, y = x.copy(), y.copy()
    if "where" in options:
        options["where"][by_where] = False
    x[removed] = rng.choice(SICK, (removed.sum(), n_classes)).astype(dtype)
    if mode == "index":
        y[removed] = rng.choice([-7, n_classes, 2**40], removed.sum())
    else:
        y[removed] = rng.choice([*SICK, -1.0], y[removed].shape).astype(dtype)
    if "teacher_indices" in options:
        options["teacher_indices"][removed] = rng.choice([0, n_classes, n_classes + 5], y[removed].shape)
    if axis == 0:
        x, y = x.T.copy(), y if y.ndim == 1 else y.T.copy()
        options |= {name: options[name].T.copy() for name in ("where", "teacher_indices") if name in options}
        options["axis"] = 0
    terms = np.abs(widen(call(case.function, x, y, **options | {"reduction": "none"}))).sum()
    for in_place in (False, True):
        own = x.copy()
        buffer = {"grad_out": own} if in_place else {}
        value, *derivatives = call(case.function, own, y, **options, **FLAGS, **buffer)
        if options["reduction"] == "none":
            same(value[~removed], expected[0])
            assert not value[removed].any()
        else:
            np.testing.assert_allclose(value, expected[0], rtol=1e-6, atol=8 * eps_of(x) * terms)
        for found, without in zip(derivatives, expected[1:], strict=True):
            found = found.T if axis == 0 else found
            same(found[~removed], without)
            np.testing.assert_array_equal(widen(found[removed]), 0)


def same_numbers(a: Any, b: Any) -> None:
    """Equality up to what other sums of a row round: a GPU reads its chunks from where they are aligned."""
    scale = float(finite(widen(b)).max(initial=0.0))
    tolerance = 64 * eps_of(b) + (eps_of(b, storage=True) if b.dtype.itemsize == 2 else 0.0)
    np.testing.assert_allclose(widen(a), widen(b), rtol=tolerance, atol=tolerance * scale)


PER_ROW = ("sample_weight", "where", "teacher_indices")

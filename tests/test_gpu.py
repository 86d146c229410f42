"""The CUDA kernels on a GPU: ``pytest -m gpu``; with pytest-xdist, ``-n 8`` shares the work.

First the results, at the sizes where each regime begins and ends, by the checks that the CPU's kernels pass; then what
only a GPU can show. ``XCE_GPU=emulated`` runs the tests of results on the CPU, at the same sizes: slowly, to try the
tests themselves. The tests named ``sanitize`` are few and small, for compute-sanitizer: see CONTRIBUTING.md.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import on_gpu
import pytest

EMULATED = os.environ.get("XCE_GPU") == "emulated"
pytestmark = pytest.mark.gpu
if on_gpu.missing() and not EMULATED:
    pytest.skip(on_gpu.missing(), allow_module_level=True)

import emulated  # noqa: E402
from cases import LOSSES, TARGETS_OF_LOSSES, Case, combinations, computed_by, problem  # noqa: E402
from checks import (  # noqa: E402
    ALIGNED,
    DTYPES,
    FLAGS,
    Array,
    call,
    called_by,
    check_loss,
    check_maps,
    check_removed_rows,
    check_stats,
    dtype_of,
    laid_out,
    same_bits,
    same_numbers,
)

import xce  # noqa: E402
from xce._engines import cuda as _cuda  # noqa: E402
from xce._engines.device import Module  # noqa: E402

needs_cuda = pytest.mark.skipif(EMULATED, reason="needs a CUDA device")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
OF_ROWS = [(case, mode) for case, mode in TARGETS_OF_LOSSES if case.kind not in ("elements",)]
OF_ELEMENTS = [(case, mode) for case, mode in TARGETS_OF_LOSSES if case.kind == "elements"]


def over(cases: Sequence[tuple[Case, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "mode"), cases, ids=[f"{case.name}-{mode}" for case, mode in cases])


# Where the calls go


def poisoned(n: int) -> Any:
    """Memory whose numbers are NaN until somebody writes them."""
    import cupy

    memory = cupy.get_default_memory_pool().malloc(n)
    memory.memset_async(0xFF, n)
    return memory


def bare(n: int) -> Any:
    """Memory of its own, so that compute-sanitizer knows where it ends and what was never written."""
    import cupy

    return cupy.cuda.MemoryPointer(cupy.cuda.Memory(n), 0)


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        if EMULATED:
            stack.enter_context(computed_by(emulated, emulated.view))
            place: on_gpu.Place = on_gpu.Host()
        else:
            import cupy

            memory = bare if "sanitize" in request.node.name else poisoned
            stack.enter_context(cupy.cuda.using_allocator(memory))
            place = on_gpu.Gpu()
        stack.enter_context(called_by(on_gpu.Elsewhere(place)))
        yield


# Compiling what is needed, many modules at a time


class Notebook(emulated.Emulated):
    """A device that computes nothing and notes the modules."""

    def __init__(self) -> None:
        super().__init__()
        device = device_of_the_tests()
        self.shared_bytes, self.has_clusters = device.shared_bytes, device.has_clusters
        self.processors = device.processors
        self.modules: dict[Module, None] = {}

    def load(self, module: Module, name: str) -> Any:
        self.modules[module] = None

    def launch(self, *_: Any) -> None:
        pass


def device_of_the_tests() -> Any:
    if EMULATED:
        return emulated.DEVICE
    from xce._engines import cupy as backend

    return backend._device(0)


class Planned(NamedTuple):
    """One call of a check."""

    check: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]


def plan(check: Callable[..., Any], *args: Any, **options: Any) -> Planned:
    return Planned(check, args, options)


def carry_out(planned: Iterable[Planned]) -> None:
    """Compile what all of these checks need, at the same time; then check."""
    planned = list(planned)
    notebook = Notebook()
    engine = SimpleNamespace(**vars(emulated))
    engine.run = lambda of: _cuda.run(of, notebook)
    engine.scan_labels = engine.scan_values = lambda *_: -1
    functions = {
        check_loss: lambda f, x, target, **options: f(x, target, **options, **FLAGS),
        check_maps: lambda x, axis=-1: [f(x, axis=axis) for f in (xce.softmax, xce.log_softmax, xce.logsumexp)],
        check_stats: xce.logit_stats,
    }
    with computed_by(engine, emulated.view):
        for one in planned:
            options = {k: v for k, v in one.options.items() if k not in ("grad_out", "hess_out")}
            functions[one.check](*one.args, **options)
    compile_all(notebook.modules)
    for one in planned:
        one.check(*one.args, **one.options)


@cache
def compile_one(module: Module) -> None:
    if EMULATED:
        emulated.library(module)
        return
    import cupy

    from xce._engines.cupy import OPTIONS

    # for CuPy's cache on the disk, from which the backend will load it
    cupy.RawModule(code=_cuda.source(module), options=OPTIONS).compile()


def compile_all(modules: Iterable[Module]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, modules))


# Sizes


def class_counts(dtype: str) -> list[int]:
    """Of each regime for adjacent classes the smallest number of classes, which is odd, and the largest."""
    size = dtype_of(dtype).itemsize
    below, found = 0, []
    for limit, _ in (*_cuda._REGIMES, *_cuda._CLUSTERS):
        last = 2 * below if math.isinf(limit) else limit // size
        found += [below + 1, last]
        below = last
    return found


def some_rows(n_classes: int) -> int:
    """More than a block takes at a time, where they are short."""
    return 37 if n_classes <= 300 else 5 if n_classes <= 10_000 else 2


def shapes(dtype: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes and class axes that meet every regime."""
    yield from (((some_rows(n), n), 1) for n in class_counts(dtype))
    yield from (((3, 1, 5), 1), ((2, 37, 70), 1), ((300, 3), 0), ((7,), 0))


def problems_of_rows(case: Case, mode: str, dtype: str) -> Iterator[Planned]:
    """The options in turns."""
    options_of = list(combinations(**case.options))
    order = np.random.default_rng(len(mode) + len(case.name)).permutation(len(options_of))
    for seed, (number, (shape, axis)) in enumerate(zip(itertools.cycle(order), shapes(dtype), strict=False)):
        x, y, options = problem(options_of[number], mode, shape, axis, dtype_of(dtype), seed, case)
        yield plan(check_loss, case.function, x, y, **options, **case.params[seed % len(case.params)])


# Results


@over(OF_ROWS)
@every_dtype
def test_losses_of_rows(case: Case, mode: str, dtype: str) -> None:
    carry_out(problems_of_rows(case, mode, dtype))


@over(OF_ELEMENTS)
@every_dtype
def test_losses_of_elements(case: Case, mode: str, dtype: str) -> None:
    def problems() -> Iterator[Planned]:
        options_of = list(combinations(**case.options))
        sizes = ((5, 7), (1, 1), (3, 1023), (70, 1000), (2, 3, 5, 4), (257, 3))
        for seed, features in enumerate(options_of):
            shape = sizes[seed % len(sizes)]
            x, y, options = problem(features, mode, shape, -1, dtype_of(dtype), seed, case)
            yield plan(check_loss, case.function, x, y, **options, **case.params[seed % len(case.params)])

    carry_out(problems())


@every_dtype
def test_maps_and_statistics(dtype: str, rng: np.random.Generator) -> None:
    def problems() -> Iterator[Planned]:
        for seed, (shape, axis) in enumerate(shapes(dtype)):
            x = np.round(4 * rng.standard_normal(shape)).astype(dtype_of(dtype))
            x[(0,) * x.ndim] = (x[(0,) * x.ndim], np.inf, np.nan, -np.inf)[seed % 4]
            rows = shape[:axis] + shape[axis + 1 :]
            yield plan(check_maps, x, axis=axis)
            labels = np.asarray(rng.integers(-1, shape[axis], size=rows))
            yield plan(check_stats, x, labels, axis=axis, ignore_index=-1)

    carry_out(problems())


# How arrays lie


def behind(a: Array, entries: int) -> Array:
    """The same numbers, so many entries behind a boundary of 16 bytes."""
    memory = np.zeros(a.nbytes + 48, np.uint8)
    start = -memory.ctypes.data % 16 + entries * a.itemsize
    result = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    result[...] = a
    return result


@every_dtype
def test_every_alignment(dtype: str) -> None:
    """Of the logits, and of the gradient beside them: both are read and written 16 bytes at a time where that goes."""

    def problems() -> Iterator[Planned]:
        entries = 16 // dtype_of(dtype).itemsize
        counts = class_counts(dtype)
        for n, (of_x, of_grad) in itertools.product(
            (5, counts[4], counts[8]), itertools.product(range(entries), (0, 1, entries - 1))
        ):
            x, y, _ = problem({}, shape=(3, n), dtype=dtype_of(dtype), seed=of_x)
            grad, hess = behind(np.zeros_like(x), of_grad), behind(np.zeros_like(x), of_x)
            yield plan(check_loss, xce.cross_entropy, behind(x, of_x), y, grad_out=grad, hess_out=hess)

    carry_out(problems())


LAID_OUT = ("index", "probabilities", "sparse js", "fractions")


@pytest.mark.parametrize("layout", ALIGNED)
@over(
    [(case, mode) for case, mode in TARGETS_OF_LOSSES if mode in ("index", "probabilities", "sparse js", "fractions")]
)
def test_every_layout(case: Case, mode: str, layout: str) -> None:
    def problems() -> Iterator[Planned]:
        place = ALIGNED[layout]
        for seed, (shape, axis) in enumerate((((3, 37), 1), ((4, 9), 0), ((2, 6, 3), 1), ((2, 1031), 1))):
            features = {name: values[-1] for name, values in case.options.items()} if seed % 2 else {}
            features |= {"reduction": "mean"}
            x, y, options = problem(features, mode, shape, axis, np.dtype("float32"), seed, case)
            buffers = {name: place(np.zeros_like(x)) for name in ("grad_out", "hess_out")}
            yield plan(check_loss, case.function, place(x), place(y), **laid_out(place, options), **buffers)

    carry_out(problems())


@every_dtype
def test_the_gradient_may_overwrite_the_logits(dtype: str) -> None:
    for n in class_counts(dtype):
        x, y, _ = problem({}, shape=(some_rows(n), n), dtype=dtype_of(dtype))
        for loss in (xce.cross_entropy, xce.nll_loss):  # the latter reads one entry and writes all
            value, grad = call(loss, x, y, reduction="none", return_grad=True)
            own = x.copy()
            same_value, same = call(loss, own, y, reduction="none", return_grad=True, grad_out=own)
            assert same is own
            same_bits(same_value, value)
            same_bits(own, grad)


# Edges and errors


@every_dtype
def test_edges(dtype: str) -> None:
    def problems() -> Iterator[Planned]:
        rows = [[0, 1, np.nan], [np.inf, 0, 0], [-np.inf] * 3, [-np.inf, 0, 1], [1e4, 0, 0]]
        for n in (3, 37, *class_counts(dtype)[4::3]):
            x = np.full((5, n), -np.inf)
            x[:, [0, n // 2, n - 1]] = rows
            x = x.astype(dtype_of(dtype))
            labels = (np.zeros(5, int), np.array([0, -100, n // 2, 0, n - 1]), np.array([n - 1, n, -7, n // 2, 0]))
            for y, smoothing in itertools.product(labels, (0.0, 0.1)):
                options = {"label_smoothing": smoothing, "validate": False, "reduction": "none"}
                yield plan(check_loss, xce.cross_entropy, x, y, **options)

    carry_out(problems())


def test_no_rows() -> None:
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = call(xce.cross_entropy, np.zeros((0, 3)), np.zeros(0, int), reduction=reduction, return_grad=True)
        np.testing.assert_array_equal(loss, value)
        assert grad.shape == (0, 3)


@pytest.mark.parametrize("n_classes", [3, 1031, 40_001])
def test_a_bad_label_is_named_and_nothing_is_written(n_classes: int) -> None:
    x, y, _ = problem({}, shape=(6, n_classes), dtype=np.float32)
    good = call(xce.cross_entropy, x, y, return_grad=True)
    for bad in (n_classes, -1, -(2**40)):
        y[4] = bad
        grad = np.full_like(x, 7)
        with pytest.raises(xce.LabelError, match=rf"target\[4\] = {bad} is out of range"):
            call(xce.cross_entropy, x, y, return_grad=True, grad_out=grad)
        assert (grad == 7).all()
    y[4], (_, y2, _) = 0, problem({}, shape=(6, n_classes), dtype=np.float32)
    for a, b in zip(call(xce.cross_entropy, x, y2, return_grad=True), good, strict=True):
        same_bits(a, b)  # the device still works


def test_a_bad_label_that_nobody_checks_makes_its_row_nan() -> None:
    for n in class_counts("float32")[::2]:
        x, y, _ = problem({}, shape=(4, n), dtype=np.float32)
        options = {"reduction": "none", "return_grad": True}
        good = call(xce.cross_entropy, x, y, **options)
        y[2] = n
        for result, right in zip(call(xce.cross_entropy, x, y, validate=False, **options), good, strict=True):
            assert np.isnan(result[2]).all()
            same_bits(np.delete(result, 2, 0), np.delete(right, 2, 0))


def test_values_that_are_not_allowed_are_named() -> None:
    x, y, _ = problem({}, "probabilities", dtype=np.float32)
    y[3, 2] = -0.5
    with pytest.raises(ValueError, match=r"target\[3, 2\] = -0.5"):
        call(xce.cross_entropy, x, y)
    with pytest.raises(ValueError, match=r"weight\[1\] = nan"):
        call(xce.cross_entropy, x, np.zeros(5, int), weight=np.float32([1, np.nan, 1, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="expected probabilities between 0 and 1"):
        call(xce.binary_cross_entropy, np.float32([0.5, 1.5]), np.float32([0, 1]))


# Accuracy


@pytest.mark.parametrize(
    "kind", ["random", "wide", "offset 1e4", "offset 1e8", "confident", "confident offset", "close"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accuracy(dtype: str, kind: str, rng: np.random.Generator, record_property: Any) -> None:
    """In ULP, as test_accuracy asks of the CPU's kernels; a GPU may be less exact in gradients, but not by more."""
    import test_accuracy

    if not test_accuracy.HAS_LONGDOUBLE:
        pytest.skip("longdouble is too short here")
    worst = dict.fromkeys(test_accuracy.LIMITS, 0.0)
    for n_classes in (3, 10, 65, 300, 1000, 5000, 40_001):
        x, y = test_accuracy.rows_of(kind, max(2, min(1000, 60_000 // n_classes)), n_classes, rng)
        x = x.astype(dtype)
        for name, error in test_accuracy.errors_of(x, y, test_accuracy.exact_by_longdouble(x)).items():
            worst[name] = max(worst[name], error)
    for name, error in worst.items():
        record_property(name, float(error))
    limits = {name: 5 if limit == 4 else 32 for name, limit in test_accuracy.LIMITS.items()}
    bad = {name: error for name, error in worst.items() if not error <= limits[name]}
    assert not bad, f"{bad} ULP, but the limits are {limits}"


# Linear layers


@pytest.mark.parametrize("mode", ["index", "probabilities"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_linear_cross_entropy(mode: str, dtype: str) -> None:
    import test_linear

    if EMULATED:
        pytest.skip("the products are those of CUDA's library")
    # products of float32 are rounded in another order than the reference's, and so are their sums
    rtol = {"float64": 1e-12, "float32": 1e-5}[dtype]
    for features in ({}, {"weight": True, "ignore": True}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        x, w, b, target, options = test_linear.layer_problem(features, mode, dtype=np.dtype(dtype))
        for bias, chunk_rows in ((b, None), (None, 2)):
            test_linear.check(x, w, target, bias, chunk_rows=chunk_rows, rtol=rtol, **options)


# What only a GPU shows


def on_device(x: Any, y: Any) -> tuple[Any, Any]:
    import cupy

    return cupy.asarray(x), cupy.asarray(y)


@needs_cuda
def test_results_are_arrays_of_cupy() -> None:
    import cupy

    x, y = on_device(*problem({}, dtype=np.float32)[:2])
    stats = xce.logit_stats(x, y)
    for result in (*xce.cross_entropy(x, y, **FLAGS), xce.softmax(x), xce.logsumexp(x), *stats):
        assert isinstance(result, cupy.ndarray)
        assert result.device == x.device
    assert xce.cross_entropy(x, y).shape == ()


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_runs_have_the_same_bits(dtype: str) -> None:
    import cupy

    for n in (10, 1031, 20_001, class_counts(dtype)[-2]):
        x, y, _ = problem({}, shape=(2 * some_rows(n), n), dtype=dtype_of(dtype))
        x, y = on_device(x, y)
        bits = f"u{x.itemsize}"
        first, differing = None, cupy.zeros((), np.int64)
        for _ in range(1000):
            value, grad = xce.cross_entropy(x, y, label_smoothing=0.1, return_grad=True, validate=False)
            found = value.reshape(1).view("u4"), grad.view(bits)
            first = first or found
            for a, b in zip(found, first, strict=True):
                differing += (a != b).sum()
        assert int(differing) == 0


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_among_many(dtype: str) -> None:
    """More rows than blocks run at a time: blocks take several.

    A copy begins as far from a boundary of 16 bytes as its original: that decides which thread adds what.
    """
    import cupy

    for n in class_counts(dtype):
        rows = 8 * -(-some_rows(n) // 8)
        x, y = on_device(*problem({}, shape=(rows, n), dtype=dtype_of(dtype))[:2])
        expected = xce.cross_entropy(x, y, reduction="none", return_grad=True)
        times = max(2, min(50_000 // len(y), 2**28 // x.size))
        results = xce.cross_entropy(
            cupy.tile(x.view(f"u{x.itemsize}"), (times, 1)).view(x.dtype), cupy.tile(y, times), reduction="none",
            return_grad=True,
        )  # fmt: skip
        for many, few in zip(results, expected, strict=True):
            bits = f"u{few.itemsize}"
            assert bool((many.view(bits).reshape(times, *few.shape) == few.view(bits)).all())


@over(OF_ROWS)
def test_removed_rows(case: Case, mode: str) -> None:
    """In every regime: padding of weight 0, and rows without a class."""
    features: tuple[dict[str, Any], ...] = (
        {"reduction": "mean", "weight": True},
        {"reduction": "none", "where": True, "label_smoothing": 0.1},
        {"reduction": "sum", "z_loss": 0.02},
    )
    for seed, (n_classes, own) in enumerate(itertools.product((5, 200, 1500, 20_000), features)):
        dtype = dtype_of(DTYPES[seed % len(DTYPES)])
        check_removed_rows(case, mode, dtype, n_classes, own, seed, same=same_numbers)


@needs_cuda
def test_more_logits_than_an_int32_counts() -> None:
    import cupy

    x, y, _ = problem({}, shape=(1, 257), dtype=np.float32)
    expected = xce.cross_entropy(x, y)
    x, y = on_device(x, y)
    n = 2**31 // 257 + 5
    value = xce.cross_entropy(cupy.broadcast_to(x, (n, 257)), cupy.broadcast_to(y, (n,)))
    np.testing.assert_allclose(float(value), expected, rtol=1e-6)
    values = xce.cross_entropy(cupy.broadcast_to(x.T, (257, n)), cupy.broadcast_to(y, (n,)), axis=0, reduction="none")
    assert float(values.min()) == float(values.max())
    np.testing.assert_allclose(float(values[-1]), expected, rtol=1e-6)
    one = cupy.broadcast_to(cupy.asarray(np.float32(0.3)), (2**31 + 5,))
    loss = xce.binary_cross_entropy_with_logits(one, one)
    np.testing.assert_allclose(float(loss), xce.binary_cross_entropy_with_logits(np.float32([0.3]), np.float32([0.3])))


@needs_cuda
@pytest.mark.parametrize("n_classes", [1000, 100_003])
def test_more_memory_than_an_int32_counts(n_classes: int) -> None:
    """Five thousand million logits, overwritten by their gradient."""
    import cupy

    n_rows = 5_000_000_000 // n_classes
    if cupy.cuda.runtime.memGetInfo()[0] < 24e9:
        pytest.skip("needs a CUDA device with 24 GB of free memory")
    few, labels = on_device(*problem({}, shape=(8, n_classes), dtype=dtype_of("bfloat16"))[:2])
    expected = xce.cross_entropy(few, labels, reduction="none", return_grad=True)
    n_rows -= n_rows % len(few)
    x = cupy.empty((n_rows, n_classes), few.dtype)
    x.view(np.uint16).reshape(-1, *few.shape)[...] = few.view(np.uint16)
    y = cupy.tile(labels, n_rows // len(labels))
    values, grad = xce.cross_entropy(x, y, reduction="none", return_grad=True, grad_out=x)
    assert bool((values.reshape(-1, len(labels)) == expected[0]).all())
    found = grad.view(np.uint16).reshape(-1, *few.shape)
    for part in range(0, len(found), 1 + len(found) // 16):  # a comparison takes memory, too
        assert bool((found[part : part + 1 + len(found) // 16] == expected[1].view(np.uint16)).all())
    del x, grad, found
    cupy.get_default_memory_pool().free_all_blocks()


@needs_cuda
@over(TARGETS_OF_LOSSES)
def test_a_graph_captures_the_call_and_replays_it(case: Case, mode: str) -> None:
    """Nothing waits for the GPU: a capture does not allow that. The replay sees the numbers that are there by then."""
    import cupy

    features = {"weight": True, "sample_weight": True, "label_smoothing": 0.1, "reduction": "mean"}
    x, y, options = problem(features, mode, (6, 300), dtype=np.float32, case=case)
    params = case.params[0]
    of_arrays = {name: cupy.asarray(value) for name, value in options.items() if isinstance(value, np.ndarray)}
    options |= of_arrays
    x, y = on_device(x, y)
    grad, other = cupy.empty_like(x), cupy.flip(x, 0).copy()
    expected = case.function(other, y, **options, **params, return_grad=True, validate=False)
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.using_allocator(pool.malloc), stream:

        def work() -> Any:
            return case.function(x, y, **options, **params, return_grad=True, grad_out=grad, validate=False)[0]

        work()  # compiles, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        value = work()
        graph = stream.end_capture()
        x[...] = other
        for _ in range(3):
            grad.fill(0)
            graph.launch(stream)
            stream.synchronize()
            same_bits(value.get(), expected[0].get())
            same_bits(grad.get(), expected[1].get())


@needs_cuda
def test_calls_follow_the_current_stream() -> None:
    """A stream that is busy holds them up: they see what it writes."""
    import cupy

    x, y = on_device(*problem({}, shape=(64, 5000), dtype=np.float32)[:2])
    expected = xce.cross_entropy(2 * x, y, return_grad=True)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        busy, doubled = cupy.ones((4096, 4096), np.float32), x.copy()
        for _ in range(20):
            busy = busy @ busy * np.float32(1e-4)
        doubled *= 2
        results = xce.cross_entropy(doubled, y, return_grad=True, validate=False)
        stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        same_bits(a.get(), b.get())


@needs_cuda
def test_arrays_on_two_devices() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    x, y = on_device(*problem({}, dtype=np.float32)[:2])
    with cupy.cuda.Device(1):
        elsewhere = cupy.asarray(y.get())
        with pytest.raises(ValueError, match="is on GPU"):
            xce.cross_entropy(x, elsewhere)
    with pytest.raises(ValueError, match="target is on GPU 1"):
        xce.cross_entropy(x, elsewhere)


@needs_cuda
def test_arrays_of_two_libraries() -> None:
    x, y, _ = problem({}, dtype=np.float32)
    with pytest.raises(TypeError, match=r"logits is a cupy\.ndarray but target is a numpy\.ndarray"):
        xce.cross_entropy(on_device(x, y)[0], y)


# Few and small calls of every kernel, for compute-sanitizer, under which each takes long


def rows_to_sanitize(dtype: str, features: dict[str, Any], counts: Iterable[int]) -> Iterator[Planned]:
    for seed, n in enumerate(counts):
        for entries in (0, 1):
            x, y, options = problem(features, shape=(3, n), dtype=dtype_of(dtype), seed=seed)
            buffers = {name: behind(np.zeros_like(x), 1 - entries) for name in ("grad_out", "hess_out")}
            yield plan(check_loss, xce.cross_entropy, behind(x, entries), y, **options, **buffers)


ALL_OPTIONS = {"weight": True, "where": True, "ignore": True, "label_smoothing": 0.1, "softcap": 3.0}


@pytest.mark.parametrize(
    ("dtype", "features", "step"),
    [("bfloat16", {}, 1), ("float32", ALL_OPTIONS, 1), ("float16", {"label_smoothing": 0.1}, 5), ("float64", {}, 5)],
    ids=["bfloat16", "float32", "float16", "float64"],
)
def test_sanitize_rows(dtype: str, features: dict[str, Any], step: int) -> None:
    carry_out(rows_to_sanitize(dtype, features, class_counts(dtype)[:: 2 * step]))


@over([(case, mode) for case, mode in OF_ROWS if mode in ("index", "js", "sparse forward")])
def test_sanitize_losses(case: Case, mode: str) -> None:
    def problems() -> Iterator[Planned]:
        for shape, axis in (((3, 37), 1), ((3, 2055), 1), ((5, 3), 0)):
            x, y, options = problem({}, mode, shape, axis, np.dtype("float32"), 1, case)
            # a teacher's classes are sorted to see whether they are distinct, and CuPy's sort reads what nobody wrote
            options["validate"] = "teacher_indices" not in options
            yield plan(check_loss, case.function, x, y, **options, **case.params[0])

    carry_out(problems())


@over([(case, mode) for case, mode in OF_ELEMENTS if mode == case.modes[0]])
def test_sanitize_elements(case: Case, mode: str) -> None:
    def problems() -> Iterator[Planned]:
        for entries in (0, 1):
            x, y, options = problem({"sample_weight": True}, mode, (3, 431), -1, np.dtype("float32"), 1, case)
            yield plan(check_loss, case.function, behind(x, entries), y, **options, **case.params[0])

    carry_out(problems())


def test_sanitize_maps_and_statistics(rng: np.random.Generator) -> None:
    def problems() -> Iterator[Planned]:
        for n in (37, 2055, 20_001):
            x = rng.standard_normal((3, n)).astype(np.float32)
            yield plan(check_maps, x)
            yield plan(check_stats, x, rng.integers(n, size=3))

    carry_out(problems())


def test_the_cases_are_all_losses() -> None:
    assert {case.name for case, _ in (*OF_ROWS, *OF_ELEMENTS)} == {case.name for case in LOSSES}

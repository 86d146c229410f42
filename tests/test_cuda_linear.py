"""`linear_cross_entropy` on the emulated GPU: the tests of the CPU's results, and what is special about it here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

emulated = pytest.importorskip("emulated")
if emulated.COMPILER is None:
    pytest.skip("needs a C++ compiler, to run the kernels of CUDA", allow_module_level=True)

import test_hypothesis  # noqa: E402
import test_linear  # noqa: E402
from cases import combinations, oracle  # noqa: E402
from checks import ALIGNED, DTYPES, dtype_of, same_bits, widen  # noqa: E402
from emulated import DEVICE, Emulated, blas  # noqa: E402
from hypothesis.strategies import sampled_from  # noqa: E402
from test_emulation import gpu  # noqa: E402, F401
from test_linear import (  # noqa: E402, F401
    RNG,
    B,
    C,
    D,
    N,
    W,
    X,
    Y,
    assert_equal,
    check,
    composed,
    constants,
    half_spacing,
    layer_problem,
    test_a_bad_label_that_nobody_checks_makes_its_row_nan,
    test_a_bias_of_minus_infinity_removes_a_class,
    test_a_row_with_nan_or_infinity_is_nan_alone,
    test_all_rows_ignored,
    test_autograd_of_torch,
    test_dtypes,
    test_extreme_sizes,
    test_finite_differences,
    test_ignored_rows_are_not_read,
    test_inputs_may_be_overwritten,
    test_labels_are_named_by_their_place_in_the_whole_target,
    test_layouts,
    test_one_label_may_be_an_integer,
    test_random_calls,
    test_rows_that_do_not_lie_in_even_steps,
    test_shapes,
    test_weights_that_sum_to_zero,
)

import xce  # noqa: E402
from xce._engines import cuda_linear as _cuda_linear  # noqa: E402
from xce._libraries import arrays_of  # noqa: E402
from xce._rows import linear_call  # noqa: E402


@pytest.fixture(autouse=True)
def aligned(request: pytest.FixtureRequest) -> Iterator[None]:
    """No GPU reads numbers at odd addresses."""
    if "misaligned" in request.node.name:
        pytest.skip("CUDA reads no numbers at odd addresses")
    with (
        mock.patch.object(test_linear, "LAYOUTS", ALIGNED),
        mock.patch.object(test_hypothesis, "LAYOUT", sampled_from(sorted(ALIGNED)).map(ALIGNED.__getitem__)),
    ):
        yield


@pytest.fixture
def slices() -> None:
    """The CPU's slices of classes: there are none here."""


@pytest.fixture(autouse=True)
def rounding_to_16_bits() -> Iterator[None]:
    """Tensor cores multiply 16 bits: the gradient of the logits is rounded before it is multiplied."""
    with mock.patch.object(test_linear, "rounding_of_g", rounding_of_g):
        yield


def rounding_of_g(x: Any, w: Any, target: Any, bias: Any, **options: Any) -> tuple[float, ...]:
    """Half a spacing of each entry, or of the subnormal numbers of float16; all of one sign at worst."""
    if x.dtype.itemsize > 2:
        return 0.0, 0.0, 0.0
    options = {k: widen(v) for k, v in options.items() if k not in ("chunk_rows", "grad_out")}
    size = half_spacing(x.dtype)
    x, w, target, bias = map(widen, (x, w, target, 0.0 if bias is None else bias))
    _, g = oracle(xce.cross_entropy, x @ w.T + bias, target, **options | {"axis": -1, "return_grad": True})
    g = np.abs(g).reshape(-1, len(w)) * size + 2.0**-25 * (1 if options.get("reduction", "mean") != "mean" else 1 / 16)
    rows = np.abs(x).reshape(len(g), x.shape[-1])
    return tuple(float(a.max(initial=0.0)) for a in (g @ np.abs(w), g.T @ rows, g.sum(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_options(dtype: str, mode: str) -> None:
    every = list(combinations())
    for i, k in enumerate(np.random.default_rng(len(dtype)).permutation(len(every))[:24]):
        x, w, b, target, options = layer_problem(every[k], mode, dtype=dtype_of(dtype))
        # the logits' rounding, amplified by their size, by temperatures and the slope of the z-loss
        rtol = 1e-12 if dtype == "float64" else 1e-4
        options |= {"chunk_rows": (None, 2)[i % 2], "rtol": rtol + (i % 2) * 6 * half_spacing(x.dtype)}
        value, _ = check(x, w, target, b if i % 3 else None, **options)
        del options["rtol"]
        alone = xce.linear_cross_entropy(x, w, target, linear_bias=b if i % 3 else None, **options)
        same_bits(alone, value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_chunks_add_up_in_float32(dtype: str) -> None:
    """A hundred chunks: rounded to 16 bits after each, small contributions would be lost."""
    x, w, b = (a.astype(dtype_of(dtype)) for a in (np.abs(RNG.standard_normal((100, D))), W, B))
    y = np.zeros(100, int)
    buffers = (None, np.full((C, D), np.nan, np.float32), np.full(C, np.nan, np.float32))
    _, grads = xce.linear_cross_entropy(
        x, w, y, linear_bias=b, chunk_rows=1, return_grad=True, grad_out=buffers, reduction="sum"
    )
    exact, rounding = composed(x, w, y, b, reduction="sum")[1], rounding_of_g(x, w, y, b, reduction="sum")
    for grad, buffer, expected, atol in zip(grads[1:], buffers[1:], exact[1:], rounding[1:], strict=True):
        assert grad is buffer
        assert_equal(grad, expected, 1e-5, atol)
    _, narrow = xce.linear_cross_entropy(x, w, y, linear_bias=b, chunk_rows=1, return_grad=True, reduction="sum")
    for grad, wide in zip(narrow[1:], buffers[1:], strict=True):
        same_bits(grad, wide.astype(grad.dtype))


def test_float16_gradients_of_a_mean_do_not_vanish() -> None:
    """Entries of g are 1e-8 here; the smallest number of float16 is 6e-8."""
    x, y = np.full((500, 1), 64, "f2"), np.zeros(500, int)
    w = np.array([[3 / 16], [3 / 32], [0]], "f2")
    out = (None, np.full(w.shape, np.nan, "f4"), None)
    for chunk_rows in (None, 170):
        _, grads = xce.linear_cross_entropy(x, w, y, return_grad=True, grad_out=out, chunk_rows=chunk_rows)
        exact = composed(x, w, y)[1][1]
        assert abs(exact[2]) / 64 / 500 < 2e-8
        np.testing.assert_allclose(grads[1], exact, rtol=2.0**-10)


def test_float16_gradients_of_one_row_among_many_do_not_overflow() -> None:
    n = 3000
    x, w, y = RNG.standard_normal((n, 2)).astype("f2"), W[:, :2].astype("f2"), np.full(n, 1)
    weights = (np.arange(n) == 7).astype("f4")
    check(x, w, y, sample_weight=weights, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_that_only_float64_holds(dtype: str) -> None:
    """Of weights in float32 themselves nothing is read before the kernels run."""
    x, w, b = (a.astype(dtype_of(dtype)) for a in (X, W, B))
    check(x, w, Y, b, weight=np.full(C, 1e-40), rtol=1e-6)
    check(x, w, Y, None, sample_weight=np.array([1e-38, 1.0, 1e-42, 1, 1]), reduction="sum", rtol=1e-6)
    buffers = tuple(np.empty_like(a) for a in (x, w))
    _, grads = check(x, w, Y, None, temperature=1e35, reduction="none", rtol=1e-6, grad_out=(*buffers, None))
    assert grads[0] is buffers[0]
    assert grads[1] is buffers[1]


def test_ignored_rows_meet_infinite_weights() -> None:
    w, y = W.copy(), np.where(Y == 2, -100, Y)
    w[1, 1], w[3, 0] = np.inf, np.nan
    for labels in (y, np.full(N, -100)):
        for chunk_rows in (None, 2):
            _, (d_inputs, d_weight, _) = xce.linear_cross_entropy(
                X, w, labels, reduction="sum", return_grad=True, chunk_rows=chunk_rows
            )
            assert not d_inputs[labels == -100].any()
            assert np.isnan(d_inputs[labels != -100]).all()
            assert (labels == y).all() or not d_weight.any()


def test_every_run_has_the_same_bits() -> None:
    x, w, y = RNG.standard_normal((50, 20)), RNG.standard_normal((30, 20)), RNG.integers(30, size=50)
    runs = [xce.linear_cross_entropy(x, w, y, return_grad=True, chunk_rows=7) for _ in range(3)]
    for value, grads in runs[1:]:
        same_bits(value, runs[0][0])
        for grad, expected in zip(grads[:2], runs[0][1][:2], strict=True):
            same_bits(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("return_grad", [True, False])
def test_chunks_are_equal_and_below_the_cap(dtype: str, return_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated beyond the outputs is a share of the memory, and a number for each row."""
    n, c, allocated, rows = 60, 51, [], []
    x, w = (RNG.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((n, D), (c, D)))
    buffers = (np.empty_like(x), np.empty(w.shape, "f8" if dtype == "float64" else "f4"), None)
    empty, gemm = Emulated.empty, Emulated.gemm
    monkeypatch.setattr(Emulated, "memory_bytes", 32 * 4000)
    monkeypatch.setattr(Emulated, "empty", lambda *a: allocated.append(empty(*a)) or allocated[-1])
    monkeypatch.setattr(Emulated, "gemm", lambda self, p: rows.append(p.n) or gemm(self, p))
    xce.linear_cross_entropy(
        x, w, RNG.integers(c, size=n), return_grad=return_grad, grad_out=buffers if return_grad else None
    )
    per_class = {"float64": 8, "float32": 4}.get(dtype, 4 + 2 * return_grad)
    n_chunks = -(-n // (4000 // (c * per_class + D * x.dtype.itemsize)))
    logits = rows[:: 3 if return_grad else 1]
    assert len(logits) == n_chunks
    assert set(logits[:-1]) == {-(-n // n_chunks)}
    assert sum(logits) == n
    # rows are rounded up to 16 bytes, values are of 8 bytes at most, and a sum has partial sums
    assert sum(a.nbytes for a in allocated) <= 4000 + 3 * 16 * logits[0] + 8 * n + 200


def test_rows_of_a_chunk() -> None:
    """As many as make products fast, however much memory there is."""
    x = np.broadcast_to(np.float32(1), (10000, 2))
    weight, labels = W[:, :2].astype("f4"), np.zeros(10000, int)
    call = linear_call(arrays_of(x, "inputs"), weight, labels, None, None, {"reduction": "sum"})
    with mock.patch.object(Emulated, "memory_bytes", 2**40):
        assert _cuda_linear._chunk_rows(call, DEVICE) == -(-10000 // 3)
        assert _cuda_linear._chunk_rows(call._replace(chunk_rows=20000), DEVICE) == 10000
    with mock.patch.object(Emulated, "memory_bytes", 0):
        assert _cuda_linear._chunk_rows(call, DEVICE) == 1


# Products and copies


PLACES = [*ALIGNED.values(), lambda a: np.pad(a, ((0, 0), (0, 3)))[:, : a.shape[1]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: str) -> None:
    kind, rng = dtype_of(dtype), np.random.default_rng(0)
    for i, (m, k, n) in enumerate(((3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1), (3, 0, 5), (0, 2, 3))):
        for j in range(len(PLACES) ** 2):
            places = (PLACES[p] for p in divmod(j, len(PLACES)))
            a, b = (np.round(8 * rng.standard_normal(shape)).astype(kind) for shape in ((m, k), (k, n)))
            a, b = (_cuda_linear._readable(DEVICE, place(x)) for place, x in zip(places, (a, b), strict=True))
            out = np.full((m, n), np.nan if j % 2 else 1, kind)
            out = PLACES[(i + j) % len(PLACES)](out)
            if _cuda_linear._lies(out) is None:
                continue
            _cuda_linear._multiply(DEVICE, a, b, out, 0.5, 0.0 if j % 2 else 1.0)
            exact = widen(a) @ widen(b) / 2 + (j % 2 == 0)
            np.testing.assert_array_equal(out, exact.astype(out.dtype))


def test_a_matrix_that_blas_does_not_read_is_copied() -> None:
    for name, lay in ALIGNED.items():
        x = lay(W)
        assert (_cuda_linear._readable(DEVICE, x) is x) == (name not in ("sliced classes", "reversed")), name
        np.testing.assert_array_equal(_cuda_linear._readable(DEVICE, x), W)
    huge = np.lib.stride_tricks.as_strided(W, (2, D), (8 * 2**31, 8))
    assert _cuda_linear._lies(huge) is None
    assert _cuda_linear._lies(W[:0]) == (True, D)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_copies_round_to_the_nearest(dtype: str) -> None:
    kind = dtype_of(dtype)
    exact = np.ldexp(np.linspace(-1, 1, 4001, dtype="f4"), np.arange(4001) % 40 - 30)
    exact = np.concatenate([exact, np.float32([2**-25, 3 * 2.0**-26, -(2.0**-14), np.inf, 65504, 1e5])])
    for shape in ((1, -1), (-1, 1)):
        source, target = exact.reshape(shape), np.full(len(exact), np.nan, kind).reshape(shape)
        wide = np.full_like(source, np.nan)
        for a, b in ((source, target), (target, wide)):
            _cuda_linear._copy(DEVICE, _cuda_linear._range(DEVICE, a, 1), _cuda_linear._range(DEVICE, b, 1), a.shape)
        with np.errstate(over="ignore"):
            same_bits(target, source.astype(kind))
        same_bits(wide, target.astype("f4"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blas_of_cupy(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLAS is asked for, by a `gemmEx` on the memory of the CPU with the names of CUDA's types and modes."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy, for CUDA")
    try:
        assert cupy.cuda.cublas.gemmEx
    except ImportError:
        pytest.skip("needs the cuBLAS of CUDA, of which names are used")
    from xce._engines import cupy as backend

    kinds, modes = {0: "f4", 1: "f8", 2: "f2", 14: dtype_of("bfloat16")}, [0]

    def gemm_ex(
        handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, a_kind: int, lda: int, b: int,
        b_kind: int, ldb: int, beta: int, c: int, c_kind: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        assert (handle, a_kind, algorithm, modes[-1]) == (7, b_kind, -1, 16)
        scalar = ctypes.c_double if compute == 70 else ctypes.c_float
        assert compute == (70 if kinds[c_kind] == "f8" else 68)
        alpha, beta = (scalar.from_address(p).value for p in (alpha, beta))
        types = np.dtype(kinds[a_kind]), np.dtype(kinds[c_kind])
        blas(bool(ta), bool(tb), m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, *types)

    library = SimpleNamespace(
        gemmEx=gemm_ex, getMathMode=lambda handle: modes[-1], setMathMode=lambda handle, mode: modes.append(mode),
        CUBLAS_COMPUTE_32F=cupy.cuda.cublas.CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F=cupy.cuda.cublas.CUBLAS_COMPUTE_64F,
        CUBLAS_GEMM_DEFAULT=cupy.cuda.cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    monkeypatch.setattr(cupy.cuda, "cublas", library)
    monkeypatch.setattr(cupy.cuda.device, "get_cublas_handle", lambda: 7)
    monkeypatch.setattr(Emulated, "gemm", lambda self, product: backend._Device.gemm(self, product))
    x, w, b, target, _ = layer_problem({}, "index", (5,), dtype_of(dtype))
    check(x, w, target, b, rtol=1e-13 if dtype == "float64" else 1e-5)
    buffers = (None, *(np.empty(a.shape, "f8" if dtype == "float64" else "f4") for a in (w, b)))
    rtol = 1e-12 if dtype == "float64" else 1e-5
    _, grads = xce.linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=2, return_grad=True, grad_out=buffers)
    exact, extra = composed(x, w, target, b)[1], rounding_of_g(x, w, target, b)
    for grad, expected, more in zip(grads[1:], exact[1:], extra[1:], strict=True):
        assert_equal(grad, expected, rtol, more)
    assert modes[-1] == 0

"""The oracle against PyTorch, mpmath, finite differences and the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import OPTIONS, SHAPES, Case, combinations, oracle, problem
from checks import every_target

import xce

INF, NAN = math.inf, math.nan


def loss(*args: Any, **options: Any) -> Any:
    return oracle(xce.cross_entropy, *args, **options)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


# PyTorch, over every combination of the options that it has

TORCH_OPTIONS = {name: OPTIONS[name] for name in ("weight", "ignore", "label_smoothing", "reduction")}
TORCH_SHAPES = (((7,), 0), ((5, 7), 1), ((4, 3, 5), 1), ((2, 5, 3, 2), 1))


@pytest.mark.parametrize(("shape", "axis"), TORCH_SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_value_and_gradient_are_those_of_pytorch(shape: tuple[int, ...], axis: int, mode: str) -> None:
    torch = pytest.importorskip("torch")
    for seed, features in enumerate(combinations(**TORCH_OPTIONS)):
        logits, target, options = problem(features, mode, shape, axis, seed=seed)
        value, grad = loss(logits, target, return_grad=True, **options)

        x = torch.tensor(logits, requires_grad=True)
        options.pop("axis")
        weight = options.pop("weight", None)
        options["weight"] = None if weight is None else torch.tensor(weight)
        expected = torch.nn.functional.cross_entropy(x, torch.tensor(target), **options)
        expected.sum().backward()
        if expected.isnan().any():  # every row ignored: NaN as well, but a gradient of zeros
            x.grad.zero_()
        assert_close(value, expected.detach())
        assert_close(grad, x.grad)


@pytest.mark.parametrize("mode", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_diagonal_is_that_of_pytorch(mode: str, reduction: str) -> None:
    torch = pytest.importorskip("torch")
    for label_smoothing in (0.0, 0.2):
        features = {
            "weight": True,
            "ignore": True,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
        }
        logits, target, options = problem(features, mode, (3, 4))
        _, hess = loss(logits, target, return_hess=True, **options)
        options.pop("axis")
        options["weight"], y = torch.tensor(options["weight"]), torch.tensor(target)

        def value(x: Any, y: Any = y, options: dict[str, Any] = options) -> Any:
            return torch.nn.functional.cross_entropy(x, y, **options)

        matrix = torch.autograd.functional.hessian(value, torch.tensor(logits)).reshape(logits.size, logits.size)
        assert_close(hess, matrix.diagonal().reshape(logits.shape))


# Derivatives against differences of what they are derivatives of, over every combination of all options


def central_difference(function: Any, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Slope in x_k of entry k of a function of the shape of `x`, or else of the sum of its entries."""
    slope = np.empty_like(x)
    for k in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[k] += step
        down[k] -= step
        difference = np.asarray(function(up)) - np.asarray(function(down))
        slope[k] = (difference[k] if difference.shape == x.shape else difference.sum()) / (2 * step)
    return slope


@every_target
def test_derivatives_are_those_of_the_value(case: Case, mode: str) -> None:
    """Of the loss with the longest history for every combination of options, of the others for a sample of them."""
    reductions = tuple(set(case.reductions) - {"sum"})
    every = list(combinations(**case.options | {"reduction": reductions}))
    for seed, features in enumerate(every[:: 1 if case.function is xce.cross_entropy else 1 + len(every) // 50]):
        for param in case.params:
            logits, target, options = problem(features, mode, (2, 3), seed=seed, case=case)
            options |= param

            def gradient(x: np.ndarray, target: np.ndarray = target, options: dict[str, Any] = options) -> np.ndarray:
                grad: np.ndarray = oracle(case.function, x, target, return_grad=True, **options)[1]
                return grad

            def value(x: np.ndarray, target: np.ndarray = target, options: dict[str, Any] = options) -> np.ndarray:
                result: np.ndarray = oracle(case.function, x, target, **options)
                return result

            _, grad, hess = oracle(case.function, logits, target, return_grad=True, return_hess=True, **options)
            if options["reduction"] != "none" and np.isnan(value(logits)).any():
                assert not grad.any()
                continue
            assert_close(grad, central_difference(value, logits), rtol=1e-6, atol=1e-9)
            assert_close(hess, central_difference(gradient, logits), rtol=1e-6, atol=1e-9)


# Options that PyTorch does not have, from their definitions


def test_temperature_and_softcap_transform_the_logits(rng: np.random.Generator) -> None:
    x, y = 5 * rng.standard_normal((6, 9)), rng.integers(9, size=6)
    assert_close(loss(x, y, temperature=0.7), loss(x / 0.7, y))
    assert_close(loss(x, y, softcap=3.0), loss(3 * np.tanh(x / 3), y))
    assert_close(loss(x, y, softcap=3.0, temperature=0.7), loss(3 * np.tanh(x / 3) / 0.7, y))


def test_softcap_leaves_padding_alone() -> None:
    padded, plain = np.array([1.0, 2.0, -INF]), np.array([1.0, 2.0])
    value, grad = loss(padded, 0, softcap=3.0, return_grad=True)
    expected, short = loss(plain, 0, softcap=3.0, return_grad=True)
    assert value == expected
    assert grad.tolist() == [*short, 0.0]


def test_where_is_the_loss_of_the_remaining_classes(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((3, 6)), rng.random(6) + 0.5
    kept = np.array([True, True, False, True, False, True])
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "return_grad": True, "return_hess": True}
    expected = loss(x[:, kept], np.array([0, 2, 3]), weight=w[kept], **options)
    x[:, ~kept] = [NAN, INF]  # not read
    results = loss(x, np.array([0, 3, 5]), where=kept, weight=w, **options)
    assert_close(results[0], expected[0])
    for derivative, short in zip(results[1:], expected[1:], strict=True):
        assert_close(derivative[:, kept], short)
        assert not derivative[:, ~kept].any()


def test_where_over_a_label_and_over_all_classes() -> None:
    x, where = np.zeros((2, 3)), np.array([[False, True, True], [False, False, False]])
    value, grad = loss(x, np.array([0, 0]), where=where, reduction="none", return_grad=True)
    assert value[0] == INF
    assert grad[0].tolist() == [0.0, 0.5, 0.5]
    assert value[1] == 0  # it counts nowhere
    assert not grad[1].any()
    assert loss(x[1:], np.zeros((1, 3)), where=where[1:], reduction="sum") == 0


def test_z_loss_is_scaled_by_the_sample_weight_alone(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 5)), np.array([0, 4, -100, 2])
    w, s = rng.random(5), rng.random(4)
    lse = oracle(xce.logsumexp, x)
    plain = loss(x, y, weight=w, sample_weight=s, reduction="none")
    total = loss(x, y, weight=w, sample_weight=s, reduction="none", z_loss=0.3)
    assert_close(total, plain + 0.3 * s * lse**2 * (y != -100))


@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_sample_weight_scales_rows_and_denominator(mode: str, rng: np.random.Generator) -> None:
    x, y, options = problem({"weight": True, "ignore": True}, mode)
    s = rng.random(len(x))
    rows = loss(x, y, reduction="none", **options)
    assert_close(loss(x, y, sample_weight=s, reduction="none", **options), s * rows)
    share = s if mode == "probabilities" else s * np.where(y == options["ignore_index"], 0, 1)
    if mode == "index":
        share = share * options["weight"][np.minimum(y, len(options["weight"]) - 1)]
    assert_close(loss(x, y, sample_weight=s, **options), (s * rows).sum() / share.sum())


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_any_axis_is_the_last_axis_moved(shape: tuple[int, ...], axis: int, mode: str) -> None:
    features = {"weight": True, "where": True, "sample_weight": True, "label_smoothing": 0.1}
    x, y, options = problem(features, mode, shape, axis)
    results = loss(x, y, reduction="none", return_grad=True, return_hess=True, **options)
    axis = options.pop("axis")
    y = y if mode == "index" else np.moveaxis(y, axis, -1)
    options["where"] = np.moveaxis(options["where"], axis, -1)
    expected = loss(np.moveaxis(x, axis, -1), y, reduction="none", return_grad=True, return_hess=True, **options)
    np.testing.assert_array_equal(results[0], expected[0])
    for derivative, moved in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(np.moveaxis(derivative, axis, -1), moved)


# Exact values and edge cases


@pytest.mark.parametrize(
    "row",
    [
        [20.0, 0.0, 0.0],
        [35.0, 0.0, 1.0],
        [1e4, 1e4 - 5, 1e4 - 40],
        [1e8 + 30, 1e8, 1e8 - 1],
        [-1.0, 2.0, 3.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [0, 1])
def test_accuracy_against_mpmath(row: list[float], target: int) -> None:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        exponentials = [mpmath.exp(mpmath.mpf(x) - mpmath.mpf(row[0])) for x in row]
        p = [e / mpmath.fsum(exponentials) for e in exponentials]
        expected = float(-mpmath.log(p[target]))
        grad = [float(q - (k == target)) for k, q in enumerate(p)]
        hess = [float(q * (1 - q)) for q in p]
    value = loss(np.array(row), target, return_grad=True, return_hess=True)
    eps = np.finfo(float).eps
    assert_close(value[0], expected, rtol=4 * eps, atol=0)
    assert_close(value[1], grad, rtol=40 * eps, atol=0)
    assert_close(value[2], hess, rtol=40 * eps, atol=0)


def test_confident_and_right_in_float32() -> None:
    value, grad = loss(np.array([20, 0, 0], np.float32), 0, return_grad=True)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, 4.1223072e-9, rtol=1e-6)
    np.testing.assert_allclose(grad[0], -4.1223072e-9, rtol=1e-6)


EDGES = [
    # logits, target, options, loss, gradient (None: only finite)
    ([0.0, -INF, 0.0], 0, {}, math.log(2), [-0.5, 0.0, 0.5]),
    ([0.0, -INF, 0.0], 1, {}, INF, [0.5, -1.0, 0.5]),
    ([0.0, -INF], 0, {"label_smoothing": 0.5}, INF, [0.25, -0.25]),
    ([0.0, -INF], [1.0, 0.0], {}, 0.0, [0.0, 0.0]),
    ([0.0, -INF, 0.0], 1, {"weight": [1.0, 0.0, 1.0], "reduction": "sum"}, 0.0, [0.0, 0.0, 0.0]),
    ([-INF, -INF], 0, {}, NAN, [NAN, NAN]),
    ([INF, 0.0], 0, {}, NAN, [NAN, NAN]),
    ([INF, 0.0], 1, {}, NAN, [NAN, NAN]),
    ([NAN, 0.0], 1, {}, NAN, [NAN, NAN]),
    ([1e30, 0.0], 0, {}, 0.0, [0.0, 0.0]),
    ([1e6, 1e6], 1, {}, math.log(2), [0.5, -0.5]),
    ([-1e30, 1e30], 0, {}, 2e30, [-1.0, 1.0]),
    ([3.0], 0, {}, 0.0, [0.0]),
    ([3.0], 0, {"label_smoothing": 0.3}, 0.0, [0.0]),
    ([NAN, 0.0], -100, {}, NAN, [0.0, 0.0]),
    ([NAN, 0.0], -100, {"reduction": "sum"}, 0.0, [0.0, 0.0]),
    ([1.0, 2.0], 0, {"weight": [0.0, 0.0]}, NAN, [0.0, 0.0]),
]


@pytest.mark.parametrize(("logits", "target", "options", "value", "grad"), EDGES)
def test_edges(logits: Any, target: Any, options: dict[str, Any], value: float, grad: Any) -> None:
    options = {k: np.array(v) if isinstance(v, list) else v for k, v in options.items()}
    target = np.array(target)
    result, gradient, hessian = loss(np.array(logits), target, return_grad=True, return_hess=True, **options)
    assert_close(result, value, rtol=1e-15, atol=0)
    assert_close(gradient, grad, rtol=1e-15, atol=0)
    np.testing.assert_array_equal(np.isnan(hessian), np.isnan(gradient))
    if value == 0:
        assert not np.signbit(result)


def test_a_bad_row_does_not_touch_the_others(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 3)), np.array([0, 1, 2, 0])
    clean = loss(x, y, reduction="none", return_grad=True, return_hess=True)
    for bad in ([-INF] * 3, [INF, 0, 0], [0, NAN, 0]):
        dirty = x.copy()
        dirty[1] = bad
        for result, expected in zip(
            loss(dirty, y, reduction="none", return_grad=True, return_hess=True), clean, strict=True
        ):
            assert np.isnan(result[1]).all()
            np.testing.assert_array_equal(np.delete(result, 1, 0), np.delete(expected, 1, 0))


def test_ignored_rows_are_not_read(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((3, 4)), np.array([1, 2, 3])
    x[1] = NAN  # and its label, 2, is a class
    value, grad, hess = loss(x, y, ignore_index=2, z_loss=0.1, return_grad=True, return_hess=True)
    assert_close(value, loss(x[[0, 2]], y[[0, 2]], z_loss=0.1))
    assert grad[1].tolist() == hess[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", ["int64", "uint8", "uint64"])
def test_a_bad_label_that_is_not_checked_makes_its_row_nan(dtype: str) -> None:
    y = np.array([0, 200, 1], dtype)
    value, grad = loss(np.zeros((3, 2)), y, validate=False, reduction="none", return_grad=True)
    assert np.isnan(value).tolist() == [False, True, False]
    assert np.isnan(grad).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, y = np.zeros(shape, np.float32), np.zeros(shape[:-1], int)
    assert np.isnan(loss(x, y))
    assert loss(x, y, reduction="sum") == 0
    assert loss(x, y, reduction="none").shape == shape[:-1]
    assert loss(x, y, return_grad=True)[1].shape == shape


@pytest.mark.parametrize(
    ("dtype", "scalar"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_dtypes(dtype: str, scalar: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    features = {"weight": True, "sample_weight": True, "where": True, "label_smoothing": 0.1, "softcap": 3.0}
    for mode in ("index", "probabilities"):
        x, y, options = problem(features, mode, dtype=dtype)
        for reduction in ("mean", "none"):
            value, grad, hess = loss(x, y, reduction=reduction, return_grad=True, return_hess=True, **options)
            assert value.dtype == scalar
            assert grad.dtype == hess.dtype == x.dtype
        wide = {k: v.astype("f8") if k.endswith("weight") else v for k, v in options.items()}
        expected = loss(x.astype("f8"), y if mode == "index" else y.astype("f8"), reduction="none", **wide)
        np.testing.assert_allclose(value, expected, rtol=1e-5 if scalar == "float32" else 1e-14)
    softmax, log_softmax = oracle(xce.softmax, x), oracle(xce.log_softmax, x)
    assert softmax.dtype == log_softmax.dtype == x.dtype
    assert oracle(xce.logsumexp, x).dtype == scalar


# The other operations


def test_softmax_and_its_relatives(rng: np.random.Generator) -> None:
    special = pytest.importorskip("scipy.special")
    x = 10 * rng.standard_normal((4, 5, 3))
    x[0, 1, 0] = -INF
    for axis in (0, 1, -1):
        assert_close(oracle(xce.softmax, x, axis=axis), special.softmax(x, axis))
        assert_close(oracle(xce.log_softmax, x, axis=axis), special.log_softmax(x, axis))
        assert_close(oracle(xce.logsumexp, x, axis=axis), special.logsumexp(x, axis))
        assert_close(oracle(xce.logsumexp, x, axis=axis, keepdims=True), special.logsumexp(x, axis, keepdims=True))
    assert_close(oracle(xce.softmax, x, temperature=2.0), special.softmax(x / 2, -1))
    assert_close(oracle(xce.log_softmax, x, temperature=2.0), special.log_softmax(x / 2, -1))


def test_infinite_rows_of_softmax_and_logsumexp() -> None:
    x = np.array([[-INF, -INF], [INF, 0.0], [NAN, 0.0], [INF, -INF]])
    np.testing.assert_array_equal(oracle(xce.logsumexp, x), [-INF, INF, NAN, INF])
    assert np.isnan(oracle(xce.softmax, x)).all()
    assert np.isnan(oracle(xce.log_softmax, x)).all()


@pytest.mark.parametrize("function", [xce.softmax, xce.log_softmax])
def test_out_is_written_and_returned(function: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4))
    expected, out = oracle(function, x), np.empty((3, 4))
    assert oracle(function, x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert oracle(function, x, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_logit_stats(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((6, 5)), np.array([0, 1, 2, -100, 4, 3])
    x[1] = [2.0, 2.0, 2.0, 1.0, 3.0]  # ties do not count
    x[4, 2] = NAN
    x[5] = [1.0, -INF, -INF, 0.0, -INF]
    stats = oracle(xce.logit_stats, x, y)
    p = oracle(xce.softmax, x)
    np.testing.assert_array_equal(stats.lse, oracle(xce.logsumexp, x))
    np.testing.assert_array_equal(stats.target_logit, [x[0, 0], 2.0, x[2, 2], NAN, x[4, 4], 0.0])
    np.testing.assert_array_equal(stats.argmax, np.argmax(x, 1))
    np.testing.assert_array_equal(stats.rank, [(x[0] > x[0, 0]).sum(), 1, (x[2] > x[2, 2]).sum(), -1, -1, 1])
    terms = np.where(p == 0, 0.0, p * np.log(np.where(p == 0, 1.0, p)))
    assert_close(stats.entropy, -terms.sum(1))
    assert stats.argmax.dtype == stats.rank.dtype == np.int64
    assert oracle(xce.logit_stats, x.astype("f4"), y).entropy.dtype == np.float32

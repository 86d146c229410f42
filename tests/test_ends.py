"""Rows near the ends of their type: what it holds comes out, anything else is an infinity, and nothing is NaN."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from cases import oracle
from checks import Array, dtype_of

import xce

INF = math.inf
TYPES = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


def greatest(dtype: str) -> float:
    kind = dtype_of(dtype)
    return float(np.finfo(kind).max) if kind.kind == "f" else float(np.float32(3.3895314e38))


def assert_near(found: Any, expected: Any, dtype: str, ulps: float = 8.0) -> None:
    """To some ULP of the type, or the same infinity."""
    eps = float(np.finfo(dtype).eps) if dtype != "bfloat16" else 2.0**-7
    found, expected = np.asarray(found).astype(np.float64), np.asarray(expected, np.float64)
    size = np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=ulps * eps, atol=eps * size)


@TYPES
@pytest.mark.parametrize("n_classes", [3, 40, 300])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.25}, {"temperature": 0.5}], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_z_loss_of_the_greatest_logits(dtype: str, n_classes: int, options: dict[str, Any], sign: int) -> None:
    """Two classes share the row: the gradient is z lse, though 2 z lse is beyond the type; and 0 where p is."""
    most, t = greatest(dtype), options.get("temperature", 1.0)
    x = np.full((4, n_classes), -most if sign > 0 else -INF, dtype_of(dtype))
    x[:, 1:3] = sign * most
    loss, grad, hess = xce.cross_entropy(
        x, np.full(4, 1), z_loss=t**2 / 2, return_grad=True, return_hess=True, **options
    )
    assert loss == INF
    expected = np.zeros((4, n_classes))
    expected[:, 1:3] = sign * most / 2 / 4  # t^2 / 2, divided by t twice: of lse and of the derivative
    assert_near(grad, expected, dtype)
    expected[:, 1:3] = sign * most / 4 / 4 / t
    if t == 1 or sign > 0:  # a Hessian of less than -max
        assert_near(hess, expected, dtype)


@pytest.mark.parametrize("function", [xce.cross_entropy, xce.focal_loss, xce.poly_loss, xce.generalized_cross_entropy])
@pytest.mark.parametrize("n_classes", [3, 300])
@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_z_loss_beyond_the_type(function: Any, n_classes: int, is_soft: bool, temperature: float) -> None:
    """An infinity where p is not 0, of the sign of lse and the weight; what the other classes get does not change."""
    rng = np.random.default_rng(n_classes)
    x = rng.standard_normal((2, n_classes)).astype(np.float32)
    x[0, 0], x[1] = 3e38, x[1] * 1e36 - 3e38
    target: Array = np.array([1, 1])
    if is_soft:
        target = np.full((2, n_classes), 1 / n_classes, np.float32)
    loss, grad, hess = function(
        x, target, z_loss=4.0, temperature=temperature, reduction="none", return_grad=True, return_hess=True,
        sample_weight=np.array([2.0, -1.0]), where=x > -INF,
    )  # fmt: skip
    top = x.argmax(-1)
    np.testing.assert_array_equal(loss, [INF, -INF])
    np.testing.assert_array_equal(grad[[0, 1], top], [INF, INF])
    others = np.arange(n_classes) != top[:, None]
    _, plain, plain_hess = function(
        x, target, temperature=temperature, reduction="none", return_grad=True, return_hess=True,
        sample_weight=np.array([2.0, -1.0]),
    )  # fmt: skip
    np.testing.assert_array_equal(grad[others], plain[others])
    np.testing.assert_array_equal(hess[others], plain_hess[others])
    assert not np.isnan(hess).any()


@TYPES
@pytest.mark.parametrize("denominator", [1, 64])
def test_a_mean_of_z_losses(dtype: str, denominator: int) -> None:
    """Divided by the number of rows a gradient may be within the type, and a small one of z, too."""
    most = greatest(dtype)
    x = np.full((denominator, 5), -INF, dtype_of(dtype))
    x[:, 0] = most
    grad = xce.cross_entropy(x, np.zeros(denominator, int), z_loss=8.0, return_grad=True)[1]
    exact = 16 / denominator * most if denominator > 16 else INF
    assert_near(grad, np.where(x > 0, exact, 0), dtype)
    small = xce.cross_entropy(x / 2, np.zeros(denominator, int), z_loss=1e-20, temperature=1e-3, return_grad=True)[1]
    assert_near(small, np.where(x > 0, 1e-20 * most * 1e6 / denominator, 0), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_a_difference_that_is_rounded_up_from_the_greatest_number(dtype: str, divergence: str) -> None:
    """The student's first distance less its logit is beyond the type, while the distance is not."""
    most = greatest(dtype)
    x = np.array([most * 0.43013359, most, most * 0.3, -most * 0.5], dtype)
    assert np.isfinite(x[0] - x[1])
    y = np.array([1.0, 1.0, 0.5, 0.0], dtype)
    for student, teacher in ((x, y), (y, x)):
        if divergence == "forward" and student is y:
            continue
        with mpmath.workdps(60):
            p, t = (softmax(a) for a in (student, teacher))
            pairs = list(zip(p, t, strict=True))
            exact = [float((a - b) if divergence == "forward" else js_slope(p, t, k)) for k, (a, b) in enumerate(pairs)]
        for run in (
            lambda *a, **k: xce.distillation_loss(*a, **k),
            lambda *a, **k: oracle(xce.distillation_loss, *a, **k),
        ):
            loss, grad = run(student, teacher, divergence=divergence, return_grad=True, reduction="sum")
            assert not np.isnan(loss)
            np.testing.assert_allclose(grad, exact, atol=32 * np.finfo(dtype).eps)


def softmax(x: Array) -> list[Any]:
    z = [mpmath.mpf(float(a)) for a in x]
    e = [mpmath.exp(a - max(z)) for a in z]
    return [a / mpmath.fsum(e) for a in e]


def js_slope(p: list[Any], t: list[Any], k: int) -> Any:
    e = [mpmath.log(2 * a / (a + b)) if a else mpmath.mpf(0) for a, b in zip(p, t, strict=True)]
    return p[k] * (e[k] - mpmath.fsum(a * b for a, b in zip(p, e, strict=True))) / 2


@pytest.mark.parametrize("sparse", [False, True])
def test_js_of_a_teacher_whose_mass_is_elsewhere(sparse: bool) -> None:
    """The student's classes have next to nothing of the teacher's: log(1 + t / p) at the top keeps its digits."""
    x = np.array([0.0, -3.0, -INF, -1.0])
    y = np.array([-141.7, -141.2, 0.0, -INF])
    with mpmath.workdps(250):
        p, t = softmax(x), softmax(y)
        exact = [float(js_slope(p, t, k)) for k in range(4)]
    options = {"teacher_indices": np.array([0, 1, 2])} if sparse else {}
    teacher = y[:3] if sparse else y
    grad = xce.distillation_loss(x, teacher, divergence="js", return_grad=True, reduction="sum", **options)[1]
    np.testing.assert_allclose(grad, exact, rtol=0, atol=32 * 2.0**-52 * np.abs(exact).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shards", [1, 2])
def test_state_of_losses_beyond_float32(dtype: str, shards: int) -> None:
    """A state computes in float64, whatever the logits are."""
    x = np.array([[3e38, -3e38, 1e38, -1e38], [1.0, 2.0, 3.0, 4.0]], dtype)
    y = np.array([1, 1])
    wide = x.astype(np.float64)
    expected = xce.cross_entropy(wide, y, label_smoothing=0.25, reduction="sum")
    state = xce.LossState(4, label_smoothing=0.25)
    for part in range(shards):
        width = 4 // shards
        state.update(x[:, part * width : (part + 1) * width], y, part * width, row_offset=0)
    assert state.result("sum") == pytest.approx(float(expected), rel=1e-15)
    state = xce.LossState(4)
    for part in range(shards):
        width = 4 // shards
        state.update(x[:, part * width : (part + 1) * width], y, part * width, row_offset=0)
    assert state.result("sum") == pytest.approx(float(xce.cross_entropy(wide, y, reduction="sum")), rel=1e-15)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_mean_has_the_sign_of_loss_and_weights(sign: int) -> None:
    """A negative denominator turns an infinity, too."""
    x, y, s = np.array([[0.0, -INF], [1.0, 2.0]]), np.array([1, 0]), np.array([sign, 0.5 * sign])
    state = xce.LossState(2).update(x, y, sample_weight=s)
    assert state.result() == xce.cross_entropy(x, y, sample_weight=s) == INF
    assert state.result("sum") == xce.cross_entropy(x, y, sample_weight=s, reduction="sum") == sign * INF


def test_shards_that_lie_apart_keep_the_digits() -> None:
    """exp of the difference of two maxima, which is rounded, errs by hundreds of ULP otherwise."""
    x = np.array([[0.1, -317.66523724773367, -301.2192466217608, 0.1 + 2**-40]]) + np.array([[0.0, 0.0, 0.0, 340.0]])
    state = xce.LossState(4)
    for k in range(4):
        state.update(x[:, k : k + 1], np.array([3]), k, row_offset=0)
    with mpmath.workdps(60):
        z = [mpmath.mpf(float(a)) for a in x[0]]
        exact = mpmath.log1p(mpmath.fsum(mpmath.exp(a - z[3]) for a in z[:3]))
        assert abs(mpmath.mpf(state.result("sum")) / exact - 1) < 4 * 2.0**-52


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("n_classes", [3, 200])
def test_a_teacher_of_nan_and_a_student_of_two_classes(divergence: str, n_classes: int) -> None:
    """All derivatives are NaN, that of the top class with p = 1 / 2, too."""
    x, y = np.full((1, n_classes), -INF, np.float32), np.zeros((1, n_classes), np.float32)
    x[:, :2], y[:, 2] = 1.0, math.nan
    for result in xce.distillation_loss(x, y, divergence=divergence, return_grad=True, return_hess=True):
        assert np.isnan(result).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_poly_loss_of_a_negative_epsilon(dtype: str) -> None:
    """epsilon (1 - p) is next to nothing beside a loss near the greatest number, and so are its parts."""
    x = np.array([[greatest(dtype) / 100, 0.0]], dtype)
    for run in (xce.poly_loss, lambda *a, **k: oracle(xce.poly_loss, *a, **k)):
        loss = run(x, np.array([1]), epsilon=-1e4, reduction="none")
        assert_near(loss, x[:, 0].astype(float), dtype, 2.0)


@pytest.mark.parametrize("gap", [20.0, 54.0])
def test_focal_hessian_of_a_confident_row(gap: float) -> None:
    """(1 - p)^2 is less than the least float32 before the Hessian is."""
    x = np.array([gap, 0.0, -1.0], np.float32)
    hess = xce.focal_loss(x, 0, gamma=0.5, reduction="none", return_hess=True)[1]
    with mpmath.workdps(120):

        def loss(a: Any) -> Any:
            z = [a, mpmath.mpf(0), mpmath.mpf(-1)]
            q = mpmath.fsum(mpmath.exp(b) for b in z[1:]) / mpmath.fsum(mpmath.exp(b) for b in z)
            return -mpmath.sqrt(q) * mpmath.log(1 - q)

        h = mpmath.mpf(10) ** -30
        exact = float((loss(gap + h) - 2 * loss(mpmath.mpf(gap)) + loss(gap - h)) / h**2)
    assert hess[0] == pytest.approx(exact, rel=10 * 2.0**-23, abs=0)


@pytest.mark.parametrize("function", [xce.softmax, xce.log_softmax])
@pytest.mark.parametrize("value", [math.nan, INF])
def test_removed_classes_of_rows_without_a_softmax(function: Any, value: float) -> None:
    """They are 0, or -inf, whatever the others hold."""
    x, kept = np.array([1.0, value, 2.0]), np.array([False, True, False])
    removed = 0.0 if function is xce.softmax else -INF
    for result in (function(x, where=kept), oracle(function, x, where=kept)):
        np.testing.assert_array_equal(result, [removed, math.nan, removed])


def test_the_reference_takes_a_teacher_as_it_is() -> None:
    """In float64 beside a float32 student, as the kernels do."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 7)).astype(np.float32)
    y = x + 1e-9 * rng.standard_normal((5, 7))
    for divergence in ("forward", "reverse", "js"):
        results = [
            run(x, y, divergence=divergence, reduction="none", return_grad=True, return_hess=True)
            for run in (xce.distillation_loss, lambda *a, **k: oracle(xce.distillation_loss, *a, **k))
        ]
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-4)

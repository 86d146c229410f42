"""The oracle: every operation in the plainest array code, and what computes for libraries that have no kernels.

Array API only, and never fast: the definitions, word for word, with the class axis last. Two forms are chosen
for accuracy, because the tests compare the kernels with this file in float64:

* ``log_softmax = (x - max) - log1p(rest)``, where `rest` sums everything but one maximum;
* ``1 - p`` of that maximum is ``rest / (1 + rest)``, and the terms of the derivatives are grouped so that a
  confident target, where ``p - 1`` would cancel, keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from xce._arrays import Array, dtype_name, namespace
from xce._call import Call, ElementCall, LinearCall, LogitStats
from xce._checks import FLOATS

# phi -> its value, first and second derivative at u = log p; the last argument is its parameter.
PHI: dict[str, Callable[[Any, Array, float], tuple[Array, Array, Array]]] = {
    "cross_entropy": lambda xp, u, _: (-u, xp.full_like(u, -1.0), xp.zeros_like(u)),
    "focal_loss": lambda xp, u, gamma: _focal(xp, u, gamma),
    "poly_loss": lambda xp, u, epsilon: _poly(xp, u, epsilon),
    "generalized_cross_entropy": lambda xp, u, q: (
        (_generalized(xp, u, q), -xp.exp(q * u), -q * xp.exp(q * u))
        if q
        else (-u, xp.full_like(u, -1.0), xp.zeros_like(u))
    ),
}


def _generalized(xp: Any, u: Array, q: float) -> Array:
    """Return (1 - p^q) / q, which is -u to the last digit where q u is small, and may underflow."""
    return xp.where(xp.abs(q * u) < 2.0**-54, -u, -xp.expm1(q * u) / q)


def _poly(xp: Any, u: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """With a negative epsilon, grouped so that near p = 1, where -u and 1 - p are equal, nothing cancels."""
    p, q = xp.exp(u), -xp.expm1(u)
    if epsilon >= 0:
        return -u + epsilon * q, -1 - epsilon * p, -epsilon * p
    value = xp.where(u > -0.5, (1 + epsilon) * -u - epsilon * _log_less_linear(xp, u), -u + epsilon * q)
    return value, xp.where(p > 0.5, -(1 + epsilon) + epsilon * q, -1 - epsilon * p), -epsilon * p


def _log_less_linear(xp: Any, u: Array) -> Array:
    """Return -u - (1 - exp(u)) of u near 0: the series u^2/2 + u^3/6 + ..."""
    near = xp.where(u > -0.5, u, 0.0)
    term, series = near, xp.zeros_like(u)
    for k in range(2, 20):
        term = term * near / k
        series = series + term
    return series


def _power(xp: Any, q: Array, p: Array, gamma: Any) -> Array:
    """Return q^gamma for q = 1 - p; gamma counts the rounding of q, which is large beside a small p."""
    return xp.where(p < 0.5, xp.exp(gamma * xp.log1p(-p)), q**gamma)


def _focal(xp: Any, u: Array, gamma: float) -> tuple[Array, Array, Array]:
    p, q = xp.exp(u), -xp.expm1(u)
    power = _power(xp, q, p, gamma)
    # p u / q, which is -1 in the limit p = 1 and 0 in the limit p = 0
    slope = xp.where(q == 0, -1.0, xp.where(p == 0, 0.0, p * u / q))
    second = xp.where(q == 0, 0.0, gamma * p * power / q * (2 + xp.where(p == 0, 0.0, u) - (gamma - 1) * slope))
    return -power * u, power * (gamma * slope - 1), second


# divergence -> a class's share of it, and the d2 of `_pair_derivatives`: of p of the student, t of the teacher and
# d = log(p / t)
DIVERGENCES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "forward": lambda xp, p, t, d: (_kullback_leibler(xp, t, -d, p), xp.zeros_like(p)),
    "reverse": lambda xp, p, t, d: (_kullback_leibler(xp, p, d, t), xp.ones_like(p)),
    "js": lambda xp, p, t, d: (_jensen_shannon(xp, p, t, d), xp.where(p + t == 0, 0.0, t / (p + t))),
}


def _kullback_leibler(xp: Any, a: Array, log_ratio: Array, b: Array) -> Array:
    """Return a log(a / b) + b - a, whose sum is that of a log(a / b), but has no negative terms."""
    is_close = xp.abs(log_ratio) < 1
    z = xp.where(is_close, -log_ratio, 0.0)
    series = xp.ones_like(z)  # exp(z) - 1 - z = z^2 / 2 (1 + z / 3 (1 + z / 4 (...)))
    for k in range(20, 2, -1):
        series = 1 + z / k * series
    return xp.where(is_close, a * z**2 / 2 * series, _times(xp, a, log_ratio) + (b - a))


def _jensen_shannon(xp: Any, p: Array, t: Array, d: Array) -> Array:
    """Return (p log(p / m) + t log(t / m)) / 2 with m = (p + t) / 2, all terms of whose sum are positive, too."""
    is_close = xp.abs(d) < 1
    z = xp.where(is_close, d, 0.0)
    close = (p + t) / 4 * (z * xp.tanh(z / 2) - 2 * xp.log1p(2 * xp.sinh(z / 4) ** 2))
    own, other = (math.log(2) - _softplus(xp, side) for side in (-d, d))
    return xp.where(is_close, close, (_times(xp, p, own) + _times(xp, t, other)) / 2)


# element formula -> value, first and second derivative at x; y is the target, w the `pos_weight`
ELEMENTS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    # 1e-12 is PyTorch's bound in the gradient, here in the second derivative, too
    "binary_cross_entropy": lambda xp, x, y, w, clamp: (
        _times(xp, y, -xp.maximum(xp.log(x), xp.full_like(x, clamp)))
        + _times(xp, 1 - y, -xp.maximum(xp.log1p(-x), xp.full_like(x, clamp))),
        (x - y) / xp.maximum(x * (1 - x), xp.full_like(x, 1e-12)),
        y / xp.maximum(x, xp.full_like(x, 1e-12)) ** 2 + (1 - y) / xp.maximum(1 - x, xp.full_like(x, 1e-12)) ** 2,
    ),
    # kept is 1 - smoothing, half is smoothing / 2
    "binary_cross_entropy_with_logits": lambda xp, x, y, w, kept, half: _binary(
        xp, x, y * kept + half, (1 - y) * kept + half, w
    ),
    "sigmoid_focal_loss": lambda xp, x, y, w, *params: _sigmoid_focal(xp, x, y, w, *params),
    "asymmetric_loss": lambda xp, x, y, w, *params: _asymmetric(xp, x, y, *params),
    "soft_margin_loss": lambda xp, x, y, w: (
        _softplus(xp, -y * x),
        -y * _sigmoid(xp, -y * x),
        y**2 * _sigmoid(xp, y * x) * _sigmoid(xp, -y * x),
    ),
    "kl_div": lambda xp, x, y, w: (_times(xp, y, xp.log(y) - x), -y, xp.zeros_like(x)),
    "kl_div_log_target": lambda xp, x, y, w: (
        xp.where(y - x == 0, 0.0, _times(xp, xp.exp(y), y - x)),
        -xp.exp(y),
        xp.zeros_like(x),
    ),
}


def _times(xp: Any, a: Array, x: Array) -> Array:
    """Return a x, 0 where a is 0."""
    return xp.where(a == 0, 0.0, a * x)


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(xp: Any, x: Array) -> Array:
    decay = xp.exp(-xp.abs(x))
    return xp.where(x < 0, decay / (1 + decay), 1 / (1 + decay))


def _binary(xp: Any, x: Array, y: Array, not_y: Array, w: Array) -> tuple[Array, Array, Array]:
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    value = _times(xp, w * y, _softplus(xp, -x)) + _times(xp, not_y, _softplus(xp, x))
    value = xp.where(xp.isnan(x), x, value)
    return value, not_y * p - w * y * q, (w * y + not_y) * p * q


def _sigmoid_focal(
    xp: Any, x: Array, y: Array, w: Array, gamma: float, alpha: float, balances: float
) -> tuple[Array, Array, Array]:
    """An alpha below 0 is w."""
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    value, first, second = _binary(xp, x, y, 1 - y, xp.ones_like(x))
    share, rest = (w, 1 - w) if alpha < 0 else (alpha, 1 - alpha)
    scale = share * y + rest * (1 - y) if balances else xp.ones_like(x)
    wrong = y * q + (1 - y) * p  # 1 - p_t
    power = xp.where(xp.isnan(x), x, scale * _power(xp, wrong, y * p + (1 - y) * q, gamma))
    slope = xp.where(wrong == 0, 1 - 2 * y, (1 - 2 * y) * p * q / wrong)  # of log(wrong)
    curvature = (gamma - 1) * slope**2 + slope * (q - p)
    return (
        _times(xp, xp.where(value == math.inf, scale, power), value),  # where the power underflows, too
        power * (first + gamma * _times(xp, slope, value)),
        power * (second + 2 * gamma * first * slope + gamma * _times(xp, curvature, value)),
    )


def _asymmetric(
    xp: Any, x: Array, y: Array, gamma_pos: float, gamma_neg: float, clip: float, root: float, root_low: float
) -> tuple[Array, Array, Array]:
    """The root in two parts is where sigma is `clip`; sigma(x) - sigma(root) is formed without cancelling."""
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    shifted, rest, moves = p, q, xp.ones_like(x)
    if clip:
        high = float(xp.asarray(root, dtype=x.dtype))
        gap = (high - x) + ((root - high) + root_low)
        moves = xp.where(gap < 0, 1.0, 0 * p)  # NaN stays NaN
        shifted = xp.where(gap < 0, p * (1 - clip) * -xp.expm1(gap), 0 * p)
        rest = xp.where(gap < 0, q + clip, 1.0 + 0 * p)
    log_rest = xp.where(shifted < 0.5, xp.log1p(-shifted), xp.log(rest)) if clip else -_softplus(xp, x)
    s1, s2 = p * q * moves, p * q * (q - p) * moves  # derivatives of `shifted`
    ratio = s1 / rest if clip else p
    value = -_times(xp, y, -_softplus(xp, -x)) - _times(xp, 1 - y, log_rest)
    first = -y * q + (1 - y) * ratio
    second = y * p * q + (1 - y) * (ratio * (q - p * clip / rest) if clip else p * q)
    wrong = y * q + (1 - y) * shifted
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    power = xp.where(gamma == 0, 1.0, _power(xp, wrong, y * p + (1 - y) * rest, gamma))
    slope = xp.where(wrong == 0, 0.0, (-y * p * q + (1 - y) * s1) / wrong)
    bend = xp.where(wrong == 0, 0.0, (-y * p * q * (q - p) + (1 - y) * s2) / wrong)
    curvature = gamma * ((gamma - 1) * slope**2 + bend)
    return (
        _times(xp, xp.where(value == math.inf, 1.0, power), value),
        power * (first + _times(xp, gamma * slope, value)),
        power * (second + 2 * gamma * first * slope + _times(xp, curvature, value)),
    )


def run(call: Call | ElementCall) -> Any:
    """Compute `call`; buffers are left to the caller of this function."""
    with np.errstate(all="ignore"):  # infinities and NaN are answers here
        return _OPERATIONS[call.op](call if isinstance(call, ElementCall) else _with_integer_labels(call))


def _with_integer_labels(call: Call) -> Call:
    """Return `call` with labels that are floats as integers; those that are not whole become no class."""
    y = call.labels
    if y is None or dtype_name(y.dtype) not in FLOATS:
        return call
    xp = namespace(y)
    n_classes = call.logits.shape[call.axis]
    y = xp.astype(y, xp.float64)  # narrower types would round the numbers that they are compared with
    is_label = (y >= 0) & (y < n_classes) & (y == xp.floor(y))
    if float(call.ignore_index) == call.ignore_index:
        is_label = is_label | (y == float(call.ignore_index))
    nothing = n_classes if call.ignore_index != n_classes else n_classes + 1
    return call._replace(labels=xp.astype(xp.where(is_label, y, float(nothing)), xp.int64))


def run_linear(call: LinearCall) -> tuple[Array, tuple[Array | None, ...]]:
    """Compute the linear layer, the loss of its logits, and the gradients of the layer."""
    with np.errstate(all="ignore"):
        return _linear(call)


class _Rows(NamedTuple):
    """Log-softmax and its relatives, with the class axis last."""

    u: Array  # log p; NaN all over a row without a finite maximum
    p: Array
    q: Array  # 1 - p
    is_top: Array  # the first maximum of each row
    lse: Array  # one per row
    distance: Array  # of the logits from the greatest one, transformed
    z: Array  # the sum of exp of these


def _softmax_rows(xp: Any, x: Array, call: Call | None = None) -> _Rows:
    """Return the softmax of logits, which `call` may want transformed."""
    maximum = xp.max(x, axis=-1, keepdims=True)
    usable = xp.isfinite(maximum)
    shifted = x - maximum if call is None else _distance(xp, call, x, maximum)
    shifted = xp.where(usable, shifted, math.nan)
    is_first_maximum = xp.arange(x.shape[-1]) == xp.argmax(x, axis=-1, keepdims=True)
    rest = xp.sum(xp.where(is_first_maximum, 0.0, xp.exp(shifted)), axis=-1, keepdims=True)
    u = shifted - xp.log1p(rest)
    p = xp.exp(u)
    q = xp.where(is_first_maximum, rest / (1 + rest), 1 - p)
    greatest = maximum if call is None else _transform(xp, call, maximum)[0]
    lse = xp.where(usable, greatest + xp.log1p(rest), maximum)
    return _Rows(u, p, q, is_first_maximum, lse[..., 0], shifted, 1 + rest)


def _distance(xp: Any, call: Call, x: Array, maximum: Array) -> Array:
    """Return f(x) - f(maximum) of what `_transform` makes of them, the difference first."""
    if not call.numbers.softcap:
        return 2 * ((x / 2 - maximum / 2) / call.numbers.temperature)  # the difference alone may be beyond the type
    a, b = x / call.numbers.softcap, maximum / call.numbers.softcap
    w = (x / 2 - maximum / 2) / call.numbers.softcap  # (a - b) / 2
    # tanh(a) - tanh(b) = sinh(a - b) / (cosh(a) cosh(b)), without what overflows
    same_sign = (a > 0) == (b > 0)
    nearest = xp.where(same_sign, xp.minimum(xp.abs(a), xp.abs(b)), 0.0)
    ends = (1 + xp.exp(-2 * xp.abs(a))) * (1 + xp.exp(-2 * xp.abs(b)))
    capped = call.numbers.softcap * (2 * xp.expm1(4 * w) * xp.exp(-2 * nearest) / ends) / call.numbers.temperature
    return xp.where(xp.isinf(x), x, capped)  # infinities stay


def _logits(xp: Any, call: Call) -> Array:
    """Return the logits with the class axis last, in the dtype of the computation."""
    x = xp.moveaxis(call.logits, call.axis, -1)
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


def _transform(xp: Any, call: Call, x: Array) -> tuple[Array, Array, Array]:
    """Return softcap and temperature applied to x, with the first derivative, and the second over that."""
    if not call.numbers.softcap:
        return x / call.numbers.temperature, xp.ones_like(x) / call.numbers.temperature, xp.zeros_like(x)
    z = x / call.numbers.softcap
    decay = xp.exp(-xp.abs(z))
    sech = 2 * decay / (1 + decay**2)  # its square is 1 - tanh(z)^2 without the cancellation
    value = xp.where(x == -math.inf, x, call.numbers.softcap * xp.tanh(z))  # -inf is padding and stays -inf
    value = xp.where(x == math.inf, x, value)
    slope = sech / call.numbers.temperature * sech  # sech^2 alone may be subnormal
    return value / call.numbers.temperature, slope, -2 * xp.tanh(z) / call.numbers.softcap


class _Target(NamedTuple):
    """What the target mode decides: the coefficients and each row's share of the mean's denominator."""

    a: Array
    share: Array
    removed: Array  # bool, one per row: it counts nowhere, whatever it holds
    invalid: Array  # bool, one per row: a bad label that nobody checked


def _coefficients(xp: Any, call: Call, x: Array, kept: Array) -> _Target:
    n_classes, eps = x.shape[-1], call.numbers.label_smoothing
    rows = x.shape[:-1]
    one = xp.ones(rows, dtype=x.dtype)
    s = one if call.sample_weight is None else xp.astype(call.sample_weight, x.dtype)
    w = xp.ones(n_classes, dtype=x.dtype) if call.weight is None else xp.astype(call.weight, x.dtype)
    uniform = xp.astype(kept, x.dtype) / xp.sum(xp.astype(kept, x.dtype), axis=-1, keepdims=True)
    removed = _removed(xp, call)
    if call.probabilities is not None:
        q = xp.astype(xp.moveaxis(call.probabilities, call.axis, -1), x.dtype)
        a = w * ((1 - eps) * q + (eps * uniform if eps else 0.0))
        share, invalid = s, xp.zeros(rows, dtype=xp.bool)
    else:
        onehot = _onehot(xp, call.labels, n_classes)
        own_weight = xp.sum(onehot * w, axis=-1)
        a = (1 - eps) * own_weight[..., None] * onehot + (eps * uniform * w if eps else 0.0)
        share, invalid = s * (one if call.weight is None else own_weight), ~xp.any(onehot > 0, axis=-1)
    a = xp.where(removed[..., None], 0.0, s[..., None] * a)
    return _Target(a, xp.where(removed, 0.0, share), removed, ~removed & invalid)


def _removed(xp: Any, call: Call) -> Array:
    """Return which rows count nowhere: of weight 0, without a class left, or with the label to ignore."""
    rows = call.logits.shape[: call.axis] + call.logits.shape[call.axis + 1 :]
    removed = xp.zeros(rows, dtype=xp.bool)
    if call.sample_weight is not None:
        removed = removed | (call.sample_weight == 0)
    if call.where is not None:
        removed = removed | ~xp.any(call.where, axis=call.axis)
    if call.labels is not None:
        removed = removed | _equal(xp, call.labels, call.ignore_index)
    return removed


def _onehot(xp: Any, labels: Array, n_classes: int) -> Array:
    classes = xp.astype(xp.arange(n_classes), xp.int64)
    return xp.astype(classes == xp.astype(labels, xp.int64)[..., None], xp.float32)


def _equal(xp: Any, labels: Array, value: int) -> Array:
    limits = xp.iinfo(labels.dtype)
    possible = limits.min <= value <= limits.max
    return labels == value if possible else xp.zeros(labels.shape, dtype=xp.bool)


def _loss(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = namespace(call.logits)
    x = _logits(xp, call)
    kept = xp.ones(x.shape, dtype=xp.bool) if call.where is None else xp.moveaxis(call.where, call.axis, -1)
    target = _coefficients(xp, call, x, kept)
    x = xp.where(kept, x, -math.inf)
    x = xp.where(target.removed[..., None], 0.0, x)
    x = xp.where(target.invalid[..., None], math.nan, x)
    _, slope, bend = _transform(xp, call, x)
    rows = _softmax_rows(xp, x, call)
    p, q, lse = rows.p, rows.q, rows.lse

    # A term with a = 0 is 0 whatever phi is: weight 0 and probability 0 silence even an infinity.
    terms = (_times(xp, target.a, f) for f in PHI[call.loss](xp, rows.u, call.numbers.parameter))
    loss, grad, hess = _row_derivatives(xp, rows, *terms)
    if call.numbers.z_loss:
        s = (
            call.numbers.z_loss
            if call.sample_weight is None
            else call.numbers.z_loss * xp.astype(call.sample_weight, x.dtype)
        )
        loss = loss + s * lse * lse
        s, lse = (2 * s * xp.ones_like(lse))[..., None], lse[..., None]
        # lse last: it may be infinite, and where p is 0 nothing moves
        grad = grad + _times(xp, s * p, lse)
        hess = hess + s * p**2 + _times(xp, s * p * q, lse)
    hess = (hess * slope if not call.numbers.softcap else hess * slope + grad * bend) * slope
    grad = grad * slope

    nan_row = xp.isnan(rows.u[..., 0])
    loss = xp.where(target.removed, 0.0, xp.where(nan_row, math.nan, loss))
    return _reduced(xp, call, loss, grad, hess, target.share, target.removed[..., None] | ~kept)


def _row_derivatives(xp: Any, rows: _Rows, value: Array, first: Array, second: Array) -> tuple[Array, Array, Array]:
    """Return loss, gradient and Hessian diagonal of a sum over classes, of terms with derivatives by u."""
    p, q = rows.p, rows.q
    grad = first * q - _sum_of_others(xp, first, rows.is_top) * p
    hess = second * q * q + _sum_of_others(xp, second, rows.is_top) * p**2
    hess = hess - xp.sum(first, axis=-1, keepdims=True) * p * q
    return xp.sum(value, axis=-1), grad, hess


def _reduced(
    xp: Any, call: Call, loss: Array, grad: Array, hess: Array, share: Array, silent: Array
) -> tuple[Array, Array | None, Array | None]:
    """Return what the call asks for, from rows with the classes last and their shares of the denominator.

    Derivatives are 0 where they are `silent`.
    """
    if call.reduction != "none":
        loss = xp.sum(loss)
    if call.reduction == "mean":
        denominator = xp.sum(share)
        loss = xp.where(denominator == 0, math.nan, loss / denominator)
        undefined = math.nan if bool(xp.any(share != 0)) else 0.0  # weights that cancel, or there are none
        grad = xp.where(denominator == 0, undefined, grad / denominator)
        hess = xp.where(denominator == 0, undefined, hess / denominator)
    grad, hess = xp.where(silent, 0.0, grad), xp.where(silent, 0.0, hess)
    return (
        loss,
        _like_logits(xp, call, grad) if call.return_grad else None,
        _like_logits(xp, call, hess) if call.return_hess else None,
    )


def _nll(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = namespace(call.logits)
    u = _logits(xp, call)
    target = _coefficients(xp, call, u, xp.ones(u.shape, dtype=xp.bool))
    loss = xp.where(target.invalid, math.nan, xp.sum(_times(xp, target.a, -u), axis=-1))
    grad, hess = (xp.where(target.invalid[..., None], math.nan, d) for d in (-target.a, xp.zeros_like(u)))
    return _reduced(xp, call, loss, grad, hess, target.share, target.removed[..., None])


def _distillation(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = namespace(call.logits)
    student = _logits(xp, call)
    dtype = student.dtype
    if call.teacher.dtype == xp.float64:
        student = xp.astype(student, xp.float64)
    kept = xp.ones(student.shape, dtype=xp.bool) if call.where is None else xp.moveaxis(call.where, call.axis, -1)
    teacher = xp.astype(xp.moveaxis(call.teacher, call.axis, -1), student.dtype)
    if call.teacher_indices is not None:  # -inf for the classes that the teacher does not have
        indices = xp.moveaxis(call.teacher_indices, call.axis, -1)
        known = _onehot(xp, indices, student.shape[-1]) > 0
        teacher = xp.max(xp.where(known, teacher[..., None], -math.inf), axis=-2)
    student, teacher = xp.where(kept, student, -math.inf), xp.where(kept, teacher, -math.inf)
    rows, of_teacher = _softmax_rows(xp, student, call), _softmax_rows(xp, teacher, call)
    zero = xp.zeros_like(student)
    above, above_of_teacher = (
        _difference(xp, x / 2, zero, xp.max(x, axis=-1, keepdims=True) / 2, zero) for x in (student, teacher)
    )
    high, low = _difference(xp, *above, *above_of_teacher)
    loss, grad, hess = _pair_derivatives(xp, call, rows, of_teacher, high, low)
    sick = xp.isnan(rows.u[..., 0]) | xp.isnan(of_teacher.u[..., 0])
    loss = xp.where(sick, math.nan, loss)
    grad, hess = (xp.where(kept, xp.where(sick[..., None], math.nan, d), 0.0) for d in (grad, hess))
    s = xp.ones_like(loss) if call.sample_weight is None else xp.astype(call.sample_weight, loss.dtype)
    removed = _removed(xp, call)
    loss = xp.where(removed, 0.0, xp.where(sick, math.nan, _times(xp, s, loss)))
    grad, hess = (
        s[..., None] * grad / call.numbers.temperature,
        s[..., None] * hess / call.numbers.temperature / call.numbers.temperature,
    )
    loss, *derivatives = _reduced(xp, call, loss, grad, hess, xp.where(removed, 0.0, s), removed[..., None] | ~kept)
    return xp.astype(loss, dtype), *derivatives


def _difference(xp: Any, a: Array, a_low: Array, b: Array, b_low: Array) -> tuple[Array, Array]:
    """Return a - b of numbers in two parts, in two parts: the second is what the first rounds away (Knuth)."""
    high = a - b
    c = high - a
    low = (a - (high - c)) - (b + c) + (a_low - b_low)
    return high, xp.where(xp.isfinite(low), low, 0.0)


def _pair_derivatives(
    xp: Any, call: Call, rows: _Rows, of_teacher: _Rows, high: Array, low: Array
) -> tuple[Array, Array, Array]:
    """Return the divergence of each row, gradient and Hessian diagonal, from differences of logits, not of p and t.

    Half of these comes in two parts: they may be beyond the type themselves, and their differences keep their digits.

    With a class's d1 = log(p / t) (reverse) or log(2 p / (p + t)) (js), and d2 its derivative by log p, they are
    ``p e`` and ``p ((1 - 2 p) (e + d2) + p sum(p d2))`` with ``e = d1 - sum(p d1)``, whatever is added to all d1.
    """
    p, q, t = rows.p, rows.q, of_teacher.p
    x, y = rows.distance, of_teacher.distance
    nowhere = xp.isinf(x) & xp.isinf(y)
    gap = xp.where(nowhere, 0.0, 2 * ((high + low) / call.numbers.temperature))
    excess = xp.where(gap > 0, -xp.exp(x) * xp.expm1(-gap), xp.exp(y) * xp.expm1(gap))
    ratio = xp.sum(excess, axis=-1, keepdims=True) / of_teacher.z
    apart = xp.where(xp.abs(ratio) < 0.5, xp.log1p(ratio), xp.log(rows.z / of_teacher.z))
    d = gap - apart
    values, second = DIVERGENCES[call.loss](xp, p, t, d)
    loss = xp.sum(values, axis=-1)
    if call.loss == "forward":
        return loss, xp.where(d > 0, -p * xp.expm1(-d), t * xp.expm1(d)), p * q
    top = xp.argmax(xp.astype(rows.is_top, xp.int8), axis=-1, keepdims=True)
    gap_top, high_top, low_top = (xp.take_along_axis(a, top, axis=-1) for a in (gap, high, low))
    # less that of the top class, so that nothing common to all classes is rounded
    first = xp.where(nowhere, 0.0, 2 * (((high - high_top) + (low - low_top)) / call.numbers.temperature))
    if call.loss == "js":
        d_top, share_top = gap_top - apart, xp.take_along_axis(second, top, axis=-1)
        close = -xp.log1p(share_top * xp.expm1(xp.where(xp.abs(first) < 1, -first, 0.0)))
        first = xp.where(xp.abs(first) < 1, close, _softplus(xp, -d_top) - _softplus(xp, -d))
    e = first - xp.sum(_times(xp, p, first), axis=-1, keepdims=True)
    if call.loss == "reverse":  # infinite where the teacher has nothing, and its neighbours with it
        e = xp.where(xp.isinf(loss)[..., None], xp.where(t == 0, xp.full_like(t, math.inf), -math.inf), e)
    scale = 0.5 if call.loss == "js" else 1.0
    # p is near 1 for one class at most: its own share of the sum of p d2 is taken together with (1 - 2 p) d2
    others = _sum_of_others(xp, p * second, rows.is_top)
    hess = _times(xp, q - p, e) + q**2 * second + p * others
    return loss, scale * _times(xp, p, e), scale * _times(xp, p, hess)


def _element(call: ElementCall) -> tuple[Array, Array | None, Array | None]:
    xp = namespace(call.logits)
    scalar = xp.float64 if dtype_name(call.logits.dtype) == "float64" else xp.float32
    operands = call.logits, call.target, call.pos_weight, call.weight, call.sample_weight
    is_wide = any(a is not None and dtype_name(a.dtype) == "float64" for a in operands)
    dtype = xp.float64 if is_wide else xp.float32  # no operand is rounded
    x, y = xp.astype(call.logits, dtype), xp.astype(call.target, dtype)
    w, weight, s = (
        xp.ones_like(x) if factor is None else xp.astype(factor, dtype)
        for factor in (call.pos_weight, call.weight, call.sample_weight)
    )
    jet = ELEMENTS[call.formula](xp, x, y, w, *call.params)
    removed = (weight == 0) | (s == 0)
    per_row = 1 if call.axis is None else x.shape[call.axis]
    denominator: Any = per_row
    if call.reduction == "mean":
        denominator = xp.sum(s)
    elif call.reduction == "batchmean":
        per_batch = math.prod(x.shape[1:])
        denominator = xp.sum(s) / per_batch if per_batch else x.shape[0]
    share = xp.where(xp.asarray(denominator == 0), math.nan, 1 / xp.asarray(denominator, dtype=dtype))
    factor = weight * s  # times the share first: before, a sum may be beyond the type whose mean is not
    share_of_loss = 1 / per_row if call.reduction == "none" else share
    loss, grad, hess = (
        xp.where(removed, 0.0, factor * by * f) for by, f in zip((share_of_loss, share, share), jet, strict=True)
    )
    if call.reduction != "none":
        loss = xp.where(xp.isnan(share), math.nan, xp.sum(loss))
    elif call.axis is not None:
        loss = xp.sum(loss, axis=call.axis)
    return (
        xp.astype(loss, scalar),
        xp.astype(grad, call.logits.dtype) if call.return_grad else None,
        xp.astype(hess, call.logits.dtype) if call.return_hess else None,
    )


def _sum_of_others(xp: Any, x: Array, is_top: Array) -> Array:
    """Return the sum of each row without the entry itself; for the top entry, whose share may be all, term by term."""
    without_top = xp.sum(xp.where(is_top, 0.0, x), axis=-1, keepdims=True)
    return xp.where(is_top, without_top, xp.sum(x, axis=-1, keepdims=True) - x)


def _like_logits(xp: Any, call: Call, x: Array) -> Array:
    return xp.astype(xp.moveaxis(x, -1, call.axis), call.logits.dtype)


def _linear(call: LinearCall) -> tuple[Array, tuple[Array | None, ...]]:
    xp, loss = namespace(call.inputs), _with_integer_labels(call.loss)
    dtype = xp.float64 if call.inputs.dtype == xp.float64 else xp.float32
    x, weight = xp.astype(call.inputs, dtype), xp.astype(call.weight, dtype)
    removed = _removed(xp, loss)
    x = xp.where(removed[..., None], 0.0, x)  # it may hold NaN
    logits = xp.matmul(x, weight.T)
    if call.bias is not None:
        logits = logits + xp.astype(call.bias, dtype)
    value, g, _ = _loss(loss._replace(logits=logits))
    if g is None:
        return value, (None, None, None)
    d_inputs = xp.where(removed[..., None], 0.0, xp.matmul(g, weight))
    n_rows = math.prod(removed.shape)
    g, x = xp.reshape(g, (n_rows, g.shape[-1])), xp.reshape(x, (n_rows, x.shape[-1]))
    grads = (d_inputs, xp.matmul(g.T, x), None if call.bias is None else xp.sum(g, axis=0))
    dtypes = (call.inputs.dtype if out is None else out.dtype for out in call.grad_out)
    return value, tuple(
        None if grad is None else xp.astype(grad, dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )


def _remaining(xp: Any, call: Call, x: Array) -> tuple[Array, Array]:
    """Return logits of which removed classes are -inf, and which classes are left."""
    if call.where is None:
        return x, xp.ones(x.shape, dtype=xp.bool)
    kept = xp.moveaxis(call.where, call.axis, -1)
    return xp.where(kept, x, -math.inf), kept


def _softmax(call: Call) -> Array:
    xp = namespace(call.logits)
    x, kept = _remaining(xp, call, _logits(xp, call))
    return _like_logits(xp, call, xp.where(kept, _softmax_rows(xp, x, call).p, 0.0))


def _log_softmax(call: Call) -> Array:
    xp = namespace(call.logits)
    x, kept = _remaining(xp, call, _logits(xp, call))
    return _like_logits(xp, call, xp.where(kept, _softmax_rows(xp, x, call).u, -math.inf))


def _logsumexp(call: Call) -> Array:
    xp = namespace(call.logits)
    return _softmax_rows(xp, _remaining(xp, call, _logits(xp, call))[0]).lse


def _stats(call: Call) -> LogitStats:
    xp = namespace(call.logits)
    x = _logits(xp, call)
    rows = _softmax_rows(xp, x)
    is_target = _onehot(xp, call.labels, x.shape[-1]) > 0
    known = xp.any(is_target, axis=-1) & ~_equal(xp, call.labels, call.ignore_index)
    target_logit = xp.where(known, xp.sum(xp.where(is_target, x, 0.0), axis=-1), math.nan)
    rank = xp.sum(xp.astype(x > target_logit[..., None], xp.int64), axis=-1)
    is_nan = xp.isnan(x)
    first_nan = xp.argmax(xp.astype(is_nan, xp.int8), axis=-1)
    return LogitStats(
        lse=rows.lse,
        target_logit=target_logit,
        argmax=xp.astype(xp.where(xp.any(is_nan, axis=-1), first_nan, xp.argmax(x, axis=-1)), xp.int64),
        rank=xp.where(known & ~xp.any(is_nan, axis=-1), rank, -1),
        entropy=-xp.sum(xp.where(rows.p == 0, 0.0, rows.p * rows.u), axis=-1),
    )


_OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "loss": _loss,
    "nll": _nll,
    "distillation": _distillation,
    "element": _element,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "stats": _stats,
}

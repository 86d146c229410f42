"""The oracle: every operation in the plainest array code, and the backend of libraries that have no kernels.

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
from array_api_compat import array_namespace

from xce._call import Array, Call, LinearCall, LogitStats
from xce._elements import ElementCall

# phi -> its value, first and second derivative at u = log p; the last argument is its parameter.
PHI: dict[str, Callable[[Any, Array, float], tuple[Array, Array, Array]]] = {
    "cross_entropy": lambda xp, u, _: (-u, xp.full_like(u, -1.0), xp.zeros_like(u)),
    "focal_loss": lambda xp, u, gamma: _focal(xp, u, gamma),
    "poly_loss": lambda xp, u, epsilon: (
        -u - epsilon * xp.expm1(u),
        -1.0 - epsilon * xp.exp(u),
        -epsilon * xp.exp(u),
    ),
    "generalized_cross_entropy": lambda xp, u, q: (
        (-xp.expm1(q * u) / q, -xp.exp(q * u), -q * xp.exp(q * u))
        if q
        else (-u, xp.full_like(u, -1.0), xp.zeros_like(u))
    ),
}


def _focal(xp: Any, u: Array, gamma: float) -> tuple[Array, Array, Array]:
    p, q = xp.exp(u), -xp.expm1(u)
    power = q**gamma
    # p u / q, which is -1 in the limit p = 1 and 0 in the limit p = 0
    slope = xp.where(q == 0, -1.0, xp.where(p == 0, 0.0, p * u / q))
    second = xp.where(q == 0, 0.0, gamma * p * power / q * (2 + xp.where(p == 0, 0.0, u) - (gamma - 1) * slope))
    return -power * u, power * (gamma * slope - 1), second


# divergence -> a class's share of it and two derivatives by u, at u = log p of the student and v = log p of the teacher
DIVERGENCES: dict[str, Callable[[Any, Array, Array], tuple[Array, Array, Array]]] = {
    "forward": lambda xp, u, v: (_xlogr(xp, xp.exp(v), v, u), -xp.exp(v), xp.zeros_like(u)),
    "reverse": lambda xp, u, v: (
        _xlogr(xp, xp.exp(u), u, v),
        xp.where(xp.exp(u) == 0, 0.0, xp.exp(u) * (u - v + 1)),
        xp.where(xp.exp(u) == 0, 0.0, xp.exp(u) * (u - v + 2)),
    ),
    "js": lambda xp, u, v: _jensen_shannon(xp, u, v),
}


def _xlogr(xp: Any, x: Array, log_x: Array, log_y: Array) -> Array:
    """Return x log(x / y), 0 where x is 0."""
    return xp.where(x == 0, 0.0, x * (log_x - log_y))


def _jensen_shannon(xp: Any, u: Array, v: Array) -> tuple[Array, Array, Array]:
    p, t = xp.exp(u), xp.exp(v)
    mean = xp.logaddexp(u, v) - math.log(2)
    own = _xlogr(xp, p, u, mean)
    share = xp.where(p == 0, 0.0, p * t / (p + t))
    return (own + _xlogr(xp, t, v, mean)) / 2, own / 2, (own + share) / 2


# element formula -> value, first and second derivative at x; y is the target, w the `pos_weight`
ELEMENTS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    "binary_cross_entropy": lambda xp, x, y, w, clamp: (
        _times(xp, y, -xp.maximum(xp.log(x), xp.full_like(x, clamp)))
        + _times(xp, 1 - y, -xp.maximum(xp.log1p(-x), xp.full_like(x, clamp))),
        (x - y) / xp.maximum(x * (1 - x), xp.full_like(x, 1e-12)),
        y / xp.maximum(x, xp.full_like(x, 1e-12)) ** 2 + (1 - y) / xp.maximum(1 - x, xp.full_like(x, 1e-12)) ** 2,
    ),
    "binary_cross_entropy_with_logits": lambda xp, x, y, w, smoothing: _binary(
        xp, x, y * (1 - smoothing) + smoothing / 2, w
    ),
    "sigmoid_focal_loss": lambda xp, x, y, w, alpha, gamma: _sigmoid_focal(xp, x, y, alpha, gamma),
    "asymmetric_loss": lambda xp, x, y, w, *params: _asymmetric(xp, x, y, *params),
    "soft_margin_loss": lambda xp, x, y, w: (
        _softplus(xp, -y * x),
        -y * _sigmoid(xp, -y * x),
        y**2 * _sigmoid(xp, y * x) * _sigmoid(xp, -y * x),
    ),
    "kl_div": lambda xp, x, y, w: (_times(xp, y, xp.log(y) - x), -y, xp.zeros_like(x)),
    "kl_div_log_target": lambda xp, x, y, w: (_times(xp, xp.exp(y), y - x), -xp.exp(y), xp.zeros_like(x)),
}


def _times(xp: Any, a: Array, x: Array) -> Array:
    """Return a x, 0 where a is 0."""
    return xp.where(a == 0, 0.0, a * x)


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(xp: Any, x: Array) -> Array:
    decay = xp.exp(-xp.abs(x))
    return xp.where(x < 0, decay / (1 + decay), 1 / (1 + decay))


def _binary(xp: Any, x: Array, y: Array, w: Array) -> tuple[Array, Array, Array]:
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    value = _times(xp, w * y, _softplus(xp, -x)) + _times(xp, 1 - y, _softplus(xp, x))
    return value, (1 - y) * p - w * y * q, (w * y + 1 - y) * p * q


def _sigmoid_focal(xp: Any, x: Array, y: Array, alpha: float, gamma: float) -> tuple[Array, Array, Array]:
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    value, first, second = _binary(xp, x, y, xp.ones_like(x))
    scale = xp.ones_like(x) if alpha < 0 else alpha * y + (1 - alpha) * (1 - y)
    wrong = y * q + (1 - y) * p  # 1 - p_t
    power = scale * wrong**gamma
    slope = xp.where(wrong == 0, 1 - 2 * y, (1 - 2 * y) * p * q / wrong)  # of log(wrong)
    curvature = (gamma - 1) * slope**2 + slope * (q - p)
    return (
        _times(xp, power, value),
        power * (first + gamma * _times(xp, slope, value)),
        power * (second + 2 * gamma * first * slope + gamma * _times(xp, curvature, value)),
    )


def _asymmetric(
    xp: Any, x: Array, y: Array, gamma_pos: float, gamma_neg: float, clip: float
) -> tuple[Array, Array, Array]:
    p, q = _sigmoid(xp, x), _sigmoid(xp, -x)
    shifted = xp.maximum(p - clip, xp.zeros_like(x))
    moves = xp.astype(p > clip, x.dtype)
    rest = q if clip == 0 else 1 - shifted
    log_rest = -_softplus(xp, x) if clip == 0 else xp.log1p(-shifted)
    s1, s2 = p * q * moves, p * q * (q - p) * moves  # derivatives of `shifted`
    ratio = p if clip == 0 else s1 / rest
    value = -_times(xp, y, -_softplus(xp, -x)) - _times(xp, 1 - y, log_rest)
    first = -y * q + (1 - y) * ratio
    second = y * p * q + (1 - y) * (p * q if clip == 0 else ratio * (q - p) + ratio**2)
    wrong = y * q + (1 - y) * shifted
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    power = xp.where(gamma == 0, 1.0, wrong**gamma)
    slope = xp.where(wrong == 0, 0.0, (-y * p * q + (1 - y) * s1) / wrong)
    bend = xp.where(wrong == 0, 0.0, (-y * p * q * (q - p) + (1 - y) * s2) / wrong)
    curvature = gamma * ((gamma - 1) * slope**2 + bend)
    return (
        _times(xp, power, value),
        power * (first + _times(xp, gamma * slope, value)),
        power * (second + 2 * gamma * first * slope + _times(xp, curvature, value)),
    )


def run(call: Call | ElementCall) -> Any:
    """Compute `call`; buffers are left to the caller of this function."""
    with np.errstate(all="ignore"):  # infinities and NaN are answers here
        return _OPERATIONS[call.op](call)


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


def _softmax_rows(xp: Any, x: Array) -> _Rows:
    maximum = xp.max(x, axis=-1, keepdims=True)
    usable = xp.isfinite(maximum)
    shifted = x - xp.where(usable, maximum, math.nan)
    is_first_maximum = xp.arange(x.shape[-1]) == xp.argmax(x, axis=-1, keepdims=True)
    rest = xp.sum(xp.where(is_first_maximum, 0.0, xp.exp(shifted)), axis=-1, keepdims=True)
    u = shifted - xp.log1p(rest)
    p = xp.exp(u)
    q = xp.where(is_first_maximum, rest / (1 + rest), 1 - p)
    lse = xp.where(usable, maximum + xp.log1p(rest), maximum)
    return _Rows(u, p, q, is_first_maximum, lse[..., 0])


def _logits(xp: Any, call: Call) -> Array:
    """Return the logits with the class axis last, in the dtype of the computation."""
    x = xp.moveaxis(call.logits, call.axis, -1)
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


def _transform(xp: Any, call: Call, x: Array) -> tuple[Array, Array, Array]:
    """Return softcap and temperature applied to x, with the first and second derivative."""
    if call.softcap is None:
        return x / call.temperature, xp.full_like(x, 1 / call.temperature), xp.zeros_like(x)
    z = x / call.softcap
    decay = xp.exp(-2 * xp.abs(z))
    sech2 = 4 * decay / (1 + decay) ** 2  # 1 - tanh(z)^2 without its cancellation
    value = xp.where(x == -math.inf, x, call.softcap * xp.tanh(z))  # -inf is padding and stays -inf
    value = xp.where(x == math.inf, x, value)
    slope = sech2 / call.temperature
    return value / call.temperature, slope, -2 * xp.tanh(z) * slope / call.softcap


class _Target(NamedTuple):
    """What the target mode decides: the coefficients and each row's share of the mean's denominator."""

    a: Array
    share: Array
    ignored: Array  # bool, one per row
    invalid: Array  # bool, one per row: a bad label that nobody checked


def _coefficients(xp: Any, call: Call, x: Array, kept: Array) -> _Target:
    n_classes, eps = x.shape[-1], call.label_smoothing
    rows = x.shape[:-1]
    one = xp.ones(rows, dtype=x.dtype)
    s = one if call.sample_weight is None else xp.astype(call.sample_weight, x.dtype)
    w = xp.ones(n_classes, dtype=x.dtype) if call.weight is None else xp.astype(call.weight, x.dtype)
    uniform = xp.astype(kept, x.dtype) / xp.sum(xp.astype(kept, x.dtype), axis=-1, keepdims=True)
    if call.target.ndim == call.logits.ndim:  # probabilities
        q = xp.astype(xp.moveaxis(call.target, call.axis, -1), x.dtype)
        a = w * ((1 - eps) * q + (eps * uniform if eps else 0.0))
        nowhere = xp.zeros(rows, dtype=xp.bool)
        return _Target(s[..., None] * a, s, nowhere, nowhere)
    onehot = _onehot(xp, call.target, n_classes)
    ignored = _equal(xp, call.target, call.ignore_index)
    own_weight = xp.sum(onehot * w, axis=-1)
    a = (1 - eps) * own_weight[..., None] * onehot + (eps * uniform * w if eps else 0.0)
    share = xp.where(ignored, 0.0, s * (one if call.weight is None else own_weight))
    a = xp.where(ignored[..., None], 0.0, s[..., None] * a)
    return _Target(a, share, ignored, ~ignored & ~xp.any(onehot > 0, axis=-1))


def _onehot(xp: Any, labels: Array, n_classes: int) -> Array:
    classes = xp.astype(xp.arange(n_classes), xp.int64)
    return xp.astype(classes == xp.astype(labels, xp.int64)[..., None], xp.float32)


def _equal(xp: Any, labels: Array, value: int) -> Array:
    limits = xp.iinfo(labels.dtype)
    possible = limits.min <= value <= limits.max
    return labels == value if possible else xp.zeros(labels.shape, dtype=xp.bool)


def _loss(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = array_namespace(call.logits)
    x = _logits(xp, call)
    kept = xp.ones(x.shape, dtype=xp.bool) if call.where is None else xp.moveaxis(call.where, call.axis, -1)
    target = _coefficients(xp, call, x, kept)
    x = xp.where(kept, x, -math.inf)
    x = xp.where(target.ignored[..., None], 0.0, x)
    x = xp.where(target.invalid[..., None], math.nan, x)
    x, slope, curvature = _transform(xp, call, x)
    rows = _softmax_rows(xp, x)
    p, q, lse = rows.p, rows.q, rows.lse

    # A term with a = 0 is 0 whatever phi is: weight 0 and probability 0 silence even an infinity.
    terms = (_times(xp, target.a, f) for f in PHI[call.phi](xp, rows.u, call.phi_param))
    loss, grad, hess = _row_derivatives(xp, rows, *terms)
    if call.z_loss:
        s = call.z_loss if call.sample_weight is None else call.z_loss * xp.astype(call.sample_weight, x.dtype)
        loss = loss + s * lse**2
        s, lse = (s * xp.ones_like(lse))[..., None], lse[..., None]
        grad = grad + s * 2 * lse * p
        hess = hess + s * 2 * (p**2 + lse * p * q)
    grad, hess = grad * slope, hess * slope**2 + grad * curvature

    nan_row = xp.isnan(rows.u[..., 0])
    loss = xp.where(target.ignored, 0.0, xp.where(nan_row, math.nan, loss))
    silent = target.ignored[..., None] | ~kept
    grad, hess = xp.where(silent, 0.0, grad), xp.where(silent, 0.0, hess)
    return _reduced(xp, call, loss, grad, hess, target.share)


def _row_derivatives(xp: Any, rows: _Rows, value: Array, first: Array, second: Array) -> tuple[Array, Array, Array]:
    """Return loss, gradient and Hessian diagonal of a sum over classes, of terms with derivatives by u."""
    p, q = rows.p, rows.q
    grad = first * q - _sum_of_others(xp, first, rows.is_top) * p
    hess = second * q**2 + _sum_of_others(xp, second, rows.is_top) * p**2
    hess = hess - xp.sum(first, axis=-1, keepdims=True) * p * q
    return xp.sum(value, axis=-1), grad, hess


def _reduced(
    xp: Any, call: Call, loss: Array, grad: Array, hess: Array, share: Array
) -> tuple[Array, Array | None, Array | None]:
    """Return what the call asks for, from rows with the classes last and their shares of the denominator."""
    if call.reduction != "none":
        loss = xp.sum(loss)
    if call.reduction == "mean":
        denominator = xp.sum(share)
        loss = xp.where(denominator == 0, math.nan, loss / denominator)
        grad = xp.where(denominator == 0, 0.0, grad / denominator)
        hess = xp.where(denominator == 0, 0.0, hess / denominator)
    return (
        loss,
        _like_logits(xp, call, grad) if call.return_grad else None,
        _like_logits(xp, call, hess) if call.return_hess else None,
    )


def _nll(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = array_namespace(call.logits)
    u = _logits(xp, call)
    target = _coefficients(xp, call, u, xp.ones(u.shape, dtype=xp.bool))
    loss = xp.where(target.invalid, math.nan, xp.sum(_times(xp, target.a, -u), axis=-1))
    grad, hess = (xp.where(target.invalid[..., None], math.nan, d) for d in (-target.a, xp.zeros_like(u)))
    return _reduced(xp, call, loss, grad, hess, target.share)


def _distillation(call: Call) -> tuple[Array, Array | None, Array | None]:
    xp = array_namespace(call.logits)
    student = _logits(xp, call)
    teacher = xp.astype(xp.moveaxis(call.target, call.axis, -1), student.dtype)
    if call.teacher_indices is not None:  # -inf for the classes that the teacher does not have
        indices = xp.moveaxis(call.teacher_indices, call.axis, -1)
        known = _onehot(xp, indices, student.shape[-1]) > 0
        teacher = xp.max(xp.where(known, teacher[..., None], -math.inf), axis=-2)
    rows = _softmax_rows(xp, student / call.temperature)
    v = _softmax_rows(xp, teacher / call.temperature).u
    loss, grad, hess = _row_derivatives(xp, rows, *DIVERGENCES[call.phi](xp, rows.u, v))
    sick = xp.isnan(rows.u[..., 0]) | xp.isnan(v[..., 0])
    loss = xp.where(sick, math.nan, loss)
    grad, hess = (xp.where(sick[..., None], math.nan, d) for d in (grad, hess))
    s = xp.ones_like(loss) if call.sample_weight is None else xp.astype(call.sample_weight, loss.dtype)
    loss = xp.where(sick, math.nan, _times(xp, s, loss))
    grad, hess = s[..., None] * grad / call.temperature, s[..., None] * hess / call.temperature**2
    return _reduced(xp, call, loss, grad, hess, s)


def _element(call: ElementCall) -> tuple[Array, Array | None, Array | None]:
    xp = array_namespace(call.logits)
    x = call.logits
    x = x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)
    y = xp.astype(call.target, x.dtype)
    w, weight, s = (
        xp.ones_like(x) if factor is None else xp.astype(factor, x.dtype)
        for factor in (call.pos_weight, call.weight, call.sample_weight)
    )
    loss, grad, hess = (_times(xp, weight * s, f) for f in ELEMENTS[call.formula](xp, x, y, w, *call.params))
    per_row = 1 if call.axis is None else x.shape[call.axis]
    denominator: Any = per_row
    if call.reduction == "mean":
        denominator = xp.sum(s)
    elif call.reduction == "batchmean":
        per_batch = math.prod(x.shape[1:])
        denominator = xp.sum(s) / per_batch if per_batch else x.shape[0]
    if call.reduction == "none":
        loss = loss if call.axis is None else xp.sum(loss, axis=call.axis) / per_row
    else:
        loss = xp.where(xp.asarray(denominator == 0), math.nan, xp.sum(loss) / denominator)
    zero = xp.asarray(denominator == 0)
    grad, hess = (xp.where(zero, 0.0, f / denominator) for f in (grad, hess))
    return (
        loss,
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
    xp, loss = array_namespace(call.inputs), call.loss
    dtype = xp.float64 if call.inputs.dtype == xp.float64 else xp.float32
    x, weight = xp.astype(call.inputs, dtype), xp.astype(call.weight, dtype)
    ignored = xp.zeros(x.shape[:-1], dtype=xp.bool)
    if loss.target.ndim < loss.logits.ndim:
        ignored = _equal(xp, loss.target, loss.ignore_index)
    x = xp.where(ignored[..., None], 0.0, x)  # not read: it may hold NaN
    logits = xp.matmul(x, weight.T)
    if call.bias is not None:
        logits = logits + xp.astype(call.bias, dtype)
    value, g, _ = _loss(loss._replace(logits=logits))
    if g is None:
        return value, (None, None, None)
    d_inputs = xp.where(ignored[..., None], 0.0, xp.matmul(g, weight))
    n_rows = math.prod(ignored.shape)
    g, x = xp.reshape(g, (n_rows, g.shape[-1])), xp.reshape(x, (n_rows, x.shape[-1]))
    grads = (d_inputs, xp.matmul(g.T, x), None if call.bias is None else xp.sum(g, axis=0))
    dtypes = (call.inputs.dtype if out is None else out.dtype for out in call.grad_out)
    return value, tuple(
        None if grad is None else xp.astype(grad, dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )


def _softmax(call: Call) -> Array:
    xp = array_namespace(call.logits)
    return _like_logits(xp, call, _softmax_rows(xp, _logits(xp, call) / call.temperature).p)


def _log_softmax(call: Call) -> Array:
    xp = array_namespace(call.logits)
    return _like_logits(xp, call, _softmax_rows(xp, _logits(xp, call) / call.temperature).u)


def _logsumexp(call: Call) -> Array:
    xp = array_namespace(call.logits)
    return _softmax_rows(xp, _logits(xp, call)).lse


def _stats(call: Call) -> LogitStats:
    xp = array_namespace(call.logits)
    x = _logits(xp, call)
    rows = _softmax_rows(xp, x)
    is_target = _onehot(xp, call.target, x.shape[-1]) > 0
    known = xp.any(is_target, axis=-1) & ~_equal(xp, call.target, call.ignore_index)
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

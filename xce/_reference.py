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

# phi -> its value, first and second derivative at u = log p; the last argument is its parameter.
PHI: dict[str, Callable[[Any, Array, float], tuple[Array, Array, Array]]] = {
    "cross_entropy": lambda xp, u, _: (-u, xp.full_like(u, -1.0), xp.zeros_like(u)),
}


def run(call: Call) -> Any:
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
    u, p, q, is_top, lse = _softmax_rows(xp, x)

    # A term with a = 0 is 0 whatever phi is: weight 0 and probability 0 silence even an infinity.
    a = target.a
    value, first, second = (xp.where(a == 0, 0.0, a * f) for f in PHI[call.phi](xp, u, call.phi_param))
    loss = xp.sum(value, axis=-1)
    grad = first * q - _sum_of_others(xp, first, is_top) * p
    hess = second * q**2 + _sum_of_others(xp, second, is_top) * p**2
    hess = hess - xp.sum(first, axis=-1, keepdims=True) * p * q
    if call.z_loss:
        s = call.z_loss if call.sample_weight is None else call.z_loss * xp.astype(call.sample_weight, x.dtype)
        loss = loss + s * lse**2
        s, lse = (s * xp.ones_like(lse))[..., None], lse[..., None]
        grad = grad + s * 2 * lse * p
        hess = hess + s * 2 * (p**2 + lse * p * q)
    grad, hess = grad * slope, hess * slope**2 + grad * curvature

    nan_row = xp.isnan(u[..., 0])
    loss = xp.where(target.ignored, 0.0, xp.where(nan_row, math.nan, loss))
    silent = target.ignored[..., None] | ~kept
    grad, hess = xp.where(silent, 0.0, grad), xp.where(silent, 0.0, hess)

    if call.reduction != "none":
        loss = xp.sum(loss)
    if call.reduction == "mean":
        denominator = xp.sum(target.share)
        loss = xp.where(denominator == 0, math.nan, loss / denominator)
        grad = xp.where(denominator == 0, 0.0, grad / denominator)
        hess = xp.where(denominator == 0, 0.0, hess / denominator)
    return (
        loss,
        _like_logits(xp, call, grad) if call.return_grad else None,
        _like_logits(xp, call, hess) if call.return_hess else None,
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


_OPERATIONS: dict[str, Callable[[Call], Any]] = {
    "loss": _loss,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "stats": _stats,
}

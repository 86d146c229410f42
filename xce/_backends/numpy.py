"""NumPy arrays: allocate the results and hand everything to the compiled kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from xce import _cpu, _threads
from xce._backends import _scan
from xce._call import Call, LogitStats, dtype_name

__all__ = ["run", "scan_labels", "scan_values", "view", "wrap"]

# what `run` of the kernels is to compute
_LOSS, _SOFTMAX, _LOG_SOFTMAX, _LOGSUMEXP, _STATS, _STATE = range(6)
_MAPS = {"softmax": _SOFTMAX, "log_softmax": _LOG_SOFTMAX}

# size in bytes, negative for a signed type
_LABEL_KINDS = {
    np.dtype(f"{sign}int{8 * size}"): size * (1 if sign else -1) for sign in ("u", "") for size in (1, 2, 4, 8)
}

_SMALLEST, _LARGEST = 1e-30, 1e30  # denominators that float32 can divide by

_KERNELS: dict[np.dtype[Any], tuple[ModuleType, np.dtype[Any]]] = {}


def view(x: Any, name: str) -> Any:
    """Return `x` as a plain array: the base array of a subclass, the 0-d array of a NumPy scalar."""
    return np.asarray(x)


def wrap(result: Any) -> Any:
    """Return `result`, a NumPy scalar instead of a 0-d array."""
    return result[()] if isinstance(result, np.ndarray) and result.ndim == 0 else result


def scan_labels(target: Any, n_classes: int, ignore_index: int) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1."""
    labels = target if target.ndim == 1 else target.reshape(-1)
    place: int = _cpu.kernels("float32").scan_labels(labels, _LABEL_KINDS[target.dtype], n_classes, ignore_index)
    return place


def scan_values(values: Any, finite: bool) -> int:
    """Return the flat C-order index of the first entry that is negative, NaN or, with `finite`, infinite; or -1."""
    widened = _scan.widen(values)
    if values.size == 0 or (widened.min() >= 0 and not (finite and widened.max() == np.inf)):
        return -1
    return _scan.scan_values(values, finite)


def run(call: Call) -> Any:
    """Compute `call`."""
    logits = call.logits
    kernels, scalar = _KERNELS.get(logits.dtype) or _load(logits.dtype)
    return _RUN[call.op](call, kernels, scalar)


def _load(dtype: np.dtype[Any]) -> tuple[ModuleType, np.dtype[Any]]:
    """The kernels of a storage type, and the type that they compute in."""
    name = dtype_name(dtype)
    _KERNELS[dtype] = found = _cpu.kernels(name), np.dtype("float64" if name == "float64" else "float32")
    return found


def _rows(call: Call) -> tuple[int, ...]:
    shape: tuple[int, ...] = call.logits.shape
    return shape[: call.axis] + shape[call.axis + 1 :]


def _loss(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    logits, axis, target, weight, sample_weight = (
        call.logits,
        call.axis,
        call.target,
        call.weight,
        call.sample_weight,
    )
    kind = _LABEL_KINDS.get(target.dtype, 0)
    label, q = (target, None) if kind else (None, target)
    q_is_scalar = q is not None and q.dtype != logits.dtype
    if q_is_scalar:
        q = _cast(q, scalar)
        q_is_scalar = scalar != logits.dtype
    if weight is not None:
        weight = np.ascontiguousarray(_cast(weight, scalar))
    if sample_weight is not None:
        sample_weight = _cast(sample_weight, scalar)
    rows = _rows(call)
    denominator = 1.0
    if call.reduction == "mean":
        denominator = _denominator(kernels, call, label, kind, weight, sample_weight)
        if logits.dtype == np.float32 and 0 < denominator < np.inf and not _SMALLEST < denominator < _LARGEST:
            return _loss_in_float64(call)
    value = np.empty(rows, scalar) if call.reduction == "none" else None
    grad = hess = None
    if call.return_grad:
        grad = np.empty_like(logits, subok=False) if call.grad_out is None else call.grad_out
    if call.return_hess:
        hess = np.empty_like(logits, subok=False) if call.hess_out is None else call.hess_out

    total = 0.0
    if logits.size:
        total = kernels.run(
            _LOSS, kernels.PHI[call.phi], call.phi_param, logits, axis, label, kind, q, call.where, weight,
            sample_weight, q_is_scalar, call.ignore_index, call.label_smoothing, call.temperature, call.softcap or 0.0,
            call.z_loss, 1.0 / denominator if denominator else 0.0, value, grad, hess, None, None, None, None, None,
            _threads.team(call.n_threads, logits.size),
        )  # fmt: skip
    if value is not None:
        return value, grad, hess
    if call.reduction == "mean":
        total = total / denominator if denominator else float("nan")
    return scalar.type(total), grad, hess


def _loss_in_float64(call: Call) -> Any:
    """The mean over weights whose sum has no reciprocal in float32."""
    float64 = np.dtype(np.float64)
    loss, *derivatives = run(call._replace(logits=call.logits.astype(float64), grad_out=None, hess_out=None))
    results: list[Any] = [np.float32(loss)]
    for x, out in zip(derivatives, (call.grad_out, call.hess_out), strict=True):
        if x is None or out is None:
            results.append(None if x is None else x.astype(np.float32))
        else:
            out[...] = x
            results.append(out)
    return tuple(results)


def _denominator(kernels: ModuleType, call: Call, label: Any, kind: int, weight: Any, sample_weight: Any) -> float:
    """What the mean divides by."""
    n_classes = call.logits.shape[call.axis]
    if label is not None:
        s = None if sample_weight is None else sample_weight.reshape(-1)
        return float(kernels.denominator(label.reshape(-1), kind, n_classes, call.ignore_index, weight, s))
    if sample_weight is not None:
        return float(np.sum(sample_weight, dtype=np.float64))
    return float(call.logits.size / n_classes)


def _map(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    out = np.empty_like(call.logits, subok=False) if call.grad_out is None else call.grad_out
    _run_rows(call, kernels, _MAPS[call.op], grad=out)
    return out


def _logsumexp(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    lse = np.empty(_rows(call), scalar)
    _run_rows(call, kernels, _LOGSUMEXP, value=lse)
    return lse


def _stats(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> LogitStats:
    rows = _rows(call)
    lse, label_logit, entropy = (np.empty(rows, scalar) for _ in range(3))
    top, rank = (np.empty(rows, np.int64) for _ in range(2))
    _run_rows(call, kernels, _STATS, value=lse, label_logit=label_logit, top=top, rank=rank, spread=entropy)
    return LogitStats(lse, label_logit, top, rank, entropy)


def _run_rows(
    call: Call,
    kernels: ModuleType,
    what: int,
    *,
    value: Any = None,
    grad: Any = None,
    label_logit: Any = None,
    top: Any = None,
    rank: Any = None,
    spread: Any = None,
    linear: Any = None,
) -> None:
    """Whatever is not a loss."""
    if call.logits.size:
        kernels.run(
            what, 0, 0.0, call.logits, call.axis, call.target,
            0 if call.target is None else _LABEL_KINDS[call.target.dtype], None, call.where, call.weight, None,
            False, call.ignore_index, 0.0, call.temperature, call.softcap or 0.0, 0.0, 1.0, value, grad, None,
            label_logit, top, rank, spread, linear, _threads.team(call.n_threads, call.logits.size),
        )  # fmt: skip


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in the floating type of the computation."""
    return x if x.dtype == dtype else _scan.widen(x).astype(dtype)


def _state(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> tuple[Any, Any, Any, Any]:
    """What a shard of classes contributes to its rows, see `xce.state`: max, rest, logit of the label, linear sum."""
    top, rest, label_logit, linear = (np.empty(_rows(call), scalar) for _ in range(4))
    weight = None if call.weight is None else np.ascontiguousarray(_cast(call.weight, scalar))
    call = call._replace(weight=weight)
    _run_rows(call, kernels, _STATE, value=top, spread=rest, label_logit=label_logit, linear=linear)
    # rows of -inf only: nothing to add, unless a NaN hides there
    empty = (top == -np.inf) & ~np.isnan(_scan.widen(call.logits)).any(axis=call.axis)
    rest[empty] = -1
    return top, rest, label_logit, linear


_RUN = {
    "loss": _loss,
    "softmax": _map,
    "log_softmax": _map,
    "logsumexp": _logsumexp,
    "stats": _stats,
    "state": _state,
}

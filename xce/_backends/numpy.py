"""NumPy arrays: allocate the results and hand everything to the compiled kernels."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from xce import _cpu, _threads
from xce._backends import _scan
from xce._backends._numbers import (
    FLOAT32,
    FLOAT64,
    LABEL_KINDS,
    LARGEST,
    NUMBER_KINDS,
    SMALLEST,
    common_dtype,
    distinct,
    has_options_beyond,
    in_wider,
    is_beyond,
    is_plain,
)
from xce._call import Call, LinearCall, LogitStats, dtype_name
from xce._elements import ElementCall

__all__ = ["from_numpy", "place", "run", "run_linear", "scan_labels", "scan_values", "to_numpy", "view", "wrap"]

# what `run` of the kernels is to compute
_LOSS, _SOFTMAX, _LOG_SOFTMAX, _LOGSUMEXP, _STATS, _STATE, _NLL = range(7)
_MAPS = {"softmax": _SOFTMAX, "log_softmax": _LOG_SOFTMAX}

_PORTION = 1 << 24  # labels between two looks for Ctrl-C

_KERNELS: dict[np.dtype[Any], tuple[ModuleType, np.dtype[Any]]] = {}


def place(x: Any) -> None:
    """Return None: no device needs to be entered."""


def view(x: Any, name: str) -> Any:
    """Return `x` as a plain array: the base array of a subclass, the 0-d array of a NumPy scalar."""
    return np.asarray(x)


def to_numpy(x: Any) -> Any:
    """Return `x`."""
    return x


def from_numpy(x: Any, like: Any) -> Any:
    """Return `x`."""
    return x


def wrap(result: Any) -> Any:
    """Return `result`, a NumPy scalar instead of a 0-d array."""
    return result[()] if isinstance(result, np.ndarray) and result.ndim == 0 else result


def scan_labels(target: Any, n_classes: int, ignore_index: int) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1."""
    labels = target if target.ndim == 1 else target.reshape(-1)
    scan, kind = _cpu.kernels("float32").scan_labels, LABEL_KINDS[target.dtype]
    if labels.size <= _PORTION:
        return scan(labels, kind, n_classes, ignore_index)  # type: ignore[no-any-return]
    for start in range(0, labels.size, _PORTION):
        place: int = scan(labels[start : start + _PORTION], kind, n_classes, ignore_index)
        if place >= 0:
            return start + place
    return -1


def scan_values(values: Any, low: float, high: float | None) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1."""
    if values.dtype.itemsize == 2 and values.dtype not in NUMBER_KINDS:
        kernels, kind = _cpu.kernels(dtype_name(values.dtype)), 0
    else:  # whole numbers too, which float64 holds or rounds to others out of any range
        kernels, kind = _cpu.kernels("float64" if values.dtype != FLOAT32 else "float32"), NUMBER_KINDS[values.dtype]
    n_threads = 1 if values.size < _threads.SERIAL_BELOW else _threads.team(None, values.size)
    highest = np.inf if high is None else high
    return kernels.scan_range(values, kind, low, highest, high is None, n_threads)  # type: ignore[no-any-return]


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    logits = call.logits
    kernels, scalar = _KERNELS.get(logits.dtype) or _load(logits.dtype)
    if call.op == "element":
        return _elements(call, kernels, scalar)
    if scalar is not FLOAT64 and not is_plain(call) and _is_beyond_float32(call):
        return _in_wider(call, FLOAT64)
    return _RUN[call.op](call, kernels, scalar)


def run_linear(call: LinearCall) -> Any:
    """Compute `call`."""
    from xce._backends import _linear  # needs this module

    return _linear.run(call)


def _load(dtype: np.dtype[Any]) -> tuple[ModuleType, np.dtype[Any]]:
    """The kernels of a storage type, and the type that they compute in."""
    name = dtype_name(dtype)
    _KERNELS[dtype] = found = _cpu.kernels(name), FLOAT64 if name == "float64" else FLOAT32
    return found


def _rows(call: Call) -> tuple[int, ...]:
    shape: tuple[int, ...] = call.logits.shape
    return shape[: call.axis] + shape[call.axis + 1 :]


def _loss(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    # fmt: off
    (
        op, phi, phi_param, logits, axis, target, weight, sample_weight, where, ignore_index, label_smoothing,
        temperature, softcap, z_loss, reduction, return_grad, return_hess, grad, hess, n_threads, *_,
    ) = call
    # fmt: on
    kind, what, phis = LABEL_KINDS.get(target.dtype, 0), _LOSS, kernels.PHI
    label, q, q_is_scalar = (target, None, False) if kind else (None, target, False)
    indices = call.teacher_indices
    if op == "nll":
        what = _NLL
    elif op == "distillation":
        phis, common = kernels.DIVERGENCES, common_dtype(logits.dtype, target.dtype)
        if common != logits.dtype:
            return _in_wider(call, common)
        q = _cast(target, common)
    elif q is not None and q.dtype != logits.dtype:
        q, q_is_scalar = _cast(q, scalar), scalar != logits.dtype
    if weight is not None:
        weight = np.ascontiguousarray(_cast(weight, scalar))
    if sample_weight is not None:
        sample_weight = _cast(sample_weight, scalar)
    denominator, value = 1.0, None
    if reduction == "mean":
        denominator = _denominator(kernels, call, label, kind, weight, sample_weight)
        if not SMALLEST < denominator < LARGEST and is_beyond(denominator) and scalar is not FLOAT64:
            return _in_wider(call, FLOAT64)
    elif reduction == "none":
        value = np.empty(_rows(call), scalar)
    if return_grad and grad is None:
        grad = np.empty_like(logits, subok=False)
    if return_hess and hess is None:
        hess = np.empty_like(logits, subok=False)

    total, size = 0.0, logits.size
    if size:
        total = kernels.run(
            what, phis[phi], phi_param, logits, axis, label, kind, q, where, weight, sample_weight, q_is_scalar,
            ignore_index, label_smoothing, temperature, softcap or 0.0, z_loss,
            1.0 / denominator if denominator else 0.0, value, grad, hess, None, None, None, None, None,
            1 if size < _threads.SERIAL_BELOW else _threads.team(n_threads, size),
            indices, 0 if indices is None else LABEL_KINDS[indices.dtype],
        )  # fmt: skip
    if value is not None:
        return value, grad, hess
    if reduction == "mean":
        total = total / denominator if denominator else math.nan
    return _scalar(total, scalar), grad, hess


def _scalar(total: float, scalar: np.dtype[Any]) -> Any:
    """A reduced loss in its type, infinite if that does not hold it."""
    if abs(total) <= LARGEST:
        return scalar.type(total)
    with np.errstate(over="ignore"):
        return np.float64(total).astype(scalar)


def _is_beyond_float32(call: Call) -> bool:
    return has_options_beyond(call) or _has_beyond(call.weight, call.sample_weight)


def _has_beyond(*weights: Any) -> bool:
    for weight in weights:
        if weight is not None and weight.dtype == np.float64 and weight.size:
            weight = distinct(weight)
            smallest = weight.min(where=weight > 0, initial=1.0)
            if is_beyond(float(smallest)) or is_beyond(float(weight.max())):
                return True
    return False


def _in_wider(call: Any, dtype: np.dtype[Any]) -> Any:
    return in_wider(call, dtype, run, _cast, _narrow)


def _narrow(x: Any, logits: Any, out: Any) -> Any:
    """`x` in the type of the logits, in the buffer `out` if there is one."""
    if x is None:
        return None
    if out is None:
        out = np.empty_like(logits, subok=False)
    with np.errstate(all="ignore"):
        if out.dtype == _scan.BFLOAT16:
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            out["bfloat16"] = np.where(np.isnan(x), (bits >> 16) | 0x40, rounded)
        else:
            out[...] = x
    return out


def _denominator(kernels: ModuleType, call: Call, label: Any, kind: int, weight: Any, sample_weight: Any) -> float:
    """What the mean divides by."""
    n_classes = call.logits.shape[call.axis]
    if sample_weight is None and label is not None and label.ndim == 1 and label.size <= _PORTION:
        return kernels.denominator(label, kind, n_classes, call.ignore_index, weight, None)  # type: ignore[no-any-return]
    if label is None and sample_weight is None:
        return float(call.logits.size / n_classes)
    w = None if label is None else weight  # class weights do not count for probabilities
    label = label if label is None or label.ndim == 1 else label.reshape(-1)
    s = None if sample_weight is None else sample_weight.reshape(-1)
    total = 0.0
    for start in range(0, call.logits.size // n_classes, _PORTION):
        part = slice(start, start + _PORTION)
        total += kernels.denominator(
            None if label is None else label[part],
            kind,
            n_classes,
            call.ignore_index,
            w,
            None if s is None else s[part],
        )
    return total


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
            0 if call.target is None else LABEL_KINDS[call.target.dtype], None, call.where, call.weight, None,
            False, call.ignore_index, 0.0, call.temperature, call.softcap or 0.0, 0.0, 1.0, value, grad, None,
            label_logit, top, rank, spread, linear, _threads.team(call.n_threads, call.logits.size),
        )  # fmt: skip


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in the floating type of the computation."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        return _scan.widen(x).astype(dtype)


def _state(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> tuple[Any, Any, Any, Any]:
    """What a shard of classes contributes to its rows, see `xce.state`: max, rest, logit of the label, linear sum."""
    top, rest, label_logit, linear = (np.empty(_rows(call), scalar) for _ in range(4))
    weight = None if call.weight is None else np.ascontiguousarray(_cast(call.weight, scalar))
    call = call._replace(weight=weight)
    _run_rows(call, kernels, _STATE, value=top, spread=rest, label_logit=label_logit, linear=linear)
    return top, rest, label_logit, linear


def _elements(call: ElementCall, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    x, y, axis = call.logits, call.target, call.axis
    pos_weight, weight, sample_weight = call.pos_weight, call.weight, call.sample_weight
    if scalar is not FLOAT64 and any(map(is_beyond, call.params)):
        return _in_wider(call, FLOAT64)
    if not (pos_weight is weight is sample_weight is None):
        if scalar is not FLOAT64 and _has_beyond(pos_weight, weight, sample_weight):
            return _in_wider(call, FLOAT64)
        pos_weight, weight, sample_weight = (
            w if w is None else _cast_broadcast(w, scalar) for w in (pos_weight, weight, sample_weight)
        )
    kind = 0
    if y.dtype != x.dtype:
        kind = NUMBER_KINDS.get(y.dtype, 0)
        if not kind:  # the other type of 16 bits
            y, kind = _cast(y, scalar), NUMBER_KINDS[scalar]
    per_row = 1 if axis is None else x.shape[axis]
    denominator = float(per_row)
    if call.reduction in ("mean", "batchmean"):
        denominator = float(x.size) if sample_weight is None else _sum(sample_weight)
        if call.reduction == "batchmean":
            per_batch = math.prod(x.shape[1:])
            denominator = denominator / per_batch if per_batch else float(len(x))
        if scalar is not FLOAT64 and is_beyond(denominator):
            return _in_wider(call, FLOAT64)
    grad = np.empty_like(x, subok=False) if call.return_grad and call.grad_out is None else call.grad_out
    hess = np.empty_like(x, subok=False) if call.return_hess and call.hess_out is None else call.hess_out
    value, row = None, 0
    if call.reduction == "none":
        value = np.empty(x.shape if axis is None else x.shape[:axis] + x.shape[axis + 1 :], scalar)
        row = 0 if axis is None else per_row

    operands = [x, y, pos_weight, weight, sample_weight, grad, hess]
    if axis is not None:  # the classes last, for the means of rows
        operands = [a if a is None else np.moveaxis(a, axis, -1) for a in operands]
    x, y, *weights, grad_at, hess_at = operands
    total, size = 0.0, x.size
    if size:
        total = kernels.run_elements(
            kernels.ELEMENT_FORMULAS[call.formula], call.params, x, y, kind, *weights,
            1.0 / denominator if denominator else 0.0, row, value, grad_at, hess_at,
            1 if size < _threads.SERIAL_BELOW else _threads.team(call.n_threads, size),
        )  # fmt: skip
    if value is None:
        value = _scalar(total / denominator if denominator else math.nan, scalar)
    return value, grad, hess


def _cast_broadcast(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in a floating type, entries that share their memory still sharing it."""
    return x if x.dtype == dtype else np.broadcast_to(_cast(distinct(x), dtype), x.shape)


def _sum(x: Any) -> float:
    """The sum of a broadcast array, always added in the same order."""
    once = np.require(distinct(x), requirements=["C", "A"])
    repetitions = int(x.size) // max(int(once.size), 1)
    return float(np.sum(once, dtype=np.float64)) * repetitions


_RUN = {
    "nll": _loss,
    "distillation": _loss,
    "loss": _loss,
    "softmax": _map,
    "log_softmax": _map,
    "logsumexp": _logsumexp,
    "stats": _stats,
    "state": _state,
}

"""The kernels of a CPU, on arrays of NumPy."""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from xce import _cpu, _threads
from xce._arrays import BFLOAT16, dtype_name, widen
from xce._call import Call, ElementCall, LinearCall, LogitStats
from xce._engines.numbers import (
    FLOAT32,
    FLOAT32_ABOVE,
    FLOAT32_BELOW,
    FLOAT64,
    distinct,
    has_options_beyond,
    is_beyond,
    is_plain,
    is_steep,
    unbounded,
)

HAS_KERNELS = True
# what `run` of the kernels is to compute
_WHAT = {"loss": 0, "distillation": 0, "softmax": 1, "log_softmax": 2, "logsumexp": 3, "stats": 4, "state": 5, "nll": 6}
# what its scans look for, see elements.h
_OUTSIDE, _OUTSIDE_OR_INFINITE, _BEYOND = range(3)


_SUMMED = 1 << 24  # rows whose weights are added up at a time: a part of the bits

_KERNELS: dict[np.dtype[Any], tuple[ModuleType, np.dtype[Any]]] = {}


def to_numpy(x: Any) -> Any:
    """Return `x`."""
    return x


def from_numpy(x: Any, like: Any) -> Any:
    """Return `x`."""
    return x


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    return _cpu.kernels("float32").scan_labels(target, n_classes, ignore_index, weights)  # type: ignore[no-any-return]


def scan_repetitions(indices: Any, n_classes: int, weights: tuple[Any, ...]) -> tuple[int, int]:
    """Return the flat number of the first row with a class twice, and the smallest such class; or -1 and -1.

    The places of a row are on the last axis. Rows that one of the weights, of the rows' shape, is 0 for are left out.
    """
    return _cpu.kernels("float32").scan_repetitions(indices, n_classes, weights)  # type: ignore[no-any-return]


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    where = _classes_last(where, axis)
    once = distinct(where)
    left = np.empty(once.shape[:-1], bool)
    _cpu.kernels("float32").classes_are_left(once, left)
    return np.broadcast_to(left, where.shape[:-1])


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    what = _OUTSIDE if high is not None else _OUTSIDE_OR_INFINITE
    return _scan_range(values, weights, low, np.inf if high is None else high, what)


def _scan_range(values: Any, weights: tuple[Any, ...], low: float, high: float, what: int) -> int:
    kernels, team = _readers(values, *weights), _team(None, values.size)
    return kernels.scan_range(values, weights, low, high, what, team)  # type: ignore[no-any-return]


def _classes_last(x: Any, axis: int) -> Any:
    return x if axis == x.ndim - 1 else np.moveaxis(x, axis, -1)


def _readers(*arrays: Any) -> ModuleType:
    """The kernels that read numbers exactly; or, whole numbers beyond 2^53, rounded to others out of any range."""
    return _cpu.kernels("float32" if all(_float32_holds(a.dtype) for a in arrays) else "float64")


@cache
def _float32_holds(dtype: np.dtype[Any]) -> bool:
    """Whether the numbers of a type are numbers of float32, too."""
    return dtype_name(dtype) in ("bool", "int8", "int16", "uint8", "uint16", "float16", "bfloat16", "float32")


def _team(n_threads: int | None, size: int) -> int:
    return 1 if size < _threads.SERIAL_BELOW else _threads.team(n_threads, size)


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    logits = call.logits
    if call.op == "element":
        return _elements(call)
    kernels, scalar = _KERNELS.get(logits.dtype) or _load(logits.dtype)
    return _RUN[call.op](call, kernels, scalar)


def run_linear(call: LinearCall) -> Any:
    """Compute `call`."""
    from xce._engines import cpu_linear  # needs this module

    return cpu_linear.run(call)


def _load(dtype: np.dtype[Any]) -> tuple[ModuleType, np.dtype[Any]]:
    """The kernels of a storage type, in whatever byte order, and the type that they compute in."""
    _threads.check_environment()
    name = dtype_name(dtype)
    _KERNELS[dtype] = found = _cpu.kernels(name), FLOAT64 if name == "float64" else FLOAT32
    return found


def _rows(call: Call) -> tuple[int, ...]:
    shape: tuple[int, ...] = call.logits.shape
    return shape[: call.axis] + shape[call.axis + 1 :]


def _loss(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    logits, weight, dtype = call.logits, None, scalar
    if scalar is not FLOAT64 and _rows_need_float64(call):
        kernels, dtype = _load(FLOAT64)
    if call.weight is not None:
        weight = _class_weight(call, dtype)
    denominator, value = 1.0, None
    if call.reduction == "mean":
        denominator = _denominator(kernels, call, weight)
        if not FLOAT32_ABOVE < denominator < FLOAT32_BELOW and is_beyond(denominator) and dtype is not FLOAT64:
            kernels, dtype = _load(FLOAT64)
            weight = _class_weight(call, dtype)
            denominator = _denominator(kernels, call, weight)
    elif call.reduction == "none":
        value = np.empty(_rows(call), scalar)
    grad, hess = call.grad_out, call.hess_out
    if call.return_grad and grad is None:
        grad = _like(logits)
    if call.return_hess and hess is None:
        hess = _like(logits)

    total = 0.0
    if logits.size:
        losses = kernels.PHI if call.teacher is None else kernels.DIVERGENCES
        operands = {
            "x": logits,
            "q": call.probabilities if call.teacher is None else call.teacher,
            "where": call.where,
            "grad": grad,
            "hess": hess,
            "label": call.labels,
            "indices": call.teacher_indices,
            "sample": call.sample_weight,
            "value": value,
            "weight": weight,
        }
        scale, team = 1.0 / denominator if denominator else 0.0, _team(call.n_threads, logits.size)
        loss = losses[call.loss]
        total = kernels.run(_WHAT[call.op], loss, call.numbers, call.ignore_index, operands, call.axis, scale, team)
    if value is not None:
        return value, grad, hess
    if call.reduction == "mean":
        total = total / denominator if denominator else math.nan
    return _scalar(total, scalar), grad, hess


def _scalar(total: float, scalar: np.dtype[Any]) -> Any:
    """A reduced loss in its type, infinite if that does not hold it."""
    if abs(total) <= FLOAT32_BELOW:
        return scalar.type(total)
    with np.errstate(over="ignore"):
        return np.float64(total).astype(scalar)


def _like(x: Any) -> Any:
    """An output for the derivatives by `x`, or for what it is mapped to."""
    return np.empty_like(x, x.dtype if x.dtype.isnative else x.dtype.newbyteorder("="), subok=False)


def _class_weight(call: Call, dtype: np.dtype[Any]) -> Any:
    return None if call.weight is None else np.ascontiguousarray(_cast(call.weight, dtype))


def _rows_need_float64(call: Call) -> bool:
    """Whether float32 cannot hold an option or a weight of a call; or it has a float64 teacher."""
    if call.teacher is not None and dtype_name(call.teacher.dtype) == "float64":
        return True
    return not is_plain(call) and _is_beyond_float32(call)


def _is_beyond_float32(call: Call) -> bool:
    return has_options_beyond(call) or _has_beyond(call.weight, call.sample_weight)


def _has_beyond(
    *weights: Any, types: tuple[str, ...] = ("float64",), low: float = FLOAT32_ABOVE, high: float = FLOAT32_BELOW
) -> bool:
    """Whether weights of some types have sizes, 0 and infinity apart, that are not within low..high."""
    return any(
        _scan_range(distinct(weight), (), low, high, _BEYOND) >= 0
        for weight in weights
        if weight is not None and dtype_name(weight.dtype) in types
    )


def _narrow(x: Any, logits: Any, out: Any) -> Any:
    """`x` in the type of the logits, in the buffer `out` if there is one."""
    if x is None:
        return None
    if out is None:
        out = np.empty_like(logits, subok=False)
    with np.errstate(all="ignore"):
        if out.dtype == BFLOAT16:
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            out["bfloat16"] = np.where(np.isnan(x), (bits >> 16) | 0x40, rounded)
        else:
            out[...] = x
    return out


def _denominator(kernels: ModuleType, call: Call, weight: Any) -> float:
    """What the mean divides by: a sum of weights, and NaN where these are not 0 but cancel."""
    n_classes = call.logits.shape[call.axis]
    n_rows = call.logits.size // n_classes
    if call.labels is call.sample_weight is call.where is None:
        return float(n_rows)
    w = None if call.labels is None else weight  # class weights do not count for probabilities
    where = None if call.where is None else _classes_last(call.where, call.axis)
    total, has_terms = 0.0, False
    for start in range(0, n_rows, _SUMMED):
        subtotal, is_any = kernels.denominator(
            call.labels,
            n_classes,
            call.ignore_index,
            w,
            call.sample_weight,
            where,
            start,
            min(start + _SUMMED, n_rows),
        )
        total, has_terms = total + subtotal, has_terms or is_any
    return math.nan if has_terms and total == 0 else total


def _map(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    out = _like(call.logits) if call.grad_out is None else call.grad_out
    _run_rows(call, kernels, scalar, {"where": call.where, "grad": out})
    return out


def _logsumexp(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    lse = np.empty(_rows(call), scalar)
    _run_rows(call, kernels, scalar, {"where": call.where, "value": lse})
    return lse


def _stats(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> LogitStats:
    rows = _rows(call)
    lse, label_logit, entropy = (np.empty(rows, scalar) for _ in range(3))
    top, rank = (np.empty(rows, np.int64) for _ in range(2))
    outputs = {"value": lse, "label_logit": label_logit, "top": top, "rank": rank, "spread": entropy}
    _run_rows(call, kernels, scalar, {"label": call.labels} | outputs)
    return LogitStats(lse, label_logit, top, rank, entropy)


def _run_rows(call: Call, kernels: ModuleType, scalar: np.dtype[Any], operands: dict[str, Any]) -> None:
    """Whatever is not a loss."""
    if call.logits.size:
        if scalar is not FLOAT64 and _rows_need_float64(call):
            kernels, _ = _load(FLOAT64)
        operands, team = {"x": call.logits} | operands, _team(call.n_threads, call.logits.size)
        kernels.run(_WHAT[call.op], 0, call.numbers, call.ignore_index, operands, call.axis, 1.0, team)


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in the floating type of the computation."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        return widen(x).astype(dtype)


def _state(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> tuple[Any, Any, Any, Any]:
    """What a shard of classes contributes to its rows, see `xce.state`: max, rest, logit of the label, linear sum."""
    # where float32 is too narrow, for the host as well
    dtype = FLOAT64 if _rows_need_float64(call) else scalar
    top, rest, label_logit, linear = (np.empty(_rows(call), dtype) for _ in range(4))
    outputs = {"value": top, "spread": rest, "label_logit": label_logit, "linear": linear}
    _run_rows(call, kernels, scalar, {"label": call.labels, "weight": _class_weight(call, dtype)} | outputs)
    return top, rest, label_logit, linear


def _elements(call: ElementCall) -> Any:
    x, axis = call.logits, call.axis
    dtype = x.dtype.newbyteorder("=")
    kernels, scalar = _KERNELS.get(dtype) or _load(dtype)
    weights = call.pos_weight, call.weight, call.sample_weight
    per_row = 1 if axis is None else x.shape[axis]
    denominator = float(per_row)
    if call.reduction in ("mean", "batchmean"):
        denominator = float(x.size) if call.sample_weight is None else _sum(call.sample_weight)
        if call.reduction == "batchmean":
            per_batch = math.prod(x.shape[1:])
            denominator = denominator / per_batch if per_batch else float(len(x))
    grad = np.empty_like(x, dtype, subok=False) if call.return_grad and call.grad_out is None else call.grad_out
    hess = np.empty_like(x, dtype, subok=False) if call.return_hess and call.hess_out is None else call.hess_out
    value, row = None, 0
    if call.reduction == "none":
        value = np.empty(x.shape if axis is None else x.shape[:axis] + x.shape[axis + 1 :], scalar)
        row = 0 if axis is None else per_row

    total, size = 0.0, x.size
    if size:
        operands: tuple[Any, ...] = x, call.target, *weights, value, grad, hess
        if scalar is not FLOAT64 and _needs_float64(call, denominator):
            kernels = _cpu.kernels("float64")
        if axis is not None:  # the classes last, for the means of rows
            operands = tuple(a if a is None or a is value else _classes_last(a, axis) for a in operands)
        total = kernels.run_elements(
            kernels.ELEMENT_FORMULAS[call.formula],
            call.params,
            operands,
            1.0 / denominator if denominator else math.nan,
            row,
            _team(call.n_threads, size),
        )
    if value is None:
        value = _scalar(total / denominator if denominator else math.nan, scalar)
    return value, grad, hess


def _needs_float64(call: ElementCall, denominator: float) -> bool:
    """Whether float32 cannot hold a number of a call, or a product of its weights."""
    if is_steep(call) or is_beyond(denominator) or any(map(is_beyond, call.params)) or _has_beyond(*unbounded(call)):
        return True
    factors = [w for w in (call.weight, call.sample_weight) if w is not None]
    if len(factors) == 2:
        types, low, high = ("bfloat16", "float32", "float64"), math.sqrt(FLOAT32_ABOVE), math.sqrt(FLOAT32_BELOW)
        return _has_beyond(*factors, types=types, low=low, high=high)
    return _has_beyond(*factors)


def _sum(x: Any) -> float:
    """The sum of a broadcast array, always added in the same order."""
    once = distinct(x)
    total = _readers(once).sum_range(once, _team(None, once.size))
    return float(total) * (int(x.size) // max(int(once.size), 1))


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

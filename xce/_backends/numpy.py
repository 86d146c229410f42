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
    LARGEST,
    NUMBER_KINDS,
    SMALLEST,
    SWAPPED,
    distinct,
    has_options_beyond,
    is_beyond,
    is_plain,
    is_steep,
    number_kind,
    unbounded,
)
from xce._call import Call, LinearCall, LogitStats, dtype_name
from xce._elements import ElementCall

__all__ = [
    "classes_left", "from_numpy", "place", "run", "run_linear", "scan_labels", "scan_repetitions", "scan_values",
    "to_numpy", "view", "wrap",
]  # fmt: skip

# what `run` of the kernels is to compute
_LOSS, _SOFTMAX, _LOG_SOFTMAX, _LOGSUMEXP, _STATS, _STATE, _NLL = range(7)
_MAPS = {"softmax": _SOFTMAX, "log_softmax": _LOG_SOFTMAX}
# what its scans look for, see elements.h
_OUTSIDE, _OUTSIDE_OR_INFINITE, _BEYOND = range(3)
# whose numbers are numbers of float32, too
_FLOAT32_HOLDS = {"bool", "int8", "int16", "uint8", "uint16", "float16", "bfloat16", "float32"}


_SUMMED = 1 << 24  # rows whose weights are added up at a time: a part of the bits

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


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    kind = NUMBER_KINDS.get(target.dtype) or number_kind(target.dtype)
    kinds = tuple(number_kind(w.dtype) for w in weights) if weights else ()
    return _cpu.kernels("float32").scan_labels(  # type: ignore[no-any-return]
        target, kind, n_classes, ignore_index, weights, kinds
    )


def scan_repetitions(indices: Any, n_classes: int, weights: tuple[Any, ...]) -> tuple[int, int]:
    """Return the flat number of the first row with a class twice, and the smallest such class; or -1 and -1.

    The places of a row are on the last axis. Rows that one of the weights, of the rows' shape, is 0 for are left out.
    """
    kinds = tuple(number_kind(w.dtype) for w in weights)
    return _cpu.kernels("float32").scan_repetitions(  # type: ignore[no-any-return]
        indices, number_kind(indices.dtype), n_classes, weights, kinds
    )


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    where = np.moveaxis(where, axis, -1)
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
    kernels, kinds = _readers(values, *weights), tuple(number_kind(w.dtype) for w in weights)
    team = _team(None, values.size)
    return kernels.scan_range(  # type: ignore[no-any-return]
        values, number_kind(values.dtype), weights, kinds, low, high, what, team
    )


def _readers(*arrays: Any) -> ModuleType:
    """The kernels that read numbers exactly; or, whole numbers beyond 2^53, rounded to others out of any range."""
    short = all(dtype_name(a.dtype) in _FLOAT32_HOLDS for a in arrays)
    return _cpu.kernels("float32" if short else "float64")


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
    from xce._backends import _linear  # needs this module

    return _linear.run(call)


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
    # fmt: off
    (
        op, phi, phi_param, logits, axis, target, weight, sample_weight, where, ignore_index, label_smoothing,
        temperature, softcap, z_loss, reduction, return_grad, return_hess, grad, hess, n_threads, *_,
    ) = call
    # fmt: on
    label, kind, q, phis = target, 0, None, "PHI"
    indices = call.teacher_indices
    if op == "distillation":
        label, q, phis = None, target, "DIVERGENCES"
    elif target.ndim == logits.ndim:
        label, q = None, target
    else:
        kind = NUMBER_KINDS.get(target.dtype) or number_kind(target.dtype)
    denominator, value, dtype = 1.0, None, scalar
    if scalar is not FLOAT64 and _rows_need_float64(call):
        kernels, dtype = _load(FLOAT64)
    if weight is not None:
        weight = _class_weight(call, dtype)
    if reduction == "mean":
        denominator = _denominator(kernels, call, label, kind, weight, sample_weight)
        if not SMALLEST < denominator < LARGEST and is_beyond(denominator) and dtype is not FLOAT64:
            kernels, dtype = _load(FLOAT64)
            weight = _class_weight(call, dtype)
            denominator = _denominator(kernels, call, label, kind, weight, sample_weight)
    elif reduction == "none":
        value = np.empty(_rows(call), scalar)
    if return_grad and grad is None:
        grad = _like(logits)
    if return_hess and hess is None:
        hess = _like(logits)

    total, size = 0.0, logits.size
    if size:
        kinds = None
        if dtype is not scalar or not (q is sample_weight is None) or not logits.dtype.isnative:
            kinds = _kinds(scalar, dtype, logits, q, grad, hess, sample_weight, value)
        total = kernels.run(
            _NLL if op == "nll" else _LOSS, getattr(kernels, phis)[phi], phi_param, logits, axis, label, kind, q, where,
            weight, sample_weight, ignore_index, label_smoothing, temperature, softcap or 0.0, z_loss,
            1.0 / denominator if denominator else 0.0, value, grad, hess, None, None, None, None, None,
            1 if size < _threads.SERIAL_BELOW else _threads.team(n_threads, size),
            indices, 0 if indices is None else number_kind(indices.dtype), kinds,
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


def _like(x: Any) -> Any:
    """An output for the derivatives by `x`, or for what it is mapped to."""
    return np.empty_like(x, x.dtype if x.dtype.isnative else x.dtype.newbyteorder("="), subok=False)


def _kinds(
    scalar: np.dtype[Any],
    dtype: np.dtype[Any],
    logits: Any,
    q: Any,
    grad: Any,
    hess: Any,
    sample_weight: Any,
    value: Any,
) -> tuple[int, ...]:
    """The types of arrays for kernels that compute in `dtype`, logits being computed on in `scalar` otherwise.

    0 is the kernels' own, and nothing is converted beforehand.
    """
    of_rows = number_kind(dtype)
    own = of_rows if dtype is not scalar else number_kind(logits.dtype) % SWAPPED
    entries = (0 if a is None or (kind := number_kind(a.dtype)) == own else kind for a in (logits, q, grad, hess))
    rows = (0 if a is None or (kind := number_kind(a.dtype)) == of_rows else kind for a in (sample_weight, value))
    return *entries, *rows


def _class_weight(call: Call, dtype: np.dtype[Any]) -> Any:
    return None if call.weight is None else np.ascontiguousarray(_cast(call.weight, dtype))


def _rows_need_float64(call: Call) -> bool:
    """Whether float32 cannot hold an option or a weight of a call; or it has a float64 teacher."""
    if is_plain(call):
        return call.op == "distillation" and dtype_name(call.target.dtype) == "float64"
    return _is_beyond_float32(call) or (call.op == "distillation" and dtype_name(call.target.dtype) == "float64")


def _is_beyond_float32(call: Call) -> bool:
    return has_options_beyond(call) or _has_beyond(call.weight, call.sample_weight)


def _has_beyond(
    *weights: Any, types: tuple[str, ...] = ("float64",), low: float = SMALLEST, high: float = LARGEST
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
        if out.dtype == _scan.BFLOAT16:
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            out["bfloat16"] = np.where(np.isnan(x), (bits >> 16) | 0x40, rounded)
        else:
            out[...] = x
    return out


def _denominator(kernels: ModuleType, call: Call, label: Any, kind: int, weight: Any, sample_weight: Any) -> float:
    """What the mean divides by: a sum of weights, and NaN where these are not 0 but cancel."""
    n_classes = call.logits.shape[call.axis]
    n_rows = call.logits.size // n_classes
    if label is None and sample_weight is call.where is None:
        return float(n_rows)
    w = None if label is None else weight  # class weights do not count for probabilities
    sample_kind = 0 if sample_weight is None else number_kind(sample_weight.dtype)
    where = None if call.where is None else np.moveaxis(call.where, call.axis, -1)
    total, has_terms = 0.0, False
    for start in range(0, n_rows, _SUMMED):
        subtotal, is_any = kernels.denominator(
            label, kind, n_classes, call.ignore_index, w, sample_weight, sample_kind, where,
            start, min(start + _SUMMED, n_rows),
        )  # fmt: skip
        total, has_terms = total + subtotal, has_terms or is_any
    return math.nan if has_terms and total == 0 else total


def _map(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    out = _like(call.logits) if call.grad_out is None else call.grad_out
    _run_rows(call, kernels, scalar, _MAPS[call.op], grad=out)
    return out


def _logsumexp(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> Any:
    lse = np.empty(_rows(call), scalar)
    _run_rows(call, kernels, scalar, _LOGSUMEXP, value=lse)
    return lse


def _stats(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> LogitStats:
    rows = _rows(call)
    lse, label_logit, entropy = (np.empty(rows, scalar) for _ in range(3))
    top, rank = (np.empty(rows, np.int64) for _ in range(2))
    _run_rows(call, kernels, scalar, _STATS, value=lse, label_logit=label_logit, top=top, rank=rank, spread=entropy)
    return LogitStats(lse, label_logit, top, rank, entropy)


def _run_rows(
    call: Call,
    kernels: ModuleType,
    scalar: np.dtype[Any],
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
        dtype, kinds = scalar, None
        if scalar is not FLOAT64 and _rows_need_float64(call):
            kernels, dtype = _load(FLOAT64)
        if dtype is not scalar or not call.logits.dtype.isnative:
            kinds = _kinds(scalar, dtype, call.logits, None, grad, None, None, value)
        kernels.run(
            what, 0, 0.0, call.logits, call.axis, call.target,
            0 if call.target is None else number_kind(call.target.dtype), None, call.where, call.weight, None,
            call.ignore_index, 0.0, call.temperature, call.softcap or 0.0, 0.0, 1.0, value, grad, None,
            label_logit, top, rank, spread, linear, _threads.team(call.n_threads, call.logits.size), None, 0, kinds,
        )  # fmt: skip


def _cast(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in the floating type of the computation."""
    if x.dtype == dtype:
        return x
    with np.errstate(all="ignore"):
        return _scan.widen(x).astype(dtype)


def _state(call: Call, kernels: ModuleType, scalar: np.dtype[Any]) -> tuple[Any, Any, Any, Any]:
    """What a shard of classes contributes to its rows, see `xce.state`: max, rest, logit of the label, linear sum."""
    # where float32 is too narrow, for the host as well
    dtype = FLOAT64 if _rows_need_float64(call) else scalar
    top, rest, label_logit, linear = (np.empty(_rows(call), dtype) for _ in range(4))
    call = call._replace(weight=_class_weight(call, dtype))
    _run_rows(call, kernels, scalar, _STATE, value=top, spread=rest, label_logit=label_logit, linear=linear)
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
        own_kind = number_kind(dtype)
        if scalar is not FLOAT64 and _needs_float64(call, denominator):
            kernels, own_kind = _cpu.kernels("float64"), None
        # 0 is the storage type of the kernels
        kinds = tuple(0 if a is None or (k := number_kind(a.dtype)) == own_kind else k for a in operands)
        if axis is not None:  # the classes last, for the means of rows
            operands = tuple(a if a is None or a is value else np.moveaxis(a, axis, -1) for a in operands)
        total = kernels.run_elements(
            kernels.ELEMENT_FORMULAS[call.formula], call.params, operands, kinds,
            1.0 / denominator if denominator else math.nan, row, _team(call.n_threads, size),
        )  # fmt: skip
    if value is None:
        value = _scalar(total / denominator if denominator else math.nan, scalar)
    return value, grad, hess


def _needs_float64(call: ElementCall, denominator: float) -> bool:
    """Whether float32 cannot hold a number of a call, or a product of its weights."""
    if is_steep(call) or is_beyond(denominator) or any(map(is_beyond, call.params)) or _has_beyond(*unbounded(call)):
        return True
    factors = [w for w in (call.weight, call.sample_weight) if w is not None]
    if len(factors) == 2:
        types, low, high = ("bfloat16", "float32", "float64"), math.sqrt(SMALLEST), math.sqrt(LARGEST)
        return _has_beyond(*factors, types=types, low=low, high=high)
    return _has_beyond(*factors)


def _sum(x: Any) -> float:
    """The sum of a broadcast array, always added in the same order."""
    once = distinct(x)
    total = _readers(once).sum_range(once, number_kind(once.dtype), _team(None, once.size))
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

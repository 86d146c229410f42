"""Arguments to one checked `Call`, results back to the caller's kind of array.

This is the only place that validates, with `_check`, which coerces or explains, and `_options`, which has the rules of
options that can be checked alone.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from numpy import ndarray

from xce import _check as check
from xce._check import DIVERGENCES, NATIVE_FLOATS, NATIVE_INTEGERS, Array, dtype_name, thread_count
from xce._core import plain_row_loss
from xce._dispatch import device_of, namespace, owner_of, placed, view, view_buffer
from xce._options import DEFAULTS, NUMBERS, Numbers, checked

__all__ = [
    "Array", "Call", "LinearCall", "LogitStats", "divergence_call", "dtype_name", "finish", "finish_linear",
    "linear_call", "map_call", "nll", "outputs", "plain_views", "row_call", "row_loss", "thread_count",
    "viewed_buffers", "wrapped",
]  # fmt: skip

_PLAIN = Numbers()
_NO_ARRAYS = {bool, int, float, str, type(None)}


class Call(NamedTuple):
    """One checked computation; past this module nothing is checked again."""

    op: str  # "loss" | "nll" | "distillation" | "softmax" | "log_softmax" | "logsumexp" | "stats" | "state"
    logits: Array  # any shape with at least one axis, floating
    axis: int  # the class axis, 0..ndim-1
    loss: str = ""  # the scalar function of the log-probability, or of two: the divergence
    numbers: Any = _PLAIN  # a `Numbers`: the parameter of that function, and the options that are numbers
    labels: Array = None  # None, or class indices of the rows' shape
    probabilities: Array = None  # None, or of the logits' shape
    teacher: Array = None  # None, or the logits of a teacher, of the logits' shape or that of
    teacher_indices: Array = None  # the classes that they are of
    weight: Array = None  # None, or (C,), floating
    sample_weight: Array = None  # None, or of the rows' shape, floating
    where: Array = None  # None, or bool, of the logits' shape
    ignore_index: int = -100
    reduction: str = "none"  # "mean" | "sum" | "none"
    return_grad: bool = False
    return_hess: bool = False
    grad_out: Array = None  # None, or buffers like the logits (also softmax's `out`)
    hess_out: Array = None
    n_threads: int | None = None
    validate: bool = True  # False: the data was not read, and a bad label makes its row NaN


class LinearCall(NamedTuple):
    """A checked cross entropy of ``inputs @ weight.T + bias``."""

    loss: Call  # of logits that are never formed: an array of their shape and dtype, without memory, stands for them
    inputs: Array  # (..., D), floating, as the next two
    weight: Array  # (C, D)
    bias: Array  # None, or (C,)
    chunk_rows: int | None
    grad_out: tuple[Array, Array, Array]  # None, or buffers like inputs, weight and bias


class LogitStats(NamedTuple):
    """Row statistics of logits, each of the logits' shape without the class axis.

    Attributes
    ----------
    lse : array of float32 or float64
        Log of the sum of the exponentials of the row's logits, in nats.
    target_logit : array of float32 or float64
        Logit of the target class; NaN for an ignored row.
    argmax : array of int64
        Class with the largest logit, the first of several; the first NaN if there is one.
    rank : array of int64
        Number of classes with a logit strictly greater than the target's: 0 is a hit at top 1. It is -1 for
        an ignored row and for a row with a NaN.
    entropy : array of float32 or float64
        Entropy of ``softmax(logits)`` in nats.
    """

    lse: Array
    target_logit: Array
    argmax: Array
    rank: Array
    entropy: Array


def row_loss(function: str, parameter: float, logits: Array, target: Array, options: Any) -> Any:
    """Return what a public loss of rows returns; plain calls on NumPy arrays are answered by `_core` before this."""
    owner = owner_of(logits, "logits")
    if (arrays := plain_views(owner, "logits", logits, target, options)) is not None:
        result = plain_row_loss(function, parameter, *arrays, options)
        if result is not None:
            return wrapped(owner, result)
    options = checked(function, options)
    call = row_call(owner, "loss", function, parameter, logits, target, options)
    return finish(owner, call, owner.run(call), options)


def plain_views(
    owner: ModuleType, name: str, x: Array, target: Array, options: dict[str, Any]
) -> tuple[ndarray[Any, Any], ndarray[Any, Any]] | None:
    """Return the NumPy arrays that share the memory of another library's, if a call has these two and no other."""
    if type(x) is ndarray or type(target) is not type(x) or not _NO_ARRAYS.issuperset(map(type, options.values())):
        return None
    if owner.place(x) is not None or type(first := owner.view(x, name)) is not ndarray:
        return None
    second = view(owner, x, target, "target", name)
    return (first, second) if type(second) is ndarray else None


def wrapped(owner: ModuleType, result: Any) -> Any:
    """Return an array, or a tuple of them, as the caller's kind."""
    return tuple(map(owner.wrap, result)) if type(result) is tuple else owner.wrap(result)


def nll(log_probs: Array, target: Array, options: Any) -> Any:
    """Return what `nll_loss` returns."""
    owner, options = owner_of(log_probs, "log_probs"), checked("nll_loss", options)
    call = row_call(owner, "nll", "cross_entropy", 0.0, log_probs, target, options, "log_probs")
    return finish(owner, call, owner.run(call), options)


@placed(4)
def row_call(
    owner: ModuleType,
    op: str,
    loss: str,
    parameter: float,
    logits: Array,
    target: Array,
    options: dict[str, Any],
    name: str = "logits",
) -> Call:
    """Return the checked call of an operation with a target, whose options have been checked as far as alone."""
    first, given = logits, DEFAULTS | options
    logits, axis, rows = _rows(owner, first, given["axis"], name)
    target = check.view_target(owner, first, name, logits, target)
    weight, where = (_viewed(owner, first, given[key], key, name) for key in ("weight", "where"))
    sample_weight = check.view_factors(owner, first, name, logits, given["sample_weight"], "sample_weight")
    buffers = viewed_buffers(owner, first, given, name)
    is_index = type(target) is ndarray and target.shape == rows and target.dtype in NATIVE_INTEGERS
    if not is_index:
        target, is_index = check.target_mode(target, name, logits.shape, axis, rows)
        if op != "loss" and not is_index:
            raise TypeError(
                f"target has dtype {dtype_name(target.dtype)} and shape {target.shape}: expected class indices of "
                f"shape {rows}, integers or floats that are whole numbers"
            )
    n_classes, ignore_index, validate = logits.shape[axis], given["ignore_index"], given["validate"]
    if weight is not None:
        weight = check.class_weight(owner, weight, n_classes, validate)
    if sample_weight is not None:
        sample_weight = check.row_weight(owner, sample_weight, rows, validate)
    if where is not None:
        where = _mask(where, logits, name)
    if validate:
        if not is_index:
            check.probabilities(owner, target, axis, sample_weight, where)
        elif owner.scan_labels(target, n_classes, ignore_index) >= 0:
            check.labels(owner, target, n_classes, ignore_index, axis, sample_weight, where)
    inputs = {"target": target, "weight": weight, "sample_weight": sample_weight, "where": where}
    return Call(
        op=op,
        logits=logits,
        axis=axis,
        loss=loss,
        numbers=_numbers(parameter, options),
        labels=target if is_index else None,
        probabilities=None if is_index else target,
        weight=weight,
        sample_weight=sample_weight,
        where=where,
        ignore_index=ignore_index,
        validate=validate,
        **outputs(logits, name, given, buffers, inputs),
    )


def _viewed(owner: ModuleType, first: Array, x: Array, name: str, first_name: str) -> Array:
    return None if x is None else view(owner, first, x, name, first_name)


def _rows(
    owner: ModuleType, first: Array, axis: Any, name: str, *, allows_none: bool = False
) -> tuple[Array, int, tuple[int, ...]]:
    """Return the logits as they are computed on, their class axis, and the shape of the rows."""
    logits = owner.view(first, name)
    if type(logits) is not ndarray or logits.dtype not in NATIVE_FLOATS:
        logits = check.of_dtype(logits, name, *check.FLOATS)
    shape = logits.shape
    axis = check.class_axis(axis, len(shape), name)
    if shape[axis] == 0 and not allows_none:
        raise ValueError(f"{name} of shape {shape} has no classes: expected at least one on axis {axis}")
    return logits, axis, shape[:axis] + shape[axis + 1 :]


def _mask(where: Array, logits: Array, name: str) -> Array:
    """Return the classes that take part, broadcast to the logits."""
    return check.broadcast(check.typed(where, "where", "bool"), "where", logits.shape, name)


def _numbers(parameter: float, options: dict[str, Any]) -> Any:
    given = {name: value or 0.0 for name, value in options.items() if name in NUMBERS}
    return Numbers(parameter, **given) if given or parameter else _PLAIN


def viewed_buffers(owner: ModuleType, first: Array, given: dict[str, Any], name: str) -> tuple[Array, Array]:
    """Return the arrays to write derivatives to, or None."""
    grad_out, hess_out = given["grad_out"], given["hess_out"]
    if grad_out is hess_out is None:
        return None, None
    grad_out = view_buffer(owner, first, grad_out, "grad_out", name)
    return grad_out, view_buffer(owner, first, hess_out, "hess_out", name)


def outputs(
    x: Array, name: str, given: dict[str, Any], buffers: tuple[Array, Array], inputs: dict[str, Array]
) -> dict[str, Any]:
    """Return the fields of a call that say what it returns, in which buffers, and how it is computed."""
    grad_out, hess_out = buffers
    if not (grad_out is hess_out is None):
        check.asked((grad_out, given["return_grad"], "grad"), (hess_out, given["return_hess"], "hess"))
        check.buffers(x, name, {"grad_out": grad_out, "hess_out": hess_out}, inputs)
    fields = {key: given[key] for key in ("reduction", "return_grad", "return_hess", "n_threads")}
    return fields | {"grad_out": grad_out, "hess_out": hess_out}


@placed(2)
def map_call(
    owner: ModuleType, op: str, x: Array, axis: Any, options: dict[str, Any], out: Array | None = None
) -> Call:
    """Return the checked call of an operation on `x` alone, whose options have been checked as far as alone."""
    first = x
    x, axis, _ = _rows(owner, first, axis, "x", allows_none=op == "logsumexp")  # the sum of nothing is 0
    where = _viewed(owner, first, options.get("where"), "where", "x")
    if where is not None:
        where = _mask(where, x, "x")
    if out is not None:
        out = view_buffer(owner, first, out, "out", "x")
        check.buffers(x, "x", {"out": out}, {"where": where})
    n_threads = options.get("n_threads")
    return Call(op, x, axis, numbers=_numbers(0.0, options), where=where, grad_out=out, n_threads=n_threads)


@placed(1)
def divergence_call(
    owner: ModuleType, student: Array, teacher: Array, indices: Array | None, divergence: str, options: dict[str, Any]
) -> Call:
    """Return the checked call of a divergence between two arrays of logits."""
    name, first, given = "student_logits", student, DEFAULTS | options
    student, axis, rows = _rows(owner, first, given["axis"], name)
    teacher = check.of_dtype(view(owner, first, teacher, "teacher_logits", name), "teacher_logits", *check.FLOATS)
    shape, validate = student.shape, given["validate"]
    divergence = check.choice("divergence", divergence, DIVERGENCES)
    sample_weight = where = None
    if given["sample_weight"] is not None:
        sample_weight = check.view_factors(owner, first, name, student, given["sample_weight"], "sample_weight")
        sample_weight = check.row_weight(owner, sample_weight, rows, validate)
    if given["where"] is not None:
        where = _mask(view(owner, first, given["where"], "where", name), student, name)
    if indices is not None:
        indices = view(owner, first, indices, "teacher_indices", name)
        counting = sample_weight, where
        indices = check.sparse_teacher(owner, indices, teacher, shape, axis, divergence, counting, validate)
    elif teacher.shape != shape:
        raise ValueError(
            f"teacher_logits has shape {teacher.shape}: expected {shape}, the shape of {name}, "
            "unless teacher_indices says which classes they are of"
        )
    inputs = {"teacher_logits": teacher, "teacher_indices": indices, "sample_weight": sample_weight, "where": where}
    return Call(
        "distillation",
        student,
        axis,
        loss=divergence,
        numbers=_numbers(0.0, options),
        teacher=teacher,
        teacher_indices=indices,
        sample_weight=sample_weight,
        where=where,
        validate=validate,
        **outputs(student, name, given, viewed_buffers(owner, first, given, name), inputs),
    )


def finish(owner: ModuleType, call: Any, result: tuple[Array, Array | None, Array | None], given: Any) -> Any:
    """Return the loss, or the tuple of it and what was asked for: as the caller's buffers or kind of array."""
    loss, grad, hess = result
    wrap = owner.wrap
    if call.return_grad:
        grad = given.get("grad_out") if call.grad_out is not None else wrap(grad)
    if call.return_hess:
        hess = given.get("hess_out") if call.hess_out is not None else wrap(hess)
        return (wrap(loss), grad, hess) if call.return_grad else (wrap(loss), hess)
    return (wrap(loss), grad) if call.return_grad else wrap(loss)


@placed(1)
def linear_call(
    owner: ModuleType,
    inputs: Array,
    linear_weight: Array,
    target: Array,
    linear_bias: Array | None,
    chunk_rows: int | None,
    options: dict[str, Any],
) -> LinearCall:
    """Return the checked call of the loss of a linear layer."""
    x = owner.view(inputs, "inputs")
    linear_weight = view(owner, inputs, linear_weight, "linear_weight", first_name="inputs")
    linear_bias = _viewed(owner, inputs, linear_bias, "linear_bias", "inputs")
    x, linear_weight, linear_bias = check.linear_layer(x, linear_weight, linear_bias)
    target = check.view_target(owner, inputs, "inputs", x, target)
    arrays = {key: _viewed(owner, inputs, options.get(key), key, "inputs") for key in ("weight", "where")}
    sample_weight = options.get("sample_weight")
    arrays["sample_weight"] = check.view_factors(owner, inputs, "inputs", x, sample_weight, "sample_weight")
    xp = namespace(x)
    stand_in = xp.zeros((), dtype=check.native(x.dtype), device=device_of(x))
    logits = xp.broadcast_to(stand_in, (*x.shape[:-1], linear_weight.shape[0]))
    # what was viewed may belong to another backend: tensors have become arrays of NumPy
    loss_options, grad_out = options | arrays | {"grad_out": None}, options.get("grad_out")
    loss = row_call(owner_of(x, "inputs"), "loss", "cross_entropy", 0.0, logits, target, loss_options)
    chunk_rows = check.thread_count("chunk_rows", chunk_rows)  # the same rule
    check.asked((grad_out, loss.return_grad, "grad"))
    buffers = tuple(
        view_buffer(owner, inputs, out, f"grad_out[{i}]", "inputs") for i, out in enumerate(check.three(grad_out))
    )
    check.linear_buffers(buffers, x, linear_weight, linear_bias, {"target": target} | arrays)
    return LinearCall(loss, x, linear_weight, linear_bias, chunk_rows, buffers)


def finish_linear(owner: ModuleType, call: LinearCall, result: tuple[Array, tuple[Array, ...]], grad_out: Any) -> Any:
    """Return the loss, or the pair of it and the three gradients: as the caller's buffers or kind of array."""
    loss, grads = result
    if not call.loss.return_grad:
        return owner.wrap(loss)
    return owner.wrap(loss), tuple(
        owner.wrap(grad) if out is None and grad is not None else out
        for grad, out in zip(grads, check.three(grad_out), strict=True)
    )

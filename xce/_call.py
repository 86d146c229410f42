"""Arguments to one checked `Call`, results back to the caller's kind of array.

`normalise` is the only place that validates. It is a straight line of ``if <unusual>: <check>``, so that a
plain NumPy call costs about a microsecond; the checks that coerce or explain are in `_check`.
"""

from __future__ import annotations

from numbers import Integral
from types import ModuleType
from typing import Any, NamedTuple

from numpy import ndarray

from xce import _check as check
from xce._check import DIVERGENCES, INT64, NATIVE_FLOATS, NATIVE_INTEGERS, REDUCTIONS, Array, dtype_name, thread_count
from xce._dispatch import device_of, namespace, owner_of, placed, view, view_buffer

__all__ = [
    "Array", "Call", "LinearCall", "LogitStats", "dtype_name", "finish", "finish_linear", "normalise",
    "normalise_distillation", "normalise_linear", "normalise_map", "thread_count",
]  # fmt: skip


class Call(NamedTuple):
    """One checked computation; past `normalise` nothing is defaulted and nothing is checked again."""

    op: str  # "loss" | "nll" | "distillation" | "softmax" | "log_softmax" | "logsumexp" | "stats"
    phi: str  # the scalar function of the log-probability (or of two: the divergence), and
    phi_param: float  # its parameter (0.0 where it has none)
    logits: Array  # any shape with at least one axis, floating
    axis: int  # the class axis, 0..ndim-1
    target: Array  # None, or integers of the rows' shape, or probabilities (or a teacher's logits) of the logits' shape
    weight: Array  # None, or (C,), floating
    sample_weight: Array  # None, or of the rows' shape, floating
    where: Array  # None, or bool, of the logits' shape
    ignore_index: int
    label_smoothing: float
    temperature: float
    softcap: float | None
    z_loss: float
    reduction: str  # "mean" | "sum" | "none"
    return_grad: bool
    return_hess: bool
    grad_out: Array  # None, or buffers like the logits (also softmax's `out`)
    hess_out: Array
    n_threads: int | None
    validate: bool  # False: the data was not read, and a bad label makes its row NaN
    teacher_indices: Array = None  # None, or the classes that a teacher's logits are of


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


def normalise(
    owner: ModuleType,
    op: str,
    phi: str,
    phi_param: float,
    logits: Array,
    axis: int,
    target: Array,
    weight: Array | None = None,
    sample_weight: Array | None = None,
    where: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "none",
    return_grad: bool = False,
    return_hess: bool = False,
    grad_out: Array | None = None,
    hess_out: Array | None = None,
    n_threads: int | None = None,
    validate: bool = True,
    name: str = "logits",
) -> Call:
    """Return the checked call of an operation with a target; `name` is what the user calls the logits."""
    has_extras = not (weight is sample_weight is where is grad_out is hess_out is None)
    is_plain = type(logits) is type(target) is ndarray
    if not is_plain and (place := owner.place(logits)) is not None:
        with place:
            return normalise(
                owner, op, phi, phi_param, logits, axis, target, weight, sample_weight, where, ignore_index,
                label_smoothing, temperature, softcap, z_loss, reduction, return_grad, return_hess, grad_out, hess_out,
                n_threads, validate, name,
            )  # fmt: skip
    if has_extras or not is_plain:
        first, logits = logits, owner.view(logits, name)
        target = check.view_target(owner, first, name, logits, target)
        weight = None if weight is None else view(owner, first, weight, "weight", name)
        if sample_weight is not None:
            sample_weight = check.view_factors(owner, first, name, logits, sample_weight, "sample_weight")
        where = None if where is None else view(owner, first, where, "where", name)
        grad_out = view_buffer(owner, first, grad_out, "grad_out", name)
        hess_out = view_buffer(owner, first, hess_out, "hess_out", name)

    if not is_plain or logits.dtype not in NATIVE_FLOATS:
        logits = check.of_dtype(logits, name, *check.FLOATS)
    shape = logits.shape
    ndim = len(shape)
    if type(axis) is not int or not -ndim <= axis < ndim:
        axis = check.class_axis(axis, ndim, name)
    if axis < 0:
        axis += ndim
    n_classes = shape[axis]
    if n_classes == 0:
        raise ValueError(f"{name} of shape {shape} has no classes: expected at least one on axis {axis}")
    rows = shape[:axis] + shape[axis + 1 :]

    is_index = is_plain and target.shape == rows and target.dtype in NATIVE_INTEGERS
    if not is_index:
        target, is_index = check.target_mode(target, name, shape, axis, rows)
        if op != "loss" and not is_index:
            raise TypeError(
                f"target has dtype {dtype_name(target.dtype)} and shape {target.shape}: expected class indices of "
                f"shape {rows}, integers or floats that are whole numbers"
            )
    if type(ignore_index) is not int or ignore_index not in INT64:
        ignore_index = check.label("ignore_index", ignore_index)
    if type(validate) is not bool:
        validate = check.flag("validate", validate)
    if has_extras:
        if weight is not None:
            weight = check.class_weight(owner, weight, n_classes, validate)
        if sample_weight is not None:
            sample_weight = check.row_weight(owner, sample_weight, rows, validate)
        if where is not None:
            where = check.broadcast(check.typed(where, "where", "bool"), "where", shape, name)
    if validate:
        if not is_index:
            check.probabilities(owner, target, axis, sample_weight, where)
        elif owner.scan_labels(target, n_classes, ignore_index) >= 0:
            check.labels(owner, target, n_classes, ignore_index, axis, sample_weight, where)

    if type(label_smoothing) is not float or label_smoothing != 0.0:
        label_smoothing = check.real("label_smoothing", label_smoothing)
    if type(temperature) is not float or temperature != 1.0:
        temperature = check.real("temperature", temperature)
    if softcap is not None:
        softcap = check.real("softcap", softcap)
    if type(z_loss) is not float or z_loss != 0.0:
        z_loss = check.real("z_loss", z_loss)
    if type(reduction) is not str or reduction not in REDUCTIONS:
        reduction = check.choice("reduction", reduction, REDUCTIONS)
    if type(return_grad) is not bool:
        return_grad = check.flag("return_grad", return_grad)
    if type(return_hess) is not bool:
        return_hess = check.flag("return_hess", return_hess)
    if n_threads is not None:
        n_threads = check.thread_count("n_threads", n_threads)

    if not (grad_out is hess_out is None):
        check.asked((grad_out, return_grad, "grad"), (hess_out, return_hess, "hess"))
        inputs = {"target": target, "weight": weight, "sample_weight": sample_weight, "where": where}
        check.buffers(logits, name, {"grad_out": grad_out, "hess_out": hess_out}, inputs)

    # fmt: off
    return tuple.__new__(Call, (  # half the time of Call(...)
        op, phi, phi_param, logits, axis, target, weight, sample_weight, where, ignore_index,
        label_smoothing, temperature, softcap, z_loss, reduction, return_grad, return_hess,
        grad_out, hess_out, n_threads, validate, None,
    ))
    # fmt: on


@placed(2)
def normalise_map(
    owner: ModuleType,
    op: str,
    x: Array,
    axis: int | Integral,
    temperature: float = 1.0,
    where: Array | None = None,
    out: Array | None = None,
    n_threads: int | None = None,
) -> Call:
    """Return the checked call of an operation on `x` alone."""
    first, x = x, check.of_dtype(owner.view(x, "x"), "x", *check.FLOATS)
    axis = check.class_axis(axis, len(x.shape), "x")
    if x.shape[axis] == 0 and op != "logsumexp":  # the sum of nothing is 0
        raise ValueError(f"x of shape {x.shape} has no classes: expected at least one on axis {axis}")
    temperature = check.real("temperature", temperature)
    n_threads = check.thread_count("n_threads", n_threads)
    if where is not None:
        where = check.typed(view(owner, first, where, "where", "x"), "where", "bool")
        where = check.broadcast(where, "where", x.shape, "x")
    if out is not None:
        out = view_buffer(owner, first, out, "out", "x")
        check.buffers(x, "x", {"out": out}, {"where": where})
    # fmt: off
    return Call(
        op=op, phi="", phi_param=0.0, logits=x, axis=axis, target=None, weight=None, sample_weight=None,
        where=where, ignore_index=-100, label_smoothing=0.0, temperature=temperature, softcap=None, z_loss=0.0,
        reduction="none", return_grad=False, return_hess=False, grad_out=out, hess_out=None,
        n_threads=n_threads, validate=True,
    )
    # fmt: on


@placed(2)
def normalise_distillation(
    owner: ModuleType,
    divergence: str,
    student: Array,
    teacher: Array,
    indices: Array | None,
    axis: int,
    temperature: float,
    reduction: str,
    sample_weight: Array | None,
    where: Array | None,
    return_grad: bool,
    return_hess: bool,
    grad_out: Array | None,
    hess_out: Array | None,
    n_threads: int | None,
    validate: bool,
) -> Call:
    """Return the checked call of a divergence between two arrays of logits."""
    name = "student_logits"
    first, student = student, check.of_dtype(owner.view(student, name), name, *check.FLOATS)
    teacher = check.of_dtype(view(owner, first, teacher, "teacher_logits", name), "teacher_logits", *check.FLOATS)
    axis = check.class_axis(axis, len(student.shape), name)
    shape = student.shape
    if shape[axis] == 0:
        raise ValueError(f"{name} of shape {shape} has no classes: expected at least one on axis {axis}")
    rows = shape[:axis] + shape[axis + 1 :]
    validate = check.flag("validate", validate)
    divergence = check.choice("divergence", divergence, DIVERGENCES)
    if sample_weight is not None:
        sample_weight = check.view_factors(owner, first, name, student, sample_weight, "sample_weight")
        sample_weight = check.row_weight(owner, sample_weight, rows, validate)
    if where is not None:
        where = check.typed(view(owner, first, where, "where", name), "where", "bool")
        where = check.broadcast(where, "where", shape, name)
    if indices is not None:
        indices = view(owner, first, indices, "teacher_indices", name)
        counting = sample_weight, where
        indices = check.sparse_teacher(owner, indices, teacher, shape, axis, divergence, counting, validate)
    elif teacher.shape != shape:
        raise ValueError(
            f"teacher_logits has shape {teacher.shape}: expected {shape}, the shape of {name}, "
            "unless teacher_indices says which classes they are of"
        )
    return_grad, return_hess = check.flag("return_grad", return_grad), check.flag("return_hess", return_hess)
    grad_out = view_buffer(owner, first, grad_out, "grad_out", name)
    hess_out = view_buffer(owner, first, hess_out, "hess_out", name)
    check.asked((grad_out, return_grad, "grad"), (hess_out, return_hess, "hess"))
    inputs = {"teacher_logits": teacher, "teacher_indices": indices, "sample_weight": sample_weight, "where": where}
    check.buffers(student, name, {"grad_out": grad_out, "hess_out": hess_out}, inputs)
    # fmt: off
    return Call(
        op="distillation", phi=divergence, phi_param=0.0, logits=student,
        axis=axis, target=teacher, weight=None, sample_weight=sample_weight, where=where, ignore_index=-100,
        label_smoothing=0.0, temperature=check.real("temperature", temperature), softcap=None, z_loss=0.0,
        reduction=check.choice("reduction", reduction, REDUCTIONS), return_grad=return_grad, return_hess=return_hess,
        grad_out=grad_out, hess_out=hess_out, n_threads=check.thread_count("n_threads", n_threads), validate=validate,
        teacher_indices=indices,
    )
    # fmt: on


def finish(
    owner: ModuleType,
    call: Any,
    result: tuple[Array, Array | None, Array | None],
    grad_out: Array | None,
    hess_out: Array | None,
) -> Any:
    """Return the loss, or the tuple of it and what was asked for: the caller's buffers, or his kind of array."""
    loss, grad, hess = result
    wrap = owner.wrap
    if call.return_grad:
        grad = wrap(grad) if grad_out is None else grad_out
    if call.return_hess:
        hess = wrap(hess) if hess_out is None else hess_out
        return (wrap(loss), grad, hess) if call.return_grad else (wrap(loss), hess)
    return (wrap(loss), grad) if call.return_grad else wrap(loss)


@placed(1)
def normalise_linear(
    owner: ModuleType,
    inputs: Array,
    linear_weight: Array,
    target: Array,
    linear_bias: Array | None,
    chunk_rows: int | None,
    weight: Array | None,
    sample_weight: Array | None,
    where: Array | None,
    grad_out: Any,
    **options: Any,
) -> LinearCall:
    """Return the checked call; `options` are those that `normalise` takes as they are."""

    def own(x: Array, name: str) -> Array:
        return None if x is None else view(owner, inputs, x, name, first_name="inputs")

    x = owner.view(inputs, "inputs")
    # fmt: off
    x, linear_weight, linear_bias = check.linear_layer(
        x, view(owner, inputs, linear_weight, "linear_weight", first_name="inputs"), own(linear_bias, "linear_bias")
    )
    # fmt: on
    arrays = {"target": check.view_target(owner, inputs, "inputs", x, target)}
    arrays |= {"weight": own(weight, "weight"), "where": own(where, "where")}
    if sample_weight is not None:
        arrays["sample_weight"] = check.view_factors(owner, inputs, "inputs", x, sample_weight, "sample_weight")
    xp = namespace(x)
    stand_in = xp.zeros((), dtype=check.native(x.dtype), device=device_of(x))
    logits = xp.broadcast_to(stand_in, (*x.shape[:-1], linear_weight.shape[0]))
    # what was viewed may belong to another backend: tensors have become arrays of NumPy
    loss = normalise(owner_of(x, "inputs"), "loss", "cross_entropy", 0.0, logits, -1, **arrays, **options)
    chunk_rows = check.thread_count("chunk_rows", chunk_rows)  # the same rule
    check.asked((grad_out, loss.return_grad, "grad"))
    buffers = tuple(
        view_buffer(owner, inputs, out, f"grad_out[{i}]", "inputs") for i, out in enumerate(check.three(grad_out))
    )
    check.linear_buffers(buffers, x, linear_weight, linear_bias, arrays)
    return LinearCall(loss, x, linear_weight, linear_bias, chunk_rows, buffers)


def finish_linear(owner: ModuleType, call: LinearCall, result: tuple[Array, tuple[Array, ...]], grad_out: Any) -> Any:
    """Return the loss, or the pair of it and the three gradients: the caller's buffers, or his kind of array."""
    loss, grads = result
    if not call.loss.return_grad:
        return owner.wrap(loss)
    return owner.wrap(loss), tuple(
        owner.wrap(grad) if out is None and grad is not None else out
        for grad, out in zip(grads, check.three(grad_out), strict=True)
    )

"""Losses of rows, and maps of them: arguments to one checked `Call`, results back to the caller's kind of array.

All validation is here and in `_elements`, with `_checks`, which coerces or explains, and `_options`, which has the
rules of options that can be checked alone.
"""

from __future__ import annotations

from typing import Any

from numpy import ndarray

from xce import _checks as check
from xce._arrays import Array, device_of, dtype_name, namespace, native
from xce._call import Call, LinearCall, LogitStats
from xce._checks import DIVERGENCES, NATIVE_FLOATS, NATIVE_INTEGERS
from xce._core import plain_row_loss
from xce._libraries import Arrays, arrays_of
from xce._options import DEFAULTS, NUMBERS, Numbers, checked

_PLAIN = Numbers()


# arrays among the arguments: those that must be there, those that may, and those that are written to
_REQUIRED, _OPTIONAL = {"teacher_logits"}, {"weight", "where", "teacher_indices"}
_WRITTEN = {"grad_out", "hess_out", "out"}


def see(
    arrays: Arrays, first: Array, given: dict[str, Any], factors: tuple[str, ...] = ("sample_weight",)
) -> dict[str, Any]:
    """Return what arrays are among the arguments as they are computed on; `first` is so already.

    `factors` are the names of those that may be one number.
    """
    seen = {}
    for key, x in given.items():
        if x is None and key not in _REQUIRED:
            continue
        if key in factors:
            seen[key] = check.view_factors(arrays, first, x, key)
        elif key in _REQUIRED or key in _OPTIONAL:
            seen[key] = arrays.view(x, key)
        elif key in _WRITTEN:
            seen[key] = arrays.view_buffer(x, key)
    return seen


def row_loss(function: str, parameter: float, logits: Array, target: Array, options: Any) -> Any:
    """Return what a public loss of rows returns; plain calls on NumPy arrays are answered by `_core` before this."""
    arrays, result = arrays_of(logits, "logits"), None
    with arrays.place():
        x = arrays.view_first()
        y, seen = check.view_target(arrays, x, target), see(arrays, x, options)
        if type(x) is ndarray is not type(logits):
            result = plain_row_loss(function, parameter, x, y, options | seen)
        if result is None:
            given = checked(function, options) | seen
            call = row_call(arrays, "loss", function, parameter, x, y, given)
            result = returned(call, arrays.engine.run(call))
    return finish(arrays, result, options)


def nll(log_probs: Array, target: Array, options: Any) -> Any:
    """Return what `nll_loss` returns."""
    arrays, given = arrays_of(log_probs, "log_probs"), checked("nll_loss", options)
    with arrays.place():
        x = arrays.view_first()
        y = check.view_target(arrays, x, target)
        call = row_call(arrays, "nll", "cross_entropy", 0.0, x, y, given | see(arrays, x, given))
        result = returned(call, arrays.engine.run(call))
    return finish(arrays, result, options)


def logit_statistics(logits: Array, target: Array, options: Any) -> LogitStats:
    """Return what `logit_stats` returns."""
    arrays = arrays_of(logits, "logits")
    with arrays.place():
        stats = arrays.engine.run(stats_call(arrays, "logit_stats", target, options))
    return LogitStats(*map(arrays.wrap, stats))


def stats_call(arrays: Arrays, function: str, target: Array, options: Any) -> Call:
    """Return the checked call of the row statistics, whose targets are class indices, for a public function."""
    given, x = checked(function, options), arrays.view_first()
    y = check.view_target(arrays, x, target)
    return row_call(arrays, "stats", "", 0.0, x, y, given | see(arrays, x, given))


def row_call(
    arrays: Arrays, op: str, loss: str, parameter: float, logits: Array, target: Array, options: dict[str, Any]
) -> Call:
    """Return the checked call of an operation with a target, of arrays that are seen and options that are checked."""
    engine, name, given = arrays.engine, arrays.name, DEFAULTS | options
    logits, axis, rows = _rows(logits, given["axis"], name)
    sample_weight, weight, where = given["sample_weight"], given["weight"], given["where"]
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
        weight = check.class_weight(engine, weight, n_classes, validate)
    if sample_weight is not None:
        sample_weight = check.row_weight(engine, sample_weight, rows, validate)
    if where is not None:
        where = _mask(where, logits, name)
    if validate:
        if not is_index:
            check.probabilities(engine, target, axis, sample_weight, where)
        elif engine.scan_labels(target, n_classes, ignore_index) >= 0:
            check.labels(engine, target, n_classes, ignore_index, axis, sample_weight, where)
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
        **outputs(logits, name, given, inputs),
    )


def _rows(logits: Array, axis: Any, name: str, *, allows_none: bool = False) -> tuple[Array, int, tuple[int, ...]]:
    """Return the logits, their class axis, and the shape of the rows."""
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


def outputs(x: Array, name: str, given: dict[str, Any], inputs: dict[str, Array]) -> dict[str, Any]:
    """Return the fields of a call that say what it returns, in which buffers, and how it is computed."""
    grad_out, hess_out = given["grad_out"], given["hess_out"]
    if not (grad_out is hess_out is None):
        check.asked((grad_out, given["return_grad"], "grad"), (hess_out, given["return_hess"], "hess"))
        check.buffers(x, name, {"grad_out": grad_out, "hess_out": hess_out}, inputs)
    keys = "reduction", "return_grad", "return_hess", "grad_out", "hess_out", "n_threads"
    return {key: given[key] for key in keys}


def returned(call: Any, result: tuple[Array, Array | None, Array | None]) -> Any:
    """Return the loss, or the tuple of it and what else a call returns."""
    loss, grad, hess = result
    if call.return_grad:
        return (loss, grad, hess) if call.return_hess else (loss, grad)
    return (loss, hess) if call.return_hess else loss


def finish(arrays: Arrays, result: Any, options: Any) -> Any:
    """Return the loss, or the tuple, in the caller's kind of array; a buffer as the caller's own object."""
    if type(result) is not tuple:
        return arrays.wrap(result)
    loss, *derivatives = result
    flags = ("return_grad", "grad_out"), ("return_hess", "hess_out")
    buffers = [options.get(buffer) for flag, buffer in flags if options.get(flag)]
    own = (arrays.wrap(x) if out is None else out for x, out in zip(derivatives, buffers, strict=True))
    return arrays.wrap(loss), *own


def map_call(op: str, x: Array, axis: Any, options: dict[str, Any]) -> Call:
    """Return the checked call of an operation on `x` alone, of arrays that are seen and options that are checked."""
    x, axis, _ = _rows(x, axis, "x", allows_none=op == "logsumexp")  # the sum of nothing is 0
    where, out = options.get("where"), options.get("out")
    if where is not None:
        where = _mask(where, x, "x")
    if out is not None:
        check.buffers(x, "x", {"out": out}, {"where": where})
    n_threads = options.get("n_threads")
    return Call(op, x, axis, numbers=_numbers(0.0, options), where=where, grad_out=out, n_threads=n_threads)


def divergence(student: Array, teacher: Array, indices: Array | None, kind: str, options: Any) -> Any:
    """Return what `distillation_loss` returns."""
    arrays, given = arrays_of(student, "student_logits"), checked("distillation_loss", options)
    given |= {"teacher_logits": teacher, "teacher_indices": indices}
    with arrays.place():
        x = arrays.view_first()
        call = _divergence_call(arrays, x, kind, given | see(arrays, x, given))
        result = returned(call, arrays.engine.run(call))
    return finish(arrays, result, options)


def _divergence_call(arrays: Arrays, student: Array, kind: str, options: dict[str, Any]) -> Call:
    """Return the checked call of a divergence between two arrays of logits, seen, as options are checked."""
    engine, name, given = arrays.engine, arrays.name, DEFAULTS | options
    student, axis, rows = _rows(student, given["axis"], name)
    teacher = check.of_dtype(given["teacher_logits"], "teacher_logits", *check.FLOATS)
    indices, sample_weight, where = (given[key] for key in ("teacher_indices", "sample_weight", "where"))
    shape, validate = student.shape, given["validate"]
    kind = check.choice("divergence", kind, DIVERGENCES)
    if sample_weight is not None:
        sample_weight = check.row_weight(engine, sample_weight, rows, validate)
    if where is not None:
        where = _mask(where, student, name)
    if indices is not None:
        counting = sample_weight, where
        indices = check.sparse_teacher(engine, indices, teacher, shape, axis, kind, counting, validate)
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
        loss=kind,
        numbers=_numbers(0.0, options),
        teacher=teacher,
        teacher_indices=indices,
        sample_weight=sample_weight,
        where=where,
        validate=validate,
        **outputs(student, name, given, inputs),
    )


def linear(
    inputs: Array, linear_weight: Array, target: Array, linear_bias: Array | None, chunk_rows: Any, options: Any
) -> Any:
    """Return what `linear_cross_entropy` returns."""
    arrays, given = arrays_of(inputs, "inputs"), checked("linear_cross_entropy", options)
    with arrays.place():
        call = linear_call(arrays, linear_weight, target, linear_bias, chunk_rows, given)
        loss, grads = arrays.engine.run_linear(call)
    if not call.loss.return_grad:
        return arrays.wrap(loss)
    outs = check.three(options.get("grad_out"))
    return arrays.wrap(loss), tuple(
        arrays.wrap(grad) if out is None and grad is not None else out for grad, out in zip(grads, outs, strict=True)
    )


def linear_call(
    arrays: Arrays,
    linear_weight: Array,
    target: Array,
    linear_bias: Array | None,
    chunk_rows: Any,
    options: dict[str, Any],
) -> LinearCall:
    """Return the checked call of the loss of a linear layer, whose options have been checked as far as alone."""
    grad_out, given = options.get("grad_out"), {key: x for key, x in options.items() if key != "grad_out"}
    weight = arrays.view(linear_weight, "linear_weight")
    bias = None if linear_bias is None else arrays.view(linear_bias, "linear_bias")
    x, weight, bias = check.linear_layer(arrays.view_first(), weight, bias)
    y, seen = check.view_target(arrays, x, target), see(arrays, x, given)
    xp = namespace(x)
    stand_in = xp.zeros((), dtype=native(x.dtype), device=device_of(x))
    logits = xp.broadcast_to(stand_in, (*x.shape[:-1], weight.shape[0]))
    loss = row_call(arrays._replace(name="logits"), "loss", "cross_entropy", 0.0, logits, y, given | seen)
    chunk_rows = check.thread_count("chunk_rows", chunk_rows)  # the same rule
    check.asked((grad_out, loss.return_grad, "grad"))
    buffers = tuple(
        None if out is None else arrays.view_buffer(out, f"grad_out[{i}]")
        for i, out in enumerate(check.three(grad_out))
    )
    check.linear_buffers(buffers, x, weight, bias, {"target": y} | seen)
    return LinearCall(loss, x, weight, bias, chunk_rows, buffers)

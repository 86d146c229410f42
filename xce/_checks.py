"""The checks of arguments: each coerces an argument, or explains what is wrong.

Every message names the argument, what was received and what is allowed; for data, the first bad index and its
value.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from numpy import ndarray
from numpy.exceptions import AxisError, TooHardError

from xce._arrays import BFLOAT16, Array, described, device_of, dtype_name, dtype_text, namespace, native, widen
from xce._engines import Engine
from xce._errors import LabelError
from xce._libraries import Arrays

REDUCTIONS = ("mean", "sum", "none")
DIVERGENCES = ("forward", "reverse", "js")
INT64 = range(-(2**63), 2**63)
_OVERLAP_EFFORT = 100_000  # bounds NumPy's exact search for shared memory; past it, it counts as shared
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NUMBERS = ("bool", *INTEGERS, *FLOATS)
# NumPy's own dtypes, in native byte order, need no look at their names.
NATIVE_FLOATS = {np.dtype("float16"), BFLOAT16, np.dtype("float32"), np.dtype("float64")}
NATIVE_INTEGERS = set(map(np.dtype, INTEGERS))
LABELS = (*INTEGERS, "int4", "uint4", *FLOATS)  # class indices; of floats, those that are whole numbers


# Arrays


def from_list(x: Any, name: str) -> Array:
    """Return what NumPy makes of a list, or of anything else that it takes."""
    try:
        return np.asarray(x)
    except Exception as error:  # of whatever is in it
        raise TypeError(f"{name} is {described(x)} that is no array: expected entries in rows of one length") from error


def typed(x: Array, name: str, *allowed: str) -> Array:
    """Return `x` in native byte order, if it has one of the allowed dtypes."""
    x = of_dtype(x, name, *allowed)
    return x if getattr(x.dtype, "isnative", True) else x.astype(native(x.dtype))


def of_dtype(x: Array, name: str, *allowed: str) -> Array:
    """Return `x`, in whatever byte order, if it has one of the allowed dtypes."""
    if dtype_name(x.dtype) not in allowed:
        hint = _bfloat16_hint(x, name) if "bfloat16" in allowed else ""
        raise TypeError(f"{name} has dtype {dtype_text(x.dtype)}: expected {_either(allowed)}{hint}")
    return x


def counted(n: int, one: str, many: str) -> str:
    """Return a count with its noun: ``1 class``, ``3 classes``."""
    return f"{n} {one if n == 1 else many}"


def _either(words: Sequence[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _bfloat16_hint(x: Array, name: str) -> str:
    """Return what to do with an array of two bytes without a meaning, which is how NumPy reads a saved bfloat16."""
    is_void = isinstance(x.dtype, np.dtype) and x.dtype == np.dtype("V2")
    return f"; if it is bfloat16 from a file, pass {name}.view(ml_dtypes.bfloat16)" if is_void else ""


def view_target(arrays: Arrays, logits: Array, target: Array) -> Array:
    """Return the target as it is computed on; one label may be an integer, for logits of shape (C,)."""
    if type(target) is not type(arrays.first) and isinstance(target, Integral) and not isinstance(target, bool):
        if int(target) not in INT64:
            raise LabelError(
                f"target = {number_text(target)} is out of range: expected a class, 0 or more, or ignore_index"
            )
        return namespace(logits).asarray(int(target))
    return arrays.view(target, "target")


def target_mode(
    target: Array, name: str, shape: tuple[int, ...], axis: int, rows: tuple[int, ...]
) -> tuple[Array, bool]:
    """Return the target and whether it holds class indices; its dtype decides, its shape must be that of `name`."""
    dtype, found = dtype_name(target.dtype), target.shape
    if dtype not in LABELS:
        raise TypeError(
            f"target has dtype {dtype_text(target.dtype)} and shape {found}: expected integers, or floats that are "
            f"whole numbers, of shape {rows} (class indices), or floats of shape {shape} (probabilities)"
            + _bfloat16_hint(target, "target")
        )
    is_index = dtype not in FLOATS or found == rows
    expected = rows if is_index else shape
    if found == expected:
        return target, is_index
    hint = _index_hint(found, shape, rows) if is_index else ""
    raise ValueError(
        f"target of dtype {dtype} has shape {found}: expected {expected} for {name} of shape {shape} "
        f"and axis={axis}{hint}"
    )


def _index_hint(found: tuple[int, ...], shape: tuple[int, ...], rows: tuple[int, ...]) -> str:
    """Return what probably is wrong with the shape of class indices."""
    fits = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == found]
    if fits:
        return f"; it fits axis={fits[0]}: pass axis={fits[0]} if the classes lie there"
    if found == shape:
        hint = "; class indices have no class axis, and probabilities must be floats"
        return hint + ("" if rows else "; for one binary target each, see binary_cross_entropy_with_logits")
    if len(found) > len(rows) and [n for n in found if n != 1] == [n for n in rows if n != 1]:
        return f"; squeeze it: target.reshape({rows})"
    return ""


def class_weight(engine: Engine, weight: Array, n_classes: int, validate: bool) -> Array:
    """Return the checked class weights."""
    weight = _floating(typed(weight, "weight", *NUMBERS))
    if weight.shape != (n_classes,):
        raise ValueError(f"weight has shape {weight.shape}: expected ({n_classes},), one weight per class")
    if validate:
        values(engine, weight, "weight", *FINITE_NOT_NEGATIVE)
    return weight


def view_factors(arrays: Arrays, like: Array, x: Any, name: str) -> Array:
    """Return factors as they are computed on; they may be one number for all."""
    if type(x) is type(arrays.first) or not isinstance(x, Real | np.bool_):
        return arrays.view(x, name)
    xp = namespace(like)
    try:
        number = float(x)
    except OverflowError:  # a very long integer
        number = math.inf
    return xp.asarray(number, dtype=xp.float64, device=device_of(like))


def row_weight(engine: Engine, weight: Array, rows: tuple[int, ...], validate: bool) -> Array:
    """Return the checked sample weights, broadcast to the rows."""
    return broadcast(factors(engine, weight, "sample_weight", validate), "sample_weight", rows, "the rows")


def factors(engine: Engine, weight: Array, name: str, validate: bool) -> Array:
    """Return checked weights; those of samples may have any sign. The kernels of a CPU read numbers of any type."""
    weight = of_dtype(weight, name, *NUMBERS)
    if not isinstance(weight, ndarray):
        weight = _floating(weight)
    if validate:
        values(engine, weight, name, *(FINITE if name == "sample_weight" else FINITE_NOT_NEGATIVE))
    return weight


def _floating(weight: Array) -> Array:
    """Return weights as floats; they may be a mask, or whole numbers."""
    if dtype_name(weight.dtype) in FLOATS:
        return weight
    xp = namespace(weight)
    return xp.astype(weight, xp.float64)


def sparse_teacher(
    engine: Engine,
    indices: Array,
    teacher: Array,
    shape: tuple[int, ...],
    axis: int,
    divergence: str,
    counting: tuple[Array | None, Array | None],
    validate: bool,
) -> Array:
    """Return the checked classes of a teacher that has logits of some classes only; `counting`: weights and `where`."""
    indices = of_dtype(indices, "teacher_indices", *LABELS)
    if divergence == "reverse":
        raise ValueError(
            "divergence='reverse' needs the teacher's logits of all classes: with teacher_indices it would be infinite"
        )
    k = indices.shape[axis] if len(indices.shape) == len(shape) else 0
    if k == 0 or indices.shape[:axis] + indices.shape[axis + 1 :] != shape[:axis] + shape[axis + 1 :]:
        raise ValueError(
            f"teacher_indices has shape {indices.shape}: expected that of student_logits, {shape}, "
            f"with the number of the teacher's classes, at least 1, on axis {axis}"
        )
    if teacher.shape != indices.shape:
        raise ValueError(f"teacher_logits has shape {teacher.shape} but teacher_indices has {indices.shape}")
    if validate:
        # ignoring a label that is a class ignores nothing
        allowed = shape[axis], 0
        if (bad := _first_bad(engine, engine.scan_labels, indices, allowed, axis, *counting)) >= 0:
            place, label = _entry(indices, bad)
            raise LabelError(
                f"teacher_indices{place} = {label} is out of range: labels of "
                f"{counted(shape[axis], 'class', 'classes')} are 0..{shape[axis] - 1}"
            )
        sample_weight, where = counting
        left = None if where is None else engine.classes_left(where, axis)
        weights = tuple(weight for weight in (sample_weight, left) if weight is not None)
        _refuse_repetitions(engine, indices, shape[axis], axis, weights)
    return indices


def _refuse_repetitions(engine: Engine, indices: Array, n_classes: int, axis: int, weights: tuple[Array, ...]) -> None:
    in_rows = namespace(indices).moveaxis(indices, axis, -1)
    flat, label = engine.scan_repetitions(in_rows, n_classes, weights)
    if flat >= 0:
        row = [int(i) for i in np.unravel_index(flat, in_rows.shape[:-1])] if len(in_rows.shape) > 1 else []
        where = f" in row {row}" if row else ""
        raise ValueError(f"teacher_indices has class {label} twice{where}: expected distinct classes")


def broadcast(x: Array, name: str, shape: tuple[int, ...], what: str) -> Array:
    """Return `x` broadcast to a shape that it does not enlarge."""
    own = x.shape
    if own == shape:
        return x
    if len(own) > len(shape) or any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} has shape {own}, which does not broadcast to {shape}, the shape of {what}")
    return namespace(x).broadcast_to(x, shape)


def probabilities(engine: Engine, target: Array, axis: int, sample_weight: Array | None, where: Array | None) -> None:
    """Refuse what is no probability, in rows that count."""
    low, high, allowed = NOT_NEGATIVE
    if (bad := _first_bad(engine, engine.scan_values, target, (low, high), axis, sample_weight, where)) >= 0:
        raise _value_error(target, "target", bad, allowed)


def labels(
    engine: Engine,
    target: Array,
    n_classes: int,
    ignore_index: int,
    axis: int,
    sample_weight: Array | None,
    where: Array | None,
) -> None:
    """Refuse labels that are no classes, in rows that count."""
    allowed = n_classes, ignore_index
    if (bad := _first_bad(engine, engine.scan_labels, target, allowed, axis, sample_weight, where)) >= 0:
        raise label_error(target, bad, n_classes, ignore_index)


def _first_bad(
    engine: Engine,
    scan: Callable[..., int],
    x: Array,
    allowed: tuple[Any, ...],
    axis: int,
    sample_weight: Array | None,
    where: Array | None,
) -> int:
    """Return what a scan finds in rows that count: where nothing is wrong, nobody asks which do."""
    bad = scan(x, *allowed)
    if bad < 0 or sample_weight is where is None:
        return bad
    xp = namespace(x)
    left = None if where is None else engine.classes_left(where, axis)
    weights = [w for w in (sample_weight, left) if w is not None]
    if len(weights[0].shape) < len(x.shape):
        weights = [xp.broadcast_to(xp.expand_dims(w, axis=axis), x.shape) for w in weights]
    return scan(x, *allowed, tuple(weights))


def values(
    engine: Engine,
    x: Array,
    name: str,
    low: float,
    high: float | None,
    allowed: str,
    weights: tuple[Array, ...] = (),
) -> None:
    """Refuse NaN and entries outside low..high (None: infinite ones), but where one of the weights is 0."""
    if (bad := engine.scan_values(x, low, high, weights)) >= 0:
        raise _value_error(x, name, bad, allowed)


def _value_error(x: Array, name: str, flat: int, allowed: str) -> ValueError:
    """Return the error for the entry at a flat C-order index."""
    place, value = _entry(x, flat)
    return ValueError(f"{name}{place} = {float(value):g} is not allowed: {allowed}")


NOT_NEGATIVE = (0.0, math.inf, "expected entries of at least 0")
FINITE = (-math.inf, None, "expected finite entries")
FINITE_NOT_NEGATIVE = (0.0, None, "expected finite entries of at least 0")
UNIT_INTERVAL = (0.0, 1.0, "expected probabilities between 0 and 1")
BETWEEN_0_AND_1 = (0.0, 1.0, "expected targets between 0 and 1")


def label_error(target: Array, flat: int, n_classes: int, ignore_index: int) -> LabelError:
    """Return the error for the label at a flat C-order index."""
    place, label = _entry(target, flat)
    if dtype_name(target.dtype) in FLOATS and not float(label).is_integer():
        return LabelError(
            f"target{place} = {float(label):g} is not a class: expected floats of this shape to be class indices, "
            f"whole numbers in 0..{n_classes - 1}, or ignore_index={ignore_index}"
        )
    return LabelError(
        f"target{place} = {int(label)} is out of range: labels of {counted(n_classes, 'class', 'classes')} are "
        f"0..{n_classes - 1}, or ignore_index={ignore_index}"
    )


def _entry(x: Array, flat: int) -> tuple[str, Any]:
    """Return the text of a flat C-order index, ``[3, 7]``, and the entry there."""
    index = tuple(int(i) for i in np.unravel_index(flat, x.shape))
    entry = widen(x[tuple(slice(i, i + 1) for i in index)])  # of one entry alone: `x` may be large
    return (f"[{', '.join(map(str, index))}]" if index else ""), entry[(0,) * len(index)]


# Buffers


def asked(*buffers: tuple[Array | None, bool, str]) -> None:
    """Refuse a buffer for what is not returned; each is (buffer, whether returned, name)."""
    for buffer, asked, name in buffers:
        if buffer is not None and not asked:
            raise ValueError(f"{name}_out given but return_{name}=False: pass return_{name}=True")


def buffers(logits: Array, name: str, buffers: dict[str, Array], inputs: dict[str, Array]) -> None:
    """Refuse a buffer that cannot hold the result, or that shares memory with anything but itself.

    The first buffer alone may be the logits, exactly: a row is read before it is written.
    """
    others = {name: logits} | {key: x for key, x in inputs.items() if x is not None}
    for key, out in buffers.items():
        if out is not None:
            buffer(out, key, logits, name, others, in_place=(next(iter(buffers)), name))
            others[key] = out


def buffer(
    out: Array,
    key: str,
    like: Array,
    name: str,
    others: dict[str, Array],
    *,
    in_place: tuple[str, str],
    or_float32: bool = False,
) -> None:
    """Refuse a buffer unlike the array `name`, or that shares memory; `in_place` is the pair that may be the same."""
    if out.shape != like.shape:
        raise ValueError(f"{key} has shape {out.shape}: expected {like.shape}, the shape of {name}")
    dtype = native(like.dtype)
    if out.dtype != dtype and not (or_float32 and dtype_name(out.dtype) == "float32"):
        found, expected = dtype_text(out.dtype), dtype_text(dtype)
        alternative = " or float32" if or_float32 else ""
        order = "" if like.dtype == dtype else " in this machine's byte order"
        raise ValueError(f"{key} has dtype {found}: expected {expected}, the dtype of {name}{order}{alternative}")
    memory = _memory(out)
    if memory is not None:
        if not memory.flags.writeable:
            raise ValueError(f"{key} is read-only: expected one that can be written")
        if _overlaps_itself(memory):
            raise ValueError(f"{key} has strides {out.strides}: expected entries that do not share memory")
    for other, x in others.items():
        if _share_memory(out, x) and not ((key, other) == in_place and _is_same(out, x)):
            raise ValueError(
                f"{key} shares memory with {other}: expected memory of its own "
                f"(only {'='.join(in_place)} is allowed, and exactly that)"
            )


def _overlaps_itself(x: Array) -> bool:
    """Whether two entries may share memory: exact for all that slicing, transposing and broadcasting make."""
    if x.flags.c_contiguous or not x.size:
        return False
    span = x.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < span:
            return True
        span += stride * (n - 1)
    return False


def _share_memory(a: Array, b: Array) -> bool:
    a_memory, b_memory = _memory(a), _memory(b)
    if a_memory is None or b_memory is None:
        return a is b
    try:
        return np.may_share_memory(a_memory, b_memory) and np.shares_memory(a_memory, b_memory, _OVERLAP_EFFORT)  # type: ignore[arg-type]
    except TooHardError:
        return True


def _is_same(a: Array, b: Array) -> bool:
    if a is b:
        return True
    a, b = _memory(a), _memory(b)
    return a is not None and b is not None and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _memory(x: Array) -> ndarray[Any, Any] | None:
    """Return an array that lies where `x` does, if that is known; one on a GPU must not be read."""
    if isinstance(x, ndarray):
        return x
    there = getattr(x, "__cuda_array_interface__", None)
    if there is None:
        return None
    if not x.size:
        return np.empty(x.shape, np.uint8)
    return np.asarray(
        _Place(
            {
                "version": 3,
                "shape": x.shape,
                "strides": x.strides,
                "data": there["data"],
                "typestr": f"|V{x.itemsize}",
            }
        )
    )


class _Place:
    """Memory as NumPy asks for it."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


# Linear layers


def linear_layer(inputs: Array, weight: Array, bias: Array | None) -> tuple[Array, Array, Array | None]:
    """Return inputs (..., D), weight (C, D) and bias (C,), if they are of one dtype and of shapes that fit."""
    inputs = of_dtype(inputs, "inputs", *FLOATS)
    if not inputs.shape:
        raise ValueError("inputs has shape (): expected the features on the last axis")
    if len(weight.shape) != 2 or weight.shape[1] != inputs.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(weight.shape)}: expected (C, {inputs.shape[-1]}), C classes by the "
            f"features of inputs of shape {tuple(inputs.shape)}"
        )
    if not weight.shape[0]:
        raise ValueError(f"linear_weight of shape {tuple(weight.shape)} has no classes: expected at least one")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), one for each class of "
            f"linear_weight of shape {tuple(weight.shape)}"
        )
    weight = _of_the_dtype(weight, "linear_weight", inputs)
    return inputs, weight, None if bias is None else _of_the_dtype(bias, "linear_bias", inputs)


def _of_the_dtype(x: Array, name: str, inputs: Array) -> Array:
    expected = dtype_name(inputs.dtype)
    if dtype_name(x.dtype) != expected:
        hint = _bfloat16_hint(x, name) if expected == "bfloat16" else ""
        raise TypeError(f"{name} has dtype {dtype_text(x.dtype)}: expected {expected}, the dtype of inputs{hint}")
    return x


def three(grad_out: Any) -> tuple[Array | None, ...]:
    """Return the buffers (d_inputs, d_weight, d_bias)."""
    text = "expected None or a tuple of three, (d_inputs, d_weight, d_bias), of arrays or None"
    if grad_out is None:
        return None, None, None
    if not isinstance(grad_out, (tuple, list)):
        raise TypeError(f"grad_out is {described(grad_out)}: {text}")
    if len(grad_out) != 3:
        raise ValueError(f"grad_out has length {len(grad_out)}: {text}")
    return tuple(grad_out)


def linear_buffers(
    buffers: tuple[Array | None, ...], inputs: Array, weight: Array, bias: Array | None, others: dict[str, Array]
) -> None:
    """Refuse buffers of the three gradients as `buffers` does; those of 16-bit parameters may be of float32."""
    likes = {"inputs": inputs, "linear_weight": weight, "linear_bias": bias}
    others = {key: x for key, x in (likes | others).items() if x is not None}
    for i, (out, (name, like)) in enumerate(zip(buffers, likes.items(), strict=True)):
        if out is None:
            continue
        if like is None:
            raise ValueError(f"grad_out[{i}] given without {name}: expected None")
        is_narrow = i > 0 and dtype_name(like.dtype) in ("float16", "bfloat16")
        buffer(out, f"grad_out[{i}]", like, name, others, in_place=("grad_out[0]", "inputs"), or_float32=is_narrow)
        others[f"grad_out[{i}]"] = out


# Options


def number_text(value: Any) -> str:
    """Return the text of a number in a message; Python writes no integer of more than 4300 digits."""
    if isinstance(value, Integral) and abs(int(value)) >= _SHOWN_IN_FULL:
        shift = int(value).bit_length() - 64
        power = shift * math.log10(2) + math.log10(abs(int(value)) >> shift)
        exponent, digits = divmod(round(power, 9), 1)  # so that powers of 10 are shown as such
        return f"{'-' if value < 0 else ''}{min(10**digits, 9.99):.2f}e+{exponent:.0f}"
    try:
        text = str(value)
    except ValueError:  # a fraction of such integers
        text = f"<{described(value).partition(' ')[2]}>"
    return text if len(text) < 80 else f"{text[:40]}..."


_SHOWN_IN_FULL = 10**40


def unboxed(name: str, value: Any) -> Any:
    """Return the Python number in a scalar or an array of no dimensions, of any library; anything else as it is."""
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} requires grad: xce has no derivative by it; detach it")
    dtype = dtype_name(value.dtype)
    convert = next((to for start, to in _PYTHON_NUMBERS.items() if dtype.startswith(start)), None)
    if convert is None:
        return value
    try:
        return convert(value)
    except Exception as error:  # of the library's own
        raise TypeError(
            f"{name} is {described(value)} that holds no number, as where it is being traced (jax.jit, "
            "torch.func.vmap) or lies on the device meta: expected a concrete number"
        ) from error


_PYTHON_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "uint": int,
    "float": float,
    "bfloat": float,
}


def class_axis(axis: Any, ndim: int, name: str) -> int:
    """Return the axis as 0..ndim-1."""
    if type(axis) is int and -ndim <= axis < ndim:
        return axis % ndim
    axis = unboxed("axis", axis)
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise TypeError(f"axis is {described(axis)}: expected an integer")
    if not -ndim <= int(axis) < ndim:
        if not ndim:
            raise AxisError(f"{name} has shape (): expected at least one axis, that of the classes")
        raise AxisError(
            f"axis={number_text(axis)} is out of range for {name} of {counted(ndim, 'dimension', 'dimensions')}: "
            f"expected {-ndim}..{ndim - 1}"
        )
    return int(axis) % ndim


def axes(axis: Any, ndim: int, name: str) -> tuple[int, ...]:
    """Return axes, of which None is all, in ascending order."""
    axis = unboxed("axis", axis)
    if axis is None:
        return tuple(range(ndim))
    if isinstance(axis, Integral):
        axis = (axis,)
    if not isinstance(axis, tuple | list):
        raise TypeError(f"axis is {described(axis)}: expected an integer, a tuple of integers or None")
    found = sorted(class_axis(a, ndim, name) for a in axis)
    if twice := [a for a, b in itertools.pairwise(found) if a == b]:
        raise ValueError(f"axis={axis} has axis {twice[0]} twice: expected distinct axes")
    return tuple(found)


def label(name: str, value: Any) -> int:
    """Return an option that is compared with labels."""
    return _integer(name, value, INT64, "an integer, of 64 bits")


def thread_count(name: str, value: Any) -> int | None:
    """Return a bound on the number of threads, or None; far too many is not an error, it is clamped later."""
    value = unboxed(name, value)
    if isinstance(value, int) and value > sys.maxsize:
        value = sys.maxsize
    return (
        None if value is None else _integer(name, value, range(1, sys.maxsize + 1), "None or an integer of at least 1")
    )


def count(name: str, value: Any) -> int:
    """Return an option that counts something."""
    return whole(name, value, 1)


def whole(name: str, value: Any, low: int, *, or_none: bool = False) -> int:
    """Return an option that is a size or a position; the message of one that may be None says so."""
    text = f"{'None or ' if or_none else ''}an integer of at least {low}"
    return _integer(name, value, range(low, sys.maxsize + 1), text)


def _integer(name: str, value: Any, allowed: range, text: str) -> int:
    value = unboxed(name, value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {described(value)}: expected {text}")
    if int(value) not in allowed:
        raise ValueError(f"{name}={number_text(value)} is not allowed: expected {text}")
    return int(value)


# What a number may be, and the words for it.
Range: TypeAlias = tuple[Callable[[float], bool], str]
UNIT: Range = (lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]")
BELOW_1: Range = (lambda x: 0.0 <= x < 1.0, "a number in [0, 1)")
AT_LEAST_0: Range = (lambda x: 0.0 <= x < math.inf, "a finite number of at least 0")
POSITIVE: Range = (lambda x: 0.0 < x < math.inf, "a finite number greater than 0")
ANY_FINITE: Range = (math.isfinite, "a finite number")
AT_MOST_0: Range = (lambda x: x <= 0.0, "a number of at most 0")
ALPHA: Range = (lambda x: x == -1.0 or 0.0 <= x <= 1.0, "a number in [0, 1], or None or -1 for no balancing")


def real(name: str, value: Any, allowed: Range = AT_LEAST_0, *, or_none: bool = False) -> Any:
    """Return an option that is a number, as a float."""
    if or_none and value is None:
        return None
    is_allowed, text = allowed
    text = f"None, or {text}" if or_none else text
    value = value if type(value) is float else unboxed(name, value)
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} is {described(value)}: expected {text}")
    try:
        number = float(value)
    except OverflowError:  # a very long integer
        number = math.inf
    if not is_allowed(number):
        raise ValueError(f"{name}={number_text(value)} is not allowed: expected {text}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return the value of a flag."""
    if type(value) is bool:
        return value
    value = unboxed(name, value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {described(value)}: expected True or False")
    return bool(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return an option that is one of a few words."""
    if type(value) is str and value in allowed:
        return value
    text = f"expected {_either([repr(word) for word in allowed])}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is {described(value)}: {text}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: {text}")
    return str(value)

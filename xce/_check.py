"""The checks of `_call.normalise` off its straight line: each coerces an argument, or explains what is wrong.

Every message names the argument, what was received and what is allowed; for data, the first bad index and its
value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from numbers import Integral, Real
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy import ndarray
from numpy.exceptions import AxisError, TooHardError

from xce._backends._scan import BFLOAT16, widen
from xce._dispatch import type_name, view
from xce._errors import LabelError

Array: TypeAlias = Any  # an array of any library that `_dispatch` knows

REDUCTIONS = ("mean", "sum", "none")
DIVERGENCES = ("forward", "reverse", "js")
INT64 = range(-(2**63), 2**63)
_OVERLAP_EFFORT = 100_000  # bounds NumPy's exact search for shared memory; past it, it counts as shared
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
# NumPy's own dtypes, in native byte order, need no look at their names.
NATIVE_FLOATS = {np.dtype("float16"), BFLOAT16, np.dtype("float32"), np.dtype("float64")}
NATIVE_INTEGERS = set(map(np.dtype, INTEGERS))


# Arrays


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library: ``"float32"``."""
    if not isinstance(dtype, np.dtype):
        return str(dtype).rpartition(".")[2]
    return _dtype_names.get(dtype) or _dtype_names.setdefault(dtype, _dtype_text(dtype.newbyteorder("=")))


_dtype_names: dict[np.dtype[Any], str] = {}


def _dtype_text(dtype: Any) -> str:
    return "bfloat16" if isinstance(dtype, np.dtype) and dtype == BFLOAT16 else str(dtype)


def typed(x: Array, name: str, *allowed: str) -> Array:
    """Return `x` in native byte order, if it has one of the allowed dtypes."""
    if dtype_name(x.dtype) not in allowed:
        raise TypeError(f"{name} has dtype {_dtype_text(x.dtype)}: allowed are {', '.join(allowed)}")
    return x if getattr(x.dtype, "isnative", True) else x.astype(x.dtype.newbyteorder("="))


def view_target(owner: ModuleType, first: Array, first_name: str, logits: Array, target: Array) -> Array:
    """Return the target as `owner` computes on it; one label may be an integer, for logits of shape (C,)."""
    if type(target) is not type(first) and isinstance(target, Integral) and not isinstance(target, bool):
        from array_api_compat import array_namespace

        if int(target) not in INT64:
            raise LabelError(f"target = {target} is out of range: a label must be a class, 0 or more, or ignore_index")
        return array_namespace(logits).asarray(int(target))
    return view(owner, first, target, "target", first_name)


def target_mode(
    target: Array, name: str, shape: tuple[int, ...], axis: int, rows: tuple[int, ...]
) -> tuple[Array, bool]:
    """Return the target and whether it holds class indices; its dtype decides, its shape must be that of `name`."""
    dtype, found = dtype_name(target.dtype), target.shape
    is_index = dtype in INTEGERS
    expected = rows if is_index else shape
    if (is_index or dtype in FLOATS) and found == expected:
        return typed(target, "target", dtype), is_index
    if not is_index and (dtype not in FLOATS or found == rows):
        raise TypeError(
            f"target has dtype {_dtype_text(target.dtype)} and shape {found}: allowed are integers of shape "
            f"{rows} (class indices) and floats of shape {shape} (probabilities)"
        )
    hint = _index_hint(found, shape, rows) if is_index else ""
    raise ValueError(
        f"target of dtype {dtype} has shape {found} but must have {expected} for {name} of shape {shape} "
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


def class_weight(owner: ModuleType, weight: Array, n_classes: int, validate: bool) -> Array:
    """Return the checked class weights."""
    weight = typed(weight, "weight", *FLOATS)
    if weight.shape != (n_classes,):
        raise ValueError(f"weight has shape {weight.shape} but must have ({n_classes},), one weight per class")
    if validate:
        values(owner, weight, "weight", *FINITE_NOT_NEGATIVE)
    return weight


def row_weight(owner: ModuleType, weight: Array, rows: tuple[int, ...], validate: bool) -> Array:
    """Return the checked sample weights, broadcast to the rows."""
    return broadcast(factors(owner, weight, "sample_weight", validate), "sample_weight", rows, "the rows")


def factors(owner: ModuleType, weight: Array, name: str, validate: bool) -> Array:
    """Return checked weights; `sample_weight` may be a mask, or whole numbers."""
    allowed = ("bool", *INTEGERS, *FLOATS) if name == "sample_weight" else FLOATS
    weight = typed(weight, name, *allowed)
    if dtype_name(weight.dtype) not in FLOATS:
        from array_api_compat import array_namespace

        xp = array_namespace(weight)
        weight = xp.astype(weight, xp.float64)
    if validate:
        values(owner, weight, name, *FINITE_NOT_NEGATIVE)
    return weight


def sparse_teacher(
    owner: ModuleType,
    indices: Array,
    teacher: Array,
    shape: tuple[int, ...],
    axis: int,
    divergence: str,
    validate: bool,
) -> Array:
    """Return the checked classes of a teacher that has logits of some classes only."""
    indices = typed(indices, "teacher_indices", *INTEGERS)
    if divergence == "reverse":
        raise ValueError(
            "divergence='reverse' needs the teacher's logits of all classes: with teacher_indices it would be infinite"
        )
    k = indices.shape[axis] if len(indices.shape) == len(shape) else 0
    if k == 0 or indices.shape[:axis] + indices.shape[axis + 1 :] != shape[:axis] + shape[axis + 1 :]:
        raise ValueError(
            f"teacher_indices has shape {indices.shape} but must have that of student_logits, {shape}, "
            f"with the number of the teacher's classes, at least 1, on axis {axis}"
        )
    if teacher.shape != indices.shape:
        raise ValueError(f"teacher_logits has shape {teacher.shape} but teacher_indices has {indices.shape}")
    if validate:
        # ignoring a label that is a class ignores nothing
        if (bad := owner.scan_labels(indices, shape[axis], 0)) >= 0:
            place, label = _entry(indices, bad)
            raise LabelError(
                f"teacher_indices{place} = {int(label)} is out of range: {shape[axis]} classes are 0..{shape[axis] - 1}"
            )
        _refuse_repetitions(indices, axis)
    return indices


def _refuse_repetitions(indices: Array, axis: int) -> None:
    from array_api_compat import array_namespace

    xp = array_namespace(indices)
    ordered = xp.sort(xp.moveaxis(indices, axis, -1), axis=-1)
    again = ordered[..., 1:] == ordered[..., :-1]
    if bool(xp.any(again)):
        flat = int(xp.argmax(xp.astype(xp.reshape(again, (-1,)), xp.uint8)))
        place, label = _entry(ordered[..., 1:], flat)
        row = f" in row {place.rpartition(',')[0]}]" if "," in place else ""
        raise ValueError(f"teacher_indices has class {int(label)} twice{row}: classes must be distinct")


def broadcast(x: Array, name: str, shape: tuple[int, ...], what: str) -> Array:
    """Return `x` broadcast to a shape that it does not enlarge."""
    from array_api_compat import array_namespace

    own = x.shape
    if len(own) > len(shape) or any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1], strict=False)):
        raise ValueError(f"{name} has shape {own}, which does not broadcast to {shape}, the shape of {what}")
    return array_namespace(x).broadcast_to(x, shape)


def values(owner: ModuleType, x: Array, name: str, low: float, high: float | None, allowed: str) -> None:
    """Refuse NaN and entries outside low..high (None: infinite ones)."""
    if (bad := owner.scan_values(x, low, high)) >= 0:
        place, value = _entry(widen(x), bad)
        raise ValueError(f"{name}{place} = {float(value):g} is not allowed: {allowed}")


NOT_NEGATIVE = (0.0, math.inf, "every entry must be not negative and not NaN")
FINITE_NOT_NEGATIVE = (0.0, None, "every entry must be finite and not negative")
UNIT_INTERVAL = (0.0, 1.0, "all elements of input should be between 0 and 1")
BETWEEN_0_AND_1 = (0.0, 1.0, "every target must be between 0 and 1")


def label_error(target: Array, flat: int, n_classes: int, ignore_index: int) -> LabelError:
    """Return the error for the label at a flat C-order index."""
    place, label = _entry(target, flat)
    return LabelError(
        f"target{place} = {int(label)} is out of range: labels of {n_classes} classes are "
        f"0..{n_classes - 1}, or ignore_index={ignore_index}"
    )


def _entry(x: Array, flat: int) -> tuple[str, Any]:
    """Return the text of a flat C-order index, ``[3, 7]``, and the entry there."""
    index = tuple(int(i) for i in np.unravel_index(flat, x.shape))
    return (f"[{', '.join(map(str, index))}]" if index else ""), x[index]


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
        raise ValueError(f"{key} has shape {out.shape} but must have {like.shape}, the shape of {name}")
    if out.dtype != like.dtype and not (or_float32 and dtype_name(out.dtype) == "float32"):
        found, expected = _dtype_text(out.dtype), _dtype_text(like.dtype)
        alternative = " or float32" if or_float32 else ""
        raise ValueError(f"{key} has dtype {found} but must have {expected}, the dtype of {name}{alternative}")
    memory = _memory(out)
    if memory is not None:
        if not memory.flags.writeable:
            raise ValueError(f"{key} is read-only: it must be writable")
        if _overlaps_itself(memory):
            raise ValueError(f"{key} has strides {out.strides}: its entries must not share memory")
    for other, x in others.items():
        if _share_memory(out, x) and not ((key, other) == in_place and _is_same(out, x)):
            raise ValueError(
                f"{key} shares memory with {other}: a buffer must have memory of its own "
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
    return np.asarray(_Place({
        "version": 3, "shape": x.shape, "strides": x.strides, "data": there["data"], "typestr": f"|V{x.itemsize}",
    }))  # fmt: skip


class _Place:
    """Memory as NumPy asks for it."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


# Linear layers


def linear_layer(inputs: Array, weight: Array, bias: Array | None) -> tuple[Array, Array, Array | None]:
    """Return inputs (..., D), weight (C, D) and bias (C,), if they are of one dtype and of shapes that fit."""
    inputs = typed(inputs, "inputs", *FLOATS)
    if not inputs.shape:
        raise ValueError("inputs has shape (): the last axis must be that of the features")
    if len(weight.shape) != 2 or weight.shape[1] != inputs.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(weight.shape)} but must have (C, {inputs.shape[-1]}), C classes by the "
            f"features of inputs of shape {tuple(inputs.shape)}"
        )
    if not weight.shape[0]:
        raise ValueError(f"linear_weight of shape {tuple(weight.shape)} has no classes: there must be at least one")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_bias has shape {tuple(bias.shape)} but must have ({weight.shape[0]},), one for each class of "
            f"linear_weight of shape {tuple(weight.shape)}"
        )
    weight = _of_the_dtype(weight, "linear_weight", inputs)
    return inputs, weight, None if bias is None else _of_the_dtype(bias, "linear_bias", inputs)


def _of_the_dtype(x: Array, name: str, inputs: Array) -> Array:
    expected = dtype_name(inputs.dtype)
    if dtype_name(x.dtype) != expected:
        raise TypeError(f"{name} has dtype {_dtype_text(x.dtype)} but must have {expected}, the dtype of inputs")
    return typed(x, name, expected)


def three(grad_out: Any) -> tuple[Array | None, ...]:
    """Return the buffers (d_inputs, d_weight, d_bias)."""
    text = "it must be None or a tuple of three, (d_inputs, d_weight, d_bias), of arrays or None"
    if grad_out is None:
        return None, None, None
    if not isinstance(grad_out, (tuple, list)):
        raise TypeError(f"grad_out is a {type_name(grad_out)}: {text}")
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
            raise ValueError(f"grad_out[{i}] given without {name}: it must be None")
        is_narrow = i > 0 and dtype_name(like.dtype) in ("float16", "bfloat16")
        buffer(out, f"grad_out[{i}]", like, name, others, in_place=("grad_out[0]", "inputs"), or_float32=is_narrow)
        others[f"grad_out[{i}]"] = out


# Options


def class_axis(axis: Any, ndim: int, name: str) -> int:
    """Return the axis as 0..ndim-1."""
    if isinstance(axis, bool) or not isinstance(axis, Integral):
        raise TypeError(f"axis is a {type_name(axis)}: it must be an integer")
    if not -ndim <= int(axis) < ndim:
        allowed = f"allowed are {-ndim}..{ndim - 1}" if ndim else "a class axis is needed"
        raise AxisError(f"axis={axis} is out of range for {name} of {ndim} dimensions: {allowed}")
    return int(axis) % ndim


def label(name: str, value: Any) -> int:
    """Return an option that is compared with labels."""
    return _integer(name, value, INT64, "an integer, of 64 bits")


def thread_count(name: str, value: Any) -> int | None:
    """Return a bound on the number of threads, or None; far too many is not an error, it is clamped later."""
    if isinstance(value, int) and value > sys.maxsize:
        value = sys.maxsize
    return (
        None if value is None else _integer(name, value, range(1, sys.maxsize + 1), "None or an integer of at least 1")
    )


def count(name: str, value: Any) -> int:
    """Return an option that counts something."""
    return _integer(name, value, range(1, sys.maxsize + 1), "an integer of at least 1")


def _integer(name: str, value: Any, allowed: range, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a {type_name(value)}: it must be {text}")
    if int(value) not in allowed:
        raise ValueError(f"{name}={value} is not allowed: it must be {text}")
    return int(value)


_REAL_OPTIONS: dict[str, tuple[Callable[[float], bool], str]] = {
    "label_smoothing": (lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
    "temperature": (lambda x: 0.0 < x < math.inf, "finite and greater than 0"),
    "softcap": (lambda x: 0.0 < x < math.inf, "None, or finite and greater than 0"),
    "q": (lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
    "clip": (lambda x: 0.0 <= x < 1.0, "in [0, 1)"),
    "alpha": (lambda x: x == -1.0 or 0.0 <= x <= 1.0, "in [0, 1], or -1 for no such factor"),
    "log_clamp": (lambda x: x <= 0.0, "None, or not positive"),
}
_NONNEGATIVE = (lambda x: 0.0 <= x < math.inf, "finite and not negative")  # z_loss, and the parameters of losses


def real(name: str, value: Any) -> float:
    """Return a real-valued option."""
    is_allowed, text = _REAL_OPTIONS.get(name, _NONNEGATIVE)
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} is a {type_name(value)}: it must be a number, {text}")
    try:
        number = float(value)
    except OverflowError:  # a very long integer
        number = math.inf
    if not is_allowed(number):
        raise ValueError(f"{name}={value} is not allowed: it must be {text}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return the value of a flag."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is a {type_name(value)}: it must be True or False")
    return bool(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return an option that is one of a few words."""
    text = f"it must be one of {', '.join(map(repr, allowed))}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type_name(value)}: {text}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: {text}")
    return str(value)

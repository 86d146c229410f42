"""What arrays of any library have: a namespace, a device, a dtype with a name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # an array of any library

# bfloat16 where `ml_dtypes` may be missing (PyTorch needs none): the bits, in a record whose field says so.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])


def namespace(x: Any) -> Any:
    """Return the array-API namespace of `x`: NumPy itself for its arrays, as array_api_compat's takes 0.1 s to load."""
    if type(x) is np.ndarray or isinstance(x, np.generic):
        return np
    from array_api_compat import array_namespace

    return array_namespace(x)


def device_of(x: Any) -> Any:
    """Return the device of an array, as the functions of its namespace take it."""
    if type(x) is np.ndarray or isinstance(x, np.generic):
        return "cpu"
    from array_api_compat import device

    return device(x)


def described(x: Any) -> str:
    """Return what `x` is, as users know its type: ``a numpy.ndarray``, ``an int``, ``None``."""
    if x is None:
        return "None"
    kind = type(x)
    package = kind.__module__.partition(".")[0]
    name = kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library: ``"float32"``."""
    if not isinstance(dtype, np.dtype):
        return str(dtype).rpartition(".")[2]
    return _dtype_names.get(dtype) or _dtype_names.setdefault(dtype, dtype_text(native(dtype)))


_dtype_names: dict[np.dtype[Any], str] = {}


def dtype_text(dtype: Any) -> str:
    return "bfloat16" if isinstance(dtype, np.dtype) and dtype == BFLOAT16 else str(dtype)


def native(dtype: Any) -> Any:
    """Return a dtype with the byte order of the machine, in which results are."""
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) and not dtype.isnative else dtype


def is_label(target: Any, label: int) -> Any:
    """Return where labels are a number, exactly: ``==`` would round it to their type."""
    xp, target = namespace(target), widen(target)
    if is_whole(xp, target.dtype):
        limits = xp.iinfo(target.dtype)
        is_there = limits.min <= label <= limits.max
    else:
        target, is_there = in_float64(target), float(label) == label  # Python compares exactly
    return target == label if is_there else xp.zeros(target.shape, dtype=xp.bool, device=device_of(target))


def in_float64(x: Any) -> Any:
    """Return `x` in float64; a NaN that signals is none that NumPy needs to tell about."""
    xp = namespace(x)
    with np.errstate(all="ignore"):
        return xp.astype(widen(x), xp.float64)


def parts(shape: tuple[int, ...], size: int) -> Iterator[tuple[slice, ...]]:
    """Split an array into pieces of about `size` entries, in C order."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    step = max(size // max(inner, 1), 1)
    for start in range(0, shape[0], step):
        for rest in parts(shape[1:], size) if step == 1 else [tuple(slice(0, n) for n in shape[1:])]:
            yield slice(start, min(start + step, shape[0])), *rest


def is_whole(xp: Any, dtype: Any) -> bool:
    """Whether a dtype is one of integers, or bool; NumPy's own answer does not know bfloat16."""
    return bool(dtype.kind in "biu" if isinstance(dtype, np.dtype) else xp.isdtype(dtype, ("bool", "integral")))


def widen(x: Any) -> Any:
    """Return `x`, or its float32 values where it holds the bits of bfloat16; integers of four bits as such of eight."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "V":
        return x
    if x.dtype.newbyteorder("=") != BFLOAT16:  # one of ml_dtypes
        return x.astype(np.int8) if x.dtype.name in ("int4", "uint4") else x
    bits = np.asarray(x["bfloat16"].astype(np.uint32) << 16)  # without axes a shift returns a scalar
    return bits.view(np.float32)

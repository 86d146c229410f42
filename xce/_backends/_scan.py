"""Searches for the first bad entry of an array, on any array-API library.

The kernels have the same functions for NumPy arrays; these serve the libraries that have no kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from xce._dispatch import device_of, namespace

_SORTED_AT_A_TIME = 1 << 15  # classes of sparse teachers, in a copy

# bfloat16 where `ml_dtypes` may be missing (PyTorch needs none): the bits, in a record whose field says so.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    xp, ignored = namespace(target), is_label(target, ignore_index)
    target = widen(target)
    if _is_whole(xp, target.dtype):
        bad = target < 0
        if n_classes <= xp.iinfo(target.dtype).max:
            bad = bad | (target >= n_classes)
    else:
        target = in_float64(target)  # narrower types would round the number of classes
        bad = ~((target >= 0) & (target < n_classes) & (target == xp.floor(target)))
    bad = bad & ~ignored
    for weight in weights:
        bad = bad & xp.astype(widen(weight), xp.bool)
    return _first(xp, bad)


def is_label(target: Any, label: int) -> Any:
    """Return where labels are a number, exactly: ``==`` would round it to their type."""
    xp, target = namespace(target), widen(target)
    if _is_whole(xp, target.dtype):
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


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    xp = namespace(values)
    values = widen(values)
    if _is_whole(xp, values.dtype):
        values = xp.astype(values, xp.float64)
    with np.errstate(invalid="ignore"):  # NaN in bfloat16 of ml_dtypes
        bad = ~((values >= low) & (values <= (math.inf if high is None else high)))
        if high is None:
            bad = bad | ~xp.isfinite(values)
    for weight in weights:
        bad = bad & xp.astype(widen(weight), xp.bool)
    return _first(xp, bad)


def scan_repetitions(indices: Any, n_classes: int, weights: tuple[Any, ...]) -> tuple[int, int]:
    """Return the flat number of the first row with a class twice, and the smallest such class; or -1 and -1.

    The places of a row are on the last axis. Rows that one of the weights, of the rows' shape, is 0 for are left out.
    """
    xp, rows, before = namespace(indices), indices.shape[:-1], 0
    for part in parts(rows, max(_SORTED_AT_A_TIME // indices.shape[-1], 1)):
        ordered = xp.sort(widen(indices[(*part, ...)]), axis=-1)
        again = ordered[..., 1:] == ordered[..., :-1]
        for weight in weights:
            again = again & xp.astype(widen(weight[(*part, ...)]), xp.bool)[..., None]
        if (flat := _first(xp, again)) >= 0:
            row, place = divmod(flat, int(again.shape[-1]))
            return before + row, int(xp.reshape(ordered, (-1, ordered.shape[-1]))[row, place])
        before += math.prod(ordered.shape[:-1])
    return -1, -1


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


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    return namespace(where).any(where, axis=axis)


def _is_whole(xp: Any, dtype: Any) -> bool:
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


def _first(xp: Any, bad: Any) -> int:
    return int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.uint8))) if bool(xp.any(bad)) else -1

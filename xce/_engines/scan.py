"""Searches for the first bad entry of an array, on any array-API library.

These serve the libraries that have no kernels; the kernels have their own, but for `scan_repetitions` on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from xce._arrays import in_float64, is_label, is_whole, namespace, parts, widen

_SORTED_AT_A_TIME = 1 << 15  # classes of sparse teachers, in a copy


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    xp, ignored = namespace(target), is_label(target, ignore_index)
    target = widen(target)
    if is_whole(xp, target.dtype):
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


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    xp = namespace(values)
    values = widen(values)
    if is_whole(xp, values.dtype):
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


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    return namespace(where).any(where, axis=axis)


def _first(xp: Any, bad: Any) -> int:
    return int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.uint8))) if bool(xp.any(bad)) else -1

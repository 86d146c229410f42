"""Searches for the first bad entry of an array, on any array-API library.

The kernels have the same two functions for NumPy arrays; these serve the libraries that have no kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

# bfloat16 where `ml_dtypes` may be missing (PyTorch needs none): the bits, in a record whose field says so.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])


def scan_labels(target: Any, n_classes: int, ignore_index: int) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1."""
    xp = array_namespace(target)
    limits = xp.iinfo(target.dtype)
    bad = target < 0
    if n_classes <= limits.max:
        bad = bad | (target >= n_classes)
    if limits.min <= ignore_index <= limits.max:
        bad = bad & (target != ignore_index)
    return _first(xp, bad)


def scan_values(values: Any, low: float, high: float | None) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1."""
    xp = array_namespace(values)
    values = widen(values)
    return _first(xp, ~((values >= low) & (values < math.inf if high is None else values <= high)))


def widen(x: Any) -> Any:
    """Return `x`, or its float32 values where it holds the bits of bfloat16."""
    if not isinstance(x, np.ndarray) or x.dtype != BFLOAT16:
        return x
    return (x["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def _first(xp: Any, bad: Any) -> int:
    return int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.uint8))) if bool(xp.any(bad)) else -1

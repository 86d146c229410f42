"""The reference, which computes on arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np

from xce import _reference
from xce._arrays import device_of, namespace
from xce._call import Call, LinearCall
from xce._engines.numbers import fill, in_buffers
from xce._engines.scan import classes_left, scan_labels, scan_repetitions, scan_values

__all__ = [
    "HAS_KERNELS", "classes_left", "from_numpy", "run", "run_linear", "scan_labels", "scan_repetitions", "scan_values",
    "to_numpy",
]  # fmt: skip

HAS_KERNELS = False


def to_numpy(x: Any) -> Any:
    """Return `x` as an array of NumPy."""
    return np.asarray(x)


def from_numpy(x: Any, like: Any) -> Any:
    """Return `x` as an array where `like` is."""
    return namespace(like).asarray(x, device=device_of(like))


def run(call: Call) -> Any:
    """Compute `call` by the reference and fill the caller's buffers."""
    return in_buffers(call, _reference.run(call))


def run_linear(call: LinearCall) -> Any:
    """Compute `call` by the reference and fill the caller's buffers."""
    loss, grads = _reference.run_linear(call)
    return loss, tuple(fill(buffer, grad) for buffer, grad in zip(call.grad_out, grads, strict=True))

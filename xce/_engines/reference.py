"""The reference, which computes on arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np

from xce import _reference
from xce._arrays import device_of, namespace
from xce._call import Call, LinearCall
from xce._engines.numbers import fill, in_buffers
from xce._engines.scan import classes_left as classes_left
from xce._engines.scan import scan_labels as scan_labels
from xce._engines.scan import scan_repetitions as scan_repetitions
from xce._engines.scan import scan_values as scan_values

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

"""Every array-API library that has no kernels: the reference computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from xce import _reference
from xce._backends._numbers import fill, in_buffers
from xce._backends._scan import classes_left, scan_labels, scan_repetitions, scan_values
from xce._call import Call, LinearCall

__all__ = [
    "classes_left", "place", "run", "run_linear", "scan_labels", "scan_repetitions", "scan_values", "to_numpy", "view",
    "wrap",
]  # fmt: skip


def place(x: Any) -> None:
    """Return None: no device needs to be entered."""


def view(x: Any, name: str) -> Any:
    """Return `x`: the reference computes on the caller's own arrays."""
    return x


def to_numpy(x: Any) -> Any:
    """Return `x` as an array of NumPy."""
    return np.asarray(x)


def wrap(result: Any) -> Any:
    """Return `result`: it already is of the caller's kind."""
    return result


def run(call: Call) -> Any:
    """Compute `call` by the reference and fill the caller's buffers."""
    return in_buffers(call, _reference.run(call))


def run_linear(call: LinearCall) -> Any:
    """Compute `call` by the reference and fill the caller's buffers."""
    loss, grads = _reference.run_linear(call)
    return loss, tuple(fill(buffer, grad) for buffer, grad in zip(call.grad_out, grads, strict=True))

"""CPU arrays of JAX, computed on as NumPy arrays that share their memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from xce._backends._scan import gpu_error
from xce._backends.numpy import run, run_linear, scan_labels, scan_values

__all__ = ["run", "run_linear", "scan_labels", "scan_values", "view", "wrap"]


def view(x: Any, name: str) -> Any:
    """Return the memory of `x` as a NumPy array; it is read-only, as JAX arrays are."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} is being traced (jax.jit, jax.grad, jax.vmap): xce computes on concrete arrays only")
    if any(device.platform != "cpu" for device in x.devices()):
        raise gpu_error(name)
    return np.asarray(x)


def wrap(result: Any) -> Any:
    """Return `result` as a JAX array."""
    return jax.numpy.asarray(result)

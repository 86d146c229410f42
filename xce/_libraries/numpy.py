"""Arrays of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from xce._engines import Engine, cpu

__all__ = ["CONVERSION", "IS_WRITABLE", "device", "engine", "place", "takes_numpy", "view", "wrap"]

CONVERSION, IS_WRITABLE = "numpy.asarray", True


def engine(x: Any) -> Engine:
    """Return the kernels of the CPU."""
    return cpu


OF_CPU = engine  # that the compiled front may stand before it, which tests replace


def place(x: Any) -> None:
    """Return None: no device needs to be entered."""


def device(x: Any) -> None:
    """Return None: there is one."""


def takes_numpy(x: Any) -> bool:
    """Return True."""
    return True


def view(x: Any, name: str) -> Any:
    """Return `x` as a plain array: the base array of a subclass, the 0-d array of a NumPy scalar."""
    return np.asarray(x)


def wrap(result: Any) -> Any:
    """Return `result`, a NumPy scalar instead of a 0-d array."""
    return result[()] if isinstance(result, np.ndarray) and result.ndim == 0 else result

"""Arrays of CuPy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from xce._engines import Engine
from xce._engines import cupy as cuda

__all__ = ["CONVERSION", "IS_WRITABLE", "device", "engine", "place", "takes_numpy", "view", "wrap"]

CONVERSION, IS_WRITABLE = "cupy.asarray", True


def engine(x: Any) -> Engine:
    """Return the kernels of a GPU."""
    return cuda


def place(x: Any) -> AbstractContextManager[Any] | None:
    """Return the context of the device of `x`, or None if it is the current one."""
    current = cuda.current_number()  # or says what is missing
    return None if x.device.id == current else cuda.cupy.cuda.Device(x.device.id)


def device(x: Any) -> Any:
    """Return the device of `x`."""
    return x.device


def takes_numpy(x: Any) -> bool:
    """Return False."""
    return False


def view(x: Any, name: str) -> Any:
    """Return `x`."""
    if any(place % x.itemsize for place in (x.data.ptr, *x.strides)):  # to read it would end the context
        raise ValueError(f"{name} does not lie at multiples of {x.itemsize} bytes, the size of an entry: copy it")
    return x


def wrap(result: Any) -> Any:
    """Return `result`: it already is an array of CuPy."""
    return result

"""Arrays of every array-API library that has no kernels."""

from __future__ import annotations

from typing import Any

from xce._engines import Engine, reference

__all__ = ["CONVERSION", "IS_WRITABLE", "device", "engine", "place", "takes_numpy", "view", "wrap"]

CONVERSION, IS_WRITABLE = "", True  # it has the name of the package


def engine(x: Any) -> Engine:
    """Return the reference."""
    return reference


def place(x: Any) -> None:
    """Return None: no device needs to be entered."""


def device(x: Any) -> Any:
    """Return the device of `x`."""
    return x.device


def takes_numpy(x: Any) -> bool:
    """Return False."""
    return False


def view(x: Any, name: str) -> Any:
    """Return `x`: the reference computes on the caller's own arrays."""
    return x


def wrap(result: Any) -> Any:
    """Return `result`: it already is of the caller's kind."""
    return result

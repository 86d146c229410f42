"""Arrays of JAX, computed on as arrays of NumPy or, on a GPU, of CuPy that share their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import jax
import numpy as np

from xce._engines import Engine
from xce._libraries import numpy

__all__ = ["CONVERSION", "IS_WRITABLE", "device", "engine", "place", "takes_numpy", "view", "wrap"]

CONVERSION, IS_WRITABLE = "jax.numpy.asarray", False
_CUDA = 2  # of DLPack


def engine(x: Any) -> Engine:
    """Return what computes on the views of arrays where `x` is."""
    return _cupy() if _is_on_cuda(x) else numpy.engine(x)


def place(x: Any) -> AbstractContextManager[Any] | None:
    """Return the context of a GPU, which is left when it has computed; None on the CPU."""
    return _entered(x.__dlpack_device__()[1]) if _is_on_cuda(x) else None


@contextmanager
def _entered(number: int) -> Iterator[None]:
    """JAX has no stream to compute on for others, nor a way to tell it that one of theirs reads an array.

    Once the caller drops it, its memory may be another array's at once.
    """
    cuda = _cupy().cupy.cuda
    with cuda.Device(number):
        try:
            yield
        finally:
            cuda.get_current_stream().synchronize()


def device(x: Any) -> Any:
    """Return the device of `x`, or None if there are several."""
    return None if isinstance(x.device, jax.sharding.Sharding) else x.device


def takes_numpy(x: Any) -> bool:
    """Return whether `x` is on the CPU."""
    return is_on_cpu(x)


def view(x: Any, name: str) -> Any:
    """Return the memory of `x` as an array of NumPy, which is read-only as JAX arrays are, or of CuPy."""
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{name} is being traced (jax.jit, jax.grad, jax.vmap): expected a concrete array. Call xce outside of the "
            "transformation, or inside by jax.pure_callback; return_grad=True returns the gradient"
        )
    if is_on_cpu(x):
        try:
            return np.asarray(x)
        except TypeError as error:
            raise TypeError(f"{name} has dtype {x.dtype}: expected numbers") from error
    if not _is_on_cuda(x):
        raise TypeError(f"{name} is on {x.sharding}: expected arrays on the CPU or on one CUDA device")
    try:
        # CuPy's stream waits until the array is there
        return _cupy().cupy.from_dlpack(x)
    except (BufferError, NotImplementedError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name} has dtype {x.dtype}, which CuPy does not take from JAX: {error}") from error


def wrap(result: Any) -> Any:
    """Return `result` as a JAX array."""
    if type(result) is np.ndarray or isinstance(result, np.generic):
        with np.errstate(all="ignore"):  # float64 becomes float32 unless JAX is told otherwise
            return jax.numpy.asarray(result)
    return jax.dlpack.from_dlpack(_Finished(result))


class _Finished:
    """An array of CuPy that nobody needs to wait for, to be handed over by DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__(stream=-1)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]


def is_on_cpu(x: Any) -> bool:
    """Whether an array lies on the CPU; one that is being traced lies nowhere."""
    if isinstance(x, jax.core.Tracer):
        return False
    return all(device.platform == "cpu" for device in x.devices())


def _is_on_cuda(x: Any) -> bool:
    """Whether an array lies on one CUDA device."""
    if isinstance(x, jax.core.Tracer) or is_on_cpu(x):
        return False
    try:
        return x.__dlpack_device__()[0] == _CUDA  # type: ignore[no-any-return]
    except BufferError:  # several devices, or of another kind
        return False


def _cupy() -> ModuleType:
    from xce._engines import cupy

    return cupy

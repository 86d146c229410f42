"""Arrays of JAX, computed on as arrays of NumPy or, on a GPU, of CuPy that share their memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import jax
import numpy as np

from xce._backends import _viewed
from xce._backends._viewed import classes_left, scan_labels, scan_repetitions, scan_values

__all__ = [
    "classes_left", "is_on_cpu", "place", "run", "run_linear", "scan_labels", "scan_repetitions", "scan_values",
    "view", "wrap",
]  # fmt: skip

_CUDA = 2  # of DLPack


def place(x: Any) -> AbstractContextManager[Any] | None:
    """Return the context of an array's device; None where there is none, or it is the current one."""
    return _cupy().place_of(x.__dlpack_device__()[1]) if _is_on_cuda(x) else None


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


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return _finished(_viewed.run(call), call.logits)


def run_linear(call: Any) -> Any:
    """Compute a `LinearCall`."""
    return _finished(_viewed.run_linear(call), call.inputs)


class _Finished:
    """An array of CuPy that nobody needs to wait for, to be handed over by DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__(stream=-1)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()  # type: ignore[no-any-return]


def _finished(result: Any, x: Any) -> Any:
    """Return `result` when the GPU has computed it.

    JAX has no stream to compute on for others, nor a way to tell it that one of theirs reads an array: once the caller
    drops it, its memory may be another array's at once.
    """
    if type(x) is not np.ndarray:
        with x.device:
            _cupy().cupy.cuda.get_current_stream().synchronize()
    return result


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
    from xce._backends import cupy

    return cupy

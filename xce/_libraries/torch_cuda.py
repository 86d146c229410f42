"""CUDA tensors of PyTorch as arrays of CuPy, on PyTorch's stream and in memory that PyTorch allocates.

Kernels run on the stream that is current in PyTorch, in order with everything before and after: nobody waits, and
`torch.cuda.graph` captures them. For its sake all memory is PyTorch's, that of temporary arrays as well: the allocator
of CuPy may ask the driver for more, which is an error during a capture, and would give to others what the graph writes
to whenever it is replayed. Moreover results are tensors like any other, `record_stream` and all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from xce._arrays import dtype_name
from xce._engines import cupy as engine
from xce._engines.cupy import cupy

__all__ = ["engine", "place", "scaled", "view", "wrap"]


def place(device: int) -> AbstractContextManager[None] | None:
    """Return the context in which to compute on tensors of a device, or None if it is entered already."""
    stream = _current_stream(device)
    return None if _is_entered(device, stream) else _entered(device, stream)


def view(x: Any) -> Any:
    """Return the memory of a tensor as an array of CuPy."""
    if x.layout != torch.strided or x.is_neg():  # a bit that says "not yet negated"
        raise TypeError("not dense")
    # CuPy 14.0 refuses bfloat16 from others
    shared = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    if _is_entered(x.get_device(), _current_stream(x.get_device())):
        array = cupy.from_dlpack(shared.__dlpack__(stream=-1))  # nothing to wait for
    else:  # one of the streams waits for the other
        array = cupy.from_dlpack(shared)
    return array.view(_bfloat16()) if shared is not x else array


def wrap(result: Any) -> Any:
    """Return `result`, computed on the current stream, as a tensor that shares its memory."""
    dtype = getattr(torch, dtype_name(result.dtype))
    memory = result.data.mem
    if not isinstance(
        memory, _Memory
    ):  # a buffer of the caller's; who goes on does so on this stream, and need not wait
        result = result.view(np.int16) if dtype == torch.bfloat16 else result
        return from_dlpack(result.__dlpack__(stream=-1)).view(dtype)
    size = result.dtype.itemsize
    tensor = torch.empty(0, dtype=dtype, device=memory.tensor.device)
    start, strides = (result.data.ptr - memory.ptr) // size, [stride // size for stride in result.strides]
    return tensor.set_(memory.tensor.untyped_storage(), start, result.shape, strides)


def scaled(x: Any, factor: Any) -> Any:
    """Return a tensor times a tensor of one number, in the memory of `x`, which is not touched if that number is 1."""
    if not x.is_contiguous() or x.data_ptr() % 16:
        return x.mul_(factor)
    with place(x.get_device()) or nullcontext():
        engine.scale(view(x), view(factor.double()))
    return x


class _Memory(cupy.cuda.UnownedMemory):  # type: ignore[misc]
    """Memory of a tensor, for CuPy."""

    tensor: torch.Tensor  # of bytes


def _allocate(size: int) -> Any:
    """The allocator of CuPy that asks PyTorch, on the current device and stream."""
    device = cupy.cuda.runtime.getDevice()
    tensor = torch.empty(size, dtype=torch.uint8, device=_torch_device(device))
    memory = _Memory(tensor.data_ptr(), size, tensor, device)
    memory.tensor = tensor
    return cupy.cuda.MemoryPointer(memory, 0)


@contextmanager
def _entered(device: int, stream: Any) -> Iterator[None]:
    with (
        cupy.cuda.Device(device),
        cupy.cuda.Stream.from_external(stream),
        cupy.cuda.using_allocator(_allocate),
    ):
        yield


def _is_entered(device: int, stream: Any) -> bool:
    cuda = cupy.cuda
    return (
        cuda.get_allocator() is _allocate
        and cuda.runtime.getDevice() == device
        and cuda.get_current_stream().ptr == stream.cuda_stream
    )


def _current_stream(device: int) -> Any:
    return torch.cuda.current_stream(device)


def _torch_device(number: int) -> torch.device:
    return torch.device("cuda", number)


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as missing:
        raise ImportError("bfloat16 on a GPU needs ml_dtypes: pip install ml_dtypes") from missing
    return bfloat16

"""Tensors of PyTorch, computed on as arrays of NumPy or, on a CUDA device, of CuPy that share their memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from xce._arrays import BFLOAT16, dtype_name
from xce._checks import NUMBERS
from xce._engines import Engine
from xce._libraries import numpy

__all__ = ["CONVERSION", "IS_WRITABLE", "device", "engine", "place", "takes_numpy", "view", "wrap"]

CONVERSION, IS_WRITABLE = "torch.as_tensor", True


def engine(x: Any) -> Engine:
    """Return what computes on the views of tensors where `x` is."""
    return _cuda().engine if is_on_cuda(x) else numpy.engine(x)


def device(x: Any) -> Any:
    """Return the device of `x`."""
    return x.device


def takes_numpy(x: Any) -> bool:
    """Return False."""
    return False


def place(x: Any) -> AbstractContextManager[Any] | None:
    """Return the context of a tensor's device and stream; None where there is none, or it is entered already."""
    return _cuda().place(x.get_device()) if is_on_cuda(x) else None


def is_on_cuda(x: Any) -> bool:
    """Whether a tensor lies on a CUDA device; PyTorch for ROCm calls its own devices so."""
    return bool(x.is_cuda) and torch.version.hip is None


def view(x: Any, name: str) -> Any:
    """Return the memory of `x` as an array of NumPy or CuPy."""
    if x.requires_grad:
        raise TypeError(
            f"{name} requires grad: detach it, or use xce.torch, which has PyTorch's own losses with autograd "
            "(return_grad=True returns the gradient of any loss)"
        )
    try:
        if not is_on_cuda(x):
            return x.view(torch.uint16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()
        array = _cuda().view(x)
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} {_refusal(x, name)}") from error
    if x.data_ptr() % x.element_size():  # of another library's memory; to read it would end the context
        raise ValueError(
            f"{name} does not lie at a multiple of {x.element_size()} bytes, the size of an entry: clone it"
        )
    return array


def _refusal(x: Any, name: str) -> str:
    """What is wrong with a tensor whose memory cannot be had."""
    if x.is_neg():
        return f"has the negative bit, its memory holds other numbers: pass {name}.resolve_neg()"
    is_usual = x.device.type in ("cpu", "cuda") and x.layout is torch.strided and dtype_name(x.dtype) in NUMBERS
    if is_usual:
        return (
            "holds no numbers, as where it is being traced or transformed (torch.func.vmap, FakeTensorMode): expected "
            "a concrete tensor; xce.torch lets PyTorch compute there"
        )
    return (
        f"is a torch.Tensor on device {x.device}, of dtype {x.dtype} and layout {x.layout}: "
        "expected dense tensors of NumPy's dtypes or bfloat16, on the CPU or a CUDA device"
    )


def wrap(result: Any) -> Any:
    """Return `result` as a tensor that shares its memory."""
    if not (type(result) is np.ndarray or isinstance(result, np.generic)):
        return _cuda().wrap(result)
    result = np.asarray(result)
    if result.dtype.kind == "V":
        return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def scaled(x: Any, factor: Any) -> Any:
    """Return a CUDA tensor times a tensor of one number, in the memory of `x`; nobody waits for the number."""
    return _cuda().scaled(x, factor)


def _cuda() -> ModuleType:
    """What needs CuPy."""
    from xce._libraries import torch_cuda

    return torch_cuda

"""CPU tensors of PyTorch, computed on as NumPy arrays that share their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xce._backends._scan import BFLOAT16, gpu_error
from xce._backends.numpy import run, run_linear, scan_labels, scan_values

__all__ = ["run", "run_linear", "scan_labels", "scan_values", "view", "wrap"]


def view(x: Any, name: str) -> Any:
    """Return the memory of `x` as a NumPy array."""
    if x.requires_grad:
        raise TypeError(
            f"{name} requires grad: detach it, or use xce.torch, which has PyTorch's own losses with autograd "
            "(return_grad=True returns the gradient of any loss)"
        )
    if x.device.type == "cuda":
        raise gpu_error(name)
    try:
        return x.view(torch.uint16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"{name} is a torch.Tensor on device {x.device}, of dtype {x.dtype} and layout {x.layout}: "
            "allowed are dense CPU tensors of NumPy's dtypes or bfloat16"
        ) from error


def wrap(result: Any) -> Any:
    """Return `result` as a tensor that shares its memory."""
    result = np.asarray(result)
    if result.dtype.kind == "V":
        return torch.from_numpy(result.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(result)

"""CuPy arrays: their memory, and the kernels of `_cuda` compiled by NVRTC. Not run on a GPU yet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NoReturn

import numpy as np

try:
    import cupy as cupy
except ImportError as missing:
    raise ImportError(
        "computing on a GPU takes the arrays of CuPy, which is missing: pip install 'xce[cuda13]'"
    ) from missing

from xce._backends import _cuda, _cuda_scale
from xce._backends._scan import scan_labels, scan_values
from xce._call import LinearCall

__all__ = ["place", "run", "run_linear", "scan_labels", "scan_values", "view", "wrap"]

# The same bits as on a CPU as far as they go: nothing is contracted. CuPy adds -ftz=true, so subnormals are 0.
_OPTIONS = ("-std=c++20", "-DXCE_CUDA", "--fmad=false")
_SHARED_BYTES = 64 << 10  # of a block: three of them share a multiprocessor of compute capability 9.0


class _Device:
    """A `_cuda.Device`: the current one of CuPy."""

    sum_blocks = 256
    sum_threads = 256

    def __init__(self, number: int) -> None:
        attributes = cupy.cuda.Device(number).attributes
        self.shared_bytes = min(_SHARED_BYTES, attributes["MaxSharedMemoryPerBlockOptin"] - 2048)
        self.has_clusters = attributes["ComputeCapabilityMajor"] >= 9
        self.processors = attributes["MultiProcessorCount"]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def sum(self, x: Any) -> Any:
        return cupy.sum(x, dtype=np.float64, keepdims=True)

    def mean(self, x: Any, axis: int) -> Any:
        return cupy.mean(x, axis, dtype=np.float64).astype(x.dtype)

    def launch(
        self, module: _cuda.Module, kernel: str, grid: int, block: tuple[int, int], shared: int, job: Any
    ) -> None:
        function = _module(module).get_function(kernel)
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        function((grid,), block, (job,), shared_mem=shared)


@cache
def _device(number: int) -> _Device:
    return _Device(number)


@cache
def _module(module: _cuda.Module) -> Any:
    definitions = (f"-D{name}={value}" for name, value in module.definitions)
    options = (*_OPTIONS, f"-DXCE_STORAGE_{module.storage}", *definitions)
    return cupy.RawModule(code=_cuda.text(*module.files), options=options)


def place(x: Any) -> AbstractContextManager[Any] | None:
    """Return the context of the device of `x`, or None if it is the current one."""
    return place_of(x.device.id)


def place_of(number: int) -> AbstractContextManager[Any] | None:
    """Return the context of a device, or None if it is the current one."""
    return None if number == cupy.cuda.runtime.getDevice() else cupy.cuda.Device(number)


def view(x: Any, name: str) -> Any:
    """Return `x`."""
    try:
        cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(f"{name} is an array of CuPy, which finds no GPU: is the driver installed?") from error
    return x


def wrap(result: Any) -> Any:
    """Return `result`: it already is an array of CuPy."""
    return result


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    with place(call.logits) or nullcontext():
        return _cuda.run(call, _device(call.logits.device.id))


def scale(x: Any, factor: Any) -> None:
    """Multiply an array, in C order and aligned to 16 bytes, by an array of one float64, in place."""
    _cuda_scale.scale(x, factor, _device(x.device.id))


def run_linear(call: LinearCall) -> NoReturn:
    """Refuse `call`."""
    raise NotImplementedError("linear_cross_entropy has no GPU kernels yet: copy the arrays to the CPU first")

"""CuPy arrays: their memory, and the kernels of `_cuda` compiled by NVRTC. Not run on a GPU yet."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

try:
    import cupy
except ImportError as missing:
    raise ImportError(
        "arrays of CuPy are computed on by CuPy, which is missing: pip install 'xce[cuda13]'"
    ) from missing

from xce._backends import _cuda, _cuda_linear
from xce._backends._scan import scan_labels, scan_values
from xce._call import LinearCall

__all__ = ["run", "run_linear", "scan_labels", "scan_values", "view", "wrap"]

# The same bits as on a CPU as far as they go: nothing is contracted. CuPy adds -ftz=true, so subnormals are 0.
_OPTIONS = ("-std=c++20", "-DXCE_CUDA", "--fmad=false")
# CUBLAS_DEFAULT_MATH, which has no TF32, with CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a sum are
# added in float32, whatever the result is rounded to.
_MATH_MODE = 16
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
        self.memory_bytes = cupy.cuda.Device(number).mem_info[1]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def sum(self, x: Any) -> Any:
        return cupy.sum(x, dtype=np.float64, keepdims=True)

    def mean(self, x: Any, axis: int) -> Any:
        return cupy.mean(x, axis, dtype=np.float64).astype(x.dtype)

    def gemm(self, product: _cuda.Product) -> None:
        p, compute = product, np.float64 if product.out_dtype == np.float64 else np.float32
        kind, out_kind = _blas_type(p.dtype), _blas_type(p.out_dtype)
        alpha, beta = np.array(p.alpha, compute), np.array(p.beta, compute)  # read during the call
        cublas, handle = cupy.cuda.cublas, cupy.cuda.device.get_cublas_handle()  # this thread's; gemmEx sets the stream
        how = cublas.CUBLAS_COMPUTE_64F if compute == np.float64 else cublas.CUBLAS_COMPUTE_32F
        mode = cublas.getMathMode(handle)
        cublas.setMathMode(handle, _MATH_MODE)
        try:
            cublas.gemmEx(
                handle, int(p.transpose_a), int(p.transpose_b), p.m, p.n, p.k, alpha.ctypes.data, p.a, kind, p.lda,
                p.b, kind, p.ldb, beta.ctypes.data, p.c, out_kind, p.ldc, how, cublas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip
        finally:
            cublas.setMathMode(handle, mode)

    def launch(
        self, module: _cuda.Module, kernel: str, grid: int, block: tuple[int, int], shared: int, job: Any
    ) -> None:
        function = _module(module).get_function(kernel)
        if shared > 48 << 10:
            function.max_dynamic_shared_size_bytes = shared
        function((grid,), block, (job,), shared_mem=shared)


def _blas_type(dtype: Any) -> int:
    runtime = cupy.cuda.runtime
    codes = {"float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    return int(codes.get(str(dtype), runtime.CUDA_R_16BF))


@cache
def _device(number: int) -> _Device:
    return _Device(number)


@cache
def _module(module: _cuda.Module) -> Any:
    definitions = (f"-D{name}={value}" for name, value in module.definitions)
    options = (*_OPTIONS, f"-DXCE_STORAGE_{module.storage}", *definitions)
    return cupy.RawModule(code=_cuda.text(*module.files), options=options)


def view(x: Any, name: str) -> Any:
    """Return `x`, which must lie on the current device."""
    try:
        current = cupy.cuda.Device().id
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(f"{name} is an array of CuPy, which finds no GPU: is the driver installed?") from error
    if x.device.id != current:
        raise ValueError(
            f"{name} is on GPU {x.device.id} but the current device is {current}: all arrays of a call must be on one, "
            f"with cupy.cuda.Device({x.device.id}): ..."
        )
    return x


def wrap(result: Any) -> Any:
    """Return `result`: it already is an array of CuPy."""
    return result


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return _cuda.run(call, _device(cupy.cuda.Device().id))


def run_linear(call: LinearCall) -> Any:
    """Compute `call`."""
    return _cuda_linear.run(call, _device(cupy.cuda.Device().id))

"""The kernels of a GPU, on arrays of CuPy: `cuda` chooses them, NVRTC compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

try:
    import cupy as cupy
except ImportError as missing:
    raise ImportError(
        "computing on a GPU takes the arrays of CuPy, which is missing: pip install 'xce[cuda13]'"
    ) from missing

from xce._call import LinearCall
from xce._engines import cuda as _cuda
from xce._engines import cuda_linear as _cuda_linear
from xce._engines import cuda_scale as _cuda_scale
from xce._engines.device import Module, Product
from xce._engines.scan import scan_repetitions as scan_repetitions

HAS_KERNELS = True

# The same bits as on a CPU as far as they go: nothing is contracted. CuPy adds -ftz=true, so subnormals are 0.
OPTIONS = ("-std=c++20", "--fmad=false")
# CUBLAS_DEFAULT_MATH, which has no TF32, with CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a sum are
# added in float32, whatever the result is rounded to.
_MATH_MODE = 16
_SHARED_BYTES = 64 << 10  # of a block: three of them share a multiprocessor of compute capability 9.0


class _Device:
    """A `Device`: the current one of CuPy."""

    sum_blocks = 256
    sum_threads = 256

    def __init__(self, number: int) -> None:
        device = cupy.cuda.Device(number)
        self.memory_bytes = device.mem_info[1]
        self.shared_bytes = min(_SHARED_BYTES, device.attributes["MaxSharedMemoryPerBlockOptin"] - 2048)
        self.has_clusters = int(device.compute_capability[:-1]) >= 9  # "90"; the attributes do not have it
        self.processors = device.attributes["MultiProcessorCount"]
        self._number = number
        self.plans: dict[Any, Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def to_numpy(self, x: Any) -> Any:
        return cupy.asnumpy(x)

    def gemm(self, product: Product) -> None:
        p, compute = product, np.float64 if product.out_dtype == np.float64 else np.float32
        kind, out_kind = _blas_type(p.dtype), _blas_type(p.out_dtype)
        alpha, beta = np.array(p.alpha, compute), np.array(p.beta, compute)  # read during the call
        cublas, handle = cupy.cuda.cublas, cupy.cuda.device.get_cublas_handle()  # this thread's; gemmEx sets the stream
        how = cublas.CUBLAS_COMPUTE_64F if compute == np.float64 else cublas.CUBLAS_COMPUTE_32F
        mode = cublas.getMathMode(handle)
        cublas.setMathMode(handle, _MATH_MODE)
        try:
            cublas.gemmEx(
                handle,
                int(p.transpose_a),
                int(p.transpose_b),
                p.m,
                p.n,
                p.k,
                alpha.ctypes.data,
                p.a,
                kind,
                p.lda,
                p.b,
                kind,
                p.ldb,
                beta.ctypes.data,
                p.c,
                out_kind,
                p.ldc,
                how,
                cublas.CUBLAS_GEMM_DEFAULT,
            )
        finally:
            cublas.setMathMode(handle, mode)

    def load(self, module: Module, name: str) -> Any:
        return _function(module, name, self._number)

    def launch(self, kernel: Any, grid: int, block: tuple[int, int], shared: int, job: Any) -> None:
        # by value, as an array of no dimensions; of plain bytes, since CuPy takes every field of a structure apart
        argument = job.reshape(-1).view(f"V{job.nbytes}").reshape(())
        kernel((grid,), block, (argument,), shared_mem=shared)


def _blas_type(dtype: Any) -> int:
    runtime = cupy.cuda.runtime
    codes = {"float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
    return int(codes.get(str(dtype), runtime.CUDA_R_16BF))


@cache
def _device(number: int) -> _Device:
    return _Device(number)


@contextmanager
def _entered(x: Any) -> Iterator[_Device]:
    """The device of an array, which becomes the current one."""
    with cupy.cuda.Device(x.device.id):
        yield _device(x.device.id)


@cache
def _function(module: Module, kernel: str, number: int) -> Any:
    """A kernel, compiled for the current device, whose number this is."""
    function = cupy.RawModule(code=_cuda.source(module), options=OPTIONS).get_function(kernel)
    if _cuda.keeps_rows(module):  # once, not by every launch
        function.max_dynamic_shared_size_bytes = _device(number).shared_bytes  # more than 48 KiB must be asked for
        function.preferred_shared_memory_carveout = 100  # the driver may else leave room for one block only
    return function


def current_number() -> int:
    try:
        return int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError("to compute on the arrays of CuPy takes a GPU: is its driver installed?") from error


def to_numpy(x: Any) -> Any:
    """Return a copy of `x` on the host."""
    return cupy.asnumpy(x)


def from_numpy(x: Any, like: Any) -> Any:
    """Return a copy of `x` where `like` is."""
    with _entered(like):
        return cupy.asarray(x, blocking=True)


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    with _entered(target) as device:
        return _cuda.scan_labels(target, n_classes, ignore_index, weights, device)


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    with _entered(values) as device:
        return _cuda.scan_values(values, low, high, weights, device)


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    with _entered(where) as device:
        return _cuda.classes_left(where, axis, device)


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    with _entered(call.logits) as device:
        return _cuda.run(call, device)


def scale(x: Any, factor: Any) -> None:
    """Multiply an array, in C order and aligned to 16 bytes, by an array of one float64, in place."""
    with _entered(x) as device:
        _cuda_scale.scale(x, factor, device)


def run_linear(call: LinearCall) -> Any:
    """Compute `call`."""
    with _entered(call.inputs) as device:
        return _cuda_linear.run(call, device)

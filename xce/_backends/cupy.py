"""CuPy arrays: their memory, and the kernels of `_cuda` compiled by NVRTC. Not run on a GPU yet."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

try:
    import cupy
except ImportError as missing:
    raise ImportError(
        "arrays of CuPy are computed on by CuPy, which is missing: pip install 'xce[cuda13]'"
    ) from missing

from xce._backends import _cuda
from xce._call import LinearCall

__all__ = ["from_numpy", "run", "run_linear", "scan_labels", "scan_values", "to_numpy", "view", "wrap"]

# The same bits as on a CPU as far as they go: nothing is contracted. CuPy adds -ftz=true, so subnormals are 0.
_OPTIONS = ("-std=c++20", "-DXCE_CUDA", "--fmad=false")
_SHARED_BYTES = 64 << 10  # of a block: three of them share a multiprocessor of compute capability 9.0


class _Device:
    """A `_cuda.Device`: the current one of CuPy."""

    sum_blocks = 256
    sum_threads = 256

    def __init__(self, number: int) -> None:
        device = cupy.cuda.Device(number)
        self.shared_bytes = min(_SHARED_BYTES, device.attributes["MaxSharedMemoryPerBlockOptin"] - 2048)
        self.has_clusters = int(device.compute_capability[:-1]) >= 9  # "90"; the attributes do not have it
        self.processors = device.attributes["MultiProcessorCount"]
        self._number = number

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)

    def pointer(self, x: Any) -> int:
        return int(x.data.ptr)

    def to_numpy(self, x: Any) -> Any:
        return cupy.asnumpy(x)

    def launch(
        self, module: _cuda.Module, kernel: str, grid: int, block: tuple[int, int], shared: int, job: Any
    ) -> None:
        # an array of one entry is passed by value
        _function(module, kernel, self._number)((grid,), block, (job,), shared_mem=shared)


@cache
def _device(number: int) -> _Device:
    return _Device(number)


def _current() -> _Device:
    return _device(cupy.cuda.Device().id)


@cache
def _function(module: _cuda.Module, kernel: str, number: int) -> Any:
    """A kernel, compiled for the current device, whose number this is."""
    definitions = (f"-D{name}={value}" for name, value in module.definitions)
    options = (*_OPTIONS, f"-DXCE_STORAGE_{module.storage}", *definitions)
    function = cupy.RawModule(code=_cuda.text(*module.files), options=options).get_function(kernel)
    if "XCE_GROUP" in dict(module.definitions):  # more than 48 KiB must be asked for, once, not by every launch
        function.max_dynamic_shared_size_bytes = _device(number).shared_bytes
    return function


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
    if any(place % x.itemsize for place in (x.data.ptr, *x.strides)):  # to read it would end the context
        raise ValueError(f"{name} does not lie at multiples of {x.itemsize} bytes, the size of an entry: copy it")
    return x


def wrap(result: Any) -> Any:
    """Return `result`: it already is an array of CuPy."""
    return result


def to_numpy(x: Any) -> Any:
    """Return a copy of `x` on the host."""
    return cupy.asnumpy(x)


def from_numpy(x: Any, like: Any) -> Any:
    """Return a copy of `x` on the current device, where `like` is."""
    return cupy.asarray(x, blocking=True)


def scan_labels(target: Any, n_classes: int, ignore_index: int) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1."""
    return _cuda.scan_labels(target, n_classes, ignore_index, _current())


def scan_values(values: Any, low: float, high: float | None) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1."""
    return _cuda.scan_values(values, low, high, _current())


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return _cuda.run(call, _current())


def run_linear(call: LinearCall) -> NoReturn:
    """Refuse `call`."""
    raise NotImplementedError("linear_cross_entropy has no GPU kernels yet: copy the arrays to the CPU first")

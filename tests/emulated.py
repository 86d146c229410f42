"""A GPU that the CPU plays: the CUDA kernels compiled by the C++ compiler against emulation.h, on NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xce._engines import cuda as _cuda
from xce._engines import cuda_linear as _cuda_linear
from xce._engines import scan
from xce._engines.device import Module, Product

HAS_KERNELS = True
scan_repetitions = scan.scan_repetitions  # which has no kernel

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-mfma", "-fno-strict-aliasing", "-w"]
SANITIZED = bool(os.environ.get("XCE_SANITIZE"))
if SANITIZED:
    FLAGS += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

ENTRY = """
extern "C" void launch_{kernel}(const void *job, unsigned grid, unsigned x, unsigned y, int cluster, size_t shared)
{{
    static {type} argument;
    memcpy(&argument, job, sizeof argument);
    emulation::launch([] {{ {kernel}(argument); }}, grid, x, y, cluster, shared);
}}
extern "C" size_t size_{kernel}() {{ return sizeof({type}); }}
"""
JOBS = {
    "rows": "row_job",
    "partial_sums": "sum_job",
    "final_sum": "sum_job",
    "elements": "element_job",
    "scale": "scale_job",
    "copy_rows": "copy_job",
}
ARRAYS = ("scan", "convert", "sum_numbers", "mean_of_rows")


@cache
def library(module: Module) -> ctypes.CDLL:
    definitions = dict(module.definitions)
    definitions.pop("XCE_PHI", None)  # one library for all losses
    definitions.pop("XCE_WHAT", None)
    kernels = ["partial_sums", "final_sum"] if "XCE_SUMS" in definitions else ["rows"]
    if "XCE_FORMULA" in definitions:
        kernels = ["elements"]
    if "XCE_SCALE" in definitions:
        kernels = ["scale"]
    if "XCE_COPY" in definitions:
        kernels = ["copy_rows"]
    if "XCE_ARRAYS" in definitions:
        kernels = list(ARRAYS)
    code = f'#define XCE_STORAGE_{module.storage}\n#include "{Path(__file__).parent / "emulation.h"}"\n'
    code += _cuda.text(*module.files)
    code += "".join(ENTRY.format(kernel=kernel, type=JOBS.get(kernel, "array_job")) for kernel in kernels)
    return compiled(code, tuple(f"-D{name}={value}" for name, value in definitions.items()))


@cache
def compiled(code: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / f"xce-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    emulation = (Path(__file__).parent / "emulation.h").read_text(encoding="utf-8")
    name = hashlib.sha256("\0".join([code, emulation, *FLAGS, *flags]).encode()).hexdigest()[:24]
    path = folder / f"{name}.so"
    if not path.exists():
        mine = f"{os.getpid()}-{threading.get_ident()}"
        source = folder / f"{name}-{mine}.cpp"
        source.write_text(code, encoding="utf-8")
        built = folder / f"{name}-{mine}.so"
        command = [str(COMPILER), *FLAGS, *flags, str(source), "-o", str(built)]
        # the library of a sanitizer, for this process, would slow the compiler down, too
        subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"})
        source.unlink()
        built.replace(path)
    return ctypes.CDLL(str(path))


class Emulated:
    """The `Device` of the tests; the sizes are small, so that small arrays have large rows."""

    memory_bytes = 1 << 20
    shared_bytes = 4096
    has_clusters = True
    processors = 1
    sum_blocks = 3
    sum_threads = 32

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with np.errstate(all="ignore"):  # NaN, as bfloat16
            return np.full(shape, 7 if np.dtype(dtype).kind in "biu" else np.nan, dtype)

    def pointer(self, x: Any) -> int:
        if SANITIZED and not x.flags.aligned:  # the sanitizer would end the process without a word of which test it was
            raise ValueError("numbers at odd addresses, which no GPU reads or writes: leave such a layout out")
        return int(x.ctypes.data)

    def to_numpy(self, x: Any) -> Any:
        return x.copy()

    def gemm(self, product: Product) -> None:
        assert product.alpha != 0
        assert product.dtype == product.out_dtype or (product.dtype.itemsize, product.out_dtype) == (2, np.float32)
        blas(*product)

    def load(self, module: Module, name: str) -> Any:
        lib, cluster = library(module), int(dict(module.definitions).get("XCE_CLUSTER", 1))

        def kernel(grid: int, block: tuple[int, int], shared: int, job: Any) -> None:
            assert lib[f"size_{name}"]() == job.nbytes
            lib[f"launch_{name}"](
                ctypes.c_void_p(job.ctypes.data), grid, block[0], block[1], cluster, ctypes.c_size_t(shared)
            )

        return kernel

    def launch(self, kernel: Any, grid: int, block: tuple[int, int], shared: int, job: Any) -> None:
        assert 0 < grid < 1 << 31, "an error on a GPU"
        kernel(grid, block, shared, job)


DEVICE = Emulated()


def blas(
    transpose_a: bool, transpose_b: bool, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
    beta: float, c: int, ldc: int, dtype: Any, out_dtype: Any,
) -> None:  # fmt: skip
    """What BLAS does, on the memory at these addresses: columns lie side by side."""
    wide = np.float64 if out_dtype == np.float64 else np.float32
    left = columns_at(a, *((k, m) if transpose_a else (m, k)), lda, dtype).astype(wide)
    right = columns_at(b, *((n, k) if transpose_b else (k, n)), ldb, dtype).astype(wide)
    out = columns_at(c, m, n, ldc, out_dtype)
    with np.errstate(all="ignore"):
        result = wide(alpha) * ((left.T if transpose_a else left) @ (right.T if transpose_b else right))
        out[...] = result + wide(beta) * out if beta else result


def columns_at(address: int, rows: int, columns: int, ld: int, dtype: Any) -> Any:
    """The matrix at an address."""
    assert 0 < rows <= ld < 2**31
    assert 0 < columns < 2**31
    size = np.dtype(dtype).itemsize
    memory = (ctypes.c_char * (((columns - 1) * ld + rows) * size)).from_address(address)
    entries = np.frombuffer(memory, dtype)
    return np.lib.stride_tricks.as_strided(entries, (rows, columns), (size, ld * size))


def view(x: Any, name: str) -> Any:
    x = np.asarray(x)
    if name in ("grad_out", "hess_out", "out"):  # a copy would be written instead
        return x
    x = x.astype(x.dtype.newbyteorder("="), copy=False)  # no array of a GPU is swapped
    return x if x.flags.aligned else x.copy(order="K")  # nor at odd addresses: CuPy's backend refuses it


def to_numpy(x: Any) -> Any:
    return np.array(x)


def from_numpy(x: Any, like: Any) -> Any:
    return np.array(x)


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    return _cuda.scan_labels(target, n_classes, ignore_index, weights, DEVICE)


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    return _cuda.scan_values(values, low, high, weights, DEVICE)


def classes_left(where: Any, axis: int) -> Any:
    return _cuda.classes_left(where, axis, DEVICE)


def run(call: Any) -> Any:
    return _cuda.run(call, DEVICE)


def run_linear(call: Any) -> Any:
    return _cuda_linear.run(call, DEVICE)

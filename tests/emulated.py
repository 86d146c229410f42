"""A GPU that the CPU plays: the CUDA kernels compiled by the C++ compiler against emulation.h, on NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xce._backends import _cuda
from xce._backends._scan import scan_labels, scan_values

__all__ = ["place", "run", "scan_labels", "scan_values", "view", "wrap"]

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-mfma", "-fno-strict-aliasing", "-w"]
if os.environ.get("XCE_SANITIZE"):
    FLAGS += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

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
}


@cache
def library(module: _cuda.Module) -> ctypes.CDLL:
    definitions = dict(module.definitions)
    definitions.pop("XCE_PHI", None)  # one library for all losses
    definitions.pop("XCE_WHAT", None)
    kernels = ["partial_sums", "final_sum"] if "XCE_SUMS" in definitions else ["rows"]
    if "XCE_FORMULA" in definitions:
        kernels = ["elements"]
    elif "XCE_SCALE" in definitions:
        kernels = ["scale"]
    code = f'#define XCE_STORAGE_{module.storage}\n#include "{Path(__file__).parent / "emulation.h"}"\n'
    code += _cuda.text(*module.files)
    code += "".join(ENTRY.format(kernel=kernel, type=JOBS[kernel]) for kernel in kernels)
    return compiled(code, tuple(f"-D{name}={value}" for name, value in definitions.items()))


@cache
def compiled(code: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / f"xce-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    emulation = (Path(__file__).parent / "emulation.h").read_text(encoding="utf-8")
    name = hashlib.sha256("\0".join([code, emulation, *FLAGS, *flags]).encode()).hexdigest()[:24]
    path = folder / f"{name}.so"
    if not path.exists():
        source = folder / f"{name}-{os.getpid()}.cpp"
        source.write_text(code, encoding="utf-8")
        built = folder / f"{name}-{os.getpid()}.so"
        subprocess.run([str(COMPILER), *FLAGS, *flags, str(source), "-o", str(built)], check=True)
        source.unlink()
        built.rename(path)
    return ctypes.CDLL(str(path))


class Emulated:
    """The `Device` of the tests; the sizes are small, so that small arrays have large rows."""

    shared_bytes = 4096
    has_clusters = True
    processors = 1
    sum_blocks = 3
    sum_threads = 32

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 7, dtype)

    def pointer(self, x: Any) -> int:
        return int(x.ctypes.data)

    def sum(self, x: Any) -> Any:
        return np.sum(x, dtype=np.float64, keepdims=True)

    def mean(self, x: Any, axis: int) -> Any:
        return np.mean(x, axis, dtype=np.float64).astype(x.dtype)

    def launch(
        self, module: _cuda.Module, kernel: str, grid: int, block: tuple[int, int], shared: int, job: Any
    ) -> None:
        lib = library(module)
        assert lib[f"size_{kernel}"]() == job.nbytes
        cluster = int(dict(module.definitions).get("XCE_CLUSTER", 1))
        lib[f"launch_{kernel}"](
            ctypes.c_void_p(job.ctypes.data), grid, block[0], block[1], cluster, ctypes.c_size_t(shared)
        )


DEVICE = Emulated()


def place(x: Any) -> None:
    pass


def view(x: Any, name: str) -> Any:
    return np.asarray(x)


def wrap(result: Any) -> Any:
    return result[()] if isinstance(result, np.ndarray) and result.ndim == 0 else result


def run(call: Any) -> Any:
    return _cuda.run(call, DEVICE)

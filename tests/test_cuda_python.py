"""What the GPU backend does in Python, as far as no GPU is needed for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from xce import _checks
from xce._engines import cuda as _cuda


@pytest.mark.parametrize("job", [_cuda.ROW_JOB, _cuda.SUM_JOB, _cuda.ELEMENT_JOB, _cuda.ARRAY_JOB])
def test_jobs_are_arguments_of_kernels(job: Any) -> None:
    """CuPy passes an array of one entry by value, and CUDA up to 4096 bytes of arguments."""
    assert np.zeros((), job).size == 1
    assert job.itemsize <= 4096


def test_definitions_stand_in_the_text() -> None:
    """Each new set of options costs a compilation in every process, even where the module is in CuPy's cache."""
    module = next(module for module, _ in _cuda.modules() if module.definitions)
    lines = _cuda.source(module).splitlines()
    assert lines[:2] == ["#define XCE_CUDA 1", f"#define XCE_STORAGE_{module.storage} 1"]
    assert lines[2 : 2 + len(module.definitions)] == [f"#define {name} {value}" for name, value in module.definitions]
    assert _cuda.source(module).endswith(_cuda.text(*module.files))


def test_jobs_are_passed_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy takes a structure apart field by field, at every launch."""
    backend = pytest.importorskip("xce._engines.cupy", reason="needs CuPy, for a CUDA device", exc_type=ImportError)
    launched: list[Any] = []
    device, job = object.__new__(backend._Device), np.zeros((), _cuda.ROW_JOB)
    job["n_rows"] = 7
    device.launch(lambda *args, **options: launched.append((args, options)), 5, (32, 4), 48, job)
    (((grid, block, (argument,)), options),) = launched
    assert (grid, block, options) == ((5,), (32, 4), {"shared_mem": 48})
    assert argument.dtype == f"V{job.nbytes}"
    assert argument.ndim == 0
    assert argument.tobytes() == job.tobytes()


class There:
    """An array of CuPy, as far as its memory is concerned: at an address that nobody may read."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.shape, self.strides, self.size = x, x.shape, x.strides, x.size
        self.itemsize, self.dtype = x.itemsize, x.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = 8 + self.x.ctypes.data - MEMORY.ctypes.data
        return {"shape": self.shape, "strides": self.strides, "typestr": "<V2", "data": (place, False), "version": 3}


MEMORY = np.zeros(40, np.float32)
LOGITS = MEMORY[:12].reshape(4, 3)


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("has strides", as_strided(MEMORY[20:], (4, 3), (0, 4))),
        ("shares memory with logits", MEMORY[3:15].reshape(4, 3)),
        ("shares memory with logits", LOGITS[::-1]),
        ("shares memory with target", MEMORY[18:30].reshape(4, 3)),
        ("", LOGITS),
        ("", MEMORY[:12].reshape(4, 3)),
        ("", MEMORY[24:36].reshape(4, 3)),
        ("", MEMORY[24:].reshape(4, 4)[:, ::-1][:, :3]),
    ],
)
def test_buffers_on_a_gpu_do_not_overlap(text: str, out: np.ndarray) -> None:
    def check() -> None:
        _checks.buffers(
            There(LOGITS), "logits", {"grad_out": There(out)}, {"target": There(MEMORY[12:24].reshape(4, 3))}
        )

    if text:
        with pytest.raises(ValueError, match=text):
            check()
    else:
        check()


def test_buffers_without_entries() -> None:
    _checks.buffers(There(LOGITS[:0]), "logits", {"grad_out": There(LOGITS[:0])}, {})


def test_what_is_asked_of_cupy_is_there() -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy, of which names are checked")
    for name in ("MaxSharedMemoryPerBlockOptin", "MultiProcessorCount"):
        assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")
    assert hasattr(cupy.cuda.Device, "compute_capability")
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes")
    assert hasattr(cupy.RawKernel, "preferred_shared_memory_carveout")

"""Every CUDA kernel compiles for the GPUs that are about, with no GPU present.

Each module is compiled for one architecture, all four in turns; ``XCE_EVERY_ARCHITECTURE=1`` compiles all for all.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from xce import _reference
from xce._backends import _cuda, _cuda_linear, _cuda_scale

nvrtc = pytest.importorskip("cupy", reason="needs CuPy, to compile the kernels of CUDA").cuda.nvrtc

ARCHITECTURES = ("75", "80", "90", "100")
EVERY = os.environ.get("XCE_EVERY_ARCHITECTURE") == "1"
CASES = [
    pytest.param(module, kernel, arch, id="-".join([f"sm_{arch}", module.storage, *(v for _, v in module.definitions)]))
    for number, (module, kernel) in enumerate((*_cuda.modules(), *_cuda_linear.modules(), *_cuda_scale.modules()))
    for arch in (ARCHITECTURES if EVERY else ARCHITECTURES[number % 4 : number % 4 + 1])
]


@pytest.mark.parametrize(("module", "kernel", "arch"), CASES)
def test_kernel_compiles(module: Any, kernel: str, arch: str) -> None:
    program = nvrtc.createProgram(_cuda.text(*module.files), "xce.cu", [], [])
    definitions = [f"-D{name}={value}" for name, value in module.definitions]
    options = [f"--gpu-architecture=sm_{arch}", "-std=c++20", "-DXCE_CUDA", f"-DXCE_STORAGE_{module.storage}"]
    try:
        nvrtc.compileProgram(program, [*options, "--fmad=false", "-ftz=true", *definitions])
    except nvrtc.NVRTCError:
        raise AssertionError(nvrtc.getProgramLog(program)) from None
    assert kernel.encode() in nvrtc.getCUBIN(program)
    nvrtc.destroyProgram(program)


def test_the_names_are_those_of_the_formulas() -> None:
    assert set(_cuda._PHIS) == {*_reference.PHI, *_reference.DIVERGENCES}
    assert set(_cuda._FORMULAS) == set(_reference.ELEMENTS)

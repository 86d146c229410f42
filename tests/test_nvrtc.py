"""Every CUDA kernel compiles for the GPUs that are about, with no GPU present, and keeps its numbers in registers.

The report of the compiler tells the registers of a kernel and what it spills to memory. NVRTC compiles in several
threads at a time, so all selected tests' modules are compiled at once. Each kernel is compiled for each architecture
and each storage type; those of rows in all regimes, by turns. ``XCE_EVERY_ARCHITECTURE=1`` compiles all for all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from xce._engines import cuda as _cuda
from xce._engines import cuda_linear as _cuda_linear
from xce._engines import cuda_scale as _cuda_scale
from xce._engines.device import Module

nvrtc = pytest.importorskip("cupy", reason="needs CuPy, to compile the kernels of CUDA").cuda.nvrtc

from xce._engines.cupy import OPTIONS  # noqa: E402

ARCHITECTURES = ("75", "80", "90", "100")
EVERY = os.environ.get("XCE_EVERY_ARCHITECTURE") == "1"
REGISTERS = 65536  # of a multiprocessor, of all these
REGIME = ("XCE_GROUP", "XCE_CLUSTER", "XCE_THREADS")


def pairs() -> Iterator[tuple[Module, str, str]]:
    """The modules, a kernel of each, and what it is compiled for."""
    turns: dict[Any, int] = {}
    for module, kernel in (*_cuda.modules(), *_cuda_linear.modules(), *_cuda_scale.modules()):
        loss = [value for name, value in module.definitions if name not in REGIME]
        in_regimes = dict(module.definitions).get("XCE_WHAT") == "0" and loss in IN_REGIMES
        turn = turns.setdefault((module.storage, *loss), 0)
        turns[(module.storage, *loss)] += 1
        for number, arch in enumerate(ARCHITECTURES):
            if EVERY or not in_regimes or turn % len(ARCHITECTURES) == number:
                yield module, kernel, arch


# what modules() has in every regime
IN_REGIMES = [
    [value for name, value in _cuda.rows_module("", _cuda._STRIDED, level, 0, phi).definitions if name not in REGIME]
    for level, phi in ((0, 0), (1, 0), (2, len(_cuda.phis()) - 1))
]
CASES = [
    pytest.param(module, kernel, arch, id="-".join([f"sm_{arch}", module.storage, *(v for _, v in module.definitions)]))
    for module, kernel, arch in dict.fromkeys(pairs())
]

# Threads that must fit on a multiprocessor, so that some wait for memory while others compute: rows of each level of
# rows.cu, whose bounds (XCE_RESIDENT) the compiler keeps unless it spills; in float64 numbers take two registers.
RESIDENT = {"0": 768, "1": 512, "2": 256, "elements": 512, "others": 512}


class Report(NamedTuple):
    """What the assembler said of a module."""

    registers: int
    spilled: dict[str, int]  # bytes stored and loaded, by function
    cubin: bytes


def compiled(module: Module, arch: str) -> Report:
    """Compile a module as CuPy would."""
    program = nvrtc.createProgram(_cuda.source(module), "xce.cu", [], [])
    options = [f"--gpu-architecture=sm_{arch}", *OPTIONS, "-ftz=true", "--ptxas-options=-v"]
    try:
        nvrtc.compileProgram(program, options)
        return report(nvrtc.getProgramLog(program), nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError:
        raise AssertionError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)


def report(log: str, cubin: bytes) -> Report:
    """Read the assembler's lines; each function's properties come in the line after its name."""
    functions = re.findall(
        r"Function properties for (\S+)\s.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log, re.DOTALL
    )
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))  # of several kernels
    return Report(registers, {name: int(a) + int(b) for name, a, b in functions}, cubin)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[Any, Future[Report]]]:
    """The compilations of the tests that were selected, which go on while the first results are looked at."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        selected = [
            item.callspec.params
            for item in request.session.items
            if getattr(item, "originalname", "") == "test_kernel_compiles"
        ]
        yield {(p["module"], p["arch"]): pool.submit(compiled, p["module"], p["arch"]) for p in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("module", "kernel", "arch"), CASES)
def test_kernel_compiles(module: Module, kernel: str, arch: str, reports: Any, record_property: Any) -> None:
    found = reports[module, arch].result()
    record_property("registers", found.registers)
    assert kernel.encode() in found.cubin
    assert kernel in found.spilled
    assert not any(found.spilled.values()), f"bytes spilled to memory and read again, by function: {found.spilled}"
    threads = REGISTERS // (-(-found.registers // 8) * 8)  # registers are dealt to threads by eight
    assert threads >= resident(module, arch), f"{found.registers} registers: only {threads} threads fit"


def resident(module: Module, arch: str) -> int:
    """How many threads of a module must fit on a multiprocessor."""
    definitions = dict(module.definitions)
    level = definitions.get("XCE_LEVEL", "elements" if "XCE_FORMULA" in definitions else "others")
    if arch == "100":  # for which the compiler needs more
        return 512 if level in ("0", "others") else 256
    if "XCE_GROUP" not in definitions:
        return RESIDENT[level]
    is_long = module.storage == "float64" or definitions["XCE_WHAT"] == "4"
    return min(RESIDENT[level], 512) if is_long else RESIDENT[level]


def test_the_report_is_read() -> None:
    log = """a.cu(3): warning #550-D: variable "unused" was set but never used
ptxas info    : 379 bytes gmem
ptxas info    : Compiling entry function 'rows' for 'sm_90'
ptxas info    : Function properties for rows
ptxas         .     128 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 72 registers, used 0 barriers, 128 bytes cumulative stack size
ptxas info    : Function properties for _Z5other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    assert report(log, b"") == Report(72, {"rows": 12, "_Z5other": 0}, b"")

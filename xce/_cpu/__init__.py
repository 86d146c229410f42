"""The compiled kernels, one module for each instruction set and storage type, and the choice among them.

A module for each storage type, too, makes `real`, `scalar` and `storage` plain C types that a -D chooses, as for a CUDA
kernel: there are no fused types, and no header is included twice. Only the modules that are used are imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from types import ModuleType

LEVELS = {"v4": 4, "v3": 3, "v2": 2}  # of x86-64, best first


@functools.cache
def available_levels() -> tuple[str, ...]:
    """The levels that were built and that this CPU can run, best first."""
    from xce._cpu.runtime import supports

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("base",)
    return tuple(name for name, level in LEVELS.items() if supports(level) and _built(name))


def level_not_built() -> str | None:
    """The best level that this CPU could run, if the build left it out."""
    from xce._cpu.runtime import supports

    best = next((name for name, level in LEVELS.items() if supports(level)), None)
    return None if best is None or _built(best) else best


def _built(level: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{level}_float32") is not None


@functools.cache
def level() -> str:
    """The level in use: the best available one, or what the environment variable ``XCE_CPU`` asks for."""
    levels = available_levels()
    if not levels:
        raise ImportError("xce needs an x86-64-v2 CPU (SSE4.2, 2009) or later; this one has no SSE4.2")
    wanted = os.environ.get("XCE_CPU", "")
    if wanted and wanted not in levels:
        raise ImportError(f"XCE_CPU={wanted!r} is not available here; choose one of {', '.join(levels)}")
    return wanted or levels[0]


@functools.cache
def kernels(storage: str) -> ModuleType:
    """The module that computes on arrays of ``storage`` ("float32", "float64", "float16", "bfloat16")."""
    return importlib.import_module(f"{__name__}.{level()}_{storage}")

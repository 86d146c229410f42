"""Gradients times a number on the GPU: what a backward pass is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from xce._engines.cuda import storage_name
from xce._engines.device import Device, Module

_JOB = np.dtype([("data", np.int64), ("factor", np.int64), ("n", np.int64)])  # scale_job of scale.cu
_FILES = ("cuda/threads.h", "cuda/scale.cu")
_DEFINITIONS = (("XCE_SCALE", "1"),)
_THREADS = 256  # of a block
_LANES = 2048  # threads of a multiprocessor


def scale(x: Any, factor: Any, device: Device) -> None:
    """Multiply an array in C order, which begins at a multiple of 16 bytes, by a float64 in memory of the device."""
    chunks = -(-x.size * x.dtype.itemsize // 16)
    if not chunks:
        return
    job = np.zeros((), _JOB)
    job["data"], job["factor"], job["n"] = device.pointer(x), device.pointer(factor), x.size
    grid = min(-(-chunks // _THREADS), device.processors * _LANES // _THREADS)
    device.launch(device.load(_module(storage_name(x)), "scale"), grid, (_THREADS, 1), 0, job)


def _module(storage: str) -> Module:
    return Module(storage, _FILES, _DEFINITIONS)


def modules() -> Iterable[tuple[Module, str]]:
    """Every module with its kernel, for the tests that compile them."""
    for storage in ("float32", "float64", "float16", "bfloat16"):
        yield _module(storage), "scale"

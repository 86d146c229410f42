"""What a kind of call does on a GPU, noted at the first one and done again at the next.

Which kernels run, on how many blocks, and all that their jobs hold but addresses depends on shapes, strides, dtypes and
options alone. Finding it out takes Python some ten times as long as writing the addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from xce._engines.device import Device, Module, Product

_KEPT = 512  # plans of a device
_ALIGNED = 256  # bytes: where the arrays of a scratch buffer begin
# The upper half of a word of a job that stands for the address of an array, whose number is the lower half: as a float
# it is a NaN, as an integer beyond all sizes.
_TOKEN = 0x7FFA5CE0


class _Launch(NamedTuple):
    kernel: Any
    grid: int
    block: tuple[int, int]
    shared: int
    words: np.ndarray[Any, Any]  # the job,
    places: np.ndarray[Any, Any]  # where it has addresses,
    numbers: np.ndarray[Any, Any]  # and those of which arrays: of the call's, then of those that were allocated

    def run(self, device: Device, addresses: np.ndarray[Any, Any]) -> None:
        job = self.words.copy()
        job[self.places] = addresses[self.numbers]
        device.launch(self.kernel, self.grid, self.block, self.shared, job)


class _Plan(NamedTuple):
    launches: list[_Launch]
    allocated: list[tuple[tuple[int, ...], Any, int]]  # shape, dtype, and where in the scratch buffer; -1: is returned
    scratch: int  # bytes
    kind: Callable[[tuple[Any, ...]], Any]  # of the result, which has arrays with these numbers
    numbers: tuple[int | None, ...]

    def run(self, device: Device, given: list[Any], addresses: list[int]) -> Any:
        arrays, start = given.copy(), 0
        if self.scratch:
            buffer = device.empty((self.scratch,), np.uint8)
            start = device.pointer(buffer)
        for shape, dtype, offset in self.allocated:
            x = device.empty(shape, dtype) if offset < 0 else None
            arrays.append(x)
            addresses.append(start + offset if x is None else device.pointer(x))
        of_arrays = np.array(addresses, np.int64)
        for launch in self.launches:
            launch.run(device, of_arrays)
        return self.kind(tuple(None if i is None else arrays[i] for i in self.numbers))


class _Notes:
    """A `Device` that notes what it is asked for while another one does it."""

    def __init__(self, device: Device, given: list[Any], same: list[int]) -> None:
        self.device, self.arrays, self.n_given = device, given.copy(), len(given)
        self.memory_bytes, self.shared_bytes = device.memory_bytes, device.shared_bytes
        self.has_clusters, self.processors = device.has_clusters, device.processors
        self.sum_blocks, self.sum_threads, self.plans = device.sum_blocks, device.sum_threads, device.plans
        self.numbers = {id(x): i for x, i in zip(given, same, strict=True)}
        self.launches: list[_Launch] = []
        self.is_constant = True

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        x = self.device.empty(shape, dtype)
        self.numbers[id(x)] = len(self.arrays)
        self.arrays.append(x)
        return x

    def pointer(self, x: Any) -> int:
        number = self.numbers.get(id(x))
        if number is None:  # a view, that the next call would have to form
            self.is_constant = False
            return self.device.pointer(x)
        return (_TOKEN << 32) + number

    def to_numpy(self, x: Any) -> Any:
        self.is_constant = False
        return self.device.to_numpy(x)

    def gemm(self, product: Product) -> None:
        raise NotImplementedError("a product in a plan")

    def load(self, module: Module, name: str) -> Any:
        return self.device.load(module, name)

    def launch(self, kernel: Any, grid: int, block: tuple[int, int], shared: int, job: Any) -> None:
        words = np.frombuffer(job.tobytes(), np.int64)
        places = np.flatnonzero(words >> 32 == _TOKEN)
        self.launches.append(_Launch(kernel, grid, block, shared, words, places, words[places] & 0xFFFFFFFF))
        addresses = [0 if x is None else self.device.pointer(x) for x in self.arrays]
        self.launches[-1].run(self.device, np.array(addresses, np.int64))

    def plan(self, result: Any) -> _Plan | None:
        """Return the plan of what was done; None if another call of the kind may need something else."""
        parts = result if isinstance(result, tuple) else (result,)
        numbers = tuple(None if x is None else self.numbers.get(id(x), -1) for x in parts)
        if not self.is_constant or -1 in numbers:
            return None
        kind = getattr(type(result), "_make", tuple) if isinstance(result, tuple) else _only
        allocated, scratch = [], 0
        for i, x in enumerate(self.arrays[self.n_given :], self.n_given):
            is_returned = i in numbers
            allocated.append((x.shape, x.dtype, -1 if is_returned else scratch))
            if not is_returned:
                scratch += -(-math.prod(x.shape) * x.dtype.itemsize // _ALIGNED) * _ALIGNED
        return _Plan(self.launches, allocated, scratch, kind, numbers)


def _only(arrays: tuple[Any, ...]) -> Any:
    return arrays[0]


def signature(x: Any) -> tuple[Any, ...] | None:
    """Return what a plan depends on of an array."""
    return None if x is None else (x.shape, x.strides, x.dtype)


def planned(device: Device, key: tuple[Any, ...], given: list[Any], run: Callable[[Device], Any]) -> Any:
    """Return ``run(device)``, of the arrays `given`, by the plan of the first call with this key."""
    if isinstance(device, _Notes):
        return run(device)
    addresses = [0 if x is None else device.pointer(x) for x in given]
    same = list(map(addresses.index, addresses))  # a call in place is of another kind
    key = *key, *same
    plan = device.plans.get(key, _UNKNOWN)
    if plan is not _UNKNOWN:
        return run(device) if plan is None else plan.run(device, given, addresses)
    notes = _Notes(device, given, same)
    result = run(notes)
    if len(device.plans) >= _KEPT:
        device.plans.clear()
    device.plans[key] = notes.plan(result)
    return result


_UNKNOWN = object()

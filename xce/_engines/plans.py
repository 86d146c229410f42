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
_TOKEN, _NUMBER = 0x7FFA5CE0, 0xFFFFFFFF


class _Launch(NamedTuple):
    kernel: Any
    grid: int
    block: tuple[int, int]
    shared: int
    job: slice  # of the words


class _Plan(NamedTuple):
    launches: tuple[_Launch, ...]
    words: np.ndarray[Any, Any]  # the jobs
    places: np.ndarray[Any, Any]  # of addresses in them: so many bytes
    offsets: np.ndarray[Any, Any]  # behind the beginning of which arrays:
    numbers: np.ndarray[Any, Any]  # those of the call, those that are returned, and a scratch buffer
    made: tuple[tuple[tuple[int, ...], Any], ...]  # shapes and dtypes of the second kind
    scratch: int  # bytes
    kind: Callable[[tuple[Any, ...]], Any]  # of the result, of arrays
    result: tuple[int | None, ...]  # with these numbers

    def run(self, device: Device, given: list[Any], addresses: list[int]) -> Any:
        arrays = given + [device.empty(*made) for made in self.made]
        addresses += map(device.pointer, arrays[len(given) :])
        if self.scratch:
            buffer = device.empty((self.scratch,), np.uint8)
            addresses.append(device.pointer(buffer))
        words = self.words.copy()
        words[self.places] = np.array(addresses, np.int64)[self.numbers] + self.offsets
        for kernel, grid, block, shared, job in self.launches:
            device.launch(kernel, grid, block, shared, words[job])
        return self.kind(tuple(None if i is None else arrays[i] for i in self.result))


class _Notes:
    """A `Device` that notes what it is asked for while another one does it."""

    def __init__(self, device: Device, given: list[Any], same: list[int]) -> None:
        self.device, self.arrays, self.n_given = device, given.copy(), len(given)
        self.memory_bytes, self.shared_bytes = device.memory_bytes, device.shared_bytes
        self.has_clusters, self.processors = device.has_clusters, device.processors
        self.sum_blocks, self.sum_threads, self.plans = device.sum_blocks, device.sum_threads, device.plans
        self.numbers = {id(x): i for x, i in zip(given, same, strict=True)}
        self.launches: list[tuple[Any, ...]] = []
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
        words = np.frombuffer(job.tobytes(), np.int64).copy()
        is_address = words >> 32 == _TOKEN
        if "ignore_index" in job.dtype.fields:  # the one word of a job that may be any number
            is_address[job.dtype.fields["ignore_index"][1] // 8] = False
        places = np.flatnonzero(is_address)
        self.launches.append((kernel, grid, block, shared, words.copy(), places))
        words[places] = [self.device.pointer(self.arrays[i]) for i in words[places] & _NUMBER]
        self.device.launch(kernel, grid, block, shared, words)

    def plan(self, result: Any) -> _Plan | None:
        """Return the plan of what was done; None if another call of the kind may need something else."""
        parts = result if isinstance(result, tuple) else (result,)
        returned = [None if x is None else self.numbers.get(id(x), -1) for x in parts]
        if not self.is_constant or -1 in returned or not self.launches:
            return None
        made = [i for i in range(self.n_given, len(self.arrays)) if i in returned]
        number, offset, scratch = np.arange(len(self.arrays)), np.zeros(len(self.arrays), np.int64), 0
        number[made] = self.n_given + np.arange(len(made))
        for i, x in enumerate(self.arrays):
            if i >= self.n_given and i not in made:
                number[i], offset[i] = self.n_given + len(made), scratch
                scratch += -(-math.prod(x.shape) * x.dtype.itemsize // _ALIGNED) * _ALIGNED
        launches, places, start = [], [], 0
        for kernel, grid, block, shared, job, of_job in self.launches:
            launches.append(_Launch(kernel, grid, block, shared, slice(start, start + job.size)))
            places.append(of_job + start)
            start += job.size
        words, at = np.concatenate([job for *_, job, _ in self.launches]), np.concatenate(places)
        arrays = words[at] & _NUMBER
        return _Plan(
            tuple(launches),
            words,
            at,
            offset[arrays],
            number[arrays],
            tuple((self.arrays[i].shape, self.arrays[i].dtype) for i in made),
            scratch,
            getattr(type(result), "_make", tuple) if isinstance(result, tuple) else _only,
            tuple(None if i is None else int(number[i]) for i in returned),
        )


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

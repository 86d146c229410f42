"""What the benchmark of a GPU stands on: its clock, its arrays, and the answers in float64."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
from benchmarks.common import numpy_dtype
from measure import TOLERANCE

BLOCK = 2**24  # random numbers, which are repeated, each time further along
CHUNK = 2**26  # entries that the oracle handles at a time, in float64


class Task(NamedTuple):
    """One loss of arrays of one size."""

    loss: str
    dtype: str
    shape: tuple[int, ...]
    axis: int = -1
    options: tuple[tuple[str, float], ...] = ()

    @property
    def title(self) -> str:
        own = "".join(f", {name}={value:g}" for name, value in self.options)
        return f"{self.loss}{own}{f', axis={self.axis}' if self.axis != -1 else ''}, {self.dtype}"

    @property
    def is_of_elements(self) -> bool:
        return self.loss.startswith("binary")

    @property
    def array_bytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def moved(self, what: str) -> int:
        """Bytes that must be read and written: labels of rows do not count."""
        return self.array_bytes * (1 + self.is_of_elements + what.startswith("gradient"))


class Inputs(NamedTuple):
    x: Any
    y: Any
    grad: Any


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    best: float
    how: str  # it was timed


class Machine(Protocol):
    """Where arrays live, and the clock; the tests have one without a GPU."""

    xp: Any
    cache_bytes: int

    def time(self, calls: Sequence[Callable[[], Any]], library: str, seconds: float) -> Times: ...
    def copy(self, source: Any, to: Any) -> None: ...
    def wait(self) -> None: ...
    def free(self) -> None: ...
    def about(self) -> dict[str, str]: ...


class Cuda:
    """The current device of CuPy."""

    def __init__(self) -> None:
        import cupy

        self.xp = self.cupy = cupy
        self.cache_bytes = cupy.cuda.Device().attributes["L2CacheSize"]

    def time(self, calls: Sequence[Callable[[], Any]], library: str, seconds: float) -> Times:
        """All calls in turns, for about so long."""
        for call in calls[:2]:
            call()
        replay, stream, how = self._captured(calls, library)
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        taken: list[float] = []
        began = time.perf_counter()
        while len(taken) < 5 or (time.perf_counter() - began < seconds and len(taken) < 1000):
            start.record(stream)
            replay()
            end.record(stream)
            end.synchronize()
            taken.append(1e-3 * self.cupy.cuda.get_elapsed_time(start, end) / len(calls))
        return Times(median(taken[1:]), min(taken[1:]), how)

    def _captured(self, calls: Sequence[Callable[[], Any]], library: str) -> tuple[Callable[[], Any], Any, str]:
        """What replays all calls, on which stream."""
        capture = {"cupy": self._capture, "torch": self._capture_torch}.get(library)
        try:
            if capture is not None:
                return *capture(calls), "graph"
        except Exception:  # it waits for the GPU, say
            self.cupy.cuda.Device().synchronize()
        return (lambda: [call() for call in calls]), self.cupy.cuda.Stream.null, "calls"

    def _capture(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], Any]:
        stream, pool = self.cupy.cuda.Stream(non_blocking=True), self.cupy.cuda.MemoryPool()
        self.cupy.cuda.Device().synchronize()
        with self.cupy.cuda.using_allocator(pool.malloc), stream:
            for call in calls:
                call()
            stream.synchronize()
            stream.begin_capture()
            try:
                results = [call() for call in calls]
            finally:
                graph = stream.end_capture()

        def replay(_keep: Any = (results, pool)) -> None:
            graph.launch(stream)

        return replay, stream

    def _capture_torch(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], Any]:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]

        def replay(_keep: Any = results) -> None:
            graph.replay()

        return replay, self.cupy.cuda.Stream.null

    def copy(self, source: Any, to: Any) -> None:
        to.data.copy_from_device_async(source.data, source.nbytes)

    def wait(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def free(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()
        if torch := imported_torch():
            torch.cuda.empty_cache()

    def about(self) -> dict[str, str]:
        runtime = self.cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.cupy.cuda.Device().id)
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        return {
            "device": properties["name"].decode(),
            "multiprocessors": str(properties["multiProcessorCount"]),
            "driver": driver or str(runtime.driverGetVersion()),
            "cuda": str(runtime.runtimeGetVersion()),
        }


def imported_torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def output_of(*command: str) -> str:
    """What a command prints, or nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# Arrays


def random_array(xp: Any, shape: Sequence[int], dtype: Any, seed: int, scale: float = 1.0) -> Any:
    """Normal numbers of any dtype."""
    return refilled(xp, xp.empty(tuple(shape), dtype), seed, scale)


def refilled(xp: Any, x: Any, seed: int, scale: float = 1.0) -> Any:
    """`x` with other numbers: a block of them, again and again, each time from another place on."""
    bits = f"u{x.dtype.itemsize}"  # CuPy copies integers, whatever it knows of bfloat16
    block = scale * np.random.default_rng(seed).standard_normal(min(x.size, BLOCK), np.float32)
    block, flat = xp.asarray(block.astype(x.dtype).view(bits)), x.view(bits).reshape(-1)
    for turn, start in enumerate(range(0, x.size, len(block))):
        part = flat[start : start + len(block)]
        part[...] = xp.roll(block, 7919 * turn)[: len(part)]
    return x


def inputs_of(task: Task, machine: Machine) -> list[Inputs]:
    """Sets of arrays, together larger than four caches."""
    xp, dtype = machine.xp, numpy_dtype(task.dtype)
    count = min(32, -(-4 * machine.cache_bytes // task.array_bytes))
    rng, rows = np.random.default_rng(1), list(task.shape)
    n_classes = rows.pop(task.axis)
    made = []
    for seed in range(max(count, 1)):
        x = random_array(xp, task.shape, dtype, seed)
        if task.is_of_elements:
            y = xp.asarray((rng.random(min(x.size, BLOCK)) < 0.3).astype(dtype).view(f"u{dtype.itemsize}"))
            y = xp.resize(y, x.size).view(dtype).reshape(task.shape)
        else:
            y = xp.asarray(rng.integers(0, n_classes, rows))
        made.append(Inputs(x, y, random_array(xp, task.shape, dtype, seed + 100)))
    return made


def widened(xp: Any, x: Any) -> Any:
    if x.dtype.itemsize == 2 and x.dtype != np.float16:
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


class Oracle:
    """The mean of a loss and its gradient in float64, by CuPy's or NumPy's functions; a part of axis 0 at a time."""

    def __init__(self, task: Task, machine: Machine, inputs: Inputs) -> None:
        self.task, self.xp, self.options = task, machine.xp, dict(task.options)
        self.x, self.y = inputs.x.copy(), inputs.y  # some contenders overwrite theirs
        self.count = self.y.size
        self.step = max(1, CHUNK * task.shape[0] // math.prod(task.shape))
        self.value = sum(float(self._part(part)[0].sum()) for part in self._parts()) / self.count

    def disagreement(self, value: Any, grad: Any, *, of_rows: bool = False) -> str | None:
        """How the answer is wrong, or None if it is right; a mean, or (the mean of) what rows have, each by itself."""
        tolerance, count = TOLERANCE[self.task.dtype], 1 if of_rows else self.count
        if not abs(float(value) - self.value) <= tolerance * abs(self.value):
            return f"value {float(value):.9g}, not {self.value:.9g}"
        if grad is None:
            return None
        if tuple(grad.shape) != self.task.shape or grad.dtype != self.x.dtype:
            return f"gradient of shape {tuple(grad.shape)} and dtype {grad.dtype}"
        smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-126}.get(self.task.dtype, 2.0**-126)
        worst = 0.0
        for part in self._parts():
            _, exact, size = self._part(part)
            error = self.xp.abs(self._moved(widened(self.xp, grad[part])) - exact / count)
            allowed = tolerance * size / count + smallest
            found = float((error / allowed).max())
            worst = max(worst, math.inf if math.isnan(found) else found)
        return None if worst <= 1 else f"gradient wrong by {worst:.2g} times the tolerance of {tolerance:g}"

    def _parts(self) -> Iterator[slice]:
        return (slice(i, i + self.step) for i in range(0, self.task.shape[0], self.step))

    def _moved(self, x: Any) -> Any:
        return self.xp.moveaxis(x, self.task.axis, -1)

    def _part(self, part: slice) -> tuple[Any, Any, Any]:
        """Losses, derivatives, and the size of the terms of these."""
        xp, x = self.xp, self._moved(widened(self.xp, self.x[part]))
        if self.task.is_of_elements:
            y = self._moved(widened(xp, self.y[part]))
            p = 1 / (1 + xp.exp(-x))
            return xp.maximum(x, 0) - x * y + xp.log1p(xp.exp(-xp.abs(x))), p - y, p + y
        x -= x.max(-1, keepdims=True)
        x -= xp.log(xp.exp(x).sum(-1, keepdims=True))
        label = self.y[part][..., None]
        u, p = xp.take_along_axis(x, label, -1), xp.exp(x)
        is_label = xp.arange(x.shape[-1]) == label
        if "gamma" in self.options:
            gamma, rest = self.options["gamma"], -xp.expm1(u)
            slope = gamma * rest ** (gamma - 1) * xp.exp(u) * u - rest**gamma
            return -(rest**gamma) * u, slope * (is_label - p), xp.abs(slope) * (is_label + p)
        eps = self.options.get("label_smoothing", 0.0)
        a = (1 - eps) * is_label + eps / x.shape[-1]
        return -(1 - eps) * u - eps * x.mean(-1, keepdims=True), p - a, p + a

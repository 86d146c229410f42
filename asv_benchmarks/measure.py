"""Fair times of several calls in one process, and the oracle that their answers must agree with."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

SETTLE = 0.01  # seconds; idle threads of libgomp spin for milliseconds after a call and disturb the next
BURST = 0.05  # seconds of calls of one contender in one round
BLOCK = 2**20  # logits that the oracle handles at a time, in float64

# Largest relative error of a value or an element of a gradient. A peer that keeps log-probabilities near -12
# in bfloat16 is wrong by 3% in their exp, which passes.
TOLERANCE = {"float16": 1e-2, "bfloat16": 6e-2, "float32": 1e-4, "float64": 1e-10}


class Times(NamedTuple):
    """Seconds of one call."""

    best: float
    median: float


def race(calls: Mapping[str, Call], rounds: int, number: int = 1) -> dict[str, Times]:
    """Time every call in each of several rounds, so that a slow moment of the machine hits all of them.

    A round starts one contender later than the one before. Each contender first waits, then runs once
    untimed (its threads wake up, the caches become its own), then runs for `BURST` seconds. A sample is
    the mean of `number` calls, more than 1 for calls of microseconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            timer = timeit.Timer(calls[name])
            time.sleep(SETTLE)
            timer.timeit(number)
            end = time.perf_counter() + BURST
            while not samples[name] or time.perf_counter() < end:
                samples[name].append(timer.timeit(number) / number)
    return {name: Times(min(seconds), median(seconds)) for name, seconds in samples.items()}


def host(array: Any) -> Array:
    """An array of any peer as a NumPy array."""
    if hasattr(array, "detach"):  # torch, whose bfloat16 NumPy cannot take
        array = array.detach()
        array = array.float() if array.element_size() == 2 else array
    return np.asarray(array)


class Oracle:
    """Mean cross entropy, its gradient and its Hessian diagonal in float64, from each row's log-sum-exp."""

    def __init__(self, logits: Array, labels: Array) -> None:
        self.logits, self.labels = logits, labels
        self.tolerance = TOLERANCE[logits.dtype.name]
        self.smallest = _smallest(logits.dtype)
        self.lse = np.empty(len(logits))
        for rows, x in self._blocks():
            top = x.max(1)
            self.lse[rows] = top + np.log(np.exp(x - top[:, None]).sum(1))
        target_logits = logits[np.arange(len(logits)), labels].astype(np.float64)
        self.value = float(np.mean(self.lse - target_logits))

    def disagreement(self, value: Any, grad: Any = None, hess: Any = None) -> str | None:
        """How the answer is wrong, or None if it is right."""
        got = float(host(value))
        if not abs(got - self.value) <= self.tolerance * abs(self.value):
            return f"value {got:.9g}, not {self.value:.9g}"
        for name, derivative in (("gradient", grad), ("Hessian", hess)):
            if derivative is not None:
                error = self._error(host(derivative), is_hessian=name == "Hessian")
                if not error <= 1:
                    return f"{name} wrong by {error:.2g} times the tolerance of {self.tolerance:g}"
        return None

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        """The rows in float64, some at a time."""
        step = max(1, BLOCK // self.logits.shape[1])
        for first in range(0, len(self.logits), step):
            rows = slice(first, first + step)
            yield rows, self.logits[rows].astype(np.float64)

    def _error(self, got: Array, is_hessian: bool) -> float:
        """Largest error of an element, in units of the tolerance; a NaN is an error without bound."""
        if got.shape != self.logits.shape:
            return np.inf
        largest = 0.0
        for rows, x in self._blocks():
            p = np.exp(x - self.lse[rows, None])
            if is_hessian:
                exact = p * (1 - p)
            else:
                exact = p
                exact[np.arange(len(x)), self.labels[rows]] -= 1
            exact /= len(self.logits)
            allowed = self.tolerance * np.abs(exact) + self.smallest
            error = np.max(np.abs(got[rows].astype(np.float64) - exact) / allowed)
            largest = max(largest, np.inf if np.isnan(error) else float(error))
        return largest


def _smallest(dtype: np.dtype[Any]) -> float:
    """The smallest positive number of the dtype."""
    if dtype.name == "bfloat16":  # unknown to np.finfo
        return 2.0**-133
    return float(np.finfo(dtype).smallest_subnormal)

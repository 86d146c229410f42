"""Statistics that are updated chunk by chunk, all in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Calibration", "Moments", "WorstRows"]


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged as of Chan, Golub and LeVeque (1979).

    Attributes
    ----------
    count : int
        Number of values seen.
    mean : float
        Their mean; 0 before the first.
    m2 : float
        The sum of their squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: NDArray[np.float64]) -> None:
        """Add values, all finite."""
        if values.size:
            mean = float(values.mean())
            self.merge(Moments(values.size, mean, float(np.square(values - mean).sum())))

    def merge(self, other: Moments) -> None:
        """Add what another instance has seen."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean += delta * (other.count / count)
        self.m2 += other.m2 + delta * delta * (self.count * (other.count / count))
        self.count = count

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for fewer than two values."""
        if self.count < 2:
            return math.nan
        return math.sqrt(self.m2 / (self.count - 1) / self.count)


@dataclass
class Calibration:
    """How often predictions of a given confidence are right, in bins of equal width.

    Bin ``k`` of ``n`` holds the confidences in ``(k/n, (k+1)/n]``, as in Guo et al., "On Calibration of
    Modern Neural Networks" (2017).

    Attributes
    ----------
    bins : int
        Number of bins.
    count, confidence, correct : numpy.ndarray
        Per bin: the number of predictions, the sum of their confidences, the number of right ones.
    """

    bins: int = 15
    count: NDArray[np.float64] = field(init=False)
    confidence: NDArray[np.float64] = field(init=False)
    correct: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.count = np.zeros(self.bins)
        self.confidence = np.zeros(self.bins)
        self.correct = np.zeros(self.bins)

    def update(self, confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> None:
        """Add predictions: the probability of the predicted class, and whether it was the right one."""
        place = np.clip(np.ceil(confidence * self.bins).astype(np.intp) - 1, 0, self.bins - 1)
        self.count += np.bincount(place, minlength=self.bins)
        self.confidence += np.bincount(place, weights=confidence, minlength=self.bins)
        self.correct += np.bincount(place, weights=correct, minlength=self.bins)

    @property
    def error(self) -> float:
        """Expected calibration error, ``sum_k |correct_k - confidence_k| / n``; NaN without predictions."""
        total = float(self.count.sum())
        return float(np.abs(self.correct - self.confidence).sum()) / total if total else math.nan


class Rows(NamedTuple):
    """A few rows, one array for each fact about them."""

    row: NDArray[np.int64]
    label: NDArray[np.int64]
    loss: NDArray[np.float64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def take(self, index: NDArray[np.intp]) -> Rows:
        """Select rows by position."""
        return Rows(
            self.row[index],
            self.label[index],
            self.loss[index],
            self.predicted[index],
            self.confidence[index],
        )


class WorstRows:
    """The rows of highest loss: NaN first, then infinite ones; equal losses in the order of the rows.

    Parameters
    ----------
    limit : int
        How many rows to keep.

    Attributes
    ----------
    rows : Rows
        The worst rows so far, the worst first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        whole, real = np.empty(0, np.int64), np.empty(0, np.float64)
        self.rows = Rows(whole, whole, real, whole, real)

    def update(self, new: Rows) -> None:
        """Add rows, which come after all rows added before."""
        if self.limit == 0 or new.loss.size == 0:
            return
        if new.loss.size > self.limit:
            # Sorting only the candidates keeps this linear in the rows of a chunk.
            key = _ascending(new.loss)
            new = new.take(np.flatnonzero(key <= np.partition(key, self.limit - 1)[self.limit - 1]))
        old = self.rows
        merged = Rows(
            np.concatenate([old.row, new.row]),
            np.concatenate([old.label, new.label]),
            np.concatenate([old.loss, new.loss]),
            np.concatenate([old.predicted, new.predicted]),
            np.concatenate([old.confidence, new.confidence]),
        )
        self.rows = merged.take(np.argsort(_ascending(merged.loss), kind="stable")[: self.limit])


def _ascending(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a key that sorts NaN first, then +inf, then falling losses."""
    largest = np.finfo(np.float64).max  # no finite loss comes near it
    return -np.nan_to_num(loss, nan=np.inf, posinf=largest)

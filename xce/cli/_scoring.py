"""The losses of logits in a file, in one pass and bounded memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import xce
from xce._checks import counted

from ._io import ArrayFile, InputError
from ._stats import Calibration, Moments, Rows, WorstRows

__all__ = ["ProbabilitiesError", "Score", "score_files"]

CHUNK_BYTES = 16 << 20  # large enough that the cost of a call vanishes, small enough for any machine
SAMPLE_BYTES = 4 << 20  # what is looked at to tell probabilities from logits
SAMPLE_ROWS = 256
HISTOGRAM_BINS = 40

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class ProbabilitiesError(InputError):
    """The file seems to hold probabilities where logits were expected."""

    exit_code = 2  # like wrong usage: an option is missing, the files are fine


@dataclass
class Score:
    """What is known about scored rows; see `as_dict` for the derived numbers.

    Attributes
    ----------
    shape : tuple of int
        Shape of the labels.
    classes : int
        Number of classes.
    ignored : int
        Rows whose label is the ignored one.
    infinite, nan : int
        Rows with an infinite loss (the label has probability 0), and rows that hold NaN or +inf.
    loss, entropy : Moments
        Of the rows with a finite loss, and of the predicted distributions; nats.
    top1, top5 : int
        Rows whose label is first, or among the first five; equal logits rank in the order of the classes.
    calibration : Calibration
        Confidence against accuracy.
    histogram : numpy.ndarray
        ``(2, HISTOGRAM_BINS)``: rows by the probability of their label, in equal bins over 0..1; first the
        rows predicted wrongly, then those predicted rightly.
    worst : WorstRows
        The rows of highest loss.
    """

    shape: tuple[int, ...]
    classes: int
    worst: WorstRows
    ignored: int = 0
    infinite: int = 0
    nan: int = 0
    loss: Moments = field(default_factory=Moments)
    entropy: Moments = field(default_factory=Moments)
    top1: int = 0
    top5: int = 0
    calibration: Calibration = field(default_factory=Calibration)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, HISTOGRAM_BINS), np.int64))

    @property
    def scored(self) -> int:
        """Rows that count: all but the ignored ones."""
        return self.loss.count + self.infinite + self.nan

    def update(self, first_row: int, logits: NDArray[Any], labels: NDArray[np.int64], ignore_index: int) -> None:
        """Add rows of logits with valid labels.

        Parameters
        ----------
        first_row : int
            Number of rows before these.
        logits : numpy.ndarray
            ``(rows, classes)``.
        labels : numpy.ndarray
            ``(rows,)``, int64.
        ignore_index : int
            Rows with this label are only counted.
        """
        keep = labels != ignore_index
        options: dict[str, Any] = {"reduction": "none"}
        # lse - target_logit would lose the losses of confident rows to cancellation; cross_entropy does not.
        losses = xce.cross_entropy(logits, labels, ignore_index=ignore_index, **options).astype(np.float64)
        stats = xce.logit_stats(logits, labels, ignore_index=ignore_index)
        valid = keep & ~np.isnan(losses)
        right = valid & (stats.argmax == labels)
        # -log of the confidence is a loss too, that of the predicted class: known where it is the label.
        predicted = np.where(valid & ~right, stats.argmax, -1)
        surprise = xce.cross_entropy(logits, predicted, ignore_index=-1, **options).astype(np.float64)
        confidence = np.exp(-np.where(right, losses, surprise))
        confidence[~valid] = np.nan

        finite = valid & np.isfinite(losses)
        self.ignored += int(np.count_nonzero(~keep))
        self.nan += int(np.count_nonzero(keep & ~valid))
        self.infinite += int(np.count_nonzero(valid & ~finite))
        self.loss.update(losses[finite])
        self.entropy.update(stats.entropy[valid].astype(np.float64))
        self.top1 += int(np.count_nonzero(right))
        self.top5 += int(np.count_nonzero(_place(logits, labels, stats.rank, valid) < 5))
        self.calibration.update(confidence[valid], right[valid])
        for counts, rows in zip(self.histogram, (valid & ~right, right), strict=True):
            counts += np.histogram(np.exp(-losses[rows]), bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]
        kept = np.flatnonzero(keep)
        self.worst.update(Rows(first_row + kept, labels[kept], losses[kept], stats.argmax[kept], confidence[kept]))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, NaN and infinity included; losses are in nats.

        Returns
        -------
        dict
            The fields of ``xce score --json``, apart from the names of the files.
        """
        loss = math.nan if self.nan or not self.scored else math.inf if self.infinite else self.loss.mean
        return {
            "rows": math.prod(self.shape),
            "ignored_rows": self.ignored,
            "scored_rows": self.scored,
            "infinite_rows": self.infinite,
            "nan_rows": self.nan,
            "classes": self.classes,
            "loss": loss,
            "loss_standard_error": self.loss.standard_error if math.isfinite(loss) else math.nan,
            "finite_loss": self.loss.mean if self.loss.count else math.nan,
            "perplexity": math.exp(loss) if loss < 709.0 else loss + math.inf,
            "bits": loss / math.log(2.0),
            "top1_accuracy": self.top1 / self.scored if self.scored else math.nan,
            "top5_accuracy": self.top5 / self.scored if self.scored else math.nan,
            "entropy": self.entropy.mean if self.entropy.count else math.nan,
            "calibration_error": self.calibration.error,
            "worst": self._worst(),
        }

    def _worst(self) -> list[dict[str, Any]]:
        report = []
        for row, label, loss, predicted, confidence in zip(*self.worst.rows, strict=True):
            entry: dict[str, Any] = {"row": int(row)}
            if len(self.shape) != 1:
                entry["index"] = [int(i) for i in np.unravel_index(row, self.shape)]
            entry |= {"label": int(label), "probability": math.exp(-loss), "loss": float(loss)}
            # Nothing is predicted where a NaN stands.
            entry["predicted"] = None if math.isnan(loss) else int(predicted)
            entry["predicted_probability"] = float(confidence)
            report.append(entry)
        return report


@np.errstate(all="ignore")
def score_files(
    logits: ArrayFile,
    labels: ArrayFile,
    *,
    ignore_index: int = -100,
    probabilities: bool = False,
    guess: bool = True,
    worst: int = 5,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Callable[[int], object] = lambda _: None,
) -> Score:
    """Score logits against labels, both in files, in chunks of rows.

    Parameters
    ----------
    logits : ArrayFile
        ``(..., C)``, floating.
    labels : ArrayFile
        ``(...)``, integers, or floats that are whole numbers; axes of length 1 may be added or missing.
    ignore_index : int
        Rows with this label do not count.
    probabilities : bool
        The file holds probabilities: their logarithm is scored.
    guess : bool
        Refuse what looks like probabilities when `probabilities` is false.
    worst : int
        How many of the worst rows to keep.
    chunk_bytes : int
        Size of a chunk of rows, which bounds the memory.
    advance : callable
        Called with the number of bytes of logits done since the last call.

    Returns
    -------
    Score
        The statistics.

    Raises
    ------
    InputError
        When files, shapes, dtypes or labels are wrong; labels are checked before any logits are read.
    ProbabilitiesError
        When the logits look like probabilities.
    """
    _check_logits(logits, labels, probabilities)
    labels = _fitting_labels(labels, logits)
    classes = logits.shape[-1]
    row_bytes = classes * logits.dtype.itemsize
    step = max(1, chunk_bytes // row_bytes)
    for _ in _checked_labels(labels, max(1, chunk_bytes // 8), classes, ignore_index):
        pass

    result = Score(labels.shape, classes, WorstRows(worst))
    guess = guess and not probabilities
    row = 0
    # Labels are checked again: the file may have been written to since.
    chunks = zip(logits.blocks(step, row_ndim=1), _checked_labels(labels, step, classes, ignore_index), strict=True)
    for block, target in chunks:
        if guess:
            kept = np.flatnonzero(target != ignore_index)
            if kept.size:
                guess = False
                limit = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // row_bytes))
                sample = kept[:: -(-kept.size // limit)]
                if _are_probabilities(block[sample]):
                    raise ProbabilitiesError(
                        f"{logits.name} seems to hold probabilities: "
                        f"{counted(sample.size, 'sampled row lies', 'sampled rows lie')} within 0..1 with sum 1. "
                        "Score them as such with --probabilities, or as logits with --logits"
                    )
        if probabilities:
            block = _log_of_probabilities(block, target != ignore_index, row, logits.name)
        result.update(row, block, target, ignore_index)
        row += target.size
        advance(target.size * row_bytes)
    return result


def _check_logits(logits: ArrayFile, labels: ArrayFile, probabilities: bool) -> None:
    """Refuse logits for what their header tells."""
    rows = logits.shape[:-1]
    if logits.dtype.name not in _FLOATS:
        swapped = logits.dtype.kind in "iu" and labels.dtype.name in _FLOATS
        hint = "; the order is LOGITS LABELS" if swapped else ""
        if logits.dtype.kind == "V" and logits.dtype.names is None:
            hint = "; NumPy forgets the names of such types, so save x.astype('float32')"
        raise InputError(f"{logits.name} has dtype {logits.dtype}, expected logits of {', '.join(_FLOATS)}{hint}")
    if not logits.shape:
        raise InputError(f"{logits.name} holds a single number, expected logits of shape (rows, classes)")
    if logits.shape[-1] == 0:
        raise InputError(f"{logits.name} has shape {logits.shape}: 0 classes, nothing to score")
    is_column = logits.shape[-1] == 1
    if is_column or (len(logits.shape) == 1 and logits.shape == labels.shape):
        what, x = ("probabilities", "p") if probabilities else ("logits", "x")
        column = x if is_column else f"{x}[:, None]"
        both = f"numpy.append(1 - {column}, {column}, -1)" if probabilities else f"numpy.insert({column}, 0, 0, -1)"
        raise InputError(
            f"{logits.name} has shape {logits.shape}: expected a column for each class, two at least; "
            f"if it holds the {what} {x} of the second of two classes, save {both}"
        )
    if math.prod(rows) == 0:
        raise InputError(f"{logits.name} has shape {logits.shape}: 0 rows, nothing to score")


def _fitting_labels(labels: ArrayFile, logits: ArrayFile) -> ArrayFile:
    """Return labels of the shape of the rows of the logits, or refuse them for what their header tells."""
    rows = logits.shape[:-1]
    if labels.dtype.kind not in "iu" and (labels.dtype.name not in _FLOATS or labels.shape == logits.shape):
        hint = "; if they are one-hot, save labels.argmax(-1)" if labels.shape == logits.shape else ""
        raise InputError(f"{labels.name} has dtype {labels.dtype}, expected labels, integers from 0{hint}")
    if [n for n in labels.shape if n != 1] == [n for n in rows if n != 1]:  # a column of labels, say
        return dataclasses.replace(labels, shape=rows)
    hint = ""
    if labels.shape == logits.shape:
        hint = "; if they are one-hot, save labels.argmax(-1)"
    elif labels.shape[:-1] == logits.shape:
        hint = "; the order is LOGITS LABELS"
    else:
        for axis in range(len(rows)):
            if labels.shape == logits.shape[:axis] + logits.shape[axis + 1 :]:
                hint = f"; if the classes are on axis {axis}, save numpy.moveaxis(logits, {axis}, -1)"
    raise InputError(
        f"{labels.name} has shape {labels.shape}, but {logits.name} of shape {logits.shape} "
        f"needs labels of shape {rows}{hint}"
    )


def _checked_labels(labels: ArrayFile, step: int, classes: int, ignore_index: int) -> Iterator[NDArray[np.int64]]:
    """Iterate over blocks of labels, all of them classes or ignored."""
    row = 0
    for block in labels.blocks(step, row_ndim=0):
        is_float = block.dtype.kind not in "iu"
        if is_float:
            block = block.astype(np.float64)
        is_class = (block >= 0) & (block < classes)
        if is_float:
            is_class &= block == np.floor(block)
        bad = ~(is_class | (block == ignore_index))
        if bad.any():
            at = int(bad.argmax())
            where = f"row {row + at}"
            if len(labels.shape) > 1:
                where += f" (index {', '.join(str(i) for i in np.unravel_index(row + at, labels.shape))})"
            what = "out of range" if float(block[at]).is_integer() else "not a whole number"
            raise InputError(
                f"{labels.name}, {where}: label {block[at]} is {what}: expected one of the {classes} classes, "
                f"0..{classes - 1}, or --ignore-index {ignore_index}"
            )
        yield block.astype(np.int64)
        row += block.size


def _are_probabilities(rows: NDArray[Any]) -> bool:
    values = rows.astype(np.float64)
    # A probability near 1 is rounded by up to 0.002 in bfloat16. Comparisons are false for NaN.
    tolerance = 1e-2 if rows.dtype.name == "bfloat16" else 1e-3
    gap = np.abs(values.sum(axis=-1) - 1.0)
    return bool(((values >= 0.0) & (values <= 1.0)).all() and (gap <= tolerance).all())


def _log_of_probabilities(block: NDArray[Any], keep: NDArray[np.bool_], first_row: int, name: str) -> NDArray[Any]:
    values = block.astype(np.float64 if block.dtype.itemsize == 8 else np.float32)
    lowest, total = values.min(axis=-1), values.sum(axis=-1, dtype=np.float64)
    # 0.01 leaves room for the rounding of 16-bit probabilities over many classes.
    bad = keep & ~((lowest >= 0.0) & (np.abs(total - 1.0) <= 1e-2))
    if bad.any():
        at = int(bad.argmax())
        what = f"holds {lowest[at]:g}" if not lowest[at] >= 0.0 else f"sums to {total[at]:g}"
        raise InputError(f"{name}, row {first_row + at}, {what}: these are no probabilities")
    with np.errstate(divide="ignore", invalid="ignore"):  # probability 0, and ignored rows with any content
        np.log(values, out=values)
    return values


def _place(
    logits: NDArray[Any], labels: NDArray[np.int64], rank: NDArray[np.int64], valid: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Position of the label when classes are sorted by falling logit, equal ones by number.

    ``rank`` alone would put every class of a constant row first. Rows that are not valid come last.
    """
    place = np.where(valid, rank, np.iinfo(np.int64).max)
    safe = np.where(valid, labels, 0)
    own = np.take_along_axis(logits, safe[:, np.newaxis], axis=1)
    equal = logits == own
    tied = np.flatnonzero((np.count_nonzero(equal, axis=1) > 1) & (place < 5))
    if tied.size:
        before = np.arange(logits.shape[1]) < labels[tied, np.newaxis]
        place[tied] += np.count_nonzero(equal[tied] & before, axis=1)
    return place

"""``xce score``: the losses of logits in a file, in one pass and bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

import xce

from ._extras import require
from ._io import ArrayFile, InputError, open_array
from ._stats import Calibration, Moments, Rows, WorstRows

__all__ = ["ProbabilitiesError", "Score", "score", "score_files"]

CHUNK_BYTES = 16 << 20  # large enough that the cost of a call vanishes, small enough for any machine
SAMPLE_BYTES = 4 << 20  # what is looked at to tell probabilities from logits
SAMPLE_ROWS = 256
HISTOGRAM_BINS = 40

_FLOATS = ("float16", "bfloat16", "float32", "float64")


class ProbabilitiesError(InputError):
    """The file seems to hold probabilities where logits were expected."""


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
            "perplexity": float(np.exp(np.float64(min(loss, 800.0)))) if loss < 709.0 else loss + math.inf,
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
        ``(...)``, integers.
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
    _check_arrays(logits, labels)
    classes = logits.shape[-1]
    row_bytes = classes * logits.dtype.itemsize
    step = max(1, chunk_bytes // row_bytes)
    _check_labels(labels, classes, ignore_index, max(1, chunk_bytes // 8))

    result = Score(labels.shape, classes, WorstRows(worst))
    guess = guess and not probabilities
    row = 0
    chunks = zip(logits.blocks(step, row_ndim=1), labels.blocks(step, row_ndim=0), strict=True)
    for block, block_labels in chunks:
        target = block_labels.astype(np.int64)
        if guess:
            counted = np.flatnonzero(target != ignore_index)
            if counted.size:
                guess = False
                limit = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // row_bytes))
                sample = counted[:: -(-counted.size // limit)]
                if _are_probabilities(block[sample]):
                    raise ProbabilitiesError(
                        f"{logits.name} seems to hold probabilities: "
                        f"{sample.size} sampled rows lie within 0..1 and sum to 1. "
                        "Score them as such with --probabilities, or as logits with --logits"
                    )
        if probabilities:
            block = _log_of_probabilities(block, target != ignore_index, row, logits.name)
        result.update(row, block, target, ignore_index)
        row += target.size
        advance(target.size * row_bytes)
    return result


def _check_arrays(logits: ArrayFile, labels: ArrayFile) -> None:
    """Everything that the headers can tell."""
    if logits.dtype.name not in _FLOATS:
        swapped = logits.dtype.kind in "iu" and labels.dtype.name in _FLOATS
        hint = "; the order is LOGITS LABELS" if swapped else ""
        raise InputError(f"{logits.name} has dtype {logits.dtype}, logits are {', '.join(_FLOATS)}{hint}")
    if not logits.shape:
        raise InputError(f"{logits.name} holds a single number, logits have the shape (rows, classes)")
    if labels.dtype.kind not in "iu":
        hint = "argmax(-1)" if labels.shape == logits.shape else "astype('int64')"
        raise InputError(
            f"{labels.name} has dtype {labels.dtype}, labels are integers: convert them with labels.{hint}"
        )
    if logits.shape[-1] == 0:
        raise InputError(f"{logits.name} has shape {logits.shape}: 0 classes, nothing to score")
    if labels.shape != logits.shape[:-1]:
        hint = ""
        if labels.shape == logits.shape:
            hint = "; if they are one-hot, save labels.argmax(-1)"
        else:
            for axis in range(len(logits.shape) - 1):
                if labels.shape == logits.shape[:axis] + logits.shape[axis + 1 :]:
                    hint = f"; if the classes are on axis {axis}, save numpy.moveaxis(logits, {axis}, -1)"
        raise InputError(
            f"{labels.name} has shape {labels.shape}, but {logits.name} with shape {logits.shape} "
            f"needs labels of shape {logits.shape[:-1]}{hint}"
        )
    if math.prod(labels.shape) == 0:
        raise InputError(f"{logits.name} has shape {logits.shape}: 0 rows, nothing to score")


def _check_labels(labels: ArrayFile, classes: int, ignore_index: int, step: int) -> None:
    row = 0
    for block in labels.blocks(step, row_ndim=0):
        bad = ((block < 0) | (block >= classes)) & (block != ignore_index)
        if bad.any():
            at = int(bad.argmax())
            where = f"row {row + at}"
            if len(labels.shape) > 1:
                where += f" (index {', '.join(str(i) for i in np.unravel_index(row + at, labels.shape))})"
            raise InputError(
                f"{labels.name}, {where}: label {block[at]} is out of range: "
                f"labels of {classes} classes are 0..{classes - 1}, or --ignore-index {ignore_index}"
            )
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


class _OptionMissing(click.ClickException):
    exit_code = 2  # like wrong usage: the files are fine


@click.command()
@click.argument("logits")
@click.argument("labels")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--ignore-index", type=int, default=-100, show_default=True, help="Rows with this label do not count.")
@click.option("--probabilities", is_flag=True, help="LOGITS holds probabilities; take their logarithm.")
@click.option("--logits", "are_logits", is_flag=True, help="LOGITS holds logits, even if it looks like probabilities.")
@click.option("--worst", type=click.IntRange(min=0), default=5, show_default=True, help="List the K worst rows.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a figure (.png, .pdf, .svg).")
@click.option("--quiet", is_flag=True, help="Print the mean loss and nothing else; no progress bar.")
def score(
    logits: str,
    labels: str,
    as_json: bool,
    ignore_index: int,
    probabilities: bool,
    are_logits: bool,
    worst: int,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Score the logits in a file against the labels in another.

    LOGITS has the shape (..., classes), LABELS the shape (...). Both are .npy files, or .npz files (with
    several arrays: file.npz:name). They are read in chunks, so they may be larger than the memory.

    \b
    Examples:
      xce score logits.npy labels.npy
      xce score run.npz:logits run.npz:labels --json
      xce score probs.npy labels.npy --probabilities --plot score.png
    """  # noqa: D301
    if probabilities and are_logits:
        raise click.UsageError("--probabilities and --logits exclude each other")
    if plot is not None:
        _check_plot(plot)
    try:
        logits_file, labels_file = open_array(logits), open_array(labels)
        with _progress(quiet) as progress:
            task = progress.add_task("scoring", total=math.prod(logits_file.shape) * logits_file.dtype.itemsize)
            result = score_files(
                logits_file,
                labels_file,
                ignore_index=ignore_index,
                probabilities=probabilities,
                guess=not are_logits,
                worst=worst,
                advance=lambda n_bytes: progress.advance(task, n_bytes),
            )
    except ProbabilitiesError as error:
        raise _OptionMissing(str(error)) from None
    except InputError as error:
        raise click.ClickException(str(error)) from None

    report = result.as_dict()
    if plot is not None:
        from ._plots import score_figure, write_figure

        write_figure(score_figure(result.histogram, result.calibration, report["loss"]), plot)
        click.echo(f"figure written to {plot}", err=True)
    if as_json:
        kind = "probabilities" if probabilities else "logits"
        named = {"logits": logits, "labels": labels, "input": kind, **report}
        click.echo(json.dumps(_jsonable(named), indent=2))
    elif quiet:
        click.echo(f"{report['loss']:.9g}")
    else:
        _print_report(f"{logits}: {logits_file.shape} {logits_file.dtype}", report)


def _check_plot(plot: Path) -> None:
    formats = require("matplotlib.backends.backend_agg").FigureCanvasAgg.get_supported_filetypes()
    if plot.suffix.lower().lstrip(".") not in formats:
        known = ", ".join(f".{name}" for name in sorted(formats))
        raise click.BadParameter(f"{plot} ends in none of {known}", param_hint="--plot")
    if not plot.absolute().parent.is_dir():
        raise click.BadParameter(f"{plot.parent} is not a directory", param_hint="--plot")


def _progress(quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def _jsonable(value: Any) -> Any:
    """JSON has neither NaN nor infinity: both become null, and the counts of such rows tell which it was."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_report(title: str, report: dict[str, Any]) -> None:
    console = Console()
    console.print(Text(title, style="bold"))
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    facts.add_column(style="dim")
    facts.add_row("rows", f"{report['rows']:,}")
    facts.add_row("ignored rows", f"{report['ignored_rows']:,}")
    facts.add_row("classes", f"{report['classes']:,}")
    if report["scored_rows"] == 0:
        facts.add_row("loss", "n/a", "all rows are ignored")
        console.print(facts)
        return
    error = report["loss_standard_error"]
    unit = "nats" if math.isnan(error) else f"nats, standard error {error:.2g}"
    facts.add_row("loss", f"{report['loss']:.6g}", unit)
    if report["infinite_rows"] or report["nan_rows"]:
        facts.add_row("  infinite rows", f"{report['infinite_rows']:,}", "the label has probability 0")
        facts.add_row("  NaN rows", f"{report['nan_rows']:,}", "NaN or +inf among the logits")
        facts.add_row("  loss of the others", f"{report['finite_loss']:.6g}", "nats")
    facts.add_row("perplexity", f"{report['perplexity']:.6g}")
    facts.add_row("bits", f"{report['bits']:.6g}")
    facts.add_row("top-1 accuracy", f"{report['top1_accuracy']:.2%}")
    if report["classes"] > 5:
        facts.add_row("top-5 accuracy", f"{report['top5_accuracy']:.2%}")
    facts.add_row("mean entropy", f"{report['entropy']:.6g}", "nats")
    facts.add_row("calibration error", f"{report['calibration_error']:.2%}", "expected, 15 bins")
    console.print(facts)
    if report["worst"]:
        _print_worst(console, report["worst"])


def _print_worst(console: Console, worst: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for heading in ("row", *(["index"] if "index" in worst[0] else []), "label", "probability", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("predicted", justify="right")
    table.add_column("with probability", justify="right")
    for entry in worst:
        cells = [str(entry["row"])]
        if "index" in entry:
            cells.append(", ".join(map(str, entry["index"])))
        cells += [str(entry["label"]), f"{entry['probability']:.3g}", f"{entry['loss']:.4g}"]
        predicted = entry["predicted"]
        cells += ["n/a" if predicted is None else str(predicted), f"{entry['predicted_probability']:.3g}"]
        table.add_row(*map(Text, cells))
    console.print("\nworst rows", style="bold")
    console.print(table)

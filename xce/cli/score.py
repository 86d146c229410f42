"""``xce score``: the losses of logits in a file."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
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

from ._console import console_output, note
from ._errors import EXIT_CODES
from ._io import open_array
from ._plots import check_figure, score_figure, write_figure
from ._scoring import score_files

__all__ = ["score"]

DEFAULT_PLOT = "score.png"


class _ScoreCommand(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # In `--plot x.npy y.npy`, the option has no value: an array is never the name of a figure.
        for i, (option, following) in enumerate(pairwise(args)):
            if option == "--plot" and re.search(r"\.np[yz](:|$)", following):
                args[i] = f"--plot={DEFAULT_PLOT}"
        return super().parse_args(ctx, args)


def _int64(ctx: click.Context, param: click.Parameter, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise click.BadParameter(f"{value} is beyond 64 bits; expected an integer in -2**63..2**63-1")
    return value


@click.command(cls=_ScoreCommand, epilog=EXIT_CODES)
@click.argument("logits")
@click.argument("labels")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--ignore-index",
    type=int,
    callback=_int64,
    default=-100,
    show_default=True,
    help="Rows with this label do not count.",
)
@click.option("--probabilities", is_flag=True, help="LOGITS holds probabilities; take their logarithm.")
@click.option("--logits", "are_logits", is_flag=True, help="LOGITS holds logits, even if it looks like probabilities.")
@click.option(
    "--worst", type=click.IntRange(min=0), metavar="K", default=5, show_default=True, help="List the K worst rows."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    is_flag=False,
    flag_value=DEFAULT_PLOT,
    metavar="[FILE]",
    help=f"Write a figure (.png, .pdf, .svg) to FILE, or to {DEFAULT_PLOT}.",
)
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

    LOGITS holds floats of shape (..., classes), LABELS the class of each row, whole numbers of shape (...).
    Both are .npy files, or .npz files (with several arrays: file.npz:name). They are read in chunks, so they
    may be larger than the memory.

    \b
    Examples:
      xce score logits.npy labels.npy
      xce score run.npz:logits run.npz:labels --json
      xce score probs.npy labels.npy --probabilities --plot score.png
    """  # noqa: D301
    if probabilities and are_logits:
        raise click.UsageError("--probabilities and --logits exclude each other; expected one of them")
    if plot is not None:
        check_figure(plot)
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

    report = result.as_dict()
    if as_json:
        kind = "probabilities" if probabilities else "logits"
        named = {"logits": logits, "labels": labels, "input": kind, **report}
        click.echo(json.dumps(_jsonable(named), indent=2))
    elif quiet:
        click.echo(f"{report['loss']:.9g}")
    else:
        with console_output() as console:
            _print_report(console, f"{logits}: {logits_file.shape} {logits_file.dtype}", report)
    # Whatever becomes of the figure, the numbers are printed.
    if plot is not None:
        write_figure(lambda: score_figure(result.histogram, result.calibration, report["loss"]), plot)
        note(f"figure written to {plot}")


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


def _print_report(console: Console, title: str, report: dict[str, Any]) -> None:
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

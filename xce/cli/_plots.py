"""Figures of the commands, drawn without pyplot: no global state, no display needed."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from ._errors import OneLineError, UnwrittenFileError, one_line
from ._extras import require
from ._stats import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_figure", "demo_figure", "score_figure", "write_figure"]

# Distinguishable with any colour vision (Okabe and Ito, 2008).
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6b6b6b"
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def demo_figure(
    train: list[float], held_out: list[float], histogram: NDArray[np.int64], calibration: Calibration
) -> Figure:
    """Draw the three panels of ``xce demo``.

    Parameters
    ----------
    train, held_out : list of float
        Mean loss in nats before the first and after each iteration.
    histogram : numpy.ndarray
        ``(2, bins)``: held-out rows by the probability of the right class, predicted wrongly and rightly.
    calibration : Calibration
        Of the held-out rows.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.
    """
    matplotlib = require("matplotlib")
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(3)
        curve = axes[0]
        curve.plot(train, color=_BLUE, linewidth=2, label="training")
        curve.plot(held_out, color=_ORANGE, linewidth=2, label="held out")
        curve.set_yscale("log")
        curve.yaxis.set_major_locator(require("matplotlib.ticker").LogLocator(subs=(1.0, 2.0, 5.0)))
        curve.yaxis.set_major_formatter("{x:g}")
        curve.yaxis.set_minor_formatter("")
        curve.set(title="Loss while training", xlabel="L-BFGS iteration", ylabel="mean cross entropy (nats)")
        curve.set_xlim(0, max(1, len(train) - 1))
        curve.annotate(
            f"{held_out[-1]:.3f} nats",
            (len(held_out) - 1, held_out[-1]),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            color=_ORANGE,
        )
        curve.legend(loc="upper right")
        _draw_histogram(axes[1], histogram)
        _draw_reliability(axes[2], calibration)
        figure.suptitle("Softmax regression on handwritten digits, trained with xce.cross_entropy", fontsize=14)
    return figure


def score_figure(histogram: NDArray[np.int64], calibration: Calibration, loss: float) -> Figure:
    """Draw the two panels of ``xce score --plot``.

    Parameters
    ----------
    histogram : numpy.ndarray
        ``(2, bins)``: rows by the probability of the right class, predicted wrongly and rightly.
    calibration : Calibration
        Of the same rows.
    loss : float
        Their mean loss in nats.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.
    """
    matplotlib = require("matplotlib")
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panels(2)
        _draw_histogram(axes[0], histogram)
        _draw_reliability(axes[1], calibration)
        mean = f"{loss:.4g} nats" if math.isfinite(loss) else str(loss)
        rows = int(histogram.sum())
        figure.suptitle(f"{rows:,} {'row' if rows == 1 else 'rows'}, mean cross entropy {mean}", fontsize=14)
    return figure


def check_figure(path: Path) -> None:
    """Refuse what no figure can be written to; said before anything is computed.

    Parameters
    ----------
    path : Path
        Where one is to be written.

    Raises
    ------
    click.UsageError
        When its ending is none of a format, or there is no such directory, or a directory of that name.
    click.ClickException
        When matplotlib is not installed, or cannot be loaded.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would talk about its caches and fonts
    try:
        formats = require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    except click.ClickException:
        raise
    except Exception as error:  # whatever its configuration makes it raise
        raise OneLineError(f"matplotlib cannot be loaded: {one_line(error)}") from None
    problem = ""
    if path.suffix.lower().lstrip(".") not in formats:
        problem = f"expected a name that ends in one of {', '.join(f'.{name}' for name in sorted(formats))}"
    elif path.is_dir():
        problem = "it is a directory"
    elif not path.parent.is_dir():
        problem = f"there is no directory {path.parent}"
    if problem:
        raise click.UsageError(f"the figure {path} cannot be written: {problem}")


def write_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure and write it; the ending of the file name, which was checked, chooses the format.

    Parameters
    ----------
    draw : callable
        Returns the figure.
    path : Path
        Where to write it.

    Raises
    ------
    UnwrittenFileError
        When it cannot be drawn or written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        content = io.BytesIO()  # a file that matplotlib cannot write, it leaves open
        draw().savefig(content, format=path.suffix.lower().lstrip("."), dpi=150)
        path.write_bytes(content.getbuffer())
    except Exception as error:  # matplotlib, Pillow and LaTeX raise anything; the results are printed already
        raise UnwrittenFileError(f"the figure {path} could not be written: {one_line(error)}") from None


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure: Figure = require("matplotlib.figure").Figure(figsize=(5.0 * count, 4.8))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    return figure, list(figure.subplots(1, count))


def _draw_histogram(axes: Axes, histogram: NDArray[np.int64]) -> None:
    wrong, total = histogram[0], histogram.sum(axis=0)
    edges = np.linspace(0.0, 1.0, total.size + 1)
    shape: dict[str, Any] = {"width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    axes.bar(edges[:-1], total, color=_BLUE, label="all rows", **shape)
    axes.bar(edges[:-1], wrong, color=_ORANGE, label="predicted wrongly", **shape)
    # Most rows of a good model are in the last bin; a logarithm shows the interesting few on the left.
    if total.any():
        axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.5, max(10.0, 2.0 * float(total.max())))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, 1)
    axes.set(title="Probability given to the right class", xlabel="probability", ylabel="rows (log scale)")
    axes.legend(loc="upper left")
    axes.grid(visible=False, axis="x")


def _draw_reliability(axes: Axes, calibration: Calibration) -> None:
    filled = calibration.count > 0
    count = calibration.count[filled]
    confidence, accuracy = calibration.confidence[filled] / count, calibration.correct[filled] / count
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    axes.vlines(confidence, confidence, accuracy, color=_ORANGE, linewidth=1.5, label="gap")
    size = 20.0 + 180.0 * count / count.max() if count.size else 0.0
    style: dict[str, Any] = {"color": _BLUE, "edgecolor": "white", "zorder": 3, "clip_on": False}
    axes.scatter(confidence, accuracy, s=size, label="bin (area: rows)", **style)
    error = "" if math.isnan(calibration.error) else f" (expected error {calibration.error:.1%})"
    axes.set(title=f"Calibration{error}", xlabel="confidence (probability of the prediction)", ylabel="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    # The side of the diagonal that most bins leave free.
    below = (accuracy >= confidence).sum() >= count.size / 2
    legend: Any = axes.legend(loc="lower right" if below else "upper left")
    legend.legend_handles[-1].set_sizes([60.0])

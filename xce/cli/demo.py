"""``xce demo``: a softmax regression on real data, trained and judged with xce."""

from __future__ import annotations

import io
import math
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import xce

from ._console import console_output
from ._errors import EXIT_CODES, UnwrittenFileError, one_line
from ._extras import require
from ._plots import demo_figure, write_figure
from ._scoring import Score
from ._stats import WorstRows

__all__ = ["Regression", "Split", "demo", "digits", "fit"]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

# Five-fold cross-validation of the training part: 0.131 nats with 1e-5, 0.117 with 1e-4, 0.178 with 1e-3.
L2 = 1e-4
MAX_ITERATIONS = 200


class Split(NamedTuple):
    """Features and labels, for training and held out."""

    train_x: Floats
    train_y: Labels
    test_x: Floats
    test_y: Labels


@dataclass
class Regression:
    """A softmax regression and how it came about.

    Attributes
    ----------
    weight : numpy.ndarray
        ``(classes, features)``.
    bias : numpy.ndarray
        ``(classes,)``.
    train_curve, test_curve : list of float
        Mean loss in nats before the first and after each iteration, without the penalty.
    evaluations : int
        How often the optimiser asked for the loss and its gradient.
    xce_seconds, seconds : float
        Time of these evaluations inside `xce.cross_entropy`, and time of the whole training.
    """

    weight: Floats
    bias: Floats
    train_curve: list[float] = field(default_factory=list)
    test_curve: list[float] = field(default_factory=list)
    evaluations: int = 0
    xce_seconds: float = 0.0
    seconds: float = 0.0

    def logits(self, x: Floats) -> Floats:
        """Return the logits ``(rows, classes)`` of features ``(rows, features)``."""
        return x @ self.weight.T + self.bias


def digits() -> Split:
    """Load scikit-learn's handwritten digits, always split in the same way.

    Returns
    -------
    Split
        1347 rows for training and 450 held out, 64 features in 0..1, ten classes in equal shares.

    Raises
    ------
    click.ClickException
        When scikit-learn is not installed.
    """
    data = require("sklearn.datasets").load_digits()
    train_x, test_x, train_y, test_y = require("sklearn.model_selection").train_test_split(
        data.data / 16.0, data.target.astype(np.int64), test_size=0.25, random_state=0, stratify=data.target
    )
    return Split(train_x, train_y, test_x, test_y)


def fit(split: Split, *, l2: float = L2, max_iterations: int = MAX_ITERATIONS) -> Regression:
    """Minimise the mean cross entropy plus ``l2 / 2 * |weight|^2`` with SciPy's L-BFGS.

    Parameters
    ----------
    split : Split
        The data; the held-out part is only watched.
    l2 : float
        Penalty of the weights; the bias is free.
    max_iterations : int
        Upper bound of the iterations.

    Returns
    -------
    Regression
        The fitted model.

    Raises
    ------
    click.ClickException
        When SciPy or threadpoolctl, which comes with scikit-learn, is not installed.
    """
    minimize = require("scipy.optimize").minimize
    classes, features = int(split.train_y.max()) + 1, split.train_x.shape[1]
    model = Regression(np.zeros((classes, features)), np.zeros(classes))

    def unpack(parameters: Floats) -> None:
        model.weight = parameters[:-classes].reshape(classes, features)
        model.bias = parameters[-classes:]

    def objective(parameters: Floats) -> tuple[float, Floats]:
        unpack(parameters)
        logits = model.logits(split.train_x)
        start = time.perf_counter()
        loss, grad = xce.cross_entropy(logits, split.train_y, return_grad=True)
        model.xce_seconds += time.perf_counter() - start
        model.evaluations += 1
        penalty = 0.5 * l2 * float(np.vdot(model.weight, model.weight))
        d_weight = grad.T @ split.train_x + l2 * model.weight
        return float(loss) + penalty, np.concatenate([d_weight.ravel(), grad.sum(axis=0)])

    def watch(parameters: Floats) -> None:
        unpack(parameters)
        model.train_curve.append(float(xce.cross_entropy(model.logits(split.train_x), split.train_y)))
        model.test_curve.append(float(xce.cross_entropy(model.logits(split.test_x), split.test_y)))

    initial = np.zeros(classes * features + classes)
    watch(initial)
    start = time.perf_counter()
    options = {"maxiter": max_iterations, "maxfun": 4 * max_iterations}
    # Matrices this small are slower on several BLAS threads, and their rounding would depend on the machine.
    with require("threadpoolctl").threadpool_limits(1, user_api="blas"):
        found = minimize(objective, initial, jac=True, method="L-BFGS-B", callback=watch, options=options)
    model.seconds = time.perf_counter() - start
    unpack(found.x)
    return model


@click.command(epilog=EXIT_CODES, short_help="Train and judge a model on handwritten digits.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("xce-demo"),
    show_default=True,
    help="Where to write logits.npy, labels.npy and demo.png.",
)
def demo(out: Path) -> None:
    """Train a softmax regression on handwritten digits, and judge it on held-out ones.

    Real data that come with scikit-learn; nothing is downloaded.
    """
    for module in (
        "matplotlib",
        "scipy.optimize",
        "sklearn",
        "threadpoolctl",
    ):  # what is missing is said before the training
        require(module)
    out.mkdir(parents=True, exist_ok=True)
    split = digits()
    model = fit(split)
    train, held_out = _judge(model, split.train_x, split.train_y), _judge(model, split.test_x, split.test_y)
    _report(model, train.as_dict(), held_out.as_dict())

    logits_path, labels_path, figure_path = out / "logits.npy", out / "labels.npy", out / "demo.png"
    _save(logits_path, model.logits(split.test_x).astype(np.float32))
    _save(labels_path, split.test_y)
    write_figure(
        lambda: demo_figure(model.train_curve, model.test_curve, held_out.histogram, held_out.calibration), figure_path
    )
    click.echo(f"\nwrote {logits_path}, {labels_path} and {figure_path}")
    click.echo("\nnext, try:")
    click.echo(f"  xce score {shlex.quote(str(logits_path))} {shlex.quote(str(labels_path))}")


def _save(path: Path, array: NDArray[Any]) -> None:
    content = io.BytesIO()  # written to a file, NumPy does not say why it cannot write
    np.save(content, array)
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise UnwrittenFileError(f"{path} could not be written: {one_line(error)}") from None


def _judge(model: Regression, x: Floats, y: Labels) -> Score:
    result = Score(y.shape, model.bias.size, WorstRows(0))
    result.update(0, model.logits(x), y, ignore_index=-100)
    return result


def _report(model: Regression, train: dict[str, Any], held_out: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("")
    table.add_column("training", justify="right")
    table.add_column("held out", justify="right")
    table.add_row("rows", f"{train['rows']:,}", f"{held_out['rows']:,}")
    table.add_row("loss (nats)", f"{train['loss']:.4f}", f"{held_out['loss']:.4f}")
    for name, key, form in (
        ("perplexity", "perplexity", ".3f"),
        ("accuracy", "top1_accuracy", ".2%"),
        ("calibration error", "calibration_error", ".2%"),
    ):
        table.add_row(name, format(train[key], form), format(held_out[key], form))
    with console_output() as console:
        console.print("softmax regression on handwritten digits", style="bold")
        console.print(table)
    click.echo(
        f"\nguessing: {math.log(model.bias.size):.4f} nats. L-BFGS took {len(model.train_curve) - 1} iterations with "
        f"{model.evaluations} evaluations in {model.seconds:.2f} s,\n"
        f"of which {1e3 * model.xce_seconds:.1f} ms inside xce "
        f"({1e6 * model.xce_seconds / model.evaluations:.0f} us for each loss with its gradient)."
    )

"""Errors in units in the last place (ULP) of the result's type, against numbers computed far more precisely.

The exact numbers come from NumPy's longdouble where that has 64 bits of precision, for many rows, and from
mpmath for a few of every kind. Gradients are those of class labels: with smoothing or probabilities ``A p - a``
can cancel to anything. Results that exp underflows for, below some 1e-36 (1e-306), are right to that absolutely.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from checks import Array, same_bits

import xce

CLASSES = (3, 10, 64, 65, 300, 1000, 5000)
KINDS = ("random", "wide", "offset 1e4", "offset 1e8", "offset -1e4", "confident", "confident offset", "close")
LIMITS = {
    "loss": 4, "loss of another": 4, "grad": 6, "hess": 8, "softmax": 6, "log_softmax": 4, "logsumexp": 4, "entropy": 6
}  # fmt: skip
HAS_LONGDOUBLE = np.finfo(np.longdouble).nmant >= 63


def rows_of(kind: str, n_rows: int, n_classes: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Logits in float64, and their labels."""
    x = rng.standard_normal((n_rows, n_classes))
    y = rng.integers(n_classes, size=n_rows)
    if kind == "wide":
        x *= 10
    elif kind.startswith("offset"):
        x = x * 10 + float(kind.split()[1])
    elif kind.startswith("confident"):
        x[np.arange(n_rows), y] = x.max(1) + rng.uniform(5, 30, n_rows)
        x += 1e4 * kind.endswith("offset")
    elif kind == "close":  # two that share the row, and the label is one of them
        x -= 20
        x[np.arange(n_rows), y] = 1
        x[np.arange(n_rows), (y + 1) % n_classes] = 1 + rng.uniform(-1e-3, 1e-3, n_rows)
    return x, y


class Exact(NamedTuple):
    u: Array  # log softmax
    p: Array
    not_p: Array
    lse: Array
    entropy: Array


def exact_by_longdouble(x: Array) -> Exact:
    x = x.astype(np.longdouble)
    top = x.argmax(-1)[:, None]
    x_top = np.take_along_axis(x, top, -1)
    e = np.exp(x - x_top)
    others = e.copy()
    np.put_along_axis(others, top, 0, -1)
    rest = np.sort(others, -1).sum(-1, keepdims=True)
    not_p = (1 + rest - e) / (1 + rest)
    np.put_along_axis(not_p, top, rest / (1 + rest), -1)
    u, p = (x - x_top) - np.log1p(rest), e / (1 + rest)
    return Exact(u, p, not_p, (x_top + np.log1p(rest))[:, 0], -(p * u).sum(-1))


def exact_by_mpmath(x: Array) -> Exact:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workprec(200):
        found = []
        for row in x:
            e = [mpmath.exp(mpmath.mpf(float(a)) - mpmath.mpf(float(row.max()))) for a in row]
            total = mpmath.fsum(e)
            p = [a / total for a in e]
            u = [mpmath.mpf(float(a)) - mpmath.mpf(float(row.max())) - mpmath.log(total) for a in row]
            lse = mpmath.mpf(float(row.max())) + mpmath.log(total)
            found.append((u, p, [1 - a for a in p], lse, -mpmath.fdot(p, u)))
    return Exact(*(np.array(column, dtype=object) for column in zip(*found, strict=True)))


def ulps(result: Array, exact: Array, size: Array | None = None) -> float:
    """The largest error, in spacings of the result's type at `exact` (or `size`), its smallest normal at least."""
    result = np.asarray(result)
    kind = result.dtype
    near = np.maximum(np.abs((exact if size is None else size).astype(kind)), 2 * np.finfo(kind).tiny)
    lost = 4 * result.shape[-1] * np.finfo(kind).tiny  # what exp may lose in a row where it underflows
    wide = np.vectorize(_mpf, otypes=[object])(result) if exact.dtype == object else result.astype(exact.dtype)
    error = np.maximum(np.abs(wide - exact) - lost, 0).astype(np.float64)
    return float(np.max(error / np.spacing(near)))


def _mpf(x: float) -> Any:
    import mpmath

    return mpmath.mpf(float(x))


def errors_of(x: Array, y: Array, exact: Exact) -> dict[str, float]:
    """The worst error of every result of some rows."""
    n = np.arange(len(x))
    other = (y + 1 + n) % x.shape[1]
    label = (n, y)
    grad = exact.p.copy()
    grad[label] = -exact.not_p[label]
    value, found, hess = xce.cross_entropy(x, y, reduction="none", return_grad=True, return_hess=True)
    stats = xce.logit_stats(x, y)
    same_bits(stats.lse, xce.logsumexp(x))
    size = np.maximum(np.abs(exact.lse), np.abs(x.max(-1)))
    return {
        "loss": ulps(value, -exact.u[label]),
        "loss of another": ulps(xce.cross_entropy(x, other, reduction="none"), -exact.u[n, other]),
        "grad": ulps(found, grad),
        "hess": ulps(hess, exact.p * exact.not_p),
        "softmax": ulps(xce.softmax(x), exact.p),
        "log_softmax": ulps(xce.log_softmax(x), exact.u),
        "logsumexp": ulps(stats.lse, exact.lse, size),  # near 0 it is the difference of larger numbers
        "entropy": ulps(stats.entropy, exact.entropy),
    }


def assert_within_limits(errors: dict[str, float]) -> None:
    bad = {name: round(error, 2) for name, error in errors.items() if not error <= LIMITS[name]}
    assert not bad, f"{bad} ULP, but the limits are {LIMITS}"


@pytest.mark.skipif(not HAS_LONGDOUBLE, reason="longdouble is too short here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_rows(dtype: str, kind: str, level: str, rng: np.random.Generator, record_property: Any) -> None:
    worst = dict.fromkeys(LIMITS, 0.0)
    for n_classes in CLASSES:
        n_rows = max(4, min(2000, 60_000 // n_classes))
        x, y = rows_of(kind, n_rows, n_classes, rng)
        x = x.astype(dtype)
        for name, error in errors_of(x, y, exact_by_longdouble(x)).items():
            worst[name] = max(worst[name], error)
    record_property("ulps", worst)
    assert_within_limits(worst)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_few_rows_by_mpmath(dtype: str, kind: str, rng: np.random.Generator) -> None:
    for n_classes, n_rows in ((3, 40), (17, 8), (300, 2)):
        x, y = rows_of(kind, n_rows, n_classes, rng)
        x = x.astype(dtype)
        exact = exact_by_mpmath(x)
        assert_within_limits(errors_of(x, y, exact))
        if HAS_LONGDOUBLE:  # the oracle of the other test
            for precise, quick in zip(exact, exact_by_longdouble(x), strict=True):
                assert ulps(quick.astype(np.float64), precise) <= 0.51


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_add_no_error(dtype: str, reduction: str, rng: np.random.Generator) -> None:
    """However many rows: they are added in float64, and rounded once."""
    for kind, n_rows in itertools.product(("random", "confident", "wide"), (3, 5000)):
        x, y = rows_of(kind, n_rows, 10, rng)
        x = x.astype(dtype)
        rows = -exact_by_longdouble(x).u[np.arange(n_rows), y]
        exact = rows.mean() if reduction == "mean" else rows.sum()
        value = xce.cross_entropy(x, y, reduction=reduction)
        assert ulps(np.array([value]), np.array([exact])) <= LIMITS["loss"]


def test_the_confident_row() -> None:
    value, grad = xce.cross_entropy(np.array([20, 0, 0], np.float32), 0, return_grad=True)
    assert value == np.float32(4.1223072e-9)
    assert grad[0] == np.float32(-4.1223072e-9)
    np.testing.assert_allclose(grad[1:], 2.0611536e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_option_keeps_the_accuracy_of_a_confident_row(dtype: str, level: str) -> None:
    """Value and gradient relative to themselves, not to 1: options must not send them through ``p - 1``."""
    x = np.array([20, 0, 1, -3], dtype).repeat(30).reshape(4, 30).T + np.arange(30)[:, None].astype(dtype)
    y = np.zeros(30, int)
    p = np.exp(np.longdouble([0, -20, -19, -23]) * 1.0)
    p /= p.sum()
    exact = np.array([-p[1:].sum(), *p[1:]])
    for options in (
        {},
        {"where": np.array([True, True, True, True])},
        {"weight": np.array([1, 2, 3, 4], dtype), "ignore_index": 3},
        {"axis": 0},
    ):
        logits = x.T if "axis" in options else x
        value, grad = xce.cross_entropy(logits, y, reduction="none", return_grad=True, **options)
        grad = grad.T if "axis" in options else grad
        assert ulps(value, np.full(30, -np.log1p(exact[0]))) <= LIMITS["loss"]
        assert ulps(grad, np.tile(exact, (30, 1))) <= LIMITS["grad"]
    value, grad = xce.cross_entropy(2 * x, y, reduction="none", return_grad=True, temperature=2.0)
    assert ulps(2 * grad, np.tile(exact, (30, 1))) <= LIMITS["grad"] + 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_shifts_of_a_row_agree(dtype: str) -> None:
    """A power of two added to a row that it does not round changes no result by more than its error."""
    row = np.array([3.25, -1.5, 0.0, 2.75, -8.5, 3.0], dtype)
    exact = exact_by_longdouble(row[None])
    for shift in (0.0, 1.0, -16.0, 255.0, 256.0, 257.0, -300.0, 1024.0, 2047.0, 2049.0, -65536.0):
        x = (row + np.dtype(dtype).type(shift))[None]
        errors = errors_of(x, np.array([1]), exact_by_longdouble(x))
        assert_within_limits(errors)
        assert ulps(xce.softmax(x), exact.p) <= LIMITS["softmax"]


# The worst of 20 million rows of the kind "wide" whose label is the largest logit: dtype, seed, classes, row. All
# other results of those rows kept their limits. About one such row in 60,000 is off by more than 4 ULP: exp errs
# by up to 1 ULP in the largest entry and in the one that dominates the rest, and their quotient is rounded again.
HARD_ROWS = [
    ("float64", 233, 100, 463), ("float64", 1183, 100, 66), ("float64", 1333, 100, 110), ("float64", 1441, 10, 1070),
    ("float32", 177, 100, 250), ("float32", 312, 100, 53), ("float32", 66, 100, 418), ("float32", 594, 10, 4487),
]  # fmt: skip


def errors_of_hard_rows() -> list[float]:
    errors = []
    for dtype, seed, n_classes, row in HARD_ROWS:
        rows = np.random.default_rng([seed, n_classes]).standard_normal((60_000 // n_classes, n_classes))
        x = (10 * rows)[row : row + 1].astype(dtype)
        y = x.argmax(-1)
        value = xce.cross_entropy(x, y, reduction="none")
        errors.append(ulps(value, -exact_by_longdouble(x).u[[0], y]))
    return errors


@pytest.mark.skipif(not HAS_LONGDOUBLE, reason="longdouble is too short here")
def test_the_worst_rows_known() -> None:
    assert max(errors_of_hard_rows()) <= 5


@pytest.mark.skipif(not HAS_LONGDOUBLE, reason="longdouble is too short here")
@pytest.mark.xfail(reason="4.9 ULP found where the target is 4 everywhere", strict=True)
def test_the_worst_rows_keep_the_limit() -> None:
    assert max(errors_of_hard_rows()) <= LIMITS["loss"]

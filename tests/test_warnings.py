"""No call lets a warning out of NumPy, JAX or PyTorch, whatever the arrays hold and whatever the error state is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import LOSSES, problem

import xce
from xce import metrics

INF, NAN = np.inf, np.nan
Array = np.ndarray[Any, Any]


class Library(NamedTuple):
    make: Callable[[Array], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def numpy_library() -> Library:
    return Library(np.asarray)


def torch_library() -> Library:
    return Library(pytest.importorskip("torch").from_numpy)


def strict_library() -> Library:
    return Library(pytest.importorskip("array_api_strict").asarray)


def jax_library(x64: bool) -> Library:
    jax = pytest.importorskip("jax")
    return Library(jax.numpy.asarray, lambda: jax.enable_x64(x64))


LIBRARIES = {
    "numpy": numpy_library,
    "torch": torch_library,
    "strict": strict_library,
    "jax": lambda: jax_library(False),
    "jax x64": lambda: jax_library(True),
}


@pytest.fixture(params=LIBRARIES.values(), ids=LIBRARIES)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[Array], Any]]:
    library: Library = request.param()
    with library.context(), warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")

        def make(a: Array) -> Any:
            with np.errstate(all="ignore"):  # JAX without x64 has no float64
                return library.make(a)

        yield make


def rows(dtype: str) -> Array:
    """Whatever overflows, underflows, divides by zero or is not a number."""
    largest, tiny = float(np.finfo(dtype).max), float(np.finfo(dtype).smallest_subnormal)
    return np.array(
        [
            [0, 1, 2], [NAN, 0, 1], [INF, 0, 1], [-INF, 0, 1], [-INF, -INF, -INF], [INF, -INF, NAN], [0, 200, 0],
            [largest, -largest, 0], [tiny, -tiny, 0], [largest, largest, largest], [1e4, 1e4 + 1, 0], [-90, 0, -105],
        ],
        dtype,
    )  # fmt: skip


def weighs_elements(case: Any) -> bool:
    return case.kind == "elements" and case.function is not xce.multilabel_soft_margin_loss


def each_of(x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    """All rows together, and each alone."""
    yield x, y
    for i in range(len(x)):
        yield x[i : i + 1], y[i : i + 1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", LOSSES, ids=[case.name for case in LOSSES])
def test_losses(case: Any, dtype: str, make: Callable[[Array], Any]) -> None:
    flags = {"return_grad": True, "return_hess": True, "validate": False}
    for mode in case.modes:
        x = rows(dtype)
        _, target, made = problem({}, mode, x.shape, 1, x.dtype, 1, case)
        indices = made.pop("teacher_indices", None)
        for part in (slice(None), *(slice(i, i + 1) for i in range(len(x)))):  # a mean must not hide what a row does
            options = made if indices is None else made | {"teacher_indices": make(indices[part])}
            weights = np.zeros(x[part].shape if weighs_elements(case) else x[part].shape[:1])
            for reduction in case.reductions:
                options = options | {"reduction": reduction}
                case.function(make(x[part]), make(target[part]), **options, **flags)
                case.function(make(x[part]), make(target[part]), sample_weight=make(weights), **options, **flags)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_options_beyond_the_type(dtype: str, make: Callable[[Array], Any]) -> None:
    x, y = rows(dtype), np.arange(12) % 3
    for options in ({"temperature": 1e-300}, {"temperature": 1e300}, {"softcap": 1e-46}, {"z_loss": 1e300}):
        for a, b in each_of(x, y):
            xce.cross_entropy(make(a), make(b), return_grad=True, return_hess=True, **options)
    for weight in (1e37, 1e-37, 0.0):
        xce.cross_entropy(make(x), make(y), weight=make(np.full(3, weight)), return_grad=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transforms_and_metrics(dtype: str, make: Callable[[Array], Any]) -> None:
    x, y = rows(dtype), np.arange(12) % 3
    for a, b in each_of(x, y):
        logits, labels = make(a), make(b)
        for function in (xce.softmax, xce.log_softmax, xce.logsumexp):
            function(logits)
            function(logits, axis=None)
            function(logits, where=make(a > 0))
        xce.logsumexp(logits, b=make(np.array([1.0, -1.0, 0.0], dtype)), return_sign=True)
        xce.logit_stats(logits, labels)
        xce.perplexity(logits, labels)
        metrics.top_k_accuracy(logits, labels, k=2)
        xce.LossState(3).update(logits, labels).result("mean")
    p = np.array([[0, 0.5, 0.5], [1, 0, 0], [1e-30, 0.5, 0.5]], dtype)
    metrics.brier_score(make(p), make(np.array([0, 0, 0])))
    xce.log_loss(make(np.array([0, 1, 2])), make(p))


def test_a_nan_that_signals() -> None:
    """Converted by NumPy, it raises an error of the processor, which is of no interest to anybody."""
    nan = np.array([0x7F800001], np.uint32).view(np.float32)[0]
    x, y, p = np.array([[1, 2, 3], [3, 2, 1]], np.float32), np.array([0, 1]), np.full((2, 2), 0.5, np.float32)
    sick, weight, proba = x.copy(), np.ones(2, np.float32), p.copy()
    # of bits: an assignment of numbers would make it quiet
    for a in (sick.ravel(), weight, proba.ravel()):
        a.view(np.uint32)[0] = 0x7F800001
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        shards = xce.LossState(3).update(sick[:, :2], y).update(sick[:, 2:], y, 2)
        for value in (
            shards.result(),
            xce.LossState(3).update(sick, y).result(),
            xce.cross_entropy(sick, y),
            xce.linear_cross_entropy(sick, x, y),
            xce.linear_cross_entropy(sick, x, y, sample_weight=np.array([1e200, 1])),
            xce.logsumexp(x, b=sick)[0],
            xce.logsumexp(sick, b=x)[0],
            metrics.brier_score(sick, y),
        ):
            assert np.isnan(value)
        assert metrics.top_k_accuracy(sick, y, k=2) == 0.5
        for text, call in {
            "^target": lambda: xce.LossState(3).update(x, weight),
            r"^target\[": lambda: xce.cross_entropy(x, weight),
            "^sample_weight": lambda: xce.LossState(3).update(x, y, sample_weight=weight),
            r"^sample_weight\[": lambda: xce.log_loss(y, p, sample_weight=weight),
            r"^sample_weight\[0\]": lambda: xce.cross_entropy(x, y, sample_weight=weight),
            "^weight": lambda: xce.LossState(3, weight=sick[0]),
            r"^weight\[": lambda: xce.cross_entropy(x, y, weight=sick[0]),
            "^y_true": lambda: xce.log_loss(proba, p),
            "^y_proba": lambda: xce.log_loss(y, proba),
            "^temperature=nan": lambda: xce.cross_entropy(x, y, temperature=nan),
        }.items():
            with pytest.raises(ValueError, match=f"{text}.* = nan|{text} is not allowed"):
                call()

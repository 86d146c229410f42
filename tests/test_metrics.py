"""Figures of merit: scikit-learn's numbers, definitions, edges and errors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

import xce
from xce.metrics import brier_score, log_loss, perplexity, top_k_accuracy

Array = np.ndarray[Any, Any]


@pytest.fixture
def proba(rng: np.random.Generator) -> Array:
    return rng.dirichlet(np.ones(4), 50)


@pytest.fixture
def labels(rng: np.random.Generator) -> Array:
    return rng.integers(4, size=50)


# log_loss


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_log_loss_is_that_of_scikit_learn(dtype: str, proba: Array, labels: Array, rng: np.random.Generator) -> None:
    theirs = pytest.importorskip("sklearn.metrics").log_loss
    proba, weight = proba.astype(dtype), rng.random(50)
    names = np.array(["b", "a", "d", "c"])[labels]
    calls: list[tuple[tuple[Any, Any], dict[str, Any]]] = [
        ((labels, proba), {}), ((labels, proba), {"normalize": False}), ((labels, proba), {"sample_weight": weight}),
        ((labels, proba), {"sample_weight": weight, "normalize": False}), ((names, proba), {}),
        ((names[:3], proba[:3]), {"labels": ["a", "b", "c", "d"]}), ((labels > 1, proba[:, 0]), {}),
        ((np.where(labels > 1, 1, -1), proba[:, :1]), {}), ((list(names), proba), {}),
        ((labels[:2], np.eye(4, dtype=dtype)[[1, 2]]), {"labels": range(4)}),
    ]  # fmt: skip
    for arrays, options in calls:
        np.testing.assert_allclose(
            log_loss(*arrays, **options), theirs(*arrays, **options), rtol=1e-13 if dtype == "float64" else 1e-6
        )
    if dtype == "float64":
        lists = [0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]]
        np.testing.assert_allclose(log_loss(*lists), theirs(*lists))
        np.testing.assert_allclose(log_loss([0, 1], [[1, 0], [0, 1]]), theirs([0, 1], [[1, 0], [0, 1]]))


def test_log_loss_of_a_single_class_and_of_soft_labels(proba: Array, labels: Array) -> None:
    np.testing.assert_allclose(log_loss(np.full(50, 2), proba), -np.log(proba[:, 2]).mean())
    np.testing.assert_allclose(log_loss(np.ones(50, int), proba[:, 0]), -np.log(proba[:, 0]).mean())
    np.testing.assert_allclose(log_loss(np.zeros(50, bool), proba[:, 0]), -np.log(1 - proba[:, 0]).mean())
    np.testing.assert_allclose(log_loss(np.full(50, -1), proba[:, 0]), -np.log(1 - proba[:, 0]).mean())
    np.testing.assert_allclose(log_loss(np.eye(4)[labels], proba), log_loss(labels, proba))
    soft = proba[::-1]
    np.testing.assert_allclose(log_loss(soft, proba), -(soft * np.log(proba)).sum(1).mean())
    np.testing.assert_allclose(log_loss(soft, proba), xce.cross_entropy(np.log(proba), soft))


def test_log_loss_of_other_libraries(proba: Array, labels: Array) -> None:
    strict = pytest.importorskip("array_api_strict")
    expected = log_loss(labels, proba)
    assert log_loss(strict.asarray(labels), strict.asarray(proba)) == pytest.approx(expected)
    torch = pytest.importorskip("torch")
    assert log_loss(torch.tensor(labels), torch.tensor(proba)) == pytest.approx(expected)
    assert log_loss(torch.tensor(labels > 1), torch.tensor(proba[:, 0])) == pytest.approx(
        log_loss(labels > 1, proba[:, 0])
    )


def test_log_loss_warns_of_labels_in_another_order(proba: Array, labels: Array) -> None:
    with pytest.warns(UserWarning, match="taken in sorted order"):
        assert log_loss(labels, proba, labels=[3, 2, 1, 0]) == log_loss(labels, proba)


def test_log_loss_warns_of_rows_that_are_no_distribution(proba: Array, labels: Array) -> None:
    with pytest.warns(UserWarning, match="do not sum to one"):
        value = log_loss(labels, proba / 2)
    np.testing.assert_allclose(value, log_loss(labels, proba) + math.log(2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([0, 1], [[0.5, 1.5], [0, 1]]), {}, ValueError, r"y_proba\[0, 1\] = 1.5 is not allowed"),
        (([0, 1], [math.nan, 1.0]), {}, ValueError, r"y_proba\[0\] = nan"),
        (([0, 1, 1], [0.5, 0.5]), {}, ValueError, "y_true has 3 rows but y_proba has 2"),
        ((["a", "a"], [0.5, 0.5]), {}, ValueError, "pass all of them as labels"),
        (([5, 5], [[0.5, 0.5]] * 2), {}, ValueError, "cannot be told"),
        (([0, 1], [[0.5, 0.5]] * 2), {"labels": [0, 1, 2]}, ValueError, "labels has 3 classes but y_proba has 2"),
        (([0, 3], [[0.5, 0.5]] * 2), {"labels": [0, 1]}, ValueError, r"y_true\[1\] = 3 is not one of the classes"),
        (
            ([[0.5, 0.5]], [[0.5, 0.25, 0.25]]),
            {},
            ValueError,
            r"y_true has shape \(1, 2\) but must have \(n,\) or \(1, 3\)",
        ),
        (([[-1.0, 2.0]], [[0.5, 0.5]]), {}, ValueError, r"y_true\[0, 0\] = -1"),
        (([0, 1], [0.5, 0.5]), {"sample_weight": [1]}, ValueError, r"sample_weight has shape \(1,\)"),
        (([0, 1], [0.5, 0.5]), {"sample_weight": [1, -1]}, ValueError, r"sample_weight\[1\] = -1"),
        (([0, 1], [0.5, 0.5]), {"sample_weight": [10**400, 1]}, TypeError, "sample_weight has dtype object"),
        (([0, 1], [0.5, 0.5]), {"normalize": "no"}, TypeError, "normalize is a str"),
        (([], []), {}, ValueError, "at least one row"),
        ((["a", "b"], ["x", "y"]), {}, TypeError, "y_proba has dtype"),
    ],
)
def test_log_loss_errors(arguments: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        log_loss(*arguments, **options)


# The others


def test_perplexity(labels: Array, proba: Array) -> None:
    np.testing.assert_allclose(perplexity(np.log(proba), labels), 2 ** (-np.log2(proba[np.arange(50), labels]).mean()))
    assert perplexity(np.zeros((3, 50)), np.array([3, -100, 4])) == pytest.approx(50)
    assert perplexity(np.zeros(7, np.float32), 3).dtype == np.float32
    assert math.isnan(perplexity(np.zeros((2, 3)), np.full(2, -100)))
    with pytest.raises(TypeError, match="target has dtype float64"):
        perplexity(np.zeros((2, 3)), np.zeros((2, 3)))


def test_top_k_accuracy_is_that_of_sorting(rng: np.random.Generator) -> None:
    x, y = np.round(2 * rng.standard_normal((200, 6))), rng.integers(6, size=200)  # with ties
    order = np.argsort(-x, axis=1, kind="stable")
    for k in (1, 2, 3, 6, 100):
        expected = (order[:, :k] == y[:, None]).any(1).mean()
        assert top_k_accuracy(x, y, k=k) == expected
        assert top_k_accuracy(x.T.astype(np.float16), y.astype(np.uint8), k=k, axis=0) == expected
    ignoring = np.where(np.arange(200) % 2, y, -100)
    assert top_k_accuracy(x, ignoring, k=2) == top_k_accuracy(x[1::2], y[1::2], k=2)


def test_top_k_accuracy_at_the_edges() -> None:
    assert top_k_accuracy(np.zeros((4, 3)), np.array([0, 1, 2, 0])) == 0.5  # a model that knows nothing is no model
    assert math.isnan(top_k_accuracy(np.zeros((2, 3)), np.full(2, -100)))
    for k in (1, 3):
        assert top_k_accuracy(np.array([[math.nan, 1, 2]]), np.array([2]), k=k) == 0
    for k, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k"):
            top_k_accuracy(np.zeros((2, 3)), np.zeros(2, int), k=k)  # type: ignore[arg-type]


def test_brier_score(proba: Array, labels: Array) -> None:
    expected = ((proba - np.eye(4)[labels]) ** 2).sum(1).mean()
    assert brier_score(np.log(proba), labels) == pytest.approx(expected)
    assert brier_score(np.log(proba).T, labels, axis=0) == pytest.approx(expected)
    assert brier_score(np.array([[20, 0]], np.float32), np.array([0])) == pytest.approx(2 / (1 + math.exp(20)) ** 2)
    assert math.isnan(brier_score(np.zeros((2, 3)), np.full(2, -100)))
    theirs = pytest.importorskip("sklearn.metrics").brier_score_loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = theirs(labels > 1, proba[:, 0] / proba[:, :2].sum(1))
    assert brier_score(np.log(proba[:, 1::-1]), (labels > 1).astype(int)) == pytest.approx(2 * half)
    with pytest.raises(TypeError, match="target has dtype float64"):
        brier_score(np.zeros((2, 3)), np.zeros((2, 3)))

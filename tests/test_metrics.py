"""Figures of merit: scikit-learn's numbers, definitions, edges and errors."""

from __future__ import annotations

import math
import tracemalloc
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
    np.testing.assert_allclose(log_loss(np.full(50, 2), proba, labels=range(4)), -np.log(proba[:, 2]).mean())
    np.testing.assert_allclose(log_loss(np.zeros(50), proba), -np.log(proba[:, 0]).mean())
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
        (([0], [0.5, 0.5]), {}, ValueError, "y_true has 1 row but y_proba has 2"),
        ((["a", 1], [0.5, 0.5]), {}, TypeError, "y_true holds labels that do not sort .*: expected labels of one type"),
        (([0, 1], [0.5, 0.5]), {"labels": ["a", 1]}, TypeError, "labels holds labels that do not sort"),
        (([0, 1], [0.5, 0.5]), {"labels": ["a", None]}, ValueError, r"labels\[1\] = None is a missing value"),
        (([0, 1], [0.5, 0.5]), {"labels": [0.2, 0.7]}, ValueError, r"labels\[0\] = 0\.2 is not a class"),
        (([0, 1], [0.5, 0.5]), {"labels": [0]}, ValueError, "labels has 1 class but y_proba has 2"),
        (([0, 1j], [0.5, 0.5]), {}, TypeError, "y_true has dtype complex128: expected numbers that are whole"),
        (([0, [1]], [0.5, 0.5]), {}, TypeError, "y_true is a list that is no array: expected entries in rows of one"),
        (([0, 1], [[0.5], [0.5, 0.5]]), {}, TypeError, "y_proba is a list that is no array"),
        ((["a", "a"], [0.5, 0.5]), {}, ValueError, "pass all of them as labels"),
        (([5, 5], [[0.5, 0.5]] * 2), {}, ValueError, "cannot be told"),
        (([0, 1], [[0.5, 0.5]] * 2), {"labels": [0, 1, 2]}, ValueError, "labels has 3 classes but y_proba has 2"),
        (([0, 3], [[0.5, 0.5]] * 2), {"labels": [0, 1]}, ValueError, r"y_true\[1\] = 3 is not one of the classes"),
        (
            ([[0.5, 0.5]], [[0.5, 0.25, 0.25]]),
            {},
            ValueError,
            r"y_true has shape \(1, 2\): expected \(n,\) or \(1, 3\)",
        ),
        (([[-1.0, 2.0]], [[0.5, 0.5]]), {}, ValueError, r"y_true\[0, 0\] = -1"),
        (([0, 1], [0.5, 0.5]), {"sample_weight": [1]}, ValueError, r"sample_weight has shape \(1,\)"),
        (
            ([0, 1], [0.5, 0.5]),
            {"sample_weight": [1, math.inf]},
            ValueError,
            r"sample_weight\[1\] = inf is not allowed",
        ),
        (
            ([0, 1], [0.5, 0.5]),
            {"sample_weight": math.nan},
            ValueError,
            "sample_weight = nan is not allowed: expected finite entries",
        ),
        (([0, 1], [0.5, 0.5]), {"sample_weight": ["1", "2"]}, TypeError, "sample_weight has dtype"),
        (([0, 1, 1], [0.1, 0.2, 0.3]), {"labels": [0, 1, 1]}, ValueError, "labels has the class 1 more than once"),
        ((["a"] * 2, [0.1, 0.2]), {"labels": ["b", "a", "b"]}, ValueError, "labels has the class b more than once"),
        (([0, 1], [0.1, 0.2]), {"labels": [[0], [1]]}, ValueError, r"labels has shape \(2, 1\): expected \(C,\)"),
        (([0, 1], [math.nan, 1.5]), {"sample_weight": [0, 1]}, ValueError, r"y_proba\[1\] = 1.5"),
        (
            ([7, 2, 1], [[0.5, 0.5]] * 3),
            {"sample_weight": [0, 1, 1], "labels": [0, 1]},
            ValueError,
            r"y_true\[1\] = 2 ",
        ),
        (([[7, 7], [0, -1]], [[0.5, 0.5]] * 2), {"sample_weight": [0, 1]}, ValueError, r"y_true\[1, 1\] = -1"),
        (
            (["a", None, "b"], [[0.1, 0.2, 0.7]] * 3),
            {"sample_weight": [1, 0, 1]},
            ValueError,
            "which are missing cannot be told",
        ),
        (([0, 1], [0.5, 0.5]), {"sample_weight": [10**400, 1]}, TypeError, "sample_weight has dtype object"),
        (([0, 1], [0.5, 0.5]), {"normalize": "no"}, TypeError, "normalize is a str"),
        (([], []), {}, ValueError, "at least one row"),
        ((["a", "b"], ["x", "y"]), {}, TypeError, "y_proba has dtype"),
    ],
)
def test_log_loss_errors(arguments: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        log_loss(*arguments, **options)


class NAType:
    """What pandas.NA does."""

    def __eq__(self, other: object) -> Any:
        return self

    __ne__ = __lt__ = __gt__ = __eq__  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self) -> str:
        return "<NA>"


NAT = np.datetime64("NaT")


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda y: np.array(y, object)])
@pytest.mark.parametrize(
    ("missing", "others"),
    [
        (None, "abab"), (None, [0, 1, 0, 1]), (None, [True, False] * 2), (NAType(), [0, 1, 0, 1]), (NAType(), "abab"),
        (math.nan, [0, 1, 0, 1]), (math.nan, "abab"), (np.float32("nan"), np.float32([0, 1, 0, 1])), (NAT, "abab"),
        (NAT, np.array(["2020-01-01", "2020-01-02"] * 2, "M8[D]")),
        (np.timedelta64("NaT"), np.array([1, 2, 1, 2], "m8[s]")),
    ],
)  # fmt: skip
def test_missing_labels(missing: Any, others: Any, kind: Any) -> None:
    labels, proba = list(others), [0.2, 0.7, 0.6, 0.1]
    labels[2:2] = [missing]
    proba[2:2] = [0.5]
    if kind is np.array and isinstance(others, str) and missing is not None and not isinstance(missing, NAType):
        kind = lambda y: np.array(y, object)  # noqa: E731  of text, NumPy makes text of everything
    with pytest.raises(
        xce.LabelError, match=r"^y_true\[2\] = (None|nan|NaT|<NA>) is a missing value: expected a class$"
    ):
        log_loss(kind(labels), proba)
    expected = log_loss(list(others), proba[:2] + proba[3:])
    assert log_loss(kind(labels), proba, sample_weight=[1, 1, 0, 1, 1]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("library", "dtype"),
    [("numpy", d) for d in ("float16", "bfloat16", "float32", "float64", "longdouble", "object")]
    + [("torch", d) for d in ("float16", "bfloat16", "float32", "float64")]
    + [("jax.numpy", d) for d in ("float16", "bfloat16", "float32")]
    + [("array_api_strict", d) for d in ("float32", "float64")],
)
def test_labels_are_no_fractions(library: str, dtype: str) -> None:
    """scikit-learn: "Unknown label type: continuous"."""
    xp, ml_dtypes = pytest.importorskip(library), pytest.importorskip("ml_dtypes")
    number = getattr(ml_dtypes, dtype, dtype) if library == "numpy" else getattr(xp, dtype)
    proba = [0.2, 0.7, 0.6]
    for values, text in (((0, 0.25, 1), "0.25"), ((0, math.inf, 1), "inf"), ((1, -2.5, 3), "-2.5")):
        labels = xp.asarray(values, dtype=number)
        with pytest.raises(xce.LabelError, match=rf"^y_true\[1\] = {text} is not a class: expected numbers that are"):
            log_loss(labels, proba)
        expected = log_loss([values[0], values[2]], [0.2, 0.6])
        assert log_loss(labels, proba, sample_weight=[1, 0, 1]) == pytest.approx(expected)
    assert log_loss(xp.asarray((0, 1, 1), dtype=number), proba) == log_loss([0, 1, 1], proba)


@pytest.mark.parametrize("metric", [perplexity, top_k_accuracy, brier_score])
def test_the_other_metrics_take_no_fractions(metric: Any) -> None:
    x = np.zeros((3, 2))
    for bad in (0.5, math.nan):
        with pytest.raises(xce.LabelError, match=rf"^target\[1\] = {bad} is not a class"):
            metric(x, np.array([0, bad, 1]))
    for bad in (None, NAType()):
        with pytest.raises(TypeError, match="target has dtype object"):
            metric(x, np.array([0, bad, 1]))


def test_classes_that_may_be_shifted() -> None:
    """Whole numbers without 0 may start at 1; scikit-learn asks for `labels` whenever one is missing."""
    theirs, proba = pytest.importorskip("sklearn.metrics").log_loss, np.array([[0.1, 0.2, 0.3, 0.4]] * 3)
    for labels in ([1, 2, 3], [1.0, 2.0, 3.0], [3, 3, 3], [1, 2, 4], np.uint8([1, 2, 2])):
        with pytest.raises(
            ValueError, match=r"^y_true has \d class(es)? but y_proba has 4, .*: pass all of them as labels"
        ):
            log_loss(labels, proba)
        for every in (range(5), range(1, 5)):
            columns = np.array([[0.1, 0.2, 0.3, 0.2, 0.2]] * 3) if len(every) == 5 else proba
            found = log_loss(labels, columns, labels=list(every))
            assert found == pytest.approx(theirs(labels, columns, labels=list(every)))
    for labels in ([0, 1, 3], [0.0, 1.0, 3.0], np.float16([0, 3, 3])):
        assert log_loss(labels, proba) == pytest.approx(theirs(labels, proba, labels=range(4)))
    # what only a removed row names is a class, unless it is none
    assert log_loss([5.0, 7.0, 6.0], proba[:, :3] / 0.6, sample_weight=[1, 1, 0]) == pytest.approx(
        -math.log(0.5 * 1 / 6) / 2
    )
    with pytest.raises(ValueError, match="pass all of them as labels"):
        log_loss([5.0, 7.0, math.nan], proba[:, :3] / 0.6, sample_weight=[1, 1, 0])


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_probabilities_of_bfloat16(library: str, proba: Array, labels: Array) -> None:
    xp, ml_dtypes = pytest.importorskip(library), pytest.importorskip("ml_dtypes")
    narrow = proba.astype(ml_dtypes.bfloat16)
    own = narrow if library == "numpy" else xp.asarray(proba, dtype=xp.bfloat16)
    p = np.clip(narrow.astype(float), 2.0**-7, 1 - 2.0**-7)
    for truth in (labels, np.eye(4)[labels], list(labels)):
        found = log_loss(truth, own, labels=None if np.ndim(truth) == 2 else range(4))
        assert found == pytest.approx(-np.log(p[np.arange(50), labels]).mean(), rel=1e-6)
    column = -np.log(np.where(labels > 1, p[:, 0], 1 - p[:, 0])).mean()
    assert log_loss(labels > 1, own[:, 0]) == pytest.approx(column, rel=1e-6)
    weight = np.arange(50) % 2
    expected = -np.log(p[np.arange(50), labels])[1::2].mean()
    assert log_loss(labels, own, sample_weight=weight, labels=range(4)) == pytest.approx(expected, rel=1e-6)
    assert log_loss([0, 1], np.array([0, 1], ml_dtypes.bfloat16)) == pytest.approx(-math.log(1 - 2.0**-7), rel=1e-6)


def test_labels_of_variable_length() -> None:
    texts, proba = ["a", "bc", "a"], [0.2, 0.7, 0.4]
    assert log_loss(np.array(texts, np.dtypes.StringDType()), proba) == log_loss(texts, proba)
    for missing in (None, math.nan):
        labels = np.array(["a", missing, "bc"], np.dtypes.StringDType(na_object=missing))
        with pytest.raises(xce.LabelError, match=r"^y_true\[1\] = (nan|None) is a missing value"):
            log_loss(labels, proba)
    with pytest.raises(TypeError, match=r"^target has dtype StringDType\(\)"):
        perplexity(np.zeros((3, 2)), np.array(texts, np.dtypes.StringDType()))


@pytest.mark.parametrize("dtype", ["longdouble", "float16", "float32", "bool", "int8", "uint64"])
def test_probabilities_of_any_number(dtype: str, proba: Array, labels: Array) -> None:
    theirs = pytest.importorskip("sklearn.metrics").log_loss
    p = (np.eye(4)[labels] if np.dtype(dtype).kind in "biu" else proba).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float16 does not sum to 1
        expected = theirs(labels, p if p.dtype.kind == "f" else p.astype(float))
        assert log_loss(labels, p) == pytest.approx(expected, rel=1e-3 if dtype == "float16" else 1e-6)


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


# Weights, kinds of arrays, warnings and memory


SIGNED = [1.0, -0.3, 2.0, 0.5]


@pytest.mark.parametrize(
    "weight", [SIGNED, [True, False, True, True], [3, 1, 0, 2], np.uint8([3, 1, 0, 2]), np.float16(SIGNED)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_log_loss_takes_weights_of_any_sign(weight: Any, normalize: bool) -> None:
    theirs = pytest.importorskip("sklearn.metrics").log_loss
    y, p = [0, 1, 1, 0], [0.2, 0.7, 0.6, 0.1]
    for arrays in ((y, p), (list("abba"), p), ([0, 1, 2, 0], np.array([[0.2, 0.7, 0.1]] * 4))):
        found = log_loss(*arrays, sample_weight=weight, normalize=normalize)
        assert found == pytest.approx(theirs(*arrays, sample_weight=weight, normalize=normalize), rel=1e-13)
    soft = np.array([[0.5, 0.5], [0.1, 0.9], [1, 0], [0, 1]])
    proba = np.stack([1 - np.array(p), p], 1)
    expected = np.asarray(weight, float) * -(soft * np.log(proba)).sum(1)
    expected = expected.sum() / np.asarray(weight, float).sum() if normalize else expected.sum()
    assert log_loss(soft, proba, sample_weight=weight, normalize=normalize) == pytest.approx(expected, rel=1e-13)


def test_log_loss_takes_one_weight(proba: Array, labels: Array) -> None:
    for weight in (3, 0.5, True, np.float32(2), np.True_, np.array(-2), -1):
        assert log_loss(labels, proba, sample_weight=weight) == pytest.approx(log_loss(labels, proba))
        total = log_loss(labels, proba, sample_weight=weight, normalize=False)
        assert total == pytest.approx(float(weight) * log_loss(labels, proba, normalize=False))


def test_log_loss_of_weights_that_sum_to_zero() -> None:
    for weight in ([1, -1], [0, 0], 0):
        assert math.isnan(log_loss([0, 1], [0.2, 0.3], sample_weight=weight))
    assert log_loss([0, 1], [math.nan, 7], sample_weight=0, normalize=False) == 0


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict", "jax.numpy"])
def test_log_loss_removes_rows_of_weight_zero(library: str, proba: Array, labels: Array) -> None:
    asarray = pytest.importorskip(library).asarray
    weight = np.where(np.arange(50) % 3, 1.5, 0.0).astype(np.float32)
    keep = weight != 0
    proba = proba.astype(np.float32)
    bad, wrong, soft = proba.copy(), labels.astype(np.int32), proba[::-1].copy()
    expected = log_loss(labels[keep], proba[keep])
    expected_soft = log_loss(soft[keep], proba[keep])
    bad[~keep], wrong[~keep], soft[~keep] = np.nan, -7, np.nan
    bad[0], bad[3] = 2.0, -np.inf
    assert log_loss(asarray(wrong), asarray(bad), sample_weight=asarray(weight)) == pytest.approx(expected, rel=1e-6)
    found = log_loss(asarray(soft), asarray(bad), sample_weight=asarray(weight))
    assert found == pytest.approx(expected_soft, rel=1e-6)
    if library == "numpy":
        names = np.array(["a", "b", "c", "d"])[labels].astype(object)
        names[~keep] = None
        assert log_loss(names, bad, sample_weight=weight) == pytest.approx(expected, rel=1e-6)
        # a class that only a removed row names, as in scikit-learn
        theirs = pytest.importorskip("sklearn.metrics").log_loss
        arguments = ["a", "c", "b"], np.array([[0.2, 0.3, 0.5]] * 3)
        assert log_loss(*arguments, sample_weight=[1, 2, 0]) == pytest.approx(
            theirs(*arguments, sample_weight=[1, 2, 0])
        )


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict", "jax.numpy"])
def test_no_metric_warns(library: str, rng: np.random.Generator) -> None:
    asarray = pytest.importorskip(library).asarray
    x = np.array([[0, 200, -1e30], [-np.inf, 0, 1], [1e-30, 0, 1e30], [3, 2, 1]], np.float32)
    y, w = asarray(np.array([0, 1, 1, 2], np.int32)), asarray(np.array([1e30, 1e-30, 0, 1], np.float32))
    p = np.array([[0, 1e-40, 1], [1, 0, 0], [1e-30, 0, 1], [0.25, 0.25, 0.5]], np.float32)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        assert float(perplexity(asarray(x), y)) == math.inf
        assert float(perplexity(asarray(x), y, sample_weight=w)) == math.inf
        for k in (1, 2):
            assert 0 <= top_k_accuracy(asarray(x), y, k=k) <= 1
        assert 0 < brier_score(asarray(x), y) <= 2
        for truth in (y, asarray(p)):
            for weight in (None, w):
                for normalize in (True, False):
                    assert log_loss(truth, asarray(p), sample_weight=weight, normalize=normalize) > 0


def in_long_double(x: Array, y: Array, s: Array, k: int) -> tuple[float, float, float]:
    """Perplexity, top-k accuracy and Brier score by their definitions; a row of weight 0 is not looked at."""
    losses, hits, squares = (np.zeros(len(x), np.longdouble) for _ in range(3))
    for i in np.flatnonzero(s):
        row, t = x[i].astype(np.longdouble), int(y[i])
        e = np.exp(row - row.max())
        losses[i] = np.log(e.sum()) - (row[t] - row.max())
        hits[i] = t in np.argsort(-row, kind="stable")[:k]
        squares[i] = ((e / e.sum() - (np.arange(len(row)) == t)) ** 2).sum()
    mean = [float((s * values).sum() / s.sum()) for values in (losses, hits, squares)]
    return math.exp(mean[0]), mean[1], mean[2]


def check_weights(x: Array, y: Array, s: Array) -> None:
    for k in (1, 2):
        expected = in_long_double(x, y, s, k)
        found = (
            perplexity(x, y, sample_weight=s),
            top_k_accuracy(x, y, k=k, sample_weight=s),
            brier_score(x, y, sample_weight=s),
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_weights_of_metrics(rng: np.random.Generator) -> None:
    x, y = np.round(2 * rng.standard_normal((60, 5))), rng.integers(5, size=60)
    for s in (rng.random(60), rng.integers(0, 3, 60), rng.random(60) < 0.7):
        check_weights(x, y, s)
    assert brier_score(x[:1], y[:1], sample_weight=np.zeros(1)) != 0  # NaN
    assert math.isnan(top_k_accuracy(x[:1], y[:1], sample_weight=np.zeros(1)))


def test_metrics_take_weights_of_any_sign(rng: np.random.Generator) -> None:
    x, y = np.round(2 * rng.standard_normal((60, 5))), rng.integers(5, size=60)
    check_weights(x, y, rng.normal(0.2, 1, 60))
    for metric in (perplexity, top_k_accuracy, brier_score):
        assert math.isnan(metric(x[:2], y[:2], sample_weight=np.array([1.0, -1.0])))
        assert metric(x, y, sample_weight=-3) == pytest.approx(metric(x, y), rel=1e-12)


def test_metrics_remove_rows_of_weight_zero(rng: np.random.Generator) -> None:
    x, y, s = rng.standard_normal((60, 5)), rng.integers(5, size=60), rng.random(60)
    s[::3] = 0
    x[0], x[3, 1], x[6], y[9], y[12] = np.nan, np.inf, -np.inf, 99, -1
    check_weights(x, y, s)


def test_labels_as_floats(rng: np.random.Generator) -> None:
    x, y, s = rng.standard_normal((60, 5)), rng.integers(5, size=60).astype(float), rng.random(60)
    check_weights(x, y, s)
    s[::3] = 0
    y[[0, 3, 9]] = np.nan, 0.5, 1e30
    check_weights(x, y, s)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_metrics_in_blocks(dtype: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed at a time, on any axis; of arrays of other libraries, too."""
    ml_dtypes, strict = pytest.importorskip("ml_dtypes"), pytest.importorskip("array_api_strict")
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    x = np.round(2 * rng.standard_normal((3, 7, 11, 5))).astype(getattr(ml_dtypes, dtype, dtype))
    y = rng.integers(7, size=(3, 11, 5)).astype(np.int32)
    y[1, 2] = -100
    rows = np.moveaxis(x.astype(float), 1, -1)[y != -100]
    expected = [in_long_double(rows, y[y != -100], np.ones(len(rows)), k) for k in (1, 2, 3)]
    for block, ties in ((1 << 19, 1 << 16), (1, 1), (200, 30), (28 * 13, 100)):
        monkeypatch.setattr("xce.metrics._BLOCK_BYTES", block)
        monkeypatch.setattr("xce.metrics._TIES", ties)
        kinds = [x, x.view(Other), np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)]
        if dtype == "bfloat16":
            kinds += [torch.from_numpy(x.astype("f4")).bfloat16(), jax.asarray(x)]
        elif dtype == "float32":
            kinds += [torch.from_numpy(x), jax.asarray(x), strict.asarray(x)]
        for logits in kinds:
            labels = y
            if type(logits).__module__.partition(".")[0] != "numpy" and not isinstance(logits, np.ndarray):
                labels = {"torch": torch, "array_api_strict": strict}.get(
                    type(logits).__module__.split(".")[0], jax
                ).asarray(y)
            for k in (1, 2, 3):
                assert top_k_accuracy(logits, labels, k=k, axis=1) == pytest.approx(expected[k - 1][1], rel=1e-14)
            tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-13}[dtype]
            assert brier_score(logits, labels, axis=1) == pytest.approx(expected[0][2], rel=tolerance)


class Other(np.ndarray[Any, Any]):
    """An array whose comparisons and sums mean something else."""

    def __array_ufunc__(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the caller's subclass was computed on")

    def __array_function__(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the caller's subclass was computed on")


@pytest.mark.parametrize("kind", [np.matrix, Other])
def test_a_subclass_is_an_array(kind: Any, proba: Array, labels: Array) -> None:
    x, own = np.log(proba), labels if kind is np.matrix else labels.view(kind)
    for k in (1, 2, 3):
        assert top_k_accuracy(x.view(kind), own, k=k) == top_k_accuracy(x, labels, k=k)
    assert brier_score(x.view(kind), own) == brier_score(x, labels)
    assert perplexity(x.view(kind), own) == perplexity(x, labels)
    assert log_loss(own, proba.view(kind)) == log_loss(labels, proba)
    assert log_loss(proba.view(kind), proba.view(kind)) == log_loss(proba, proba)
    if kind is Other:
        weight = np.linspace(-1, 2, 50)
        assert log_loss(own, proba, sample_weight=weight.view(kind)) == log_loss(labels, proba, sample_weight=weight)


def test_memory_of_metrics() -> None:
    """1 MiB beside the logits, as NumPy counts it."""
    for dtype in (np.float16, np.float32, np.float64):
        x = np.ones((1 << 18, 16), dtype)
        for logits in (x, x.reshape(4, -1)[:, :100_000]):
            labels, weight = np.broadcast_to(np.int64(1), len(logits)), np.broadcast_to(np.float32(2), len(logits))
            for act in (
                lambda x, y, s: brier_score(x, y, sample_weight=s),
                lambda x, y, s: top_k_accuracy(x, y, sample_weight=s),
                lambda x, y, s: top_k_accuracy(x, y, k=3, sample_weight=s),
            ):
                act(logits[:64], labels[:64], weight[:64])
                tracemalloc.start()
                act(logits, labels, weight)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak < 1.2 * 2**20


@pytest.mark.parametrize(
    "dtype", ["longdouble", "clongdouble", "complex64", "O", "M8[s]", "m8[s]", "U3", "S3", "i4,f4"]
)
def test_soft_labels_are_numbers_that_are_read(dtype: str) -> None:
    truth = np.zeros((2, 2), dtype) if "," in dtype else np.array([[1, 0], [0, 1]]).astype(dtype)
    proba = np.array([[0.5, 0.5], [0.3, 0.7]])
    with pytest.raises(TypeError, match=r"^y_true has dtype .*: expected bool, int8, .* or float64$"):
        log_loss(truth, proba)
    with pytest.raises(TypeError, match=r"^y_true has dtype .*: expected bool, int8, .* or float64$"):
        log_loss(truth, proba, sample_weight=[1, 0])


@pytest.mark.parametrize("dtype", ["bool", "int8", ">i4", "uint64", "float16", ">f4", "float64", "bfloat16"])
def test_soft_labels_of_any_number(dtype: str) -> None:
    number = getattr(pytest.importorskip("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype
    truth = np.array([[1, 0], [0, 1]]).astype(number)
    for weight in (None, [1.0, 0.0]):
        expected = -math.log(0.5) if weight else -(math.log(0.5) + math.log(0.7)) / 2
        assert log_loss(truth, np.array([[0.5, 0.5], [0.3, 0.7]]), sample_weight=weight) == pytest.approx(expected)


def test_a_label_is_ignored_only_if_it_is_that_number() -> None:
    """Nothing is rounded or wrapped to `ignore_index`; a bad label that nobody checked makes a score NaN."""
    x = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    for dtype, label, ignore_index in (
        ("uint64", 2**64 - 1, -1),
        ("float16", 2048, 2049),
        ("float32", 2**24, 2**24 + 1),
        ("float64", 2**53, 2**53 + 1),
    ):
        target = np.array([label, 1], dtype)
        assert math.isnan(brier_score(x, target, ignore_index=ignore_index, validate=False))
        assert top_k_accuracy(x, target, ignore_index=ignore_index, validate=False) == 0
        if dtype != "uint64":
            assert brier_score(x, target, ignore_index=label) == brier_score(x[1:], target[1:])


def test_classes_of_very_many_digits() -> None:
    many = 10**5000
    with pytest.raises(ValueError, match=r"^y_true\[1\] = 1\.00e\+5000 is not one of the classes \[0 1\]$"):
        log_loss([0, many], [[0.5, 0.5], [0.3, 0.7]], labels=[0, 1])
    with pytest.raises(ValueError, match=r"^y_true\[1\] = 1 is not one of the classes of dtype object$"):
        log_loss([0, 1], [[0.5, 0.5], [0.3, 0.7]], labels=[0, many])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_brier_score_does_not_depend_on_strides(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 23333)).astype(dtype)
    y = np.array([5, 6, 7])
    expected = brier_score(x, y)
    assert brier_score(np.asfortranarray(x), y) == expected
    assert brier_score(x.T.copy(), y, axis=0) == expected
    same = np.broadcast_to(x[:1], x.shape)
    assert brier_score(same, y) == brier_score(same.copy(), y)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_log_loss_does_not_depend_on_strides(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for n, c in ((9000, 3), (200, 1000), (7, 40000)):
        p, q = (rng.dirichlet(np.ones(c), size=n).astype(dtype) for _ in range(2))
        y, w = rng.integers(c, size=n), rng.standard_normal(n)
        options = {"labels": np.arange(c), "sample_weight": w}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # float16 does not sum to 1
            expected = xce.log_loss(q, p), xce.log_loss(y, p, **options), xce.log_loss(q, p, sample_weight=w)
            for place in (np.asfortranarray, lambda a: np.flip(np.flip(a).copy()), lambda a: np.repeat(a, 2, 0)[::2]):
                own = {"labels": np.arange(c), "sample_weight": place(w)}
                found = (
                    xce.log_loss(place(q), place(p)), xce.log_loss(place(y), place(p), **own),
                    xce.log_loss(place(q), place(p), sample_weight=place(w)),
                )  # fmt: skip
                assert found == expected

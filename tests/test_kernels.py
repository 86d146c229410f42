"""The compiled kernels against the reference in float64: options, dtypes, shapes, layouts and edge values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from cases import CASE_OF, TARGETS_OF_LOSSES, Case, combinations, problem
from checks import (
    DTYPES,
    FLAGS,
    LAYOUTS,
    Array,
    assert_close,
    check_loss,
    check_maps,
    check_stats,
    compute_dtype,
    dtype_of,
    every_target,
    laid_out,
    reference,
    same_bits,
    widen,
)

import xce
from xce import _cpu, _reference

INF, NAN = math.inf, math.nan
MODES = ["index", "probabilities"]

# Around every border of the schedules: lanes, virtual lanes, blocks of 8, the switch at 64, portions of rows.
CLASSES = (1, 2, 3, 10, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 1000, 1025)
ROWS = (1, 2, 15, 16, 17, 33)

FEATURES: dict[str, dict[str, Any]] = {
    "sparse": {"weight": True, "ignore": True},
    "dense": {"weight": True, "ignore": True, "label_smoothing": 0.1, "sample_weight": True},
    "full": {
        "where": True,
        "ignore": True,
        "temperature": 1.3,
        "softcap": 7.0,
        "z_loss": 0.02,
        "weight": True,
    },
}


def test_every_module_knows_the_formulas_of_the_reference(level: str) -> None:
    for storage in DTYPES:
        kernels = _cpu.kernels(storage)
        assert kernels.__name__.endswith(f"{level}_{storage}")
        assert set(kernels.PHI) == set(_reference.PHI)
        assert set(kernels.DIVERGENCES) == set(_reference.DIVERGENCES)
        assert set(kernels.ELEMENT_FORMULAS) == set(_reference.ELEMENTS)


# Options

# Eleven shapes: no divisor of a power of two, so that every pair of options meets every shape.
MIXED = (
    ((9,), 0), ((4, 1), 1), ((3, 5), -1), ((17, 10), -1), ((2, 3, 16), 2), ((2, 65), 1), ((1, 300), -1),
    ((130, 3), 0), ((20, 5), 0), ((2, 70, 3), 1), ((2, 6, 3, 2), 1),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@every_target
def test_every_combination_of_options(case: Case, mode: str, dtype: str, level: str) -> None:
    shapes, reductions, params = itertools.cycle(MIXED), itertools.cycle(case.reductions), itertools.cycle(case.params)
    others = {name: values for name, values in case.options.items() if name != "reduction"}
    every = list(combinations(**others)) if len(others) > 4 else 12 * list(combinations(**others))
    for seed, features in enumerate(every):
        shape, axis = next(shapes)
        features["reduction"] = next(reductions)
        x, target, options = problem(features, mode, shape, axis, dtype_of(dtype), seed, case)
        check_loss(case.function, x, target, **options, **next(params))


# Shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
def test_shapes_around_the_borders_of_the_schedules(features: str, dtype: str, level: str) -> None:
    targets = itertools.cycle(TARGETS_OF_LOSSES)  # 25: no divisor of the numbers of the shapes
    for seed, (n_classes, n_rows) in enumerate(itertools.product(CLASSES, ROWS)):
        shape, axis = (((n_rows, n_classes), -1), ((n_classes, n_rows), 0), ((2, n_classes, n_rows), 1))[seed % 3]
        for case, mode in [(CASE_OF[xce.cross_entropy], MODES[seed // 3 % 2]), next(targets), next(targets)]:
            feature = FEATURES[features] | {"reduction": case.reductions[seed % len(case.reductions)]}
            x, target, options = problem(feature, mode, shape, axis, dtype_of(dtype), seed, case)
            check_loss(case.function, x, target, **options, **case.params[seed % len(case.params)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_and_statistics_of_shapes(dtype: str, level: str, rng: np.random.Generator) -> None:
    for seed, (n_classes, n_rows) in enumerate(itertools.product(CLASSES, (1, 16, 33))):
        shape, axis = (((n_rows, n_classes), -1), ((n_classes, n_rows), 0), ((2, n_classes, n_rows), 1))[seed % 3]
        x = (4 * rng.standard_normal(shape)).astype(dtype_of(dtype))
        x = np.round(x) if seed % 2 else x  # with ties
        check_maps(x, axis=axis, temperature=1.0 if seed % 4 else 0.6)
        labels = rng.integers(-1, n_classes, size=xce.logsumexp(x, axis=axis).shape)
        check_stats(x, labels, axis=axis, ignore_index=-1)


def test_no_rows() -> None:
    x, y = np.zeros((0, 3), np.float32), np.zeros(0, int)
    for reduction, value in (("mean", NAN), ("sum", 0.0)):
        results = xce.cross_entropy(x, y, reduction=reduction, return_grad=True, return_hess=True)
        np.testing.assert_array_equal(results[0], value)
        assert results[1].shape == results[2].shape == (0, 3)
    assert xce.cross_entropy(x, y, reduction="none").shape == (0,)
    assert xce.softmax(x).shape == (0, 3)
    assert xce.logsumexp(np.zeros((4, 3, 0), "f8"), axis=1).shape == (4, 0)
    assert all(statistic.shape == (0,) for statistic in xce.logit_stats(x, y))


def test_more_logits_than_an_int32_counts() -> None:
    row = np.linspace(-2, 2, 1024, dtype=np.float32)
    x, y = np.broadcast_to(row, (2**21 + 3, 1024)), np.broadcast_to(np.int64(1000), (2**21 + 3,))
    assert x.size > 2**31
    value = xce.cross_entropy(x, y)
    assert value == xce.cross_entropy(row, 1000)


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_all_arguments_and_buffers(layout: Any, dtype: str) -> None:
    shapes = (((5, 70), -1), ((18, 6), 1), ((70, 5), 0), ((3, 80, 2), 1), ((4, 9), 0))
    for seed, (features, (case, mode)) in enumerate(itertools.product(FEATURES.values(), TARGETS_OF_LOSSES)):
        of_most = shapes[seed % 5 :][:2]  # the loss with the most schedules has all of them
        for shape, axis in shapes if case.function is xce.cross_entropy else of_most:
            x, target, options = problem(features, mode, shape, axis, dtype_of(dtype), seed, case)
            options |= case.params[seed % len(case.params)] | {"reduction": "none"}
            own = laid_out(layout, options)
            grad, hess = layout(np.full_like(x, 9)), layout(np.full_like(x, 9))
            results = case.function(layout(x), layout(target), grad_out=grad, hess_out=hess, **own, **FLAGS)
            assert results[1] is grad
            assert results[2] is hess
            expected = check_loss(case.function, x, target, **options)
            assert np.isfinite(reference(case.function, x, target, **options)).all()
            for result, plain in zip(results, expected, strict=True):
                same_bits(result, plain)


def test_broadcast_arguments() -> None:
    x, y, _ = problem({}, shape=(40, 70), dtype=np.float32)
    row, where = np.broadcast_to(x[0], x.shape), np.broadcast_to(np.arange(70) != 3, x.shape)
    y[y == 3] = 4
    arrays = {"where": where, "sample_weight": np.broadcast_to(np.float32(0.5), 40)}
    check_loss(xce.cross_entropy, row, y, **arrays)
    check_loss(xce.cross_entropy, row, np.broadcast_to(y[0], 40), **arrays, label_smoothing=0.1)
    check_loss(xce.cross_entropy, row, np.broadcast_to(np.float32(1 / 70), x.shape))
    check_loss(xce.cross_entropy, np.broadcast_to(x[:, :1], x.shape), y)  # all classes alike
    check_loss(xce.cross_entropy, np.broadcast_to(np.float64(3), (2, 3, 4)), np.zeros((2, 4), int), axis=1)


# Edge values


def edge_rows(n_classes: int, dtype: np.dtype[Any], rng: np.random.Generator, *, widest: bool = True) -> Array:
    """Rows that hold what breaks naive code; the interesting entries are the first and the last.

    Without `widest`, differences of logits stay within the range of the type.
    """
    largest = float(np.finfo(compute_dtype(np.empty(0, dtype))).max)
    largest = float(np.float32(65504)) if dtype == np.float16 else largest
    largest = 2.0**127 if dtype.name == "bfloat16" else largest
    tiny = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).smallest_subnormal)
    plain = 3 * rng.standard_normal(n_classes)

    def ends(first: float, last: float) -> Array:
        row = plain.copy()
        row[-1] = last
        row[0] = first
        return row

    rows = [
        plain, ends(NAN, 0), ends(0, NAN), ends(NAN, NAN), np.full(n_classes, NAN),
        ends(INF, 0), ends(0, INF), ends(INF, INF), ends(INF, -INF), ends(INF, NAN), ends(-INF, NAN),
        ends(-INF, 0), ends(0, -INF), ends(-INF, -INF), np.full(n_classes, -INF), np.full(n_classes, INF),
        np.where(np.arange(n_classes) == 0, 1.0, -INF), np.where(np.arange(n_classes) == n_classes - 1, 1.0, -INF),
        np.zeros(n_classes), -np.zeros(n_classes), ends(0.0, -0.0), np.full(n_classes, 7.25),
        tiny * np.arange(n_classes), -tiny * np.arange(n_classes),
        ends(largest / 2, -largest / 2), ends(largest, 0), ends(-largest, 0),
        np.full(n_classes, largest), np.full(n_classes, -largest),
        plain + 1e4, plain - 1e4, plain + 60, plain + 700, ends(30, 0), ends(90, 0), ends(750, 0), ends(-90, -110),
    ]  # fmt: skip
    if widest:
        rows += [ends(largest, -largest), ends(-largest, largest)]
    if dtype != np.float16:
        rows += [
            plain + 1e6,
            8 * np.round(plain) + 1e8,
            plain - 1e6,
            plain + 1e30,
            ends(1e30, -1e30),
            ends(1e30, 1e30),
        ]
    with np.errstate(over="ignore"):
        return np.array(rows).astype(dtype)


EDGE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "probabilities": {"target": "probabilities"},
    "z-loss": {"z_loss": 0.01},
    "temperature": {"temperature": 2.0},
    "softcap": {"softcap": 30.0, "target": "first"},
    "ignored": {"target": "ignored"},
    "removed": {"where": True, "label_smoothing": 0.1},
    "weights": {"weight": True},
    "weights and smoothing": {"weight": True, "label_smoothing": 0.2, "where": True, "z_loss": 0.5},
    "sample weights": {"sample_weight": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EDGE_OPTIONS)
def test_edge_values(name: str, dtype: str, level: str, rng: np.random.Generator) -> None:
    check_edges(xce.cross_entropy, name, dtype, rng, (1, 2, 5, 16, 64, 65, 200))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "smoothing", "probabilities", "ignored", "weights", "sample weights"])
@pytest.mark.parametrize("function", [xce.focal_loss, xce.poly_loss, xce.generalized_cross_entropy])
def test_edge_values_of_other_losses(function: Any, name: str, dtype: str, rng: np.random.Generator) -> None:
    for k, params in enumerate(CASE_OF[function].params):
        check_edges(function, name, dtype, rng, ((1, 5, 65), (2, 16, 200))[k % 2], **params)


def check_edges(
    function: Any, name: str, dtype: str, rng: np.random.Generator, class_counts: tuple[int, ...], **params: float
) -> None:
    for n_classes in class_counts:
        options: dict[str, Any] = EDGE_OPTIONS[name] | params
        x = edge_rows(n_classes, dtype_of(dtype), rng, widest=name in ("plain", "ignored"))
        n = len(x)
        kind = options.pop("target", "both")
        if kind == "probabilities":
            q = rng.random((n, n_classes)) * (rng.random((n, n_classes)) < 0.5)
            q[:, 0] *= np.arange(n) % 2
            targets = [q.astype(x.dtype)]
        else:
            targets = [np.zeros(n, int), np.full(n, n_classes - 1), rng.integers(n_classes, size=n)]
        if kind == "ignored":
            targets = [np.where(np.arange(n) % 3 == k, -100, targets[2]) for k in range(3)]
        if "where" in options:
            options["where"] = rng.random((n, n_classes)) < 0.5
            options["where"][::5, 0] = False  # also where the label is
        if "weight" in options:
            options["weight"] = (rng.random(n_classes) * (np.arange(n_classes) % 2)).astype(np.float32)
        if "sample_weight" in options:
            options["sample_weight"] = (np.arange(n) % 3).astype(np.float32) / 2
        for target in targets:
            if "where" in options:  # NaN rows that lack classes: see test_where_of_nan_rows
                options["where"][np.isnan(reference(function, x, target, reduction="none", **options))] = True
            check_loss(function, x, target, reduction="none", **options)
            check_loss(function, x.T, target.T, reduction="none", axis=0, **turned(options))
            good = np.isfinite(reference(function, x, target, reduction="none", **options))
            good &= np.abs(widen(np.where(np.isfinite(x), x, 0))).max(-1) < 1e30
            chosen = {k: v[good] if k in ("where", "sample_weight") else v for k, v in options.items()}
            check_loss(function, x[good], target[good], reduction="mean", **chosen)


def turned(options: dict[str, Any]) -> dict[str, Any]:
    return options | ({"where": options["where"].T} if "where" in options else {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values_of_maps_and_statistics(dtype: str, level: str, rng: np.random.Generator) -> None:
    for n_classes in (2, 5, 16, 64, 65, 200, 1100):
        x = edge_rows(n_classes, dtype_of(dtype), rng)
        for y, axis in ((x, 1), (x.T, 0)):
            check_maps(y, axis=axis)
            check_maps(y, axis=axis, temperature=2.0)
            for target in (np.zeros(len(x), int), np.full(len(x), n_classes - 1), np.arange(len(x)) % 3 - 2):
                labels = np.minimum(target, n_classes - 1)
                check_stats(y, labels, axis=axis, ignore_index=-1 if (labels >= -1).all() else -2, validate=False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_one_class(dtype: str) -> None:
    x = np.array([[0.0], [NAN], [INF], [-INF], [7.0]], dtype)
    for labels in (np.zeros(5, int), np.full(5, -100)):
        check_stats(x, labels)
        check_stats(x.T, labels, axis=0)


@pytest.mark.parametrize("n_classes", [3, 80])
def test_where_of_nan_rows(n_classes: int) -> None:
    x, where = np.zeros((4, n_classes), np.float32), np.ones((4, n_classes), bool)
    x[0, 0], x[1, 0], x[2, 1] = NAN, INF, NAN
    where[:3, 1] = False
    where[3] = False
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"temperature": 2.0}):
        check_loss(xce.cross_entropy, x, np.full(4, 2), where=where, reduction="none", **options)


def test_a_whole_row_of_one_class() -> None:
    for x in (0.0, 1e30, -1e6, -0.0):
        for dtype in ("float32", "float64"):
            for options in ({}, {"label_smoothing": 0.3}, {"temperature": 2.0}):
                value, grad, hess = xce.cross_entropy(
                    np.full((3, 1), x, dtype), np.zeros(3, int), return_grad=True, return_hess=True, **options
                )
                same_bits(value, np.zeros((), dtype))  # not -0.0
                assert not grad.any()
                assert not hess.any()


def test_a_bad_label_that_nobody_checked_makes_its_row_nan(level: str) -> None:
    for shape, axis in (((6, 5), -1), ((6, 100), -1), ((5, 6), 0)):
        for dtype, name in itertools.product(("float32", "float64", "float16"), ("int64", "int8", "uint64", "uint8")):
            for features in (
                {},
                {"label_smoothing": 0.1},
                {"weight": True, "sample_weight": True},
                {"z_loss": 0.1},
            ):
                x, y, options = problem(features, "index", shape, axis, dtype)
                y = y.astype(name)
                bad = (
                    np.array([0, -3, 120, 4, -1, 100], name)
                    if name[0] == "i"
                    else np.array([0, 250, 120, 4, 255, 111], name)
                )
                y = (
                    np.where((bad > 4) & (bad < 2**63), bad, y)
                    if name[0] == "u"
                    else np.where((bad < 0) | (bad > 4), bad, y)
                )
                check_loss(xce.cross_entropy, x, y.astype(name), reduction="none", validate=False, **options)


def test_a_bad_label_that_nobody_checked_counts_unless_its_weight_is_zero() -> None:
    x, s = np.zeros((3, 3), np.float32), np.array([0, -1, 1], np.float32)
    results = check_loss(xce.cross_entropy, x, np.array([7, 7, 1]), sample_weight=s, reduction="none", validate=False)
    for result in results:
        assert not result[0].any()
        assert np.isnan(result[1]).all()


def test_all_rows_ignored_and_weights_of_zero() -> None:
    x, y = np.ones((4, 100), np.float32), np.full(4, -100)
    for options in (
        {"target": y},
        {"target": y + 101, "weight": np.zeros(100)},
        {"target": y + 101, "sample_weight": np.zeros(4)},
    ):
        for reduction, value in (("mean", NAN), ("sum", 0.0), ("none", np.zeros(4))):
            found, grad, hess = check_loss(xce.cross_entropy, x, reduction=reduction, **options)
            np.testing.assert_array_equal(found, value)
            assert not grad.any()
            assert not hess.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_targets_are_more_precise_than_logits(dtype: str) -> None:
    """16-bit logits are computed in float32, and so are the probabilities that come with them."""
    x, q, _ = problem({}, "probabilities", (20, 30))
    x = x.astype(dtype_of(dtype))
    for target in (q.astype(np.float32), q, (1e-6 * q).astype(np.float32)):
        value = xce.cross_entropy(x, target, reduction="none")
        assert_close(value, reference(xce.cross_entropy, x, target, reduction="none"), 1e-5, 0)


@pytest.mark.parametrize("option", ["sample_weight", "weight"])
def test_the_mean_over_weights_that_are_subnormal(option: str) -> None:
    """The reciprocal of their sum is too large for float32, the derivatives are not."""
    x, y = np.array([[1, 2, 3]], np.float32), np.array([0])
    options = {option: np.array([1e-40, 1, 1][: 1 if option == "sample_weight" else 3], np.float32)}
    results = xce.cross_entropy(x, y, return_grad=True, return_hess=True, **options)
    expected = reference(xce.cross_entropy, x, y, return_grad=True, return_hess=True, **options)
    for result, exact in zip(results, expected, strict=True):
        assert_close(result, exact, 1e-4, 0)


def test_as_many_dimensions_as_numpy_has() -> None:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((2, 2, 3))
    for n_axes in (32, 33, 34, 64):
        x = flat.reshape((2, 2) + (1,) * (n_axes - 3) + (3,))[:, ::-1]
        np.testing.assert_array_equal(xce.softmax(x).reshape(flat.shape), xce.softmax(flat[:, ::-1]))
        np.testing.assert_array_equal(xce.softmax(np.moveaxis(x, -1, 0), axis=0), np.moveaxis(xce.softmax(x), -1, 0))


def test_the_denominator_does_not_depend_on_layout(rng: np.random.Generator) -> None:
    x, q, s = np.zeros((7, 9, 4)), np.full((7, 9, 4), 0.25), rng.random((7, 9))
    y, w = rng.integers(4, size=(7, 9)), rng.random(4)
    for target, options in ((q, {}), (y, {}), (y, {"weight": w})):
        results = {float(xce.cross_entropy(x, target, sample_weight=v, **options)) for v in (s, np.asfortranarray(s))}
        assert len(results) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        {"sample_weight": np.array([1e-50, 2e-50])},
        {"sample_weight": np.array([1e39, 2e39])},
        {"weight": np.array([1e-45, 3e-45, 2e-45])},
        {"softcap": 1e-46},
        {"softcap": 1e39},
        {"temperature": 1e39},
        {"label_smoothing": 1e-50},
    ],
)
def test_numbers_that_float32_does_not_hold(dtype: str, options: dict[str, Any]) -> None:
    x, y = np.array([[3, 1, 2], [0, 1, 0]]).astype(dtype_of(dtype)), np.array([1, 2])
    results = xce.cross_entropy(x, y, return_grad=True, return_hess=True, **options)
    exact = xce.cross_entropy(x.astype(np.float64), y, return_grad=True, return_hess=True, **options)
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == (x.dtype if result.ndim else np.float32)
        np.testing.assert_array_equal(result, expected.astype(result.dtype))
    buffer = np.empty_like(x)
    assert xce.cross_entropy(x, y, return_grad=True, grad_out=buffer, **options)[1] is buffer
    np.testing.assert_array_equal(buffer, results[1])


def test_a_sum_beyond_float32_is_infinite() -> None:
    x = np.full((2, 2), [-3e38, 0], np.float32)
    assert xce.cross_entropy(x, np.array([0, 0]), reduction="sum") == np.inf

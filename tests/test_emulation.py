"""The CUDA kernels, run by the CPU (`emulation.h`), against the reference: every loss, any layout, every regime.

``XCE_SANITIZE=1`` compiles them with the address and undefined-behaviour sanitizers, whose library must be preloaded:
CONTRIBUTING.md has the command.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
from cases import CASE_OF, LOSSES, TARGETS_OF_LOSSES, Case, combinations, computed_by, problem
from checks import (
    ALIGNED,
    DTYPES,
    FLAGS,
    assert_close,
    check_loss,
    check_maps,
    check_stats,
    dtype_of,
    every_target,
    reference,
    same_bits,
)

emulated = pytest.importorskip("emulated")
if emulated.COMPILER is None:
    pytest.skip("needs a C++ compiler, to run the kernels of CUDA", allow_module_level=True)

from emulated import SANITIZED  # noqa: E402

import xce  # noqa: E402
from xce._engines import cuda as _cuda  # noqa: E402
from xce._engines import scan as _scan  # noqa: E402

# What is asked of NumPy arrays, collected here once more: the same answers from the GPU.
SHARED = {
    "test_ends": """z_loss_of_the_greatest_logits z_loss_beyond_the_type a_mean_of_z_losses
        a_difference_that_is_rounded_up_from_the_greatest_number js_of_a_teacher_whose_mass_is_elsewhere
        state_of_losses_beyond_float32 a_teacher_of_nan_and_a_student_of_two_classes
        focal_hessian_of_a_confident_row""",
    "test_errors": """errors buffers_that_do_not_fit a_buffer_shares_memory_with_another_argument
        buffers_are_written_and_returned one_label_may_be_an_integer ignore_index_is_any_int64""",
    "test_kernels": """a_bad_label_that_nobody_checked_counts_unless_its_weight_is_zero a_sum_beyond_float32_is_infinite
        all_rows_ignored_and_weights_of_zero as_many_dimensions_as_numpy_has broadcast_arguments no_rows
        numbers_that_float32_does_not_hold targets_are_more_precise_than_logits
        the_denominator_does_not_depend_on_layout where_of_nan_rows""",
    "test_losses": """a_weight_of_zero_removes_anything denominators masks_and_counts_are_sample_weights
        other_weights_of_zero scalars_and_many_axes student_and_teacher_of_different_types
        weights_that_float32_cannot_divide_by no_elements what_weighs_nothing_is_not_checked both_weights_remove
        signed_weights weights_that_cancel alpha_near_one_keeps_the_share_of_negatives""",
    "test_metrics": "top_k_accuracy_is_that_of_sorting top_k_accuracy_at_the_edges log_loss_errors",
    "test_state": """a_shard_of_infinities_and_nan a_shard_of_infinities_with_smoothing edges errors
        a_grid_of_batches_and_shards_merges_in_any_order shards_agree_with_whole_rows whole_rows_stream_in_batches
        weights_that_float32_does_not_hold""",
    "test_transforms": "axes where factors_and_signs signs_of_sums zero_dimensions",
    "test_weights": """removed_rows_by_turns signed_weights_are_factors weights_that_cancel
        a_class_weight_of_zero_removes_no_row infinities_and_nan_keep_their_weights_sign
        minus_infinity_is_the_loss_of_a_negative_weight linear_layers
        sizes_that_float32_does_not_hold one_number_and_other_kinds_of_weights what_counts_is_checked
        linear_layers_whose_weights_cancel a_bare_row_that_where_empties_counts_nowhere""",
}
for module, names in SHARED.items():
    for name in names.split():
        globals()[f"{module}_{name}"] = getattr(import_module(module), f"test_{name}")

Regime = _cuda.Regime

# The regimes at sizes that fibres can do: groups within a warp, a block, and clusters of blocks.
REGIMES = ((64, Regime(8, 1, 16)), (160, Regime(32, 1, 64)), (400, Regime(64, 1, 64)))
CLUSTERS = ((800, Regime(64, 2, 64)), (math.inf, Regime(64, 4, 64)))
SHAPES = (
    ((3, 5), 1),
    ((5, 3), 0),
    ((2, 33), 1),
    ((3, 3, 2), 1),
    ((1, 101), 1),
    ((2, 203), 1),
    ((1, 407), 1),
    ((4,), 0),
)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with (
        computed_by(emulated, emulated.view),
        mock.patch.multiple(_cuda, _REGIMES=REGIMES, _CLUSTERS=CLUSTERS),
    ):
        yield


@every_target
@pytest.mark.parametrize("dtype", ["float32"] if SANITIZED else ["float32", "float64", "float16", "bfloat16"])
def test_losses(case: Case, mode: str, dtype: str) -> None:
    """Options and shapes in turns, so that each option meets each regime over all losses."""
    options_of = list(combinations(**case.options))
    picked = np.random.default_rng(len(mode) + len(case.name)).permutation(len(options_of))[: 4 if SANITIZED else 16]
    for seed, (features, (shape, axis)) in enumerate(
        zip((options_of[i] for i in picked), itertools.cycle(SHAPES), strict=False)
    ):
        x, target, options = problem(features, mode, shape, axis, dtype_of(dtype), seed, case=case)
        params = case.params[seed % len(case.params)]
        check_loss(case.function, x, target, **options, **params)


@every_target
def test_layouts_and_buffers(case: Case, mode: str) -> None:
    for seed, (shape, axis) in enumerate((((3, 37), 1), ((4, 9), 1), ((2, 6, 3), 1))):
        x, target, options = problem({}, mode, shape, axis, np.dtype("float32"), seed, case=case)
        expected = case.function(x, target, **options, **FLAGS)
        for place in (shifted, np.asfortranarray, lambda a: np.flip(np.flip(a).copy())):
            grad = place(np.ones_like(x))
            results = case.function(place(x), place(target), **options, **FLAGS, grad_out=grad)
            for a, b in zip(results, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        for _ in range(2):  # the fibres in one order, and in the other
            own = x.copy()
            value, grad = case.function(own, target, **options, return_grad=True, grad_out=own)
            same_bits(value, expected[0])
            same_bits(grad, expected[1])


def shifted(a: np.ndarray) -> np.ndarray:
    """The same numbers, one entry beyond a boundary of 16 bytes."""
    memory = np.zeros(a.size + 4, a.dtype)
    start = next(i for i in range(4) if memory[i:].ctypes.data % 16 == a.dtype.itemsize % 16)
    result = memory[start : start + a.size].reshape(a.shape)
    result[...] = a
    return result


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_maps_and_statistics(dtype: str, rng: np.random.Generator) -> None:
    for seed, (shape, axis) in enumerate(SHAPES):
        x = np.round(4 * rng.standard_normal(shape)).astype(dtype_of(dtype))
        if seed % 3 == 2:
            x[(0,) * x.ndim] = (np.nan, np.inf, -np.inf)[seed % 3]
        check_maps(x, axis=axis)
        rows = xce.logsumexp(x, axis=axis).shape
        check_stats(x, np.asarray(rng.integers(-1, shape[axis], size=rows)), axis=axis, ignore_index=-1)


def test_edges() -> None:
    x = np.array([[0, 1, np.nan], [np.inf, 0, 0], [-np.inf] * 3, [-np.inf, 0, 1], [1e30, 0, 0]], np.float32)
    for labels in (np.zeros(5, int), np.array([0, -100, 1, 0, 2]), np.array([2, 9, -7, 1, 0], np.int8)):
        check_loss(xce.cross_entropy, x, labels, reduction="none", validate=False)
        check_loss(xce.cross_entropy, x, labels, reduction="none", validate=False, label_smoothing=0.1)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = xce.cross_entropy(np.zeros((0, 3)), np.zeros(0, int), reduction=reduction, return_grad=True)
        np.testing.assert_array_equal(loss, value)
        assert grad.shape == (0, 3)
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3"):
        xce.cross_entropy(np.zeros((2, 3)), np.array([0, 3]))


@pytest.mark.parametrize("shape", [(2, 3), (2, 407)])
def test_a_row_with_a_bad_label_is_nan_in_all_that_is_returned(shape: tuple[int, int]) -> None:
    u = xce.log_softmax(np.zeros(shape, np.float32))
    labels = np.array([0, shape[1]])
    for loss in (xce.nll_loss, xce.cross_entropy):
        results = loss(u, labels, reduction="none", validate=False, **FLAGS)
        for result in results:
            assert np.isfinite(result[0]).all()
            assert np.isnan(result[1]).all()


def test_every_run_has_the_same_bits() -> None:
    x, y, _ = problem({}, shape=(7, 203), dtype=np.float32)
    runs = [xce.cross_entropy(x, y, return_grad=True, label_smoothing=0.1) for _ in range(3)]
    for value, grad in runs[1:]:
        same_bits(value, runs[0][0])
        same_bits(grad, runs[0][1])


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
PLACES = tuple(ALIGNED.values())


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_first_bad_label_is_found(dtype: str, rng: np.random.Generator) -> None:
    limits = np.iinfo(dtype)
    for place, shape in itertools.product(PLACES, ((), (1,), (3, 97), (2, 3, 2), (0, 4))):
        for n_classes, ignore_index in ((3, -100), (3, 200), (100, 1), (300, 5), (2**40, -1)):
            labels = rng.integers(0, min(n_classes, limits.max), shape).astype(dtype)
            for n_bad in (0, 1, 3):
                for bad in (limits.min, limits.max, n_classes, ignore_index):
                    flat = labels.reshape(-1).copy()
                    if flat.size and limits.min <= bad <= limits.max:
                        flat[rng.integers(0, flat.size, n_bad)] = bad
                    y = place(flat.reshape(shape)) if shape else flat.reshape(shape)
                    found = emulated.scan_labels(y, n_classes, ignore_index)
                    assert found == _scan.scan_labels(y, n_classes, ignore_index)


@pytest.mark.parametrize("dtype", [*DTYPES, "bool", *INTEGERS])
def test_the_first_bad_value_is_found(dtype: str, rng: np.random.Generator) -> None:
    ranges = ((0.0, math.inf), (0.0, None), (0.0, 1.0), (-1.0, 1.0))
    special = (math.nan, math.inf, -math.inf, -1e-45, -5e-324, 1e-45, -0.0, 1.5, -1.0, -0.5)
    for place, (low, high) in itertools.product(PLACES, ranges):
        x = rng.integers(0, 2, (3, 97)).astype(dtype_of(dtype))
        for value in (*special, np.nextafter(np.float32(1), 2), np.nextafter(1.0, 2.0)):
            if dtype in DTYPES:
                x[rng.integers(3), rng.integers(97)] = value
            assert emulated.scan_values(place(x), low, high) == _scan.scan_values(place(x), low, high)
            x[...] = np.where(np.isfinite(x), np.abs(x) > 0.5, 0)
        assert emulated.scan_values(np.zeros((0, 3), x.dtype), low, high) == -1


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_conversions_are_those_of_numpy(source: str, kind: str, rng: np.random.Generator) -> None:
    """Any numbers, ties and subnormal ones too; NumPy takes float64 to bfloat16 by way of float32, and so do we."""
    bits = rng.integers(0, 2**64, 4096, dtype=np.uint64).view(np.float64)
    sizes = 2.0 ** rng.uniform(-160, 140, 4096) * rng.choice([-1, 1], 4096)
    ties = np.ldexp(1.0 + (2 * rng.integers(0, 2**9, 4096) + 1) * 2.0**-9, rng.integers(-150, 128, 4096))
    halves = np.arange(2048) * 2.0**-25  # of the steps of float16 below its least normal number
    near = np.nextafter(np.concatenate([ties, halves]), np.inf)
    x = np.concatenate([bits, sizes, ties, halves, near, [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-126]])
    with np.errstate(all="ignore"):
        x = x[: x.size // 6 * 6].astype(dtype_of(source)).reshape(-1, 6)
        expected = x.astype(np.float32).astype(dtype_of(kind)) if kind == "bfloat16" else x.astype(kind)
    for place in PLACES:
        out = place(np.zeros(x.shape, dtype_of(kind)))
        same_bits(_cuda.convert(emulated.DEVICE, place(x), out), expected)


def test_weights_of_elements_beyond_float32() -> None:
    """They are multiplied in float64, and their sum may be what float32 cannot divide by."""
    x, y = np.array([[3, -1, 2]], np.float32), np.array([[0, 1, 1]])
    for size, reduction in ((1e-60, "mean"), (1e-36, "mean"), (1e-36, "none"), (1e36, "none"), (1e60, "mean")):
        options = {"sample_weight": size * np.array([[1.0, 2.0, 3.0]]), "reduction": reduction, **FLAGS}
        results = xce.binary_cross_entropy_with_logits(x, y, **options)
        expected = reference(xce.binary_cross_entropy_with_logits, x, y, **options)
        for result, exact in zip(results, expected, strict=True):
            assert_close(result, exact, 1e-6, 0)
    pos_weight = np.array([1e-50, 1.0, 2.0])
    for validate in (True, False):  # which alone may read it; otherwise it is what float32 makes of it
        results = xce.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight, validate=validate, **FLAGS)
        exact = reference(xce.binary_cross_entropy_with_logits, x, y, pos_weight=pos_weight, **FLAGS)
        for result, wide in zip(results, exact, strict=True):
            assert_close(result, wide, 1e-6, 0)


def test_nothing_waits_for_the_device_without_validation() -> None:
    x, y, _ = problem({}, shape=(5, 7), dtype=np.float32)
    s, w = np.ones(5), np.ones(7)
    with mock.patch.object(emulated.Emulated, "to_numpy", side_effect=AssertionError("waits")):
        for options in ({}, {"sample_weight": s, "weight": w}, {"softcap": 1e-46}, {"label_smoothing": 0.1}):
            xce.cross_entropy(x, y, validate=False, **options, **FLAGS)
        xce.binary_cross_entropy_with_logits(x, x > 0, validate=False, sample_weight=s[:, None], pos_weight=w)
        xce.multilabel_soft_margin_loss(x, x > 0, validate=False, weight=w, reduction="none")
        xce.distillation_loss(x, x.astype(np.float64), validate=False)
        xce.softmax(x)
        xce.logit_stats(x, y, validate=False)
        with pytest.raises(AssertionError, match="waits"):
            xce.cross_entropy(x, y)


def test_more_axes_than_a_kernel_knows(rng: np.random.Generator) -> None:
    """Axes that do not join, more of them than fit into a job."""
    x = rng.standard_normal((2,) * 10)[:, ::-1].transpose(3, 1, 8, 0, 9, 2, 7, 4, 6, 5).astype(np.float32)
    y, s = rng.integers(0, 2, (2,) * 9), rng.random((2, 1) * 4 + (2,))
    grad = np.empty_like(x).transpose(1, 0, 3, 2, 5, 4, 7, 6, 9, 8)
    for options in ({"axis": 4}, {"sample_weight": s}):
        found = check_loss(xce.cross_entropy, x, y, grad_out=grad, reduction="none", **options)
        assert found[1] is grad
    check_loss(xce.binary_cross_entropy_with_logits, x, (x > 0).astype(np.float32), grad_out=grad)
    check_maps(x, axis=3)
    bad = y.copy()
    bad[(1,) * 9] = 2
    with pytest.raises(xce.LabelError, match=r"target\[1, 1, 1, 1, 1, 1, 1, 1, 1\] = 2"):
        xce.cross_entropy(x, bad)


def test_the_means_of_rows(rng: np.random.Generator) -> None:
    for axis, dtype in itertools.product((0, 1, 2), ("float32", "float64")):
        x = rng.standard_normal((5, 40, 3)).astype(dtype)
        for place in PLACES:
            exact = np.mean(x, axis, dtype=np.float64)
            np.testing.assert_allclose(_cuda._mean(emulated.DEVICE, place(x), axis, x.dtype), exact, 1e-6, 1e-7)
    assert _cuda._mean(emulated.DEVICE, np.zeros((0, 3), "f4"), 1, np.dtype("f4")).shape == (0,)


def test_single_elements_at_the_ends_of_the_types(rng: np.random.Generator) -> None:
    losses, accuracy = pytest.importorskip("test_losses"), pytest.importorskip("test_accuracy")
    for dtype, edge in itertools.product(("float32", "float64"), losses.EDGES):
        losses.test_edges(dtype, *edge, "")
    losses.test_log_targets_of_minus_infinity_in_another_type()
    losses.test_targets_beyond_the_type_of_the_logits(1e40, "")
    losses.test_factors_that_overflow_before_the_mean("")
    for name in ("weight", "sample_weight"):
        losses.test_weighted_losses_beyond_float32_add_up(name, "")
    accuracy.test_probabilities_near_their_targets("float64", "", rng)
    for axis in (0, 1):
        accuracy.test_rows_of_very_many_classes(axis, "", rng)


@pytest.mark.parametrize("mode", CASE_OF[xce.distillation_loss].modes)
def test_divergences_at_any_shift_and_distance(mode: str, rng: np.random.Generator) -> None:
    accuracy = pytest.importorskip("test_accuracy")
    for distance, n_classes, dtype in itertools.product(accuracy.DISTANCES, (3, 70), ("float32", "float64")):
        accuracy.check_divergence(mode, dtype, distance, 1e4, n_classes, 0.7, rng, xce.distillation_loss)
    for n_classes, dtype in itertools.product((3, 70), ("float32", "float64")):
        for distance in (1e-3, 2 * float(np.finfo(dtype).eps)):
            accuracy.check_divergence(mode, dtype, distance, 0, n_classes, 7.3, rng, xce.distillation_loss, near=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_soft_labels(dtype: str, rng: np.random.Generator) -> None:
    accuracy = pytest.importorskip("test_accuracy")
    for name, params in accuracy.VARYING_PHI:
        accuracy.check_soft_labels(name, params, dtype, rng)


@pytest.mark.parametrize("gamma", [10.0, 100.0, 1e8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_focal_losses_of_any_gamma(dtype: str, gamma: float, rng: np.random.Generator) -> None:
    accuracy = pytest.importorskip("test_accuracy")
    for kind, shape in itertools.product(accuracy.TARGETS_OF_FOCAL, ((3, 5), (2, 33), (1, 203))):
        accuracy.check_focal(kind, dtype, gamma, shape, rng, xce.focal_loss)
    accuracy.check_focal_elements(dtype, gamma, rng, lambda function, *args, **options: function(*args, **options))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transformed_logits(dtype: str, softcap: float | None, rng: np.random.Generator) -> None:
    accuracy = pytest.importorskip("test_accuracy")
    for temperature in accuracy.TEMPERATURES:
        x, y = accuracy.transformed_rows(dtype, softcap, temperature, rng)
        value = xce.cross_entropy(x, y, temperature=temperature, softcap=softcap, reduction="none")
        with accuracy.mpmath.workdps(60):
            rows = [accuracy.transformed_by_mpmath(row, temperature, softcap).logits for row in x]
            exact = [-accuracy.log_softmax_by_mpmath(row)[label] for row, label in zip(rows, y, strict=True)]
            assert accuracy.ulps(value, accuracy.objects(exact)) <= 8


def test_the_cases_are_all_losses() -> None:
    assert {case.name for case, _ in TARGETS_OF_LOSSES} == {case.name for case in LOSSES}

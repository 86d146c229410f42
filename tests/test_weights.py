"""Weights of rows: those of 0, those of both signs, and what their means divide by."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from cases import TARGETS_OF_LOSSES, Case, oracle, problem
from checks import DTYPES, FLAGS, call, check_removed_rows, dtype_of, same_bits, same_numbers

import xce
from xce._engines import cpu
from xce._engines import scan as _scan

NAN, INF = np.nan, np.inf

OF_ROWS = [(case, mode) for case, mode in TARGETS_OF_LOSSES if case.kind != "elements"]
every_row_loss = pytest.mark.parametrize(
    ("case", "mode"), OF_ROWS, ids=[f"{case.name}-{mode}" for case, mode in OF_ROWS]
)
FEATURES: tuple[dict[str, Any], ...] = (
    {"reduction": "mean"},
    {"reduction": "none", "weight": True},
    {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.02},
    {"reduction": "mean", "weight": True, "label_smoothing": 0.1, "where": True},
    {"reduction": "mean", "temperature": 0.7, "softcap": 5.0, "where": True, "ignore": True, "weight": True},
)


@every_row_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_removed_rows(case: Case, mode: str, dtype: str, level: str) -> None:
    for seed, (n_classes, features, axis) in enumerate(itertools.product((3, 40, 150, 1100), FEATURES, (-1, 0))):
        check_removed_rows(case, mode, dtype_of(dtype), n_classes, features, seed, axis=axis, same=same_bits)


@every_row_loss
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_removed_rows_by_turns(case: Case, mode: str, dtype: str) -> None:
    """The same, smaller, for whoever computes."""
    for seed, (n_classes, features) in enumerate(zip((5, 203, 67, 3, 203), FEATURES, strict=True)):
        axis = -(seed % 2)
        check_removed_rows(case, mode, dtype_of(dtype), n_classes, features, seed, axis=axis, same=same_numbers)


@every_row_loss
def test_removed_rows_of_the_reference(case: Case, mode: str) -> None:
    for seed, features in enumerate(FEATURES):
        check_like_none(lambda f, *args, **options: oracle(f, *args, **options), case, mode, features, seed)


@every_row_loss
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_signed_weights_are_factors(case: Case, mode: str, dtype: str) -> None:
    """By powers of two, nothing is rounded: the values and derivatives of rows, times their weights."""
    for seed, (n_classes, features) in enumerate(itertools.product((3, 150), FEATURES)):
        check_like_none(call, case, mode, features, seed, n_classes, dtype)


def check_like_none(
    caller: Any, case: Case, mode: str, features: Any, seed: int, n_classes: int = 5, dtype: Any = "float64"
) -> None:
    rng = np.random.default_rng(seed)
    x, y, options = problem(features, mode, (9, n_classes), -1, np.dtype(dtype), seed, case)
    options |= case.params[seed % len(case.params)]
    options.pop("sample_weight", None)
    s = rng.choice([-1.0, -2.0, 0.5, 1.0, 0.0], 9)
    rows = caller(case.function, x, y, **options | {"reduction": "none"}, **FLAGS)
    found = caller(case.function, x, y, sample_weight=s, **options | {"reduction": "none"}, **FLAGS)
    for own, each in zip(found, rows, strict=True):
        factor = s.reshape(-1, *(1,) * (own.ndim - 1))
        # float16 has subnormals, which a half may round
        np.testing.assert_allclose(own, (factor * each).astype(own.dtype), atol=2**-24 if dtype == "float16" else 0)
    # the others, by hand
    share = np.ones(9)
    if mode == "index":
        share = (y != options.get("ignore_index", -100)) * 1.0
        if "weight" in options:
            share = share * options["weight"].astype(float)[np.where(share > 0, y, 0)]
    denominator = float((s * share).sum())
    total = float((s * rows[0].astype(float)).sum())
    scale = float((np.abs(s) * rows[0].astype(float)).sum())
    value, grad, _ = caller(case.function, x, y, sample_weight=s, **options | {"reduction": "mean"}, **FLAGS)
    if denominator:
        np.testing.assert_allclose(value, total / denominator, atol=4e-7 * scale / abs(denominator))
        exact = s[:, None] * rows[1].astype(float) / denominator
        np.testing.assert_allclose(grad, exact, rtol=2e-3 if dtype == "float16" else 1e-6, atol=1e-6)


@every_row_loss
@pytest.mark.parametrize("n_classes", [4, 150])
def test_weights_that_cancel(case: Case, mode: str, n_classes: int) -> None:
    x, y, options = problem({}, mode, (4, n_classes), -1, np.dtype("float32"), 0, case)
    for caller in (call, oracle):
        for weight in ([1, -1, 0, 0], [2.0, -1.0, -1.0, 0.0]):
            s = np.array(weight)
            value, *derivatives = caller(case.function, x, y, sample_weight=s, **options, **FLAGS)
            assert np.isnan(value)
            for d in derivatives:
                assert np.isnan(d[s != 0]).all()
                assert not d[s == 0].any()
        value, *derivatives = caller(case.function, x, y, sample_weight=np.zeros(4), **options, **FLAGS)
        assert np.isnan(value)
        assert not any(d.any() for d in derivatives)


@every_row_loss
def test_infinities_and_nan_keep_their_weights_sign(case: Case, mode: str) -> None:
    x, y, options = problem({"reduction": "none"}, mode, (3, 5), -1, np.dtype("float32"), 0, case)
    x[1] = NAN
    s = np.array([1.0, -1.0, 1e-20])
    for value in call(case.function, x, y, sample_weight=s, **options, **FLAGS)[:1]:
        assert np.isnan(value[1])
        assert np.isfinite(value[[0, 2]]).all()


def test_minus_infinity_is_the_loss_of_a_negative_weight() -> None:
    x, y = np.array([[-INF, 0, 1], [-INF, 0, 2], [0, 1, 2]], np.float32), np.zeros(3, int)
    for function in (xce.cross_entropy, xce.focal_loss, xce.poly_loss):
        value = function(x, y, sample_weight=np.array([-1, 1, 1]), reduction="none")
        np.testing.assert_array_equal(value[:2], [-INF, INF])
        assert np.isnan(function(x, y, sample_weight=np.array([-1, 1, 1]), reduction="sum"))
        assert function(x, y, sample_weight=np.array([-1, 0, 1]), reduction="sum") == -INF
    value = xce.nll_loss(x, y, sample_weight=np.array([-1, 1, 0]), reduction="none")
    np.testing.assert_array_equal(value, [-INF, INF, 0])


@pytest.mark.parametrize("size", [1e-40, 1e-35, 1e35])
def test_sizes_that_float32_does_not_hold(size: float) -> None:
    x, y, _ = problem({}, "index", (6, 7), dtype=np.float32)
    s = np.array([1.0, -2.0, 0.0, -4.0, 1.0, 0.5])
    x[2] = NAN
    for dtype in ("float32", "float64"):
        weight = (s * size).astype(dtype)
        expected = xce.cross_entropy(x.astype(float), y, sample_weight=weight.astype(float), **FLAGS)
        for found, exact in zip(xce.cross_entropy(x, y, sample_weight=weight, **FLAGS), expected, strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-5 if size > 1e-40 else 1e-4, atol=1e-7)


def test_one_number_and_other_kinds_of_weights() -> None:
    x, y, _ = problem({}, "index", (4, 5), dtype=np.float32)
    for function, args in ((xce.cross_entropy, (x, y)), (xce.nll_loss, (x, y)), (xce.distillation_loss, (x, x[::-1]))):
        for reduction in ("mean", "sum", "none"):
            bare = function(*args, reduction=reduction)
            for number in (2, -2, 2.0, np.float32(2), np.array(2), np.int8(-2), np.array(-2.0), True, np.True_):
                factor = 1 if reduction == "mean" else float(number)
                np.testing.assert_allclose(
                    function(*args, reduction=reduction, sample_weight=number), factor * bare, rtol=1e-6
                )
    for text, number in (("nan", NAN), ("inf", INF), ("inf", 10**400)):
        with pytest.raises(ValueError, match=f"sample_weight = {text} is not allowed: expected finite entries"):
            xce.cross_entropy(x, y, sample_weight=number)
    counts = np.bincount([0, 1, 1, 3, 3, 4])
    for kind in (np.int64, np.uint8, np.int16):
        weight = counts.astype(kind)
        assert xce.cross_entropy(x, y, weight=weight) == xce.cross_entropy(x, y, weight=counts.astype(float))
    with pytest.raises(ValueError, match=r"weight\[1\] = -2 is not allowed: expected finite entries of at"):
        xce.cross_entropy(x, y, weight=np.array([1, -2, 0, 1, 1]))


def test_what_counts_is_checked() -> None:
    x, y = np.zeros((4, 3)), np.array([0, 5, 1, -3])
    q = np.full((4, 3), 1 / 3)
    q[1], q[3, 1] = NAN, -0.5
    where = np.ones((4, 3), bool)
    where[1] = False
    for options in ({"sample_weight": [1, 0, -1, 2]}, {"where": where}, {"where": where, "sample_weight": 2}):
        arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in options.items()}
        with pytest.raises(xce.LabelError, match=r"target\[3\] = -3"):
            xce.cross_entropy(x, y, **arrays)
        with pytest.raises(ValueError, match=r"target\[3, 1\] = -0.5"):
            xce.cross_entropy(x, q, **arrays)
        turned = arrays | ({"where": where.T} if "where" in arrays else {})
        with pytest.raises(ValueError, match=r"target\[1, 3\] = -0.5"):
            xce.cross_entropy(x.T, q.T, axis=0, **turned)
    indices, s = np.array([[0, 1], [9, 9], [1, 2], [2, 2]]), np.array([1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"class 2 twice in row \[3\]"):
        xce.distillation_loss(x, x[:, :2], teacher_indices=indices, sample_weight=s)
    indices[3] = 0, 4
    with pytest.raises(xce.LabelError, match=r"teacher_indices\[3, 1\] = 4"):
        xce.distillation_loss(x, x[:, :2], teacher_indices=indices, sample_weight=s)


def test_a_class_weight_of_zero_removes_no_row() -> None:
    x, y = np.array([[NAN, 0, 0], [1, 2, 3]]), np.array([0, 1])
    for target in (y, np.eye(3)[y]):
        value, grad = xce.cross_entropy(x, target, weight=np.array([0, 1, 1]), reduction="none", return_grad=True)
        assert np.isnan(value[0])
        assert np.isnan(grad[0]).all()
        assert np.isfinite(value[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_policy_gradients_are_those_of_pytorch(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y, advantage = rng.normal(size=(50, 30)), rng.integers(30, size=50), rng.normal(size=50)
    advantage[::7] = 0
    weight = rng.random(30)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": weight}):
        for target in (y, rng.dirichlet(np.ones(30), 50)):
            t = torch.tensor(x, requires_grad=True)
            own = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
            losses = torch.nn.functional.cross_entropy(t, torch.tensor(target), reduction="none", **own)
            (losses @ torch.tensor(advantage)).backward()
            value, grad = xce.cross_entropy(
                x.astype(dtype), target, sample_weight=advantage, reduction="sum", return_grad=True, **options
            )
            eps = np.finfo(dtype).eps
            exact = losses.detach().numpy()
            np.testing.assert_allclose(value, exact @ advantage, atol=16 * eps * (exact @ np.abs(advantage)))
            np.testing.assert_allclose(grad, t.grad.numpy(), atol=32 * eps)


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_linear_layers(dtype: str, chunk_rows: int | None) -> None:
    """Rows of padding reach no gradient of the weights; oracle: the call without them."""
    rng = np.random.default_rng(0)
    n, width, n_classes = 23, 6, 11
    x, w, b = (rng.normal(size=shape).astype(dtype) for shape in ((n, width), (n_classes, width), (n_classes,)))
    y, q = rng.integers(n_classes, size=n), rng.dirichlet(np.ones(n_classes), n).astype(dtype)
    removed = rng.random(n) < 0.4
    where = rng.random((n, n_classes)) < 0.8
    where[np.arange(n), y] = True
    q[~where] = 0
    for reduction, target, has_where in itertools.product(("mean", "sum", "none"), (y, q), (False, True)):
        s = rng.choice([-1.0, 2.0, 4.0], n)
        options: dict[str, Any] = {"linear_bias": b, "reduction": reduction, "return_grad": True}
        options["chunk_rows"] = chunk_rows
        keep: dict[str, Any] = {"where": where[~removed]} if has_where else {}
        expected = xce.linear_cross_entropy(
            x[~removed], w, target[~removed], sample_weight=s[~removed], **keep, **options
        )
        dirty, bad, left = x.copy(), target.copy(), where.copy()
        dirty[removed] = rng.choice([NAN, INF, -INF], (removed.sum(), width))
        bad[removed] = 99 if target is y else NAN
        by_where = removed & (np.arange(n) % 2 == 0) & has_where
        left[by_where] = False
        s[removed & ~by_where] = 0
        extra = {"where": left} if has_where else {}
        for caller in (call, oracle):
            value, grads = caller(xce.linear_cross_entropy, dirty, w, bad, sample_weight=s, **extra, **options)
            value = value[~removed] if reduction == "none" else value
            tolerance = {"rtol": 1e-3 if dtype == "float16" else 1e-4, "atol": 2e-2 if dtype == "float16" else 1e-5}
            np.testing.assert_allclose(value, expected[0], **tolerance)
            np.testing.assert_allclose(grads[0][~removed], expected[1][0], **tolerance)
            assert not grads[0][removed].any()
            for found, exact in zip(grads[1:], expected[1][1:], strict=True):
                np.testing.assert_allclose(found, exact, **tolerance)


def test_linear_layers_whose_weights_cancel() -> None:
    x, w, y = np.ones((3, 2)), np.ones((4, 2)), np.zeros(3, int)
    for caller in (call, oracle):
        value, grads = caller(xce.linear_cross_entropy, x, w, y, sample_weight=np.array([1, -1, 0]), return_grad=True)
        assert np.isnan(value)
        assert np.isnan(grads[0][:2]).all()
        assert not grads[0][2].any()
        assert np.isnan(grads[1]).all()
        for options in ({"sample_weight": 0}, {"weight": np.zeros(4)}):
            value, grads = caller(xce.linear_cross_entropy, x, w, y, return_grad=True, **options)
            assert np.isnan(value)
            assert not grads[0].any()
            assert not grads[1].any()


def test_a_bare_row_that_where_empties_counts_nowhere() -> None:
    x, y, q = np.zeros((3, 4)), np.array([0, 77, 2]), np.full((3, 4), 0.25)
    x[1] = q[1] = NAN
    where = np.ones((3, 4), bool)
    where[1] = False
    keep = np.array([0, 2])
    for target, smoothing, sample_weight in itertools.product((y, q), (0.0, 0.2), (None, np.array([1.0, 9.0, 3.0]))):
        s = None if sample_weight is None else sample_weight[keep]
        for reduction in ("mean", "sum"):
            options = {"label_smoothing": smoothing, "reduction": reduction, "return_grad": True}
            value, grad = call(xce.cross_entropy, x, target, where=where, sample_weight=sample_weight, **options)
            exact = call(xce.cross_entropy, x[keep], target[keep], sample_weight=s, **options)
            same_bits(value, exact[0])
            same_bits(grad[keep], exact[1])
            assert not grad[1].any()


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_weights_of_other_libraries(library: str) -> None:
    xp = pytest.importorskip(library)
    x = np.array([[1, 2, 3], [NAN, NAN, NAN], [0, 1, 0]], np.float32)
    y, s, w = np.array([0, 9, 1]), np.array([1, 0, -3]), np.array([1, 2, 5])
    q = np.eye(3, dtype=np.float32)[[0, 1, 1]]
    q[1] = NAN
    ours = [xp.asarray(a) for a in (x, y, q, s, w)]
    for (x_, target, s_, w_), mine in (((x, y, s, w), (0, 1, 3, 4)), ((x, q, s, w), (0, 2, 3, 4))):
        expected = xce.cross_entropy(x_, target, sample_weight=s_, weight=w_, return_grad=True)
        a, b, c, d = (ours[i] for i in mine)
        value, grad = xce.cross_entropy(a, b, sample_weight=c, weight=d, return_grad=True)
        np.testing.assert_allclose(np.asarray(value), expected[0], rtol=1e-6)
        np.testing.assert_allclose(np.asarray(grad), expected[1], rtol=1e-6)
        for number in (-2, 2.5, np.float32(3), True):
            value = xce.cross_entropy(a[2:, ...], b[2:, ...], sample_weight=number, reduction="sum")
            exact = xce.cross_entropy(x_[2:], target[2:], sample_weight=number, reduction="sum")
            np.testing.assert_allclose(np.asarray(value), exact, rtol=1e-6)
    value = xce.distillation_loss(ours[0], ours[0], sample_weight=ours[3])
    np.testing.assert_allclose(np.asarray(value), 0, atol=1e-6)
    layer = [xp.asarray(a) for a in (np.ones((4, 3), np.float32),)]
    value, grads = xce.linear_cross_entropy(ours[0], *layer, ours[1], sample_weight=ours[3], return_grad=True)
    assert np.isfinite(np.asarray(value))
    assert np.isfinite(np.asarray(grads[1])).all()


# Checks of what counts


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", ">i4", "float16", ">f8"])
@pytest.mark.parametrize("weight_dtype", ["bool", "float16", ">f4", "float64", "uint8"])
def test_the_first_label_that_counts_is_found(dtype: str, weight_dtype: str) -> None:
    """In any layout, by whoever looks."""
    rng = np.random.default_rng(3)
    for share in (0.0, 0.1, 1.0):
        target = np.where(rng.random((7, 1300)) < 0.2, 9, rng.integers(0, 5, (7, 1300))).astype(dtype)[:, ::-1]
        weight = (rng.random(1300) < share).astype(weight_dtype)
        masks = np.broadcast_to(weight, target.shape), np.broadcast_to(rng.random((7, 1)) < 0.5, target.shape)
        for weights in (masks[:1], masks):
            is_bad = (target.astype(float) > 4) & np.all([w.astype(float) != 0 for w in weights], axis=0)
            first = int(is_bad.argmax()) if is_bad.any() else -1
            assert cpu.scan_labels(target, 5, -1, weights) == first
            assert _scan.scan_labels(target, 5, -1, weights) == first


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">i2", "float32"])
def test_the_first_row_with_a_class_twice_is_found(dtype: str) -> None:
    rng = np.random.default_rng(4)
    for n_places, n_classes, n_rows in ((1, 3, 4), (6, 127, 300), (40, 99, 20), (100, 127, 9)):
        indices = np.stack([rng.permutation(n_classes)[:n_places] for _ in range(n_rows)]).astype(dtype)[::-1]
        repeated = indices.copy()
        repeated[n_rows // 2, -1] = repeated[n_rows // 2, 0]
        repeated[n_rows // 2 + 1, n_places // 2] = repeated[n_rows // 2 + 1, 0]
        weight = np.ones(n_rows)
        weight[n_rows // 2] = 0
        for scan in (cpu.scan_repetitions, _scan.scan_repetitions):
            assert scan(indices, n_classes, ()) == (-1, -1)
            if n_places > 1:
                assert scan(repeated, n_classes, ()) == (n_rows // 2, int(repeated[n_rows // 2, 0]))
                assert scan(repeated, n_classes, (weight,)) == (n_rows // 2 + 1, int(repeated[n_rows // 2 + 1, 0]))
                assert scan(repeated, n_classes, (weight, weight == 0)) == (-1, -1)
            assert scan(indices[:0], n_classes, ()) == (-1, -1)


def test_the_smallest_class_that_is_there_twice_is_named() -> None:
    indices = np.array([[0, 1, 2, 3, 4], [7, 5, 7, 5, 0]])
    for scan in (cpu.scan_repetitions, _scan.scan_repetitions):
        assert scan(indices, 8, ()) == (1, 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_that_where_leaves_a_class(axis: int) -> None:
    where = np.random.default_rng(5).random((3, 40, 5)) < 0.1
    for mask in (where, where[:, ::-3], where[:1], where[:, :1], np.broadcast_to(where[:, :1], where.shape), where[:0]):
        if mask.shape[axis]:
            assert cpu.classes_left(mask, axis).tolist() == mask.any(axis).tolist()


@pytest.mark.parametrize("n_axes", [31, 62])
def test_removed_rows_of_many_axes(n_axes: int) -> None:
    """NumPy's iterators end at 32 axes."""
    shape = (1,) * n_axes + (2,)
    x, y, w = np.zeros((*shape, 3), np.float32), np.zeros(shape, int), np.ones(shape)
    where = np.ones(x.shape, bool)
    y[..., 0], w[..., 0], where[..., 0, :] = 9, 0, False
    q = np.full(x.shape, 1 / 3)
    q[..., 0, 0] = -1
    indices = np.zeros((*shape, 2), int)
    indices[..., 1, :] = 0, 1
    expected = pytest.approx(math.log(3))
    for options in ({"sample_weight": w}, {"where": where}):
        assert xce.cross_entropy(x, y, **options) == expected
        assert xce.cross_entropy(x, y.astype(np.float32), **options) == expected
        assert xce.cross_entropy(x, q, **options) == expected
        xce.distillation_loss(x, x[..., :2], teacher_indices=indices, **options)
    assert xce.linear_cross_entropy(x, np.zeros((3, 3), np.float32), y, sample_weight=w) == expected
    assert xce.LossState().update(x, y, sample_weight=w).result() == expected
    place = ", ".join("0" * len(shape))
    with pytest.raises(xce.LabelError, match=rf"^target\[{place}\] = 9 is out of range"):
        xce.cross_entropy(x, y)
    for labels in (y, y + 0.5):
        with pytest.raises(xce.LabelError, match=rf"^target\[{place}\] = 9"):
            xce.LossState().update(x, labels)
    with pytest.raises(ValueError, match=rf"^teacher_indices has class 0 twice in row \[{place}\]: expected distinct"):
        xce.distillation_loss(x, x[..., :2], teacher_indices=indices)


def test_a_label_of_bfloat16_that_is_no_class() -> None:
    torch = pytest.importorskip("torch")
    labels = torch.tensor([0.0, 9.5]).bfloat16()
    with pytest.raises(xce.LabelError, match=r"^target\[1\] = 9\.5 is not a class: expected floats"):
        xce.cross_entropy(torch.zeros(2, 3), labels)
    with pytest.raises(xce.LabelError, match=r"^target\[1\] = 9 is out of range"):
        xce.cross_entropy(torch.zeros(2, 3), labels.floor())


def test_classes_that_take_no_part_have_derivatives_of_0_where_weights_cancel() -> None:
    rng = np.random.default_rng(0)
    x, teacher = rng.normal(size=(2, 2, 5))
    where, w = np.array([True, False, True, True, False]), np.array([1.0, -1.0])
    for caller in (call, lambda f, *args, **options: oracle(f, *args, **options)):
        for f, y in ((xce.cross_entropy, np.array([0, 2])), (xce.distillation_loss, teacher)):
            loss, *derivatives = caller(f, x, y, where=where, sample_weight=w, **FLAGS)
            assert np.isnan(loss)
            for d in derivatives:
                assert np.isnan(d[:, where]).all()
                assert (d[:, ~where] == 0).all()

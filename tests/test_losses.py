"""What is special about single losses: edge values, denominators, targets, sparse teachers, errors, peers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from cases import CASE_OF, LOSSES, TARGETS_OF_LOSSES, Case, combinations, oracle, problem
from checks import DTYPES, FLAGS, Array, check_loss, dtype_of, every_loss, every_target, same_bits

import xce

INF, NAN = math.inf, math.nan
ELEMENTS = [case for case in LOSSES if case.kind == "elements"]
of_elements = pytest.mark.parametrize("case", ELEMENTS, ids=lambda case: case.name)

bce, bce_logits, kl, distil = (
    xce.binary_cross_entropy, xce.binary_cross_entropy_with_logits, xce.kl_div, xce.distillation_loss
)  # fmt: skip


def both(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What kernels and reference say, which must agree."""
    result, expected = function(*args, **options), oracle(function, *args, **options)
    parts = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for a, b in parts:
        np.testing.assert_allclose(a, b, rtol=1e-5)
    return result


# Edge values: function, arguments, options, loss, gradient (None: whatever it is)

EDGES: list[tuple[Any, float, float, dict[str, Any], float, float | None]] = [
    (bce_logits, -INF, 0, {}, 0, 0), (bce_logits, INF, 1, {}, 0, 0), (bce_logits, INF, 0, {}, INF, 1),
    (bce_logits, -INF, 1, {}, INF, -1), (bce_logits, 0, 0.5, {}, math.log(2), 0), (bce_logits, NAN, 1, {}, NAN, NAN),
    (bce_logits, -INF, 1, {"pos_weight": 0.0}, 0, 0), (bce_logits, 1e30, 0, {}, 1e30, 1),
    (bce_logits, NAN, 1, {"pos_weight": 0.0}, NAN, NAN),
    (bce_logits, -INF, 0, {"label_smoothing": 0.1}, INF, -0.05), (bce_logits, -1e4, 1, {}, 1e4, -1),
    (xce.soft_margin_loss, 1e30, -1, {}, 1e30, 1), (xce.soft_margin_loss, INF, 1, {}, 0, 0),
    (xce.soft_margin_loss, -INF, 1, {}, INF, -1), (xce.soft_margin_loss, 1e30, 1, {}, 0, 0),
    (bce, 0, 0, {}, 0, 0), (bce, 1, 1, {}, 0, 0), (bce, 0, 1, {}, 100, -1e12), (bce, 1, 0, {}, 100, 1e12),
    (bce, 0, 1, {"log_clamp": None}, INF, -1e12), (bce, 1, 0, {"log_clamp": None}, INF, 1e12),
    (bce, 0.01, 1, {"log_clamp": -2.0}, 2, -100), (bce, 0.5, 1, {"log_clamp": -2.0}, math.log(2), -2),
    (bce, 0.5, 1, {"log_clamp": 0.0}, 0, -2), (bce, 0.25, 0.25, {"log_clamp": None}, 0.5623351446188083, 0),
    (kl, -INF, 0, {}, 0, 0), (kl, -INF, 0.5, {}, INF, -0.5), (kl, 0, 0.5, {}, -math.log(2) / 2, -0.5),
    (kl, -INF, -INF, {"log_target": True}, 0, 0), (kl, -1, -INF, {"log_target": True}, 0, 0),
    (kl, -INF, -1, {"log_target": True}, INF, -math.exp(-1)), (kl, NAN, 0, {}, 0, 0), (kl, NAN, 1, {}, NAN, -1),
    (xce.sigmoid_focal_loss, -INF, 0, {}, 0, 0), (xce.sigmoid_focal_loss, INF, 1, {}, 0, 0),
    (xce.sigmoid_focal_loss, INF, 0, {"alpha": -1.0}, INF, 1), (xce.sigmoid_focal_loss, -INF, 1, {"alpha": 0.0}, 0, 0),
    (xce.sigmoid_focal_loss, -INF, 0, {"alpha": -1.0, "gamma": 0.0}, 0, 0),
    (xce.sigmoid_focal_loss, NAN, 0, {"alpha": 1.0, "gamma": 0.0}, NAN, NAN),
    (xce.asymmetric_loss, -INF, 0, {}, 0, 0), (xce.asymmetric_loss, INF, 1, {}, 0, 0),
    (xce.asymmetric_loss, INF, 0, {"clip": 0.0, "gamma_neg": 0.0}, INF, 1),
    (xce.asymmetric_loss, INF, 0, {"clip": 0.5, "gamma_neg": 0.0}, math.log(2), 0),
    (xce.asymmetric_loss, -3, 0, {"clip": 0.5, "gamma_neg": 0.0}, 0, 0),
    # a power too small for the type, of an infinite value
    (xce.asymmetric_loss, -INF, 1e-36, {"clip": 0.0, "gamma_neg": 20.0}, INF, 0),
    (xce.asymmetric_loss, -INF, 1e-36, {"gamma_neg": 20.0}, INF, 0),
    (xce.sigmoid_focal_loss, -INF, 1e-36, {"gamma": 20.0}, INF, 0),
    (xce.sigmoid_focal_loss, -INF, 1e-36, {"gamma": 20.0, "alpha": None}, INF, 0),
    # a target whose square is too large for the type, and a curvature of 0
    (xce.soft_margin_loss, 10, 1e30, {}, 0, 0), (xce.soft_margin_loss, -10, 1e30, {}, 1e31, -1e30),
    (kl, 100, 100, {"log_target": True}, 0, None),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "y", "options", "value", "grad"), EDGES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges(
    dtype: str, function: Any, x: float, y: float, options: Any, value: float, grad: Any, level: str
) -> None:
    options = {k: np.full((), v, dtype) if k == "pos_weight" else v for k, v in options.items()}
    args = np.full((), x, dtype), np.full((), y, dtype)
    for run in (function, lambda *args, **own: oracle(function, *args, **own)):
        found, slope, _ = run(*args, reduction="none", **options, **FLAGS)
        np.testing.assert_allclose(found, value, rtol=4e-7)
        if grad is not None:
            np.testing.assert_allclose(slope, grad, rtol=4e-7)
        assert not (value == 0 and np.signbit(found)), "-0.0"


@every_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_of_zero_removes_anything(case: Case, mode: str, dtype: str) -> None:
    """Whatever is there but NaN, and for elements that, too."""
    x, y, options = problem({"weight": True, "pos_weight": True}, mode, (40, 5), -1, dtype_of(dtype), case=case)
    options["reduction"] = "sum"
    sick = np.arange(40) % 4 == 1
    s = np.where(sick, 0, 1).astype(np.float32)
    s = s[:, None] if case.kind == "elements" and not case.has_classes else s
    dirty = x.copy()
    if case.kind == "elements":
        dirty[sick] = x.dtype.type(NAN)
    else:
        dirty[sick, 0] = x.dtype.type(-INF)
    value, grad, hess = case.function(dirty, y, sample_weight=s, validate=False, **options, **FLAGS)
    expected = case.function(x, y, sample_weight=s, **options, **FLAGS)
    same_bits(value, expected[0])
    same_bits(grad[~sick], expected[1][~sick])
    same_bits(hess[~sick], expected[2][~sick])
    assert not grad[sick].any()
    assert not hess[sick].any()


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in ELEMENTS for name in ("weight", "pos_weight") if name in case.options],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_other_weights_of_zero(case: Case, name: str) -> None:
    weight = np.array([0, 1, 1], np.float32)
    for dtype in (np.float32, np.float64):
        x = np.array([[NAN if name == "weight" else -INF, 1, 2]] if case.inputs != "probs" else [[0, 0.5, 1]], dtype)
        value, grad, hess = case.function(
            x, np.ones((1, 3), int), reduction="none", validate=False, **{name: weight}, **FLAGS
        )
        assert np.isfinite(value).all()
        assert grad[0, 0] == hess[0, 0] == 0
        if not case.has_classes:
            assert value[0, 0] == 0


@of_elements
def test_no_elements(case: Case) -> None:
    for shape in ((0,), (0, 3), (3, 0)):
        if case.has_classes and shape[-1] == 0:
            continue
        x = np.zeros(shape, np.float32)
        for reduction, expected in (("mean", NAN), ("sum", 0.0), ("batchmean", NAN)):
            if reduction in case.reductions and (shape[0] == 0 or reduction != "batchmean"):
                value, grad, hess = both(case.function, x, x, reduction=reduction, **FLAGS)
                np.testing.assert_array_equal(value, np.float32(expected))
                assert grad.shape == hess.shape == shape
        value = both(case.function, x, x, reduction="none")
        assert value.shape == (shape[:-1] if case.has_classes else shape)


@of_elements
def test_scalars_and_many_axes(case: Case) -> None:
    x, y, options = problem({"reduction": "none"}, case.modes[0], (3,), case=case)
    flat = case.function(x, y, **options, **FLAGS)
    for n_axes in (5, 33, 64):
        shape = (1,) * (n_axes - 1) + (3,)
        for a, b in zip(case.function(x.reshape(shape), y.reshape(shape), **options, **FLAGS), flat, strict=True):
            same_bits(a.reshape(b.shape), b)
    if not case.has_classes:
        for dtype in DTYPES:
            z, t = np.asarray(x[0]).astype(dtype_of(dtype)), np.asarray(y[0])
            value, grad, hess = check_loss(case.function, z, t, **options)
            assert np.ndim(value) == np.ndim(grad) == np.ndim(hess) == 0
            assert type(grad) is type(np.zeros(1, dtype_of(dtype))[0])


# Denominators


@of_elements
def test_denominators(case: Case, rng: np.random.Generator) -> None:
    x, y, options = problem({"weight": True, "pos_weight": True}, case.modes[1], (4, 6), case=case)
    rows = (4,) if case.has_classes else (4, 6)
    s = rng.random(rows) + 0.1
    terms = case.function(x, y, **options | {"reduction": "none"})
    assert terms.shape == rows
    for weights in (None, s, s[:1], s[..., :1]):
        own = options if weights is None else options | {"sample_weight": weights}
        w = np.broadcast_to(1.0 if weights is None else weights, rows)
        expected = {"sum": (w * terms).sum(), "mean": (w * terms).sum() / w.sum()}
        expected |= {"batchmean": (w * terms).sum() / (w.sum() / 6)} if "batchmean" in case.reductions else {}
        for reduction, value in expected.items():
            np.testing.assert_allclose(case.function(x, y, **own | {"reduction": reduction}), value, rtol=1e-14)
        np.testing.assert_allclose(case.function(x, y, **own | {"reduction": "none"}), w * terms, rtol=1e-14)
    zeros = options | {"sample_weight": np.zeros(rows)}
    assert math.isnan(both(case.function, x, y, **zeros | {"reduction": "mean"}))
    assert not case.function(x, y, **zeros | {"reduction": "mean"}, **FLAGS)[1].any()


def test_default_reductions() -> None:
    x, y = np.zeros(3), np.ones(3)
    for case in ELEMENTS:
        assert np.shape(case.function(x, y)) == ((3,) if case.function is xce.sigmoid_focal_loss else ())


# Targets


@of_elements
def test_targets_of_every_kind(case: Case) -> None:
    """Bool, integers of any width and floats of any type are the same numbers."""
    if case.name == "kl_div":
        kinds = DTYPES
    else:
        signed = case.name == "soft_margin_loss"
        kinds = [
            *("bool", "uint8", "uint16", "uint32", "uint64")[5 * signed :],
            "int8",
            "int16",
            "int32",
            "int64",
            *DTYPES,
        ]
    for dtype, n in itertools.product(DTYPES, (5, 700)):
        x, y, options = problem({"reduction": "none"}, case.modes[0], (n, 1), dtype=dtype_of(dtype), case=case)
        y = (y != 0).astype(np.float64) if case.name == "kl_div" else y
        expected = check_loss(case.function, x, y.astype(np.float64), **options)
        for kind, order in itertools.product(kinds, "=>"):
            given = y.astype(dtype_of(kind))
            if kind != "bfloat16":
                given = given.astype(given.dtype.newbyteorder(order))
            for a, b in zip(case.function(x, given, **options, **FLAGS), expected, strict=True):
                same_bits(a, b)


# Errors

X, Y = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64)


def changed(array: Array, place: Any, value: Any) -> Array:
    array = array.copy()
    array[place] = value
    return array


def error(function: Any, kind: type[Exception], text: str, *args: Any, **options: Any) -> Any:
    return pytest.param(function, kind, text, args, options, id=f"{function.__name__}: {text[:50]}")


RANGE = "expected probabilities between 0 and 1"
BINARY = [bce_logits, bce, xce.sigmoid_focal_loss, xce.asymmetric_loss, xce.multilabel_soft_margin_loss]
ERRORS = [
    *(error(bce, ValueError, f"probs[1, 2] = {value:g} is not allowed: {RANGE}", changed(X, (1, 2), value), Y)
      for value in (1.5, -0.25, NAN, INF, np.nextafter(np.float32(1), np.float32(2)))),
    error(bce, ValueError, "probs[0, 0] = -1 is", np.full((2, 3), -1.0), Y),
    error(bce, ValueError, "log_clamp=1.0 is not allowed: expected None, or a number of", X, Y, log_clamp=1.0),
    error(bce, ValueError, "log_clamp=nan", X, Y, log_clamp=NAN),
    *(error(f, ValueError, f"target[0, 1] = {value:g} is not allowed: expected targets between 0 and 1", X,
            changed(Y.astype(float), (0, 1), value)) for f in BINARY for value in (2, -0.5, NAN)),
    *(error(f, ValueError, "target[1, 0] = 2 is not", X, changed(Y, (1, 0), 2)) for f in BINARY),
    *(error(f, ValueError, "target[1, 0] = -1 is not", X, changed(Y.astype("i1"), (1, 0), -1)) for f in BINARY),
    *(error(f, ValueError, "target[0, 0] = 255 is not", X, changed(Y.astype("u1"), (0, 0), 255)) for f in BINARY),
    error(kl, ValueError, "target[0, 2] = -0.5 is not allowed: expected entries of at least 0", X,
          changed(X, (0, 2), -0.5)),
    error(kl, ValueError, "target[0, 2] = nan is not", X, changed(X, (0, 2), NAN)),
    error(kl, TypeError, "target has dtype int64: expected float16", X, Y),
    error(kl, TypeError, "log_target is an int: expected True or False", X, X, log_target=1),
    error(kl, ValueError, "reduction='avg' is unknown: expected 'mean', 'sum', 'none' or 'batchmean'", X, X,
          reduction="avg"),
    error(bce_logits, ValueError, "reduction='batchmean' is unknown", X, Y, reduction="batchmean"),
    error(xce.soft_margin_loss, TypeError, "target has dtype bool: expected int8", X, Y > 0),
    error(xce.soft_margin_loss, TypeError, "target has dtype uint8", X, Y.astype("u1")),
    *(error(case.function, ValueError, "target has shape (3, 2): expected (2, 3), the shape of", X, X.T)
      for case in ELEMENTS),
    *(error(case.function, TypeError, "target has dtype complex64: expected ", X, X.astype("c8"))
      for case in ELEMENTS),
    *(error(case.function, TypeError, "has dtype int64: expected float16", Y, Y) for case in ELEMENTS),
    *(error(case.function, TypeError, "target is a list", X, [0.0]) for case in ELEMENTS),
    *(error(case.function, ValueError, "sample_weight has shape (2, 2, 3), which does not broadcast to (2,", X, X,
            sample_weight=np.ones((2, 2, 3))) for case in ELEMENTS),
    *(error(case.function, ValueError, f"sample_weight[1] = {value:g} is not allowed: expected finite weights", X.T,
            X.T, sample_weight=np.array([1.0, value, 0.0] if case.has_classes else [1.0, value]))
      for case in ELEMENTS for value in (NAN, INF, -INF)),
    *(error(f, ValueError, "weight[1] = -inf is not allowed: expected finite weights", X.T, Y.T,
            weight=np.array([1.0, -INF])) for f in (bce, bce_logits)),
    error(xce.multilabel_soft_margin_loss, ValueError, "weight[1] = -2 is not allowed: expected finite entries of at",
          X, Y, weight=np.array([1.0, -2.0, 3.0])),
    *(error(case.function, ValueError, "n_threads=0 is not", X, X, n_threads=0) for case in LOSSES
      if case.kind != "rows" and case.name != "nll_loss"),
    *(error(f, ValueError, f"{name} has shape (4, 2, 3), which does not broadcast to (2, 3), the shape of", X, Y,
            **{name: np.ones((4, 2, 3))}) for f in (bce, bce_logits) for name in ("weight", "pos_weight")
      if name == "weight" or f is bce_logits),
    error(bce_logits, ValueError, "pos_weight has shape (2,), which does not broadcast", X, Y, pos_weight=np.ones(2)),
    error(bce_logits, ValueError, "pos_weight[2] = inf is not", X, Y, pos_weight=np.array([1, 1, INF])),
    error(bce_logits, ValueError, "pos_weight = -1 is not allowed: expected finite entries of at least 0", X, Y,
          pos_weight=-1),
    error(bce_logits, ValueError, "pos_weight[1] = -1 is not", X, Y, pos_weight=np.array([1, -1, 0])),
    error(bce_logits, ValueError, "sample_weight = inf is not", X, Y, sample_weight=10**400),
    error(bce_logits, TypeError, "pos_weight is a str", X, Y, pos_weight="2"),
    error(bce_logits, TypeError, "weight has dtype complex128", X, Y, weight=np.ones(3, complex)),
    error(bce_logits, ValueError, "label_smoothing=1.5", X, Y, label_smoothing=1.5),
    error(xce.multilabel_soft_margin_loss, ValueError, "weight has shape (2,): expected (3,), one weight per class",
          X, Y, weight=np.ones(2)),
    error(xce.multilabel_soft_margin_loss, ValueError, "logits of shape (2, 0) has no classes", X[:, :0], Y[:, :0]),
    error(xce.multilabel_soft_margin_loss, np.exceptions.AxisError, "axis=2 is out of range for logits of 2", X, Y,
          axis=2),
    *(error(xce.sigmoid_focal_loss, ValueError, f"alpha={a} is not allowed: expected a number in [0, 1], or", X, Y,
            alpha=a) for a in (1.5, -0.5, NAN)),
    *(error(xce.sigmoid_focal_loss, ValueError, f"alpha[2] = {a:g} is not allowed: expected alphas between 0 and 1",
            X, Y, alpha=np.array([0.5, 0.5, a])) for a in (1.5, -1.0, NAN)),
    error(xce.sigmoid_focal_loss, ValueError, "alpha has shape (2,), which does not broadcast to (2, 3)", X, Y,
          alpha=np.ones(2)),
    error(xce.sigmoid_focal_loss, TypeError, "alpha is a str", X, Y, alpha="0.5"),
    *(error(xce.poly_loss, ValueError, f"epsilon={e} is not allowed: expected a finite number", X, Y[:, 0], epsilon=e)
      for e in (NAN, INF, -INF)),
    *(error(f, ValueError, f"{name}={value} is not allowed: expected a finite number of at least 0", X,
            Y if f in BINARY else Y[:, 0], **{name: value})
      for f, name in ((xce.sigmoid_focal_loss, "gamma"), (xce.asymmetric_loss, "gamma_pos"),
                      (xce.asymmetric_loss, "gamma_neg"), (xce.focal_loss, "gamma")) for value in (-1.0, NAN, INF)),
    *(error(xce.asymmetric_loss, ValueError, f"clip={c} is not allowed: expected a number in [0, 1)", X, Y, clip=c)
      for c in (1.0, -0.1, NAN)),
    *(error(xce.generalized_cross_entropy, ValueError, f"q={q} is not allowed: expected a number in", X, Y[:, 0], q=q)
      for q in (1.5, -0.1, NAN)),
    error(xce.focal_loss, TypeError, "gamma is a str: expected a finite number", X, Y[:, 0], gamma="2"),
    error(xce.nll_loss, TypeError, "target has dtype float32 and shape (2, 3): expected class indices of", X, X),
    error(xce.nll_loss, xce.LabelError, "target[1] = 3 is out of range", X, np.array([0, 3])),
    error(xce.nll_loss, TypeError, "log_probs has dtype int64", Y, Y[:, 0]),
    error(distil, ValueError, "teacher_logits has shape (3,): expected (2, 3), the shape of student_logits, "
          "unless teacher_indices says", X, X[0]),
    error(distil, TypeError, "teacher_logits has dtype int64", X, Y),
    error(distil, ValueError, "divergence='kl' is unknown: expected 'forward', 'reverse' or 'js'", X, X,
          divergence="kl"),
    error(distil, ValueError, "temperature=0.0 is not", X, X, temperature=0.0),
    error(distil, ValueError, "divergence='reverse' needs the teacher's logits of all classes", X, X, teacher_indices=Y,
          divergence="reverse"),
    error(distil, xce.LabelError, "teacher_indices[1, 0] = 3 is out of range: labels of 3 classes are 0..2", X,
          X[:, :2], teacher_indices=np.array([[0, 1], [3, 1]])),
    error(distil, xce.LabelError, "teacher_indices[0, 1] = -1 is", X, X[:, :2],
          teacher_indices=np.array([[0, -1], [2, 1]])),
    error(distil, xce.LabelError, f"teacher_indices[0, 0] = {2**63} is", X, X[:, :1],
          teacher_indices=np.array([[2**63], [0]], "u8")),
    error(distil, ValueError, "teacher_indices has class 2 twice in row [1]: expected distinct classes", X, X,
          teacher_indices=np.array([[0, 1, 2], [2, 0, 2]])),
    error(distil, ValueError, "teacher_indices has shape (2, 0): expected that of student_logits, (2, 3)", X,
          X[:, :0], teacher_indices=Y[:, :0]),
    error(distil, ValueError, "teacher_indices has shape (3, 2): expected", X, X[:, :2], teacher_indices=Y.T),
    error(distil, ValueError, "teacher_logits has shape (2, 3) but teacher_indices has (2, 2)", X, X,
          teacher_indices=np.array([[0, 1], [2, 1]])),
    error(distil, TypeError, "teacher_indices has dtype bool", X, X, teacher_indices=X > 0),
    error(distil, ValueError, "sample_weight has shape (3,), which does not broadcast to (2,)", X, X,
          sample_weight=np.ones(3)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "kind", "text", "args", "options"), ERRORS)
def test_errors(function: Any, kind: type[Exception], text: str, args: Any, options: Any) -> None:
    out = np.full_like(args[0], 7) if args[0].dtype.kind == "f" else np.full(args[0].shape, 7.0)
    with pytest.raises(kind) as caught:
        function(*args, **options, return_grad=True, grad_out=out)
    assert text in str(caught.value)
    assert type(caught.value) is kind
    assert (out == 7).all()


@every_loss
def test_buffers_that_do_not_fit(case: Case) -> None:
    x, y, options = problem({}, case.modes[0], (4, 3), dtype=np.float32, case=case)
    before = x.copy()
    read_only = x.copy()
    read_only.flags.writeable = False
    for text, buffers in {
        "grad_out has dtype float64: expected float32": {"grad_out": np.ones((4, 3))},
        "hess_out has shape (3, 4): expected (4, 3)": {"hess_out": np.ones((3, 4), "f4")},
        "grad_out is read-only": {"grad_out": read_only},
        "grad_out shares memory with": {"grad_out": x[::-1]},
        "hess_out shares memory with": {"hess_out": x},
        "grad_out has strides (0, 4)": {"grad_out": np.lib.stride_tricks.as_strided(x.copy(), (4, 3), (0, 4))},
    }.items():
        flags = {f"return_{name[:4]}": True for name in buffers}
        with pytest.raises(ValueError, match="_out") as caught:
            case.function(x, y, **options, **buffers, **flags)
        assert text in str(caught.value)
        np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="grad_out given but return_grad=False: pass return_grad=True"):
        case.function(x, y, **options, grad_out=x)


@pytest.mark.parametrize("case", [case for case in LOSSES if case.kind not in ("rows", "log-probabilities")],
                         ids=lambda case: case.name)  # fmt: skip
def test_a_buffer_shares_memory_with_the_target(case: Case) -> None:
    x, y, options = problem({}, case.modes[0], (4, 3), dtype=np.float32, case=case)
    y = y.astype(np.float32)
    with pytest.raises(ValueError, match=r"grad_out shares memory with (target|teacher_logits)"):
        case.function(x, y, **options, return_grad=True, grad_out=y)


def test_nothing_is_checked_without_validation() -> None:
    for function in BINARY:
        assert function(X + 0.5, Y + 2, validate=False).shape == np.shape(function(X + 0.5, Y))
    assert np.isfinite(bce_logits(X, Y, pos_weight=np.full(3, -1.0), validate=False))
    value = bce(np.array([0.5, 1.5, 0.25]), np.array([0, 1, 1]), validate=False, reduction="none")
    np.testing.assert_allclose(value[[0, 2]], [math.log(2), math.log(4)])


# nll_loss


@pytest.mark.parametrize("dtype", DTYPES)
def test_nll_takes_one_entry_of_a_row(dtype: str, level: str) -> None:
    for shape, axis in (((6, 5), -1), ((6, 300), -1), ((5, 6), 0), ((2, 5, 3), 1)):
        u, y, options = problem({"weight": True}, "index", shape, axis, dtype_of(dtype), case=CASE_OF[xce.nll_loss])
        w = options["weight"].astype(np.float64)
        picked = np.take_along_axis(u, np.expand_dims(y, axis), axis).astype(np.float64).squeeze(axis)
        np.testing.assert_allclose(xce.nll_loss(u, y, reduction="none", **options), -w[y] * picked, rtol=1e-6)
        value, grad, hess = xce.nll_loss(u, y, **options, **FLAGS)
        np.testing.assert_allclose(value, (-w[y] * picked).sum() / w[y].sum(), rtol=1e-6)
        onehot = np.moveaxis(np.eye(shape[axis])[y], -1, axis)
        rtol = 1e-2 if u.dtype.itemsize == 2 else 1e-6
        np.testing.assert_allclose(grad.astype("f8"), -onehot * np.expand_dims(w[y], axis) / w[y].sum(), rtol=rtol)
        assert not hess.any()


def test_nll_reads_nothing_else(level: str) -> None:
    u, y = np.full((4, 70), NAN, np.float32), np.array([3, -100, 69, 0])
    u[0, 3], u[2, 69], u[3, 0] = -1, -INF, -0.25
    for options in ({}, {"sample_weight": np.ones(4)}, {"weight": np.ones(70)}):
        value, grad, hess = both(xce.nll_loss, u, y, reduction="none", **options, **FLAGS)
        np.testing.assert_array_equal(value, np.array([1, 0, INF, 0.25], np.float32))
        assert not grad[1].any()
        assert not hess.any()
        assert np.flatnonzero(grad).tolist() == [3, 2 * 70 + 69, 3 * 70]
    for bad in (70, -1, 255):
        value, grad = both(xce.nll_loss, u, changed(y, 0, bad), reduction="none", validate=False, return_grad=True)
        assert np.isnan(value[0])
        assert np.isnan(grad[0]).all()
        np.testing.assert_array_equal(value[1:], np.array([0, INF, 0.25], np.float32))


# distillation_loss


@pytest.mark.parametrize("divergence", ["forward", "js"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_teachers(dtype: str, divergence: str, level: str, rng: np.random.Generator) -> None:
    """Of any number of classes, in any order and index type: like a teacher that is -inf elsewhere."""
    kinds = itertools.cycle(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
    for n_classes, axis in itertools.product((1, 3, 16, 17, 100, 127), (0, 1)):
        for k in sorted({1, 2, n_classes // 2, n_classes - 1, n_classes} & set(range(1, n_classes + 1))):
            x = (3 * rng.standard_normal((5, n_classes))).astype(dtype_of(dtype))
            indices = np.argsort(rng.random(x.shape), 1)[:, :k]
            given = (3 * rng.standard_normal(indices.shape)).astype(x.dtype)
            dense = np.full_like(x, -np.inf)
            np.put_along_axis(dense, indices, given, 1)
            if axis == 0:
                x, indices, given, dense = x.T, indices.T, given.T, dense.T
            options = {"axis": axis, "divergence": divergence, "reduction": "none", "temperature": 1.5}
            sparse = options | {"teacher_indices": indices.astype(next(kinds))}
            results = check_loss(distil, x, given, **sparse)
            check_loss(distil, x, dense, **options)
            tolerance = 1e-12 if dtype == "float64" else 2e-5
            np.testing.assert_allclose(results[0], distil(x, dense, **options), rtol=tolerance, atol=tolerance)
            z = x.copy()
            value, grad, hess = distil(z, given, grad_out=z, **sparse, **FLAGS)
            assert grad is z
            for a, b in zip((value, grad, hess), results, strict=True):
                same_bits(a, b)


def test_a_bad_index_that_nobody_checked(level: str) -> None:
    """The row is NaN, others are not, and nothing beside the outputs is written."""
    for n_classes, bad, divergence in itertools.product((5, 100), (-1, 100, 2**31, -(2**40)), ("forward", "js")):
        room, hess_room = np.full((2, 5, n_classes), 7, np.float32)
        room, hess_room = (np.full((9, n_classes), 7, np.float32) for _ in range(2))
        room[3:6] = np.linspace(-1, 1, 3 * n_classes, dtype=np.float32).reshape(3, n_classes)
        x, indices = room[3:6].copy(), np.array([[0, 2], [1, 4], [3, 0]])
        options: dict[str, Any] = {"divergence": divergence, "reduction": "none", "validate": False}
        expected = distil(x, x[:, :2], teacher_indices=indices, **options, **FLAGS)
        indices[1, 1] = bad
        given = x[:, :2].copy()
        results = distil(room[3:6], given, teacher_indices=indices, grad_out=room[3:6], hess_out=hess_room[3:6],
                         **options, **FLAGS)  # fmt: skip
        for result, clean in zip(results, expected, strict=True):
            assert np.isnan(result[1]).all()
            same_bits(result[[0, 2]], clean[[0, 2]])
        for beside in (room, hess_room):
            assert (np.delete(beside, [3, 4, 5], 0) == 7).all()


def test_repeated_indices_that_nobody_checked() -> None:
    x = np.zeros((1, 5), np.float32)
    value, grad = distil(x, x[:, :3], teacher_indices=np.array([[1, 1, 1]]), validate=False, return_grad=True)
    assert grad.shape == x.shape
    assert not np.isinf(value)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("n_classes", [3, 20, 200])
def test_edges_of_divergences(divergence: str, n_classes: int, level: str, rng: np.random.Generator) -> None:
    x, y = 3 * rng.standard_normal((2, 10, n_classes)).astype(np.float32)
    x[0], x[1, 0], x[2, 1], y[3, 0], y[4], y[5, 0] = y[0], NAN, INF, NAN, -INF, INF
    x[6, 0] = y[6, 0] = -INF
    x[7, 0] = -INF  # the teacher is not certain that it is not this class
    if divergence != "reverse":
        y[8, 1:] = -INF
    value, grad, hess = check_loss(distil, x, y, divergence=divergence, reduction="none")
    assert np.isnan(value).tolist() == [False] + 5 * [True] + 4 * [False]
    assert np.isnan(grad).all(1).tolist() == np.isnan(hess).all(1).tolist() == np.isnan(value).tolist()
    assert value[0] == 0
    assert not grad[0].any()
    assert (value[7] == INF) == (divergence == "forward")
    assert (value[~np.isnan(value)] >= 0).all()
    alone = distil(x[6:, 1:], y[6:, 1:], divergence=divergence, reduction="none")
    np.testing.assert_allclose(value[6], alone[0], rtol=2e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_student_and_teacher_of_different_types(divergence: str, rng: np.random.Generator) -> None:
    """Computed in the wider of both (float32 for two of 16 bits), and answered in the student's."""
    wide = 3 * rng.standard_normal((2, 7, 33))
    for one, other in itertools.permutations(DTYPES, 2):
        x, y = wide[0].astype(dtype_of(one)), wide[1].astype(dtype_of(other))
        value, grad, hess = check_loss(distil, x, y, divergence=divergence, reduction="none")
        assert value.dtype == ("float64" if one == "float64" else "float32")
        assert grad.dtype == hess.dtype == x.dtype
        common = np.float64 if "float64" in (one, other) else np.float32
        exact = distil(x.astype(common), y.astype(common), divergence=divergence, reduction="none", **FLAGS)
        same_bits(value, exact[0].astype(value.dtype))
        same_bits(grad, exact[1].astype(x.dtype))
        buffer = np.zeros_like(x)
        assert distil(x, y, divergence=divergence, return_grad=True, grad_out=buffer)[1] is buffer


def test_symmetries(rng: np.random.Generator) -> None:
    x, y = 3 * rng.standard_normal((2, 20, 40))
    none = {"reduction": "none"}
    np.testing.assert_allclose(
        distil(x, y, divergence="forward", **none), distil(y, x, divergence="reverse", **none), rtol=1e-13
    )
    np.testing.assert_allclose(distil(x, y, divergence="js", **none), distil(y, x, divergence="js", **none), rtol=1e-13)
    assert (distil(x, -100 * y, divergence="js", **none) <= math.log(2)).all()
    q = xce.softmax(y)
    entropy = -(q * np.log(q)).sum(-1)
    np.testing.assert_allclose(distil(x, y, **none) + entropy, xce.cross_entropy(x, q, **none), rtol=1e-12)
    np.testing.assert_allclose(
        distil(x, y, temperature=3.0, **FLAGS)[1], distil(x / 3, y / 3, **FLAGS)[1] / 3, rtol=1e-10, atol=1e-16
    )


def test_losses_that_are_others() -> None:
    x, y, _ = problem({}, "index", (9, 12))
    options = {"label_smoothing": 0.1, "reduction": "none"}
    expected = xce.cross_entropy(x, y, **options, **FLAGS)
    for function, own in ((xce.focal_loss, {"gamma": 0.0}), (xce.poly_loss, {"epsilon": 0.0}),
                          (xce.generalized_cross_entropy, {"q": 0.0})):  # fmt: skip
        for a, b in zip(function(x, y, **own, **options, **FLAGS), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    onehot = np.eye(12)[y]
    mae = xce.generalized_cross_entropy(x, y, q=1.0, reduction="none")
    np.testing.assert_allclose(mae, np.abs(xce.softmax(x) - onehot).sum(-1) / 2, rtol=1e-12)
    labels = (x > 0).astype(int)
    plain = bce_logits(x, labels, reduction="none")
    np.testing.assert_allclose(xce.sigmoid_focal_loss(x, labels, alpha=-1.0, gamma=0.0), plain, rtol=1e-14)
    np.testing.assert_allclose(
        xce.asymmetric_loss(x, labels, gamma_neg=0.0, clip=0.0, reduction="none"), plain, rtol=1e-14
    )
    np.testing.assert_allclose(xce.soft_margin_loss(x, 2 * labels - 1, reduction="none"), plain, rtol=1e-14)
    np.testing.assert_allclose(xce.multilabel_soft_margin_loss(x, labels, reduction="none"), plain.mean(-1), rtol=1e-14)
    np.testing.assert_allclose(bce(1 / (1 + np.exp(-x)), labels, reduction="none"), plain, rtol=1e-9)


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("q", [5e-324, 1e-300, 1e-40, 1e-28, 1e-20, 1e-9, 2e-4, 9e-4, 0.01, 0.7])
def test_generalized_cross_entropy_of_a_small_q(q: float, dtype: str, library: str) -> None:
    """The product of q and a log-probability may underflow, their quotient is a log-probability."""
    make = pytest.importorskip(library).asarray
    for x in ([1.0, 0, 0], [40.0, 0, 0], [0.0, 40, 0], [0.0, 2.0**100, 0]):
        with mpmath.workdps(400):
            u = -mpmath.log1p(sum(mpmath.exp(mpmath.mpf(v) - x[0]) for v in x[1:]))
            expected = float(-mpmath.expm1(q * u) / mpmath.mpf(q))
        loss = float(xce.generalized_cross_entropy(make(np.array([x], dtype)), make(np.array([0])), q=q))
        # log p, the power and the quotient
        np.testing.assert_allclose(loss, expected, rtol=8 * np.finfo(dtype).eps)


# The same losses elsewhere


def assert_close(result: Any, expected: Any, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=rtol, atol=1e-14)


def torch_binary_focal(f: Any, x: Any, y: Any, alpha: float, gamma: float, reduction: str) -> Any:
    """torchvision.ops.sigmoid_focal_loss, line by line."""
    torch = pytest.importorskip("torch")
    p = torch.sigmoid(x)
    ce = f.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss = ce * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    loss = (alpha * y + (1 - alpha) * (1 - y)) * loss if alpha >= 0 else loss
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def timm_asymmetric(f: Any, x: Any, y: Any, gamma_pos: float, gamma_neg: float, clip: float, reduction: str) -> Any:
    """timm's AsymmetricLossMultiLabel, line by line, without its bound on the logarithms."""
    torch = pytest.importorskip("torch")
    p = torch.sigmoid(x)
    q = (1 - p + clip).clamp(max=1) if clip else 1 - p
    loss = y * torch.log(p) + (1 - y) * torch.log(q)
    weight = (1 - (p * y + q * (1 - y))) ** (gamma_pos * y + gamma_neg * (1 - y))
    loss = -loss * torch.where(gamma_pos * y + gamma_neg * (1 - y) == 0, 1.0, weight)
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


TORCH: dict[Any, Callable[..., Any]] = {
    xce.nll_loss: lambda f, x, y, **options: f.nll_loss(x, y, **options),
    xce.binary_cross_entropy: lambda f, x, y, log_clamp=-100.0, **options: f.binary_cross_entropy(x, y, **options),
    xce.binary_cross_entropy_with_logits: lambda f, x, y, label_smoothing=0.0, **options: (
        f.binary_cross_entropy_with_logits(x, y * (1 - label_smoothing) + label_smoothing / 2, **options)
    ),
    xce.soft_margin_loss: lambda f, x, y, **options: f.soft_margin_loss(x, y, **options),
    xce.multilabel_soft_margin_loss: lambda f, x, y, axis=-1, **options: f.multilabel_soft_margin_loss(x, y, **options),
    xce.kl_div: lambda f, x, y, **options: f.kl_div(x, y, **options),
    xce.sigmoid_focal_loss: torch_binary_focal,
    xce.asymmetric_loss: timm_asymmetric,
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div
@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case, mode in TARGETS_OF_LOSSES if case.function in TORCH],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_value_and_gradient_are_those_of_pytorch(case: Case, mode: str) -> None:
    torch = pytest.importorskip("torch")
    names = {"weight", "pos_weight", "label_smoothing", "ignore"} & set(case.options)
    for seed, features in enumerate(
        combinations(**{name: case.options[name] for name in sorted(names)} or {"seed": (0, 1)})
    ):
        for params, reduction in itertools.product(case.params, case.reductions):
            x, y, options = problem(features | {"reduction": reduction}, mode, (6, 5), -1, np.float64, seed, case)
            options |= params
            value, grad = case.function(x, y, **options, return_grad=True)
            if case.name == "nll_loss":
                options.pop("axis")
            z = torch.tensor(x, requires_grad=True)
            t = torch.tensor(y if case.name == "nll_loss" else y.astype(np.float64))
            options = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
            expected = TORCH[case.function](torch.nn.functional, z, t, **options)
            expected.sum().backward()
            assert_close(value, expected.detach(), 1e-10)
            assert_close(grad, z.grad, 1e-10)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_divergences_are_those_of_pytorch(divergence: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    kl_of = torch.nn.functional.kl_div
    x, y = 3 * rng.standard_normal((2, 6, 11))
    z = torch.tensor(x, requires_grad=True)
    u, v = (z / 1.7).log_softmax(-1), (torch.tensor(y) / 1.7).log_softmax(-1)
    if divergence == "js":
        mean = torch.logaddexp(u, v) - math.log(2)
        pairs = [(mean, v), (mean, u)]
    else:
        pairs = [(u, v) if divergence == "forward" else (v, u)]
    loss = sum(kl_of(a, b, log_target=True, reduction="batchmean") for a, b in pairs) / len(pairs)
    loss.backward()
    value, grad = distil(x, y, temperature=1.7, divergence=divergence, return_grad=True)
    assert_close(value, loss.detach())
    assert_close(grad, z.grad)


def test_divergences_are_those_of_scipy(rng: np.random.Generator) -> None:
    special = pytest.importorskip("scipy.special")
    p, t = rng.random((2, 8, 9)) + 0.01
    t[rng.random(t.shape) < 0.3] = 0
    log_p = np.log(p)
    terms = xce.kl_div(log_p, t, reduction="none")
    assert_close(terms, special.rel_entr(t, np.exp(log_p)), 1e-11)
    assert_close(terms - t + p, special.kl_div(t, p), 1e-10)
    distance = pytest.importorskip("scipy.spatial.distance")
    x, y = rng.standard_normal((2, 5, 7))
    expected = [distance.jensenshannon(a, b) ** 2 for a, b in zip(xce.softmax(x), xce.softmax(y), strict=True)]
    assert_close(distil(x, y, divergence="js", reduction="none"), expected, 1e-10)


def test_losses_are_those_of_optax(rng: np.random.Generator) -> None:
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    x, y = rng.standard_normal((2, 8, 5)).astype(np.float32)
    labels, signs = (y > 0).astype(np.float32), np.where(y > 0, 1, -1)
    q, t = np.asarray(jax.nn.softmax(y)), {"reduction": "none"}
    older = "convex_kl_divergence"
    generalized = getattr(optax.losses, "generalized_kl_divergence", None) or getattr(optax.losses, older)
    pairs = [
        (xce.sigmoid_focal_loss(x, labels), optax.losses.sigmoid_focal_loss(x, labels, alpha=0.25)),
        (bce_logits(x, labels, **t), optax.losses.sigmoid_binary_cross_entropy(x, labels)),
        (xce.poly_loss(x, q, epsilon=2.0, **t), optax.losses.poly_loss_cross_entropy(x, q, epsilon=2.0)),
        (kl(jax_log_softmax(jax, x), q, **t).sum(-1), optax.losses.kl_divergence(jax_log_softmax(jax, x), q)),
        (distil(x, y, **t), generalized(jax_log_softmax(jax, x), q)),
        (xce.soft_margin_loss(x, signs, **t), optax.losses.sigmoid_binary_cross_entropy(x, labels)),
    ]
    for result, expected in pairs:
        np.testing.assert_allclose(result, np.asarray(expected), rtol=2e-5, atol=2e-6)


def jax_log_softmax(jax: Any, x: Array) -> Array:
    return np.asarray(jax.nn.log_softmax(x))


def test_losses_are_those_of_scikit_learn(rng: np.random.Generator) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    p, y, s = rng.random(50), rng.integers(2, size=50), rng.random(50)
    assert_close(bce(p, y), metrics.log_loss(y, p))
    assert_close(bce(p, y, sample_weight=s), metrics.log_loss(y, p, sample_weight=s))
    u, labels = np.asarray(xce.log_softmax(rng.standard_normal((30, 4)))), rng.integers(4, size=30)
    assert_close(xce.nll_loss(u, labels), metrics.log_loss(labels, np.exp(u), labels=range(4)))


# What hostile calls found


def test_a_sparse_teacher_with_a_temperature_reads_only_what_it_has() -> None:
    x = np.zeros((1, 5_000_000), np.float32)
    x[0, -1] = 1  # the student's top, where a dense teacher would have a logit
    arrays = x, np.zeros((1, 1), np.float32), np.zeros((1, 1), int)
    loss = xce.distillation_loss(*arrays[:2], teacher_indices=arrays[2], temperature=2.0)
    np.testing.assert_allclose(loss, math.log(4_999_999 + math.exp(0.5)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int64", "bool", "float16"])
def test_labels_of_any_type_beside_logits_computed_in_float64(kind: str) -> None:
    x, y = np.array([3, -1, 0.5], np.float32), np.array([1, 0, 1])
    for gamma in (1e-35, 30.0):
        expected = xce.sigmoid_focal_loss(x.astype(np.float64), y, gamma=gamma)
        np.testing.assert_allclose(
            xce.sigmoid_focal_loss(x, y.astype(kind), gamma=gamma), expected, rtol=3e-7, atol=1e-38
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [50.0, 800.0, 1200.0, 3981.0, 12_000.0, 1e6, 1e35, 1e39, 1e300])
def test_huge_exponents(gamma: float, dtype: str) -> None:
    mpmath = pytest.importorskip("mpmath")
    x = np.array([0.3, 20, -20, 0.0], dtype)
    with mpmath.workdps(50):
        sigma = [1 / (1 + mpmath.exp(-mpmath.mpf(float(v)))) for v in x]
        exact = [float(-(p**gamma) * mpmath.log(1 - p)) for p in sigma]
    loss = xce.sigmoid_focal_loss(x, np.zeros(4), alpha=-1, gamma=gamma)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(loss, exact, rtol=32 * eps, atol=10 * np.finfo(dtype).tiny)
    value, grad = xce.focal_loss(np.array([20, 0], dtype), np.array(0), gamma=gamma, return_grad=True)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_weights_that_float32_cannot_divide_by() -> None:
    x, y = np.array([1, 2], np.float32), np.array([0.0, 1.0])
    expected = bce_logits(x, y, return_grad=True)
    for weight in (1e-40, 1e-44, 1e38):
        result = bce_logits(x, y, sample_weight=np.full(2, weight, np.float32), return_grad=True)
        np.testing.assert_allclose(result[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(result[1], expected[1], rtol=1e-6)


def test_where_a_weight_lies_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    x, y, weight = rng.standard_normal(5003), rng.random(5003), rng.random(5003)
    moved = np.empty(weight.nbytes + 1, np.uint8)[1:].view(np.float64)
    moved[:] = weight
    for result, expected in zip(
        bce_logits(x, y, sample_weight=moved, return_grad=True),
        bce_logits(x, y, sample_weight=weight, return_grad=True),
        strict=True,
    ):
        same_bits(result, expected)


def test_masks_and_counts_are_sample_weights() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 4)), rng.integers(4, size=6)
    mask = np.array([1, 0, 1, 1, 0, 1])
    for weight in (mask, mask.astype(bool), mask.astype(np.uint8)):
        np.testing.assert_allclose(
            xce.cross_entropy(x, y, sample_weight=weight), xce.cross_entropy(x[mask > 0], y[mask > 0])
        )
        np.testing.assert_allclose(distil(x, x + 1, sample_weight=weight), 0, atol=1e-15)
        np.testing.assert_allclose(
            bce_logits(x[:, 0], y > 1, sample_weight=weight), bce_logits(x[mask > 0, 0], y[mask > 0] > 1)
        )


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_divergences_near_the_teacher_keep_their_digits(divergence: str) -> None:
    """The difference of log-probabilities is formed from the difference of logits, which is exact there."""
    rng = np.random.default_rng(0)
    student = (3 * rng.standard_normal((100, 50))).astype(np.float32)
    for noise, limit in ((1e-1, 1e-6), (1e-2, 1e-6), (1e-3, 1e-6), (1e-4, 1e-5)):
        teacher = (student + noise * rng.standard_normal(student.shape)).astype(np.float32)
        loss = distil(student, teacher, divergence=divergence, reduction="none")
        exact = distil(student.astype(float), teacher.astype(float), divergence=divergence, reduction="none")
        np.testing.assert_allclose(loss, exact, rtol=limit)


# Weights of elements


SICK = (NAN, INF, -INF, -1.0, 7.5)


@of_elements
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_weighs_nothing_is_not_checked(case: Case, dtype: str, level: str) -> None:
    """Whatever inputs and targets hold there; the first bad one that weighs something is named."""
    x, y, options = problem({}, case.modes[1], (6, 40), -1, dtype_of(dtype), case=case)
    rows = (6,) if case.has_classes else x.shape
    removed = np.random.default_rng(0).random(rows) < 0.4
    everywhere = np.broadcast_to(removed[:, None] if case.has_classes else removed, x.shape)
    names = ["sample_weight"] + ["weight"] * ("weight" in case.options and not case.has_classes)
    for name, reduction in itertools.product(names, case.reductions):
        own = options | {"reduction": reduction, name: (~removed).astype(np.int8)}
        expected = case.function(x, y, **own, **FLAGS)
        for sick in SICK:
            dirty_x, dirty_y = (np.where(everywhere, a.dtype.type(sick), a) for a in (x, y))
            results = both_same(case.function, dirty_x, dirty_y, **own, **FLAGS)
            for result, exact in zip(results, expected, strict=True):
                same_bits(result, exact)
            assert not results[1][everywhere].any()
            assert not np.signbit(results[1][everywhere].astype(np.float32)).any()
        place = tuple(np.argwhere(~everywhere)[-1])
        if case.name not in ("soft_margin_loss", "kl_div"):
            dirty_y[place] = -1
            with pytest.raises(ValueError, match=rf"target\[{place[0]}, {place[1]}\] = -1 is"):
                case.function(x, dirty_y, **own)
        if case.inputs == "probs":
            dirty_x[place] = NAN
            with pytest.raises(ValueError, match=rf"probs\[{place[0]}, {place[1]}\] = nan is"):
                case.function(dirty_x, y, **own)


def both_same(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What kernels say; the reference must remove the same."""
    results = function(*args, **options)
    for result, exact in zip(results, oracle(function, *args, **options), strict=True):
        np.testing.assert_array_equal(np.isnan(result.astype(np.float64)), np.isnan(exact.astype(np.float64)))
    return results


def test_both_weights_remove(level: str) -> None:
    x, y = np.array([0.5, NAN, 1.0, -INF]), np.array([1.0, 0.5, NAN, 3.0])
    options = {"weight": np.array([1, 1, 0, 0]), "sample_weight": np.array([2.0, 0.0, 3.0, 0.0])}
    value, grad, hess = bce_logits(x, y, **options, **FLAGS)
    np.testing.assert_allclose(value, 2 * np.log1p(np.exp(-0.5)) / 5, rtol=1e-15)  # a weight of 0 counts, a sample not
    assert not grad[1:].any()
    assert not hess[1:].any()
    with pytest.raises(ValueError, match=r"target\[2\] = nan"):
        bce_logits(x, y, weight=np.array([1, 1, 1, 0]), sample_weight=options["sample_weight"])


@of_elements
def test_signed_weights(case: Case, level: str, rng: np.random.Generator) -> None:
    """Losses are linear in them, and so are derivatives."""
    x, y, options = problem({}, case.modes[1], (300, 3), case=case)
    s = rng.standard_normal((300,) if case.has_classes else x.shape)
    terms, slopes, bends = case.function(x, y, **options | {"reduction": "none"}, **FLAGS)
    wide = s[:, None] if case.has_classes else s
    for name in ["sample_weight"] + ["weight"] * ("weight" in case.options and not case.has_classes):
        for reduction in case.reductions:
            denominator = {"mean": s.sum() if name == "sample_weight" else s.size, "batchmean": s.sum() / 3}
            share = denominator.get(reduction, 1.0)
            expected = (
                (terms * s if reduction == "none" else (terms * s).sum() / share),
                *(d * wide / share for d in (slopes, bends)),
            )
            results = case.function(x, y, **options | {"reduction": reduction, name: s}, **FLAGS)
            for result, exact in zip(results, expected, strict=True):
                np.testing.assert_allclose(result, exact, rtol=1e-11, atol=1e-300)


@of_elements
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_that_cancel(case: Case, dtype: str, level: str) -> None:
    x, y, options = problem({}, case.modes[0], (4, 3), dtype=dtype_of(dtype), case=case)
    s = np.array([1.0, -1.0, 0.0, 0.0])
    s = s if case.has_classes else s[:, None]
    for weights, counts in ((s, [True, True, False, False]), (0 * s, [False] * 4)):
        for function in (case.function, lambda *args, **own: oracle(case.function, *args, **own)):
            value, grad, hess = function(x, y, **options | {"reduction": "mean", "sample_weight": weights}, **FLAGS)
            assert np.isnan(value)
            for derivative in (grad, hess):
                assert np.isnan(derivative[counts]).all()
                assert not derivative[~np.array(counts)].any()


KINDS = ("bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64", ">f2", ">f4", ">f8", ">i4")


@of_elements
def test_weights_of_every_kind(case: Case, level: str, rng: np.random.Generator) -> None:
    """The same numbers in any type and byte order, or as one number, are the same weights."""
    for dtype in DTYPES:
        x, y, options = problem({}, case.modes[1], (5, 7), dtype=dtype_of(dtype), case=case)
        rows = (5,) if case.has_classes else x.shape
        for name in {"weight", "pos_weight", "sample_weight"} & set(case.options):
            shape = (7,) if case.has_classes and name == "weight" else rows
            w = rng.integers(0, 2, shape)
            expected = case.function(x, y, **options, **{name: w.astype(np.float64)}, **FLAGS)
            for kind in KINDS:
                for result, exact in zip(case.function(x, y, **options, **{name: w.astype(kind)}, **FLAGS), expected,
                                         strict=True):  # fmt: skip
                    same_bits(result, exact)
            if shape == rows:
                expected = case.function(x, y, **options, **{name: np.full(shape, 3.0)}, **FLAGS)
                for one in (3, 3.0, np.float32(3), np.int64(3), np.array(3)):
                    for result, exact in zip(case.function(x, y, **options, **{name: one}, **FLAGS), expected,
                                             strict=True):  # fmt: skip
                        same_bits(result, exact)


@of_elements
def test_inputs_of_another_byte_order(case: Case, level: str) -> None:
    for dtype in ("float16", "float32", "float64"):
        x, y, options = problem(
            {"weight": True, "sample_weight": True}, case.modes[1], (700, 3), dtype=dtype, case=case
        )
        expected = case.function(x, y, **options, **FLAGS)
        results = case.function(x.astype(x.dtype.newbyteorder()), y, **options, **FLAGS)
        for result, exact in zip(results, expected, strict=True):
            assert result.dtype.isnative
            same_bits(result, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beyond_float32_change_no_type(dtype: str, level: str, rng: np.random.Generator) -> None:
    """A call that float64 computes returns what it would have returned, rounded once, in the caller's buffers."""
    for shape in ((5, 3), (400, 3)):
        x, y, _ = problem({}, "fractions", shape, dtype=dtype_of(dtype), case=CASE_OF[bce_logits])
        size = 1e-35 * rng.random(shape)
        wide = bce_logits(x.astype(np.float64), y, weight=size * 1e35, sample_weight=size, **FLAGS)
        grad = np.empty_like(x)
        for axis_first in (False, True):
            place = np.asfortranarray if axis_first else np.asarray
            results = bce_logits(place(x), y, weight=size * 1e35, sample_weight=size, grad_out=grad, **FLAGS)
            assert results[1] is grad
            narrow = np.float32 if dtype == "bfloat16" else x.dtype  # which NumPy rounds to first
            for result, exact in zip(results[1:], wide[1:], strict=True):
                same_bits(result, exact.astype(narrow).astype(x.dtype))
            np.testing.assert_allclose(results[0], wide[0], rtol=1e-6)


# An alpha for each class


def test_alpha_of_a_class(level: str, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        x, y, _ = problem({}, "fractions", (300, 4), dtype=dtype_of(dtype), case=CASE_OF[xce.sigmoid_focal_loss])
        alpha = np.array([0.0, 0.25, 1.0, 0.5])
        options = {"gamma": 1.5, "reduction": "none"}
        results = xce.sigmoid_focal_loss(x, y, alpha=alpha, **options, **FLAGS)
        for c, own in enumerate(alpha):
            expected = xce.sigmoid_focal_loss(x[:, c], y[:, c], alpha=float(own), **options, **FLAGS)
            for result, exact in zip(results, expected, strict=True):
                same_bits(result[:, c], exact)
        for given in (alpha.astype(np.float32), np.tile(alpha, (300, 1)), np.int64([0, 1, 1, 0])):
            check_loss(xce.sigmoid_focal_loss, x, y, alpha=given, **options)
        for a, b in zip(xce.sigmoid_focal_loss(x, y, alpha=None, **FLAGS),
                        xce.sigmoid_focal_loss(x, y, alpha=-1, **FLAGS), strict=True):  # fmt: skip
            same_bits(a, b)


def test_alpha_near_one_keeps_the_share_of_negatives(level: str) -> None:
    """1 - alpha is formed of alpha as it is given."""
    x = np.array([0.5, 1.0], np.float32)
    plain = xce.sigmoid_focal_loss(x, np.zeros(2), alpha=None)
    for alpha in (1 - 1e-9, np.full(2, 1 - 1e-9)):
        np.testing.assert_allclose(xce.sigmoid_focal_loss(x, np.zeros(2), alpha=alpha), 1e-9 * plain, rtol=3e-7)


def test_poly_loss_without_the_first_term(level: str) -> None:
    """epsilon = -1 leaves (1 - p)^2 / 2 + (1 - p)^3 / 3 + ..., of which nothing may cancel."""
    for dtype, rtol in (("float32", 1e-6), ("float64", 2e-15)):
        for gap in (3.0, 8.0, 15.0):
            q = 1 / (1 + np.exp(np.longdouble(gap)))
            exact = sum(q**k / k for k in range(2, 60))
            value = xce.poly_loss(np.array([gap, 0], dtype), 0, epsilon=-1)
            np.testing.assert_allclose(value, float(exact), rtol=rtol)
            np.testing.assert_allclose(
                oracle(xce.poly_loss, np.array([gap, 0], dtype), np.array(0), epsilon=-1), float(exact), rtol=4 * rtol
            )


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_probability_on_a_removed_class_is_as_a_label_there(dtype: str) -> None:
    for n_classes in (3, 300):
        x = np.linspace(-1, 1, 2 * n_classes).reshape(2, n_classes).astype(dtype)
        where, labels = np.arange(n_classes) != 1, np.array([1, 0])
        onehot = (np.arange(n_classes) == labels[:, None]).astype(dtype)
        for smoothing in (0.0, 0.1):
            options: dict[str, Any] = {"where": where, "label_smoothing": smoothing, "reduction": "none"}
            by_label = xce.cross_entropy(x, labels, return_grad=True, **options)
            by_probability = xce.cross_entropy(x, onehot, return_grad=True, **options)
            assert by_label[0][0] == by_probability[0][0] == INF
            for a, b in zip(by_label, by_probability, strict=True):
                np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-2 if dtype == "float16" else 1e-6)


def test_log_targets_of_minus_infinity_in_another_type() -> None:
    u = np.zeros(4, np.float32)
    for kind in ("float64", ">f8", "float16"):
        lowest = -1e40 if kind != "float16" else -INF  # float32 makes an infinity of it
        v = np.array([-INF, 0.0, -1.0, lowest], kind)
        value, grad = xce.kl_div(u, v, log_target=True, reduction="none", return_grad=True)
        np.testing.assert_allclose(value, [0, 0, -np.exp(-1), 0], rtol=1e-6)
        np.testing.assert_allclose(grad, [0, -1, -np.exp(-1), 0], rtol=1e-6)


@pytest.mark.parametrize("beyond", [1e40, 1e200])
def test_targets_beyond_the_type_of_the_logits(beyond: float, level: str) -> None:
    x, y = np.array([1, -1, 1, -1], np.float32), beyond * np.array([1, 1, -1, -1])
    value, grad, hess = xce.soft_margin_loss(x, y, reduction="none", **FLAGS)
    np.testing.assert_array_equal(value, [0, INF, INF, 0])
    np.testing.assert_array_equal(grad, [0, -INF, INF, 0])
    assert not hess.any()


@pytest.mark.parametrize("case", [case for case in ELEMENTS if not case.has_classes], ids=lambda case: case.name)
def test_derivatives_without_axes_are_the_buffers(case: Case) -> None:
    """As of arrays, and as the functions of NumPy have it: only what nobody gave a place to is a number."""
    x, y, options = problem({"reduction": "sum"}, case.modes[0], (3,), case=case)
    x, y = np.asarray(x[0]), np.asarray(y[0])
    _, grad, hess = case.function(x, y, **options, **FLAGS)
    slope, bend = np.full((), 7, x.dtype), np.full((), 7, x.dtype)
    for given in ({"grad_out": slope}, {"hess_out": bend}, {"grad_out": slope, "hess_out": bend}):
        results = case.function(x, y, **options, **FLAGS, **given)
        for result, name, exact in zip(results[1:], ("grad_out", "hess_out"), (grad, hess), strict=True):
            assert result is given[name] if name in given else isinstance(result, np.generic)
            same_bits(result, exact)
    assert case.function(x, y, **options, return_hess=True, hess_out=bend)[1] is bend
    assert case.function(x, y, **options, return_grad=True, grad_out=x)[1] is x


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_weighted_losses_beyond_float32_add_up(name: str, level: str) -> None:
    """To what float32 holds, or to an infinity of the right sign; never to the difference of two infinities."""
    x, zeros = np.full((2, 300), 2.0**127, np.float32), np.zeros((2, 300))
    w = np.tile(np.float32([4, -4]), 300).reshape(2, 300)
    assert bce_logits(x, zeros, **{name: w}, reduction="sum") == 0
    w[0, 0] = 4.5
    assert bce_logits(x, zeros, **{name: w}, reduction="sum") == 2.0**126
    w[0, 0] = 0
    assert bce_logits(x, zeros, **{name: w}, reduction="sum") == -INF
    assert bce_logits(x, zeros, **{name: np.abs(w)}, reduction="sum") == INF


def test_a_row_of_weighted_losses_beyond_float32(level: str) -> None:
    x, w = np.full((2, 512), 2.0**127, np.float32), np.float32([4] + [0] * 511)
    value = xce.multilabel_soft_margin_loss(x, np.zeros(x.shape), weight=w, reduction="none")
    np.testing.assert_array_equal(value, np.full(2, 2.0**120, np.float32))


def test_factors_that_overflow_before_the_mean(level: str) -> None:
    """A weight times a derivative, or times another weight, that float32 does not hold."""
    p, y = np.full(4, 1e-13, np.float32), np.ones(4)
    w = np.float32([3e37, 1e30, 1, 1])
    _, grad = bce(p, y, sample_weight=w, return_grad=True)
    np.testing.assert_allclose(grad, -1e12 * (w / w.sum()), rtol=1e-6)
    x, one = np.float32([1e-30, 2.0]), np.ones(2)
    for size in (1e25, 1e-25):
        factor = np.full(2, size, np.float32)
        value, grad = bce_logits(x, one, weight=factor, sample_weight=factor, return_grad=True)
        exact = float(np.float32(size)) * np.log1p(np.exp(-x.astype(float)))
        np.testing.assert_allclose(value, exact.mean(), rtol=1e-6)
        np.testing.assert_allclose(grad, float(np.float32(size)) / 2 / -(1 + np.exp(x.astype(float))), rtol=1e-6)

"""Numbers of every type, byte order and layout, read where they lie: labels, probabilities, teachers, weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checks import same_bits

import xce
from xce import _reference
from xce._engines import cpu
from xce._engines import scan as _scan
from xce._engines.numbers import number_kind
from xce._libraries import arrays_of
from xce._rows import row_call

ml_dtypes = pytest.importorskip("ml_dtypes")

RNG = np.random.default_rng(0)
N, C = 67, 9
LOGITS = RNG.integers(-32, 33, size=(N, C)) / 8.0  # numbers of every float type
LABELS = RNG.integers(C, size=N)
LABELS[::7] = 5
FLOATS = ("f2", "f4", "f8", ">f2", ">f4", ">f8", "bfloat16")
INTEGERS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i2", ">u2", ">i4", ">u4", ">i8", ">u8", "int4", "uint4")


def dtype_of(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def losses(x: Any, y: Any) -> Any:
    """The definition in extended precision."""
    z = x.astype(np.longdouble)
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, y[:, None].astype(int), -1)[:, 0]


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
@pytest.mark.parametrize("layout", ["plain", "strided", "reversed", "misaligned"])
def test_labels_of_any_type(name: str, layout: str) -> None:
    dtype = dtype_of(name)
    labels = np.minimum(LABELS, 7 if name == "int4" else C)
    y = labels.astype(dtype)
    if layout == "strided":
        y = np.repeat(y, 3)[::3]
    elif layout == "reversed":
        y = y[::-1].copy()[::-1]
    elif layout == "misaligned":
        y = np.frombuffer(b"\0" + y.tobytes(), np.uint8)[1:].view(dtype)
    value = xce.cross_entropy(LOGITS, y, reduction="none")
    np.testing.assert_allclose(value, losses(LOGITS, labels).astype(float), rtol=4e-15)
    same_bits(xce.nll_loss(LOGITS, y, reduction="none"), -LOGITS[np.arange(N), labels])
    np.testing.assert_array_equal(
        xce.logit_stats(LOGITS, y).rank, (LOGITS[np.arange(N), labels][:, None] < LOGITS).sum(-1)
    )
    assert xce.cross_entropy(LOGITS, y, ignore_index=5) == pytest.approx(
        float(losses(LOGITS, labels)[labels != 5].mean()), rel=1e-14
    )


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
@pytest.mark.parametrize(
    ("bad", "text"),
    [(1.5, r"target\[3\] = 1.5 is not a class"), (np.nan, r"target\[3\] = nan"), (np.inf, r"target\[3\] = inf"),
     (9.0, r"target\[3\] = 9 is out of range"), (-1.0, r"target\[3\] = -1 is out of range")],
)  # fmt: skip
def test_labels_that_are_no_classes(dtype: str, bad: float, text: str) -> None:
    y = LABELS.astype(dtype_of(dtype))
    y[3] = bad
    for function in (xce.cross_entropy, xce.nll_loss, xce.logit_stats):
        with pytest.raises(xce.LabelError, match=text):
            function(LOGITS, y)
    value = xce.cross_entropy(LOGITS, y, reduction="none", validate=False)
    assert np.isnan(value[3])
    assert np.isfinite(np.delete(value, 3)).all()


def test_bool_labels_are_refused() -> None:
    with pytest.raises(TypeError, match="bool"):
        xce.cross_entropy(LOGITS, LABELS > 3)


def test_float_labels_of_other_libraries() -> None:
    expected = float(losses(LOGITS, LABELS).mean())
    strict = pytest.importorskip("array_api_strict")
    x, y = strict.asarray(LOGITS), strict.asarray(LABELS.astype("f4"))
    assert float(xce.cross_entropy(x, y)) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(xce.LabelError, match=r"target\[0\] = 1.5"):
        xce.cross_entropy(x, strict.where(strict.arange(N) == 0, 1.5, y))
    torch = pytest.importorskip("torch")
    assert float(xce.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS).float())) == pytest.approx(expected)
    jax = pytest.importorskip("jax")
    x, y = jax.numpy.asarray(LOGITS, "float32"), jax.numpy.asarray(np.minimum(LABELS, 7)).astype("int4")
    expected = float(losses(LOGITS, np.minimum(LABELS, 7)).mean())
    assert float(xce.cross_entropy(x, y)) == pytest.approx(expected, rel=1e-6)


SHAPES = [((5, 3), -1), ((33, 20), -1), ((3, 300), -1), ((300, 5), 0), ((2, 40, 3), 1)]


@pytest.mark.parametrize("logits", ["f2", "f4", "f8", ">f4", ">f8", ">f2", "bfloat16"])
@pytest.mark.parametrize("other", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_probabilities_and_teachers_of_any_type(logits: str, other: str, shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(1)
    x = (rng.integers(-32, 33, size=shape) / 8).astype(dtype_of(logits))
    q = (rng.integers(0, 9, size=shape) / 8).astype(dtype_of(other))
    wide, q_wide = np.moveaxis(x.astype(np.longdouble), axis, -1), np.moveaxis(q.astype(np.longdouble), axis, -1)
    u = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    v = q_wide - np.log(np.exp(q_wide).sum(-1, keepdims=True))
    eps = 4e-15 if "f8" in logits else 2e-6
    value, grad = xce.cross_entropy(x, q, axis=axis, reduction="none", return_grad=True)
    np.testing.assert_allclose(value, (-q_wide * u).sum(-1).astype(float), rtol=eps)
    expected = np.moveaxis(np.exp(u) * q_wide.sum(-1, keepdims=True) - q_wide, -1, axis)
    rounding = {"f2": 1e-3, "bf": 8e-3}.get(logits.lstrip(">")[:2], 8 * eps)
    np.testing.assert_allclose(
        grad.astype(float), expected.astype(float), rtol=rounding, atol=rounding * q_wide.sum(-1).max()
    )
    assert grad.dtype == x.dtype.newbyteorder("=")
    value, grad = xce.distillation_loss(x, q, axis=axis, reduction="none", return_grad=True)
    np.testing.assert_allclose(value, (np.exp(v) * (v - u)).sum(-1).astype(float), rtol=4 * eps)
    expected = np.moveaxis(np.exp(u) - np.exp(v), -1, axis)
    np.testing.assert_allclose(grad.astype(float), expected.astype(float), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("weight", [*FLOATS, "bool", "i1", ">i4", "u8"])
def test_sample_weights_of_any_type(weight: str) -> None:
    s = np.arange(N).astype(dtype_of(weight))
    wide = s.astype(float)
    for x in (LOGITS, LOGITS.astype("f4"), LOGITS.astype(">f2")):
        expected = float((losses(LOGITS, LABELS) * wide).sum() / wide.sum())
        assert float(xce.cross_entropy(x, LABELS, sample_weight=s)) == pytest.approx(expected, rel=1e-6)


def test_ranks_beyond_what_float32_counts() -> None:
    x = np.zeros((1, (1 << 24) + 7), np.float32)
    x[0, 0], x[0, 3] = -1, 5
    stats = xce.logit_stats(x, np.array([0]))
    assert (stats.rank[0], stats.argmax[0]) == ((1 << 24) + 6, 3)


def test_labels_in_bfloat16_as_the_reference_reads_them() -> None:
    y = LABELS.astype(ml_dtypes.bfloat16)
    call = row_call(arrays_of(LOGITS, "logits"), "loss", "cross_entropy", 0.0, LOGITS, y, {"reduction": "none"})
    value = _reference.run(call)[0]
    np.testing.assert_allclose(value, losses(LOGITS, LABELS).astype(float), rtol=4e-15)


@pytest.mark.parametrize("dtype", ["longdouble", "complex64", "O", "M8[s]", "U3", "V2", "i4,f4", "float8_e4m3", "int2"])
def test_the_kernels_know_no_other_kind(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"is unknown to the kernels"):
        number_kind(dtype_of(dtype))


def test_linear_layers_take_labels_of_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    inputs, weight = torch.from_numpy(LOGITS), torch.eye(C, dtype=torch.float64)
    labels = torch.from_numpy(LABELS)
    value = xce.linear_cross_entropy(inputs, weight, labels.bfloat16(), ignore_index=5)
    assert value == xce.linear_cross_entropy(inputs, weight, labels, ignore_index=5)


@pytest.mark.parametrize(("dtype", "label"), [("float16", 2048), ("float32", 2**24), ("float64", 2**52)])
def test_the_search_of_other_libraries_rounds_no_bound(dtype: str, label: int) -> None:
    """As the kernels do not: the number of classes and the label to ignore are no numbers of the labels' type."""
    labels = np.array([[0, label]], dtype)
    for scan in (_scan.scan_labels, cpu.scan_labels):
        assert scan(labels, label + 1, -1) == -1
        assert scan(labels, label, -1) == 1
        assert scan(labels, label, label) == -1
        assert scan(labels, 5, label + 1 if dtype != "float64" else -1) == 1


def test_the_reference_rounds_no_label_to_ignore() -> None:
    strict = pytest.importorskip("array_api_strict")
    x, y = strict.zeros((2, 3), dtype=strict.float32), strict.asarray([2.0**24, 1], dtype=strict.float32)
    for validate in (True, False):
        assert float(xce.cross_entropy(x, y, ignore_index=2**24, validate=validate)) == pytest.approx(np.log(3))
    with pytest.raises(xce.LabelError, match=r"^target\[0\] = 16777216 is out of range"):
        xce.cross_entropy(x, y, ignore_index=2**24 + 1)
    assert np.isnan(float(xce.cross_entropy(x, y, ignore_index=2**24 + 1, validate=False)))

"""The compiled front: it answers plain calls with the bits of the general way, and leaves everything else to that."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checks import DTYPES, dtype_of

import xce
from xce import _elements, _rows, losses

RNG = np.random.default_rng(0)
N, C = 37, 13
LABELS = RNG.integers(0, C, N)
LABELS[5] = -100
ROW_LOSSES: dict[str, tuple[str, float]] = {
    "cross_entropy": ("", 0.0), "focal_loss": ("gamma", 2.0), "poly_loss": ("epsilon", -1.0),
    "generalized_cross_entropy": ("q", 0.7),
}  # fmt: skip
ELEMENT_LOSSES: dict[str, Any] = {
    "binary_cross_entropy_with_logits": losses._BINARY, "sigmoid_focal_loss": losses._SIGMOID_FOCAL,
    "asymmetric_loss": losses._ASYMMETRIC,
}  # fmt: skip

RULES = {"real", "unboxed", "choice", "<lambda>"}  # which a loss's own parameter is checked by


def python_frames(call: Any) -> list[str]:
    """The functions of Python that a call without arguments enters."""
    frames: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            frames.append(frame.f_code.co_name)

    call()  # loads what it needs
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return frames[1:]


def same(found: Any, expected: Any) -> None:
    found, expected = (result if isinstance(result, tuple) else (result,) for result in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def options_of_rows(dtype: Any) -> list[dict[str, Any]]:
    scalar = np.float64 if dtype == np.float64 else np.float32
    weight = RNG.uniform(0, 2, C).astype(scalar)
    weight[3] = 0
    sample = RNG.normal(size=N)
    return [
        {}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"label_smoothing": 0.1},
        {"temperature": 3.0}, {"softcap": 5.0}, {"z_loss": 1e-3}, {"weight": weight},
        {"weight": weight, "reduction": "none"},
        {"sample_weight": sample}, {"sample_weight": sample.astype("f4"), "weight": weight, "label_smoothing": 0.2},
        {"axis": 1, "n_threads": 1, "validate": True, "where": None, "weight": None},
    ]  # fmt: skip


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_losses_of_rows_have_the_bits_of_the_general_way(loss: str, dtype: str, flags: tuple[bool, bool]) -> None:
    x = RNG.normal(size=(N, C)).astype(dtype_of(dtype))
    name, parameter = ROW_LOSSES[loss]
    for options in options_of_rows(x.dtype):
        given = options | {"return_grad": flags[0], "return_hess": flags[1]}
        own = {name: parameter} if name else {}
        y = np.where(LABELS < 0, options.get("ignore_index", -100), LABELS)

        def call(own: Any = own, given: Any = given, y: Any = y) -> Any:
            return getattr(xce, loss)(x, y, **own, **given)

        same(call(), _rows.row_loss(loss, parameter, x, y, given))
        frames = python_frames(call)
        assert frames[0] == loss, options
        assert set(frames[1:]) <= RULES, options


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ELEMENT_LOSSES)
def test_losses_of_elements_have_the_bits_of_the_general_way(loss: str, dtype: str, reduction: str) -> None:
    x, y = RNG.normal(size=(N, C)).astype(dtype), RNG.uniform(size=(N, C)).astype(dtype)
    general = {"binary_cross_entropy_with_logits": (1.0, 0.0), "sigmoid_focal_loss": (2.0, 0.25, 1.0)}
    params = general.get(loss) or (0.0, 4.0, 0.05, *_elements.logit_in_two_parts(0.05))
    for flags in itertools.product((False, True), repeat=2):
        given: dict[str, Any] = {"return_grad": flags[0], "return_hess": flags[1]}
        found = getattr(xce, loss)(x, y, reduction=reduction, **given)
        same(found, _elements.element_loss(ELEMENT_LOSSES[loss], params, x, y, given, reduction=reduction))
    frames = python_frames(lambda: getattr(xce, loss)(x, y, reduction=reduction))
    assert set(frames) <= {loss, *RULES}


BUFFERED = {
    "grad": lambda x: {"grad_out": np.empty_like(x)},
    "in place": lambda x: {"grad_out": x},
    "both": lambda x: {"grad_out": np.empty_like(x), "hess_out": np.empty_like(x)},
}


@pytest.mark.parametrize("buffers", BUFFERED)
def test_buffers_are_filled_and_returned(buffers: str) -> None:
    x = RNG.normal(size=(N, C)).astype("f4")
    flags = {"return_grad": True, "return_hess": buffers == "both"}
    expected, copy = _rows.row_loss("cross_entropy", 0.0, x, LABELS, flags), x.copy()
    given = BUFFERED[buffers](copy)
    found = xce.cross_entropy(copy, LABELS, **flags, **given)
    same(found, expected)
    assert all(a is b for a, b in zip(found[1:], given.values(), strict=True))


X = np.zeros((4, 3), np.float32)
Y = np.array([0, 1, 2, 0])
OVERLAPPING = np.zeros(24, np.float32)
ONES = np.ones(24, np.float32)
NOT_PLAIN: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    # what is given, and what the general way makes of it: a value, or an error
    "label out of range": (X, np.array([0, 1, 3, 0]), {}, xce.LabelError),
    "int32 labels": (X, Y.astype("i4"), {}, math.log(3)),
    "floats": (X, Y.astype(float), {}, math.log(3)),
    "swapped labels": (X, Y.astype(">i8"), {}, math.log(3)),
    "swapped logits": (X.astype(">f4"), Y, {}, math.log(3)),
    "integers": (X.astype(int), Y, {}, TypeError),
    "complex": (X.astype(complex), Y, {}, TypeError),
    "longdouble": (X.astype(np.longdouble), Y, {}, TypeError),
    "strided": (np.zeros((4, 6), np.float32)[:, ::2], Y, {}, math.log(3)),
    "columns": (np.asfortranarray(X), Y, {}, math.log(3)),
    "strided labels": (X, np.repeat(Y, 2)[::2], {}, math.log(3)),
    "other axis": (np.zeros((3, 4), np.float32), Y, {"axis": 0}, math.log(3)),
    "masked": (np.ma.masked_array(X), Y, {}, TypeError),
    "datetimes": (X, Y.astype("M8[s]"), {}, TypeError),
    "no rows": (X[:0], Y[:0], {"reduction": "sum"}, 0.0),
    "no classes": (X[:, :0], Y, {}, ValueError),
    "an option's name": (X, Y, {"smoothing": 0.1}, TypeError),
    "reduction": (X, Y, {"reduction": "avg"}, ValueError),
    "another str": (X, Y, {"reduction": "".join(["me", "an"])}, math.log(3)),
    "smoothing above 1": (X, Y, {"label_smoothing": 1.5}, ValueError),
    "smoothing NaN": (X, Y, {"label_smoothing": math.nan}, ValueError),
    "temperature 0": (X, Y, {"temperature": 0.0}, ValueError),
    "temperature, an int": (X, Y, {"temperature": 2}, math.log(3)),
    "softcap 0": (X, Y, {"softcap": 0.0}, ValueError),
    "z_loss beyond float32": (X, Y, {"z_loss": 1e-40}, math.log(3)),
    "flag of NumPy": (X, Y, {"return_grad": np.False_}, math.log(3)),
    "flag of 1": (X, Y, {"return_grad": 1}, TypeError),
    "ignore_index 2**70": (X, Y, {"ignore_index": 2**70}, ValueError),
    "ignore_index True": (X, Y, {"ignore_index": True}, TypeError),
    "threads": (X, Y, {"n_threads": 0}, ValueError),
    "threads of a float": (X, Y, {"n_threads": 1.0}, TypeError),
    "weight of int": (X, Y, {"weight": np.ones(3, int)}, math.log(3)),
    "weight of another float": (X, Y, {"weight": np.ones(3)}, math.log(3)),
    "weight, negative": (X, Y, {"weight": -np.ones(3, "f4")}, ValueError),
    "weight, infinite": (X, Y, {"weight": np.full(3, np.inf, "f4")}, ValueError),
    "weight, too short": (X, Y, {"weight": np.ones(2, "f4")}, ValueError),
    "weights that cancel": (X, Y, {"sample_weight": np.array([1, -1, 1, -1.0])}, math.nan),
    "sample weight of 0": (X, np.array([0, 9, 2, 0]), {"sample_weight": np.array([1, 0, 1, 1.0])}, math.log(3)),
    "sample weight, NaN": (X, Y, {"sample_weight": np.array([1, np.nan, 1, 1])}, ValueError),
    "sample weight, a number": (X, Y, {"sample_weight": 2.0}, math.log(3)),
    "buffer not asked for": (X, Y, {"grad_out": np.empty_like(X)}, ValueError),
    "buffer read-only": (X, Y, {"return_grad": True, "grad_out": np.broadcast_to(np.float32(0), (4, 3))}, ValueError),
    "buffer of another dtype": (X, Y, {"return_grad": True, "grad_out": np.empty((4, 3))}, ValueError),
    "buffer of another shape": (X, Y, {"return_grad": True, "grad_out": np.empty((3, 4), "f4")}, ValueError),
    "one buffer twice": (
        X, Y, dict.fromkeys(("grad_out", "hess_out"), np.empty_like(X)) | {"return_grad": True, "return_hess": True},
        ValueError,
    ),
    "overlapping": (
        OVERLAPPING[:12].reshape(4, 3), Y, {"return_grad": True, "grad_out": OVERLAPPING[6:18].reshape(4, 3)},
        ValueError,
    ),
    "buffer over labels": (
        X[:, :2], Y, {"return_grad": True, "grad_out": Y.view("f4").reshape(4, 2)}, ValueError,
    ),
    "buffer over weights": (
        X, Y, {"return_grad": True, "grad_out": OVERLAPPING[:12].reshape(4, 3), "weight": OVERLAPPING[3:6]}, ValueError,
    ),
    "buffer over sample weights": (
        X, Y, {"return_grad": True, "grad_out": ONES[:12].reshape(4, 3), "sample_weight": ONES[8:12]}, ValueError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_general_way(case: str) -> None:
    x, y, given, expected = NOT_PLAIN[case]
    if isinstance(expected, type):
        with pytest.raises(expected):
            xce.cross_entropy(x, y, **given)
        return
    loss = xce.cross_entropy(x, y, **given)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert "row_loss" in python_frames(lambda: xce.cross_entropy(x, y, **given))


def test_an_error_leaves_the_buffer_as_it_was() -> None:
    out = np.full_like(X, 7)
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 9 is out of range"):
        xce.cross_entropy(X, np.array([0, 9, 2, 0]), return_grad=True, grad_out=out)
    assert (out == 7).all()


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"cross_entropy\(\) got an unexpected keyword argument 'smoothing': did you mean"
    ):
        xce.cross_entropy(X, Y, smoothing=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"kl_div\(\) got an unexpected keyword argument 'where'"):
        xce.kl_div(X, X, where=X > 0)  # type: ignore[call-arg]


def test_bfloat16_of_both_kinds() -> None:
    x = X.astype(ml_dtypes.bfloat16)
    assert xce.cross_entropy(x, Y) == xce.cross_entropy(X, Y)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_tensors_take_the_same_way(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(RNG.normal(size=(N, C))).to(getattr(torch, dtype))
    y, q = torch.from_numpy(LABELS), torch.sigmoid(x)
    for f, target in ((xce.cross_entropy, y), (xce.binary_cross_entropy_with_logits, q)):
        for flags in ({}, {"return_grad": True}, {"return_grad": True, "return_hess": True, "reduction": "none"}):
            found = f(x, target, **flags)
            # with a weight it is no plain call
            own = {"sample_weight": torch.ones(target.shape, dtype=torch.int64)}
            expected = f(x, target, **flags, **own)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
                assert type(a) is torch.Tensor
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
    frames = python_frames(lambda: xce.cross_entropy(x, y))
    assert "row_call" not in frames

"""Hostile input: each is a result or an error as documented, and an error leaves every buffer untouched."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import LOSSES, Case, problem
from numpy.exceptions import AxisError

import xce

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 2, 1, 0])
P = np.full((4, 3), 1 / 3, np.float32)
W = np.ones(3, np.float32)
S = np.ones(4, np.float32)


def changed(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def foreign(module: str, method: str) -> Any:
    """Return an object of another library, which need not be installed."""
    kind = type("Series", (), {method: None})
    kind.__module__ = f"{module}.core"
    return kind()


ERRORS: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {}


def error(name: str, kind: type[Exception], text: str, *args: Any, **options: Any) -> None:
    ERRORS[name] = (kind, text, args, options)


# Labels
error("label too large", xce.LabelError, "target[1] = 3 is out of range: labels of 3 classes are 0..2, or "
      "ignore_index=-100", X, changed(Y, 1, 3))  # fmt: skip
error("label of one class", xce.LabelError, "target[1] = 3 is out of range: labels of 1 class are 0..0, or ", X[:, :1],
      changed(np.zeros(4, int), 1, 3))  # fmt: skip
error("axis of one dimension", AxisError, "axis=1 is out of range for logits of 1 dimension: expected -1..0", X[0], 1,
      axis=1)  # fmt: skip
error("label negative", xce.LabelError, "target[3] = -1 is out of range", X, changed(Y, 3, -1))
error("first bad label", xce.LabelError, "target[0] = 9 is", X, np.array([9, 8, 0, -7]))
error("label -100 is not ignored", xce.LabelError, "target[2] = -100", X, changed(Y, 2, -100), ignore_index=1)
error("label position", xce.LabelError, "target[1, 0] = 5", X.reshape(2, 2, 3), np.array([[0, 1], [5, 0]]))
error("label along axis 1", xce.LabelError, "target[1, 0] = 2", X.reshape(2, 2, 3),
      np.array([[0, 1, 1], [2, 0, 0]]), axis=1)  # fmt: skip
error("label unsigned", xce.LabelError, f"target[0] = {2**63} is", X, changed(Y.astype("u8"), 0, 2**63))
error(
    "label uint64 is not -100",
    xce.LabelError,
    f"= {2**64 - 100} is",
    X,
    changed(Y.astype("u8"), 0, 2**64 - 100),
)
error("label int", xce.LabelError, "target = 3 is out of range", X[0], 3)
error("labels bool", TypeError, "target has dtype bool and shape (4,): expected integers, or floats that are "
      "whole numbers, of shape (4,) (class indices), or floats of shape (4, 3) (probabilities)", X, Y > 0)  # fmt: skip
for kind in (
    "longdouble",
    "complex64",
    "object",
    "str",
    "datetime64[s]",
    "timedelta64[s]",
):
    error(f"labels {kind}", TypeError, "target has dtype ", X, Y.astype(kind))
error("labels NaN", xce.LabelError, "target[1] = nan is not a class: expected floats of this shape to be class "
      "indices, whole numbers in 0..2", X, np.array([0, math.nan, 1, 2]))  # fmt: skip
error("labels structured", TypeError, "target has dtype [(", X, np.zeros(4, [("a", "i4")]))
error("labels too few", ValueError, "target of dtype int64 has shape (3,): expected (4,) for logits of "
      "shape (4, 3) and axis=1; it fits axis=0: pass axis=0", X, Y[:3])  # fmt: skip
error("labels too many", ValueError, "has shape (5,): expected (4,)", X, np.zeros(5, int))
error("labels (N, 1)", ValueError, "squeeze it: target.reshape((4,))", X, Y[:, None])
error("labels of the logits' shape", ValueError, "class indices have no class axis", X, np.zeros((4, 3), int))
error(
    "labels of PyTorch's layout",
    ValueError,
    "it fits axis=1",
    np.zeros((2, 5, 4, 4)),
    np.zeros((2, 4, 4), int),
)
error("label 0-d for a batch", ValueError, "has shape (): expected (4,)", X, 1)
error("no labels", TypeError, "target is None", X, None)
error("labels list", TypeError, "target is a list: expected an array of NumPy, PyTorch, JAX, CuPy or another "
      "array-API library: convert it first, numpy.asarray(target)", X, [0, 1, 2, 0])  # fmt: skip
error("ignore_index 1.0", TypeError, "ignore_index is a float: expected an integer", X, Y, ignore_index=1.0)
error("ignore_index None", TypeError, "ignore_index is None", X, Y, ignore_index=None)
error("ignore_index True", TypeError, "ignore_index is a bool", X, Y, ignore_index=True)
error("ignore_index 2**63", ValueError, "ignore_index=9223372036854775808 is", X, Y, ignore_index=2**63)

# Probabilities
error("probability negative", ValueError, "target[1, 2] = -0.5 is not allowed: expected entries of at "
      "least 0", X, changed(P, (1, 2), -0.5))  # fmt: skip
error("probability NaN", ValueError, "target[0, 1] = nan", X, changed(P, (0, 1), math.nan))
error("probabilities of another shape", ValueError, "has shape (3, 3): expected (4, 3)", X, P[:3])

# Logits
for kind in ("int64", "bool", "complex64", "longdouble", "object", "str"):
    error(f"logits {kind}", TypeError, "logits has dtype ", X.astype(kind), Y)
error("logits structured", TypeError, "logits has dtype [(", np.zeros((4, 3), [("a", "f4")]), Y)
error("logits 0-d", AxisError, "logits has shape (): expected at least one axis, that of the classes", np.float32(1), 0)
error("logits without classes", ValueError, "logits of shape (4, 0) has no classes", X[:, :0], Y)
error("logits masked", TypeError, "logits is a numpy.MaskedArray: expected an array of NumPy, PyTorch, JAX, "
      "CuPy or another array-API library: masks are not read: fill it first, "
      "logits.filled(value)", np.ma.masked_array(X), Y)  # fmt: skip
error("labels masked", TypeError, "target.filled(value)", X, np.ma.masked_array(Y))
error("logits list", TypeError, "logits is a list", X.tolist(), Y)
error("logits tuple", TypeError, "numpy.asarray(logits)", (1.0, 2.0), 0)
error("logits pandas", TypeError, "logits is a pandas.Series; allowed", foreign("pandas", "to_numpy"), Y)
error("logits pandas", TypeError, "logits.to_numpy()", foreign("pandas", "to_numpy"), Y)
error("logits sparse", TypeError, "logits.toarray()", foreign("scipy", "toarray"), Y)
error("logits dask", TypeError, "logits.compute()", foreign("dask", "compute"), Y)

# Options
error("weight wrong length", ValueError, "weight has shape (4,): expected (3,)", X, Y, weight=S)
error("weight 2-D", ValueError, "weight has shape (1, 3): expected (3,)", X, Y, weight=W[None])
error("weight negative", ValueError, "weight[2] = -1 is not allowed: expected finite entries", X, Y,
      weight=changed(W, 2, -1))  # fmt: skip
error("weight NaN", ValueError, "weight[0] = nan", X, Y, weight=changed(W, 0, math.nan))
error("weight infinite", ValueError, "weight[1] = inf", X, Y, weight=changed(W, 1, math.inf))
error("weight int negative", ValueError, "weight[2] = -1 is not allowed: expected finite entries of at least 0",
      X, Y, weight=np.array([1, 0, -1]))  # fmt: skip
error("weight complex", TypeError, "weight has dtype complex128: expected bool, int8", X, Y, weight=np.ones(3, complex))
error("weight list", TypeError, "weight is a list", X, Y, weight=[1.0, 1.0, 1.0])
error("sample_weight wrong length", ValueError, "sample_weight has shape (3,), which does not broadcast "
      "to (4,)", X, Y, sample_weight=W)  # fmt: skip
error("sample_weight enlarges", ValueError, "does not broadcast", X, Y, sample_weight=P)
error("sample_weight minus infinity", ValueError, "sample_weight[1] = -inf is not allowed: expected finite entries",
      X, Y, sample_weight=changed(S, 1, -math.inf))  # fmt: skip
error("sample_weight NaN", ValueError, "sample_weight[0] = nan", X, Y, sample_weight=changed(S, 0, math.nan))
error("sample_weight text", TypeError, "sample_weight is a str", X, Y, sample_weight="1")
error("sample_weight list", TypeError, "sample_weight is a list", X, Y, sample_weight=[1.0])
error("where int", TypeError, "where has dtype int64: expected bool", X, Y, where=np.ones((4, 3), int))
error(
    "where wrong shape",
    ValueError,
    "where has shape (4,), which does not broadcast to (4, 3)",
    X,
    Y,
    where=S > 0,
)
error("where True", TypeError, "where is a bool", X, Y, where=True)
for name, values in {
    "label_smoothing": (-0.1, 1.5, math.nan),
    "temperature": (0.0, -1.0, math.nan, math.inf),
    "softcap": (0.0, -1.0, math.nan, math.inf),
    "z_loss": (-1.0, math.nan, math.inf),
}.items():
    for value in values:
        error(
            f"{name} {value}",
            ValueError,
            f"{name}={value} is not allowed: expected ",
            X,
            Y,
            **{name: value},
        )
    for value in ("1", True, [0.5], np.array([0.5, 0.5])):
        error(f"{name} {value!r}", TypeError, f"{name} is a ", X, Y, **{name: value})
error("reduction avg", ValueError, "reduction='avg' is unknown: expected 'mean', 'sum' or 'none'",
      X, Y, reduction="avg")  # fmt: skip
error("reduction None", TypeError, "reduction is None: expected 'mean'", X, Y, reduction=None)
error("reduction array", TypeError, "reduction is a numpy.ndarray", X, Y, reduction=S)
for value in (0, -1):
    error(f"n_threads {value}", ValueError, f"n_threads={value} is not allowed: expected None or", X, Y,
          n_threads=value)  # fmt: skip
for value in ("2", 2.0, True):
    error(f"n_threads {value!r}", TypeError, "n_threads is a ", X, Y, n_threads=value)
for value in (2, -3, 10**30):
    error(f"axis {value}", AxisError, f"axis={value} is out of range for logits of 2 dimensions: expected "
          "-2..1", X, Y, axis=value)  # fmt: skip
for value in (None, 1.0, "1", True, (0, 1)):
    error(f"axis {value!r}", TypeError, "axis is ", X, Y, axis=value)
for name in ("return_grad", "return_hess", "validate"):
    error(f"{name} 1", TypeError, f"{name} is an int: expected True or False", X, Y, **{name: 1})

# Libraries
error("GPU", ImportError, "of CuPy", foreign("cupy", "__dlpack__"), Y)  # without CuPy, or without a driver
error("mixed", TypeError, "logits is a numpy.ndarray but target is a cupy.Series: expected all arrays "
      "of a call from one library", X, foreign("cupy", "device"))  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "args", "options"), ERRORS.values(), ids=ERRORS)
def test_errors(kind: type[Exception], text: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    buffers: dict[str, Any] = {}
    if isinstance(args[0], np.ndarray) and args[0].dtype == np.float32 and "return_grad" not in options:
        buffers = {"grad_out": np.full_like(args[0], 7), "return_grad": True}
    with pytest.raises(kind) as caught:
        xce.cross_entropy(*args, **options, **buffers)
    assert text in str(caught.value)
    assert type(caught.value) is kind
    if buffers:
        assert (buffers["grad_out"] == 7).all()


def test_a_label_error_is_both_an_index_and_a_value_error() -> None:
    assert issubclass(xce.LabelError, IndexError)
    assert issubclass(xce.LabelError, ValueError)


# Buffers

BUFFERS: dict[str, tuple[str, Callable[[np.ndarray], dict[str, Any]]]] = {
    "dtype": ("has dtype float64: expected float32", lambda _: {"grad_out": np.empty((4, 3))}),
    "byte order": ("has dtype >f4: expected float32", lambda _: {"grad_out": np.empty((4, 3), ">f4")}),
    "shape": ("has shape (3, 4): expected (4, 3)", lambda _: {"grad_out": np.empty((3, 4), "f4")}),
    "broadcastable": ("has shape (1, 3): expected (4, 3)", lambda _: {"grad_out": np.empty((1, 3), "f4")}),
    "read-only": ("grad_out is read-only", lambda _: {"grad_out": read_only(X)}),
    "read-only hess": ("hess_out is read-only", lambda _: {"hess_out": read_only(X)}),
    "stride 0": ("expected entries that do not", lambda _: {"grad_out": stride(np.zeros(3, "f4"), (0, 4))}),
    "self-overlapping": ("expected entries that do not", lambda _: {"grad_out": stride(np.zeros(9, "f4"), (8, 4))}),
    "overlapping the logits": ("shares memory with logits", lambda x: {"grad_out": tail(x)}),
    "logits reversed": ("shares memory with logits", lambda x: {"grad_out": x[::-1]}),
    "logits as hess": ("hess_out shares memory with logits", lambda x: {"hess_out": x}),
    "one for two": ("hess_out shares memory with grad_out", lambda x: one_for_two(np.empty_like(x))),
    "two overlapping": ("hess_out shares memory with grad_out", lambda _: two_overlapping()),
    "logits for two": ("hess_out shares memory with logits", lambda x: one_for_two(x)),
    "not asked": ("grad_out given but return_grad=False", lambda x: {"grad_out": x, "return_grad": False}),
    "not asked hess": ("hess_out given but return_hess=False",
                       lambda x: {"hess_out": np.empty_like(x), "return_hess": False}),
}  # fmt: skip


def stride(array: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(array, (4, 3), strides)


def tail(x: np.ndarray) -> np.ndarray:
    assert x.base is not None
    return x.base[3:].reshape(4, 3)


def one_for_two(buffer: np.ndarray) -> dict[str, Any]:
    return {"grad_out": buffer, "hess_out": buffer}


def two_overlapping() -> dict[str, Any]:
    both = np.empty(15, np.float32)
    return {"grad_out": both[:12].reshape(4, 3), "hess_out": both[3:].reshape(4, 3)}


@pytest.mark.parametrize(("text", "buffers"), BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_do_not_fit(text: str, buffers: Callable[[np.ndarray], dict[str, Any]]) -> None:
    x = np.arange(15, dtype=np.float32)[:12].reshape(4, 3)
    options = buffers(x)
    arrays = [x] + [value for value in options.values() if isinstance(value, np.ndarray)]
    before = [array.copy() for array in arrays]
    options = {"return_grad": "grad_out" in options, "return_hess": "hess_out" in options} | options
    with pytest.raises(ValueError, match="_out") as caught:
        xce.cross_entropy(x, Y, **options)
    assert text in str(caught.value)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_buffer_shares_memory_with_another_argument() -> None:
    for name, argument in {
        "target": P,
        "sample_weight": P[:, 0],
        "weight": P[0],
        "where": P.view(bool),
    }.items():
        options = {"target": Y, name: argument[:, :3] if name == "where" else argument}
        with pytest.raises(ValueError, match=f"grad_out shares memory with {name}"):
            xce.cross_entropy(X, grad_out=P, return_grad=True, **options)


def test_a_buffer_of_another_kind() -> None:
    with pytest.raises(TypeError, match="grad_out is a list"):
        xce.cross_entropy(X, Y, grad_out=[0.0], return_grad=True)


def test_buffers_are_written_and_returned() -> None:
    expected = xce.cross_entropy(X, Y, return_grad=True, return_hess=True)
    grad, hess = np.empty((8, 6), np.float32)[::2, ::2], np.empty((3, 4), np.float32).T
    results = xce.cross_entropy(X, Y, return_grad=True, return_hess=True, grad_out=grad, hess_out=hess)
    assert results[1] is grad
    assert results[2] is hess
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, value)


def test_interleaved_buffers_share_no_memory() -> None:
    both = np.empty((4, 6), np.float32)
    both[:, ::2] = X
    _, grad = xce.cross_entropy(both[:, ::2], Y, return_grad=True, grad_out=both[:, 1::2])
    np.testing.assert_array_equal(grad, xce.cross_entropy(X, Y, return_grad=True)[1])
    np.testing.assert_array_equal(both[:, ::2], X)


@pytest.mark.parametrize("alias", [lambda x: x, lambda x: x[:], lambda x: x.reshape(4, 3)], ids=["same", "view", "new"])
def test_the_gradient_may_overwrite_the_logits(alias: Callable[[np.ndarray], np.ndarray]) -> None:
    x = X.copy()
    value, grad = xce.cross_entropy(x, Y, return_grad=True, grad_out=alias(x))
    expected = xce.cross_entropy(X, Y, return_grad=True)
    assert value == expected[0]
    np.testing.assert_array_equal(x, expected[1])
    assert np.shares_memory(grad, x)


# The other functions

MAPS = (xce.softmax, xce.log_softmax)


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize(
    ("kind", "text", "x", "options"),
    [
        (TypeError, "x has dtype int64: expected float16", Y, {}),
        (TypeError, "x is a set", {1.0}, {}),
        (ValueError, "x of shape (4, 0) has no classes", X[:, :0], {}),
        (AxisError, "axis=2 is out of range for x of 2", X, {"axis": 2}),
        (ValueError, "temperature=0.0 is not", X, {"temperature": 0.0}),
        (ValueError, "n_threads=0 is not", X, {"n_threads": 0}),
        (
            ValueError,
            "out has shape (3, 4): expected (4, 3), the shape of x",
            X,
            {"out": np.empty((3, 4))},
        ),
        (ValueError, "out has dtype float64", X, {"out": np.empty((4, 3))}),
        (ValueError, "out is read-only", X, {"out": read_only(X)}),
        (ValueError, "out shares memory with x", X, {"out": X[::-1]}),
        (TypeError, "out is a list", X, {"out": []}),
    ],
)
def test_errors_of_softmax(function: Any, kind: type[Exception], text: str, x: Any, options: dict[str, Any]) -> None:
    with pytest.raises(kind) as caught:
        function(x, **options)
    assert text in str(caught.value)


def test_errors_of_logsumexp_and_logit_stats() -> None:
    with pytest.raises(AxisError, match="axis=1 is out of range for x of 1"):
        xce.logsumexp(X[0], axis=1)
    with pytest.raises(TypeError, match="x has dtype int64"):
        xce.logsumexp(Y)
    with pytest.raises(xce.LabelError, match="target"):
        xce.logit_stats(X, changed(Y, 0, 3))
    with pytest.raises(TypeError, match=r"target has dtype float32 .*: expected class indices of shape \(4,\)"):
        xce.logit_stats(X, P)


# Hostile input that has a right result: the same as the plain array's


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + 1, np.uint8)[1:]
    result = raw.view(array.dtype).reshape(array.shape)
    result[...] = array
    assert not result.flags.aligned
    return result


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "Fortran": np.asfortranarray,
    "sliced": lambda a: np.repeat(a, 2, axis=0)[::2],
    "sliced classes": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "reversed classes": lambda a: a[..., ::-1].copy()[..., ::-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "subclass": lambda a: a.view(type("Mine", (np.ndarray,), {})),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layouts(layout: Callable[[np.ndarray], np.ndarray], dtype: str) -> None:
    x = X.astype(dtype)
    results = [
        xce.cross_entropy(layout(x), target, return_grad=True, return_hess=True, weight=w, sample_weight=s)
        for target, w, s in ((Y, W, S), (layout(Y), layout(W), layout(S)))
    ]
    expected = xce.cross_entropy(x, Y, return_grad=True, return_hess=True, weight=W, sample_weight=S)
    probabilities = xce.cross_entropy(layout(x), layout(P.astype(dtype)), return_grad=True)[1]
    for result in results:
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
            assert isinstance(a, np.generic) or type(a) is np.ndarray
    np.testing.assert_array_equal(
        probabilities, xce.cross_entropy(x, P.astype(dtype), return_grad=True)[1], strict=True
    )


def test_stride_0() -> None:
    x, y = np.broadcast_to(X[:1], (4, 3)), np.broadcast_to(Y[:1], (4,))
    expected = xce.cross_entropy(x.copy(), y.copy(), return_grad=True)
    for a, b in zip(xce.cross_entropy(x, y, return_grad=True), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_read_only_memmap(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", X)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    value, grad = xce.cross_entropy(x, Y, return_grad=True)
    assert value == xce.cross_entropy(X, Y)
    assert type(grad) is np.ndarray
    with pytest.raises(ValueError, match="grad_out is read-only"):
        xce.cross_entropy(x, Y, return_grad=True, grad_out=x)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u8", "longlong"])
def test_every_integer_width(dtype: str) -> None:
    y = Y.astype(dtype)
    assert xce.cross_entropy(X, y) == xce.cross_entropy(X, Y)
    assert xce.cross_entropy(X, y, ignore_index=2) == xce.cross_entropy(X, Y, ignore_index=2)
    with pytest.raises(xce.LabelError, match=r"target\[2\] = 3 is"):
        xce.cross_entropy(X, changed(y, 2, 3))
    many = np.zeros((1, 300), np.float32)  # more classes than the narrow types have values
    assert xce.cross_entropy(many, y[:1]) == xce.cross_entropy(many, Y[:1])


def test_one_label_may_be_an_integer() -> None:
    expected = xce.cross_entropy(X[:1], Y[:1])
    for y in (0, np.int32(0), np.uint8(0), np.array(0)):
        assert xce.cross_entropy(X[0], y) == expected


def test_far_too_many_threads_are_no_error() -> None:
    assert xce.cross_entropy(X, Y, n_threads=100_000) == xce.cross_entropy(X, Y)


@pytest.mark.parametrize("ignore_index", [-(2**63), 2**63 - 1, -1, 0, 255, np.int16(2)])
def test_ignore_index_is_any_int64(ignore_index: int) -> None:
    expected = xce.cross_entropy(X[1:], Y[1:])
    value = xce.cross_entropy(X, changed(Y, 0, 2), ignore_index=ignore_index)
    assert np.isfinite(value)
    if int(ignore_index) not in range(3):
        assert xce.cross_entropy(X, changed(Y, 0, ignore_index), ignore_index=ignore_index) == expected


def test_options_of_numpy_types() -> None:
    expected = xce.cross_entropy(X, Y, label_smoothing=0.5, axis=1, n_threads=1, return_grad=True)[0]
    value = xce.cross_entropy(
        X, Y, label_smoothing=np.float32(0.5), axis=np.int8(-1), n_threads=np.int64(1), return_grad=np.True_
    )[0]
    assert value == expected
    assert xce.cross_entropy(X, Y, label_smoothing=0, temperature=1, softcap=None) == xce.cross_entropy(X, Y)


def in_array(library: str, value: Any) -> Any:
    """Return a number in an array of no dimensions, or as a scalar of NumPy."""
    if library in ("numpy", "scalar"):
        array = np.array(value, np.float32 if isinstance(value, float) else None)
        return array if library == "numpy" else array[()]
    if library == "bfloat16":  # NumPy knows it as no number
        return np.array(value, pytest.importorskip("ml_dtypes").bfloat16) if isinstance(value, float) else value
    if library == "jax":
        return pytest.importorskip("jax.numpy").asarray(value)
    return pytest.importorskip({"torch": "torch", "strict": "array_api_strict"}[library]).asarray(value)


def streamed(x: Any, y: Any, *, class_offset: Any, row_offset: Any, **options: Any) -> float:
    """The loss of rows whose first class comes last."""
    state = xce.LossState(**options).update(x, y, class_offset, row_offset=row_offset)
    return state.update(x[:, :1], y, row_offset=row_offset).result()


NUMBERS: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...] = (
    (xce.cross_entropy, (X, Y), {"label_smoothing": 0.5, "temperature": 0.25, "softcap": 3.0, "z_loss": 0.125}),
    (xce.cross_entropy, (X, Y), {"axis": 1, "ignore_index": 2, "n_threads": 1}),
    (xce.cross_entropy, (X, Y), {"validate": False, "return_grad": True, "return_hess": True}),
    (xce.focal_loss, (X, Y), {"gamma": 1.5}),
    (xce.poly_loss, (X, Y), {"epsilon": 0.5}),
    (xce.generalized_cross_entropy, (X, Y), {"q": 0.5}),
    (xce.distillation_loss, (X, X[::-1]), {"axis": 1, "temperature": 0.5}),
    (xce.softmax, (X,), {"axis": -1, "temperature": 0.5}),
    (xce.binary_cross_entropy_with_logits, (X, P), {"label_smoothing": 0.25, "n_threads": 1}),
    (xce.binary_cross_entropy, (P, P), {"log_clamp": -10.0}),
    (xce.sigmoid_focal_loss, (X, P), {"alpha": 0.5, "gamma": 1.5}),
    (xce.asymmetric_loss, (X, P), {"gamma_pos": 0.5, "gamma_neg": 2.0, "clip": 0.125}),
    (xce.linear_cross_entropy, (X, X, Y), {"chunk_rows": 3, "temperature": 0.5}),
    (xce.metrics.top_k_accuracy, (X, Y), {"k": 2}),
    (xce.logsumexp, (X,), {"axis": 1, "keepdims": True, "return_sign": True, "n_threads": 1}),
    (streamed, (X, Y), {"n_classes": 4, "class_offset": 1, "row_offset": 7, "ignore_index": 2, "keep_rows": True}),
    (streamed, (X, Y), {"n_classes": 4, "class_offset": 1, "row_offset": 0, "label_smoothing": 0.5}),
)


@pytest.mark.parametrize("library", ["scalar", "numpy", "bfloat16", "torch", "jax", "strict"])
@pytest.mark.parametrize(("function", "args", "options"), NUMBERS)
def test_options_in_arrays_of_no_dimensions(function: Any, args: Any, options: dict[str, Any], library: str) -> None:
    result = function(*args, **{name: in_array(library, value) for name, value in options.items()})
    expected = function(*args, **options)
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    for x, y in zip(result, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_number_of_threads_in_an_array() -> None:
    with xce.num_threads(np.array(1)):
        assert xce.get_num_threads() == 1


@pytest.mark.parametrize("dtype", ["bool", "complex64", "datetime64[s]", "U1", "O"])
@pytest.mark.parametrize(("name", "text"), [
    ("temperature", "expected a"), ("label_smoothing", "expected a"), ("axis", "an integer"),
    ("ignore_index", "an integer"), ("n_threads", "an integer of at least 1"), ("validate", "True or False"),
])  # fmt: skip
def test_what_is_in_an_array_must_be_a_number_of_its_kind(name: str, text: str, dtype: str) -> None:
    value = np.zeros((), dtype) if (name, dtype) != ("validate", "bool") else np.ones(())
    with pytest.raises(TypeError, match=rf"^{name} .*{text}"):
        xce.cross_entropy(X, Y, **{name: value})


@pytest.mark.parametrize("name", ["axis", "ignore_index", "n_threads", "validate"])
def test_a_float_in_an_array_is_no_integer_and_no_flag(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} "):
        xce.cross_entropy(X, Y, **{name: np.array(1.0)})


def test_an_array_of_one_number_is_no_number() -> None:
    with pytest.raises(TypeError, match=r"^temperature "):
        xce.cross_entropy(X, Y, temperature=np.ones(1))
    with pytest.raises(ValueError, match=r"^temperature=0\.0 "):
        xce.cross_entropy(X, Y, temperature=np.array(0.0))


def test_a_number_that_requires_grad_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^temperature requires grad: .*detach"):
        xce.cross_entropy(X, Y, temperature=torch.tensor(2.0, requires_grad=True))


def test_nothing_is_written_when_validation_is_off_and_all_is_well() -> None:
    assert xce.cross_entropy(X, Y, validate=False) == xce.cross_entropy(X, Y)
    assert math.isnan(xce.cross_entropy(X, changed(Y, 1, 3), validate=False))


def test_doctests() -> None:
    """Run apart: the examples import the package by its name."""
    code = "import doctest, sys, xce.losses; sys.exit(doctest.testmod(xce.losses).failed)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_namespaces_of_the_package() -> None:
    assert isinstance(xce, types.ModuleType)
    for name in (
        "cross_entropy",
        "softmax",
        "log_softmax",
        "logsumexp",
        "logit_stats",
        "LogitStats",
        "LabelError",
    ):
        assert hasattr(xce, name)


@pytest.mark.parametrize(("sign", "digits"), [(1, 5000), (-1, 5000), (-1, 40)])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("temperature", lambda v: xce.cross_entropy(X, Y, temperature=-abs(v))),
        ("label_smoothing", lambda v: xce.cross_entropy(X, Y, label_smoothing=v)),
        ("axis", lambda v: xce.cross_entropy(X, Y, axis=v)),
        ("axis", lambda v: xce.softmax(X, axis=(0, v))),
        ("ignore_index", lambda v: xce.cross_entropy(X, Y, ignore_index=v)),
        ("target", lambda v: xce.cross_entropy(X[0], v)),
        ("k", lambda v: xce.metrics.top_k_accuracy(X, Y, k=v)),
        ("n_threads", lambda v: xce.cross_entropy(X, Y, n_threads=-abs(v))),
        ("n", lambda v: xce.set_num_threads(-abs(v))),
        ("n_classes", lambda v: xce.LossState(v)),
        ("class_offset", lambda v: xce.LossState().update(X, Y, v)),
        ("chunk_rows", lambda v: xce.linear_cross_entropy(X, X, Y, chunk_rows=-abs(v))),
    ],
)
def test_integers_of_very_many_digits(name: str, call: Callable[[int], Any], sign: int, digits: int) -> None:
    """Python refuses to write those of more than 4300."""
    with pytest.raises((ValueError, AxisError), match=rf"^{name} ?= ?-?1\.00e\+{digits} is .*: expected "):
        call(sign * 10**digits)


def test_a_fraction_of_very_many_digits() -> None:
    with pytest.raises(
        ValueError, match=r"^temperature=<fractions\.Fraction> is not allowed: expected a finite number"
    ):
        xce.cross_entropy(X, Y, temperature=Fraction(10**5000, 3))


@pytest.mark.parametrize("reduction", [None, "avg", 1])
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_reductions_that_no_loss_has(case: Case, reduction: Any) -> None:
    x, y, options = problem({}, case.modes[0], (3, 4), case=case)
    with pytest.raises((TypeError, ValueError), match=r"^reduction.*expected 'mean', 'sum'"):
        case.function(x, y, **options | {"reduction": reduction})

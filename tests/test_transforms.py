"""softmax, log_softmax and logsumexp over any axes, with removed classes, factors and signs; judged in longdouble."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from checks import DTYPES, call, compute_dtype, dtype_of, misaligned, same_bits, widen

import xce

INF, NAN = np.inf, np.nan
AXES = (None, 0, 1, -1, (0, 2), (2, 0), (1, 2), (0, 1), (0, 1, 2), (), [1], np.int64(1))
MAPS = (xce.softmax, xce.log_softmax)
Array = np.ndarray[Any, Any]

# the last places that an entry may be off by, and the step of the smallest numbers
STORED = {"float32": (8 * 2.0**-23, 1e-37), "float64": (8 * 2.0**-52, 1e-307), "float16": (2.0**-10, 2.0**-24)}
STORED |= {"bfloat16": (2.0**-7, 1e-37)}


def axes_of(axis: Any, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in np.atleast_1d(np.asarray(axis, int)))


def _last(x: Array, axes: tuple[int, ...]) -> Array:
    """With `axes` joined to one, the last."""
    kept = [a for a in range(x.ndim) if a not in axes]
    return x.transpose(*kept, *axes).reshape(*(x.shape[a] for a in kept), -1)


def exact(x: Array, axis: Any, where: Array | bool = True, b: Any = 1.0) -> tuple[Array, ...]:
    """By their definitions: softmax and its logarithm; log-sum-exp, sign and condition of the sum, dimensions kept."""
    axes = axes_of(axis, x.ndim)
    with np.errstate(all="ignore"):
        z = np.where(where, widen(x).astype(np.longdouble), -INF)
        counts = np.broadcast_to(np.asarray(b) != 0, z.shape) & where
        greatest = np.max(np.where(counts, z, -INF), axis=axes, keepdims=True)
        greatest = np.where(np.isfinite(greatest), greatest, 0)
        terms = np.where(counts, b * np.exp(z - greatest), 0)
        total = np.sum(terms, axis=axes, keepdims=True)
        condition = np.sum(np.abs(terms), axis=axes, keepdims=True) / np.abs(total)
        lse = greatest + np.log(np.abs(total))
        log_z = np.log1p(np.sum(np.sort(_last(np.where(counts, np.exp(z - greatest), 0), axes))[..., :-1], axis=-1))
        log_z = log_z.reshape(total.shape)
        empty = ~np.any(np.broadcast_to(where, z.shape), axis=axes, keepdims=True)
        u = np.where(empty | ~np.broadcast_to(where, z.shape), -INF, (z - greatest) - log_z)
        return np.exp(u), u, lse, np.sign(total), condition


def check(function: Callable[..., Any], x: Array, axis: Any, **options: Any) -> None:
    p, u, lse, sign, condition = exact(x, axis, options.get("where", True), options.get("b", 1.0))
    if function is xce.logsumexp:
        result = call(function, x, axis=axis, **options)
        if not options.get("keepdims"):
            lse, sign, condition = (np.squeeze(a, axes_of(axis, x.ndim)) for a in (lse, sign, condition))
        if options.get("return_sign"):
            result, found = result
            np.testing.assert_array_equal(found, sign)
        else:
            lse = np.where(sign < 0, NAN, lse)
        assert result.dtype == compute_dtype(x)
        eps = np.finfo(result.dtype).eps
        largest = np.max(np.abs(widen(x)), where=np.isfinite(widen(x)), initial=1.0)
        bound = 4 * eps * largest + 16 * np.finfo(float).eps * np.where(np.isfinite(condition), condition, 0)
        finite = np.isfinite(lse)
        error = np.abs(np.subtract(result, lse, where=finite, out=np.zeros(lse.shape, lse.dtype)))
        np.testing.assert_array_less(error, bound)
        np.testing.assert_array_equal(result[~finite], lse[~finite].astype(float))
        return
    result = call(function, x, axis=axis, **options)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    eps, least = STORED[x.dtype.name]
    want = p if function is xce.softmax else u
    np.testing.assert_allclose(widen(result), want.astype(float), rtol=eps, atol=least)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_axes(axis: Any, dtype: str, rng: np.random.Generator) -> None:
    x = (3 * rng.standard_normal((3, 4, 5))).astype(dtype_of(dtype))
    for place in (np.asarray, np.asfortranarray, misaligned, lambda a: np.flip(np.flip(a).copy())):
        for function in (*MAPS, xce.logsumexp):
            check(function, place(x), axis)
        check(xce.logsumexp, place(x), axis, keepdims=True)


@pytest.mark.parametrize("function", MAPS)
def test_buffers_over_several_axes(function: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 5))
    for axis, order in itertools.product((None, (0, 2), (1, 2)), "CF"):
        expected, out = function(x, axis), np.empty(x.shape, order=order)
        assert function(x, axis, out=out) is out
        np.testing.assert_array_equal(out, expected)
        own = x.copy(order)
        assert function(own, axis, out=own) is own
        np.testing.assert_array_equal(own, expected)
    with pytest.raises(ValueError, match="out is read-only"):
        function(x, None, out=np.broadcast_to(0.0, x.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where(dtype: str, rng: np.random.Generator) -> None:
    for shape, axis in (((7, 5), -1), ((5, 7), 0), ((3, 300), -1), ((2, 40, 3), 1), ((3, 4, 5), (0, 2)), ((9,), None)):
        x = (3 * rng.standard_normal(shape)).astype(dtype_of(dtype))
        where = rng.random(shape) < 0.6
        where[(0,) * len(shape)] = True
        x[~where] = rng.choice([NAN, INF, -INF, 7.0], size=int(np.sum(~where)))  # whatever they hold
        for function in (*MAPS, xce.logsumexp):
            check(function, x, axis, where=where)
            nothing = call(function, x, axis=axis, where=np.zeros(1, bool))
            np.testing.assert_array_equal(widen(np.asarray(nothing)), 0.0 if function is xce.softmax else -INF)
    one_row_empty = np.array([[True, False], [False, False]])
    x = np.array([[1.0, NAN], [NAN, 2.0]], dtype_of(dtype))
    np.testing.assert_array_equal(widen(call(xce.softmax, x, where=one_row_empty)), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(widen(call(xce.log_softmax, x, where=one_row_empty)), [[0, -INF], [-INF, -INF]])
    np.testing.assert_array_equal(call(xce.logsumexp, x, where=one_row_empty), [1, -INF])


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_factors_and_signs(axis: Any, rng: np.random.Generator) -> None:
    for dtype, shape in itertools.product((np.float32, np.float64), ((3, 4, 5), (2, 70, 300))):
        x = (3 * rng.standard_normal(shape)).astype(dtype)
        b = rng.standard_normal((shape[1], 1))
        b[1] = 0.0
        x[:, 1] = NAN  # not read
        where = rng.random(shape) < 0.9
        for factors, kept in itertools.product(
            (b, b.astype(dtype), np.abs(b), np.sign(b).astype(int), b > 0), (None, where)
        ):
            options: dict[str, Any] = {"b": factors} if kept is None else {"b": factors, "where": kept}
            check(xce.logsumexp, x, axis, **options)
            check(xce.logsumexp, x, axis, **options, keepdims=True, return_sign=True)


def test_signs_of_sums() -> None:
    x = np.array([0.0, np.log(3.0)])
    for b, value, sign in (([-1, 1], np.log(2), 1), ([1, -1], np.log(2), -1), ([3, -1], -INF, 0), ([0, 0], -INF, 0)):
        lse, found = xce.logsumexp(x, b=np.array(b), return_sign=True)
        assert found == sign
        np.testing.assert_allclose(lse, value, rtol=1e-15)
        plain = xce.logsumexp(x, b=np.array(b))
        assert np.isnan(plain) if sign < 0 else plain == lse
    np.testing.assert_allclose(xce.logsumexp(x, b=2), np.log(8), rtol=1e-15)
    for values, lse, sign in (([-INF], -INF, 0), ([INF], INF, 1), ([NAN], NAN, NAN), ([5.0], 5.0, 1)):
        np.testing.assert_array_equal(xce.logsumexp(np.array(values), return_sign=True), (lse, sign))
    np.testing.assert_array_equal(xce.logsumexp(np.array([INF, 0]), b=np.array([-1, 1]), return_sign=True), (INF, -1))


def _log_of_sum(x: Any, b: Any) -> tuple[Any, int]:
    """Logarithm of the size of a sum, and its sign, in 400 digits."""
    with mpmath.workdps(400):
        terms = [mpmath.mpf(float(f)) * mpmath.exp(mpmath.mpf(float(z))) for z, f in zip(x, b, strict=True) if f]
        total = mpmath.fsum(terms)
        return mpmath.log(abs(total)), int(mpmath.sign(total))


@pytest.mark.parametrize(
    ("x", "b"),
    [
        ([0.0, -40.0], [1, 1]),  # where all of the result lies beside the greatest term
        ([0.0, -80.0, -100.0], [1, 1, -1]),
        ([-40.0, 0.0, -41.0], [-1, -1, 3]),
        ([0.0, -705.0], [1, 1]),
        ([0.0] * 3, [1 / 3] * 3),
        ([0.0, -37.0] * 8192, [2.0**-13, 2.0] * 8192),  # in several blocks
        ([1000.0, 0.0], [1e-320, 1e300]),  # factors of any size
        ([-700.0, 700.0, 0.0], [1e308, 5e-324, 1]),
        ([1400.0, 0.0], [5e-324, 1e308]),
        ([0.0, -745.0, -745.0], [-5e-324, 1e308, 1e308]),
        ([0.0, 0.0], [1e308, 1e308]),
        ([-1e308, 1e308], [1, 1]),
    ],
)
def test_a_sum_with_factors_has_all_its_digits(x: list[float], b: list[float]) -> None:
    """Within 4 ulp of the result and of the x of the greatest term, which it is the sum of with a logarithm: no term is
    lost beside another, and no product overflows."""
    expected, sign = _log_of_sum(x, b)
    with np.errstate(all="ignore"):
        reference = abs(x[int(np.argmax(np.add(x, np.log(np.abs(b)))))])
    bound = 4 * np.spacing(max(abs(float(expected)), reference))
    for order in (slice(None), slice(None, None, -1)):
        lse, found = xce.logsumexp(np.array(x)[order], b=np.array(b)[order], return_sign=True)
        assert found == sign
        assert abs(lse - expected) <= bound
    if min(b) == max(b) == 1 and max(x) < 1e30:
        narrow = xce.logsumexp(np.array(x, np.float32), b=np.array(b))
        assert abs(narrow - expected) <= np.spacing(abs(np.float32(expected)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_with_factors_does_not_depend_on_strides(dtype: str, rng: np.random.Generator) -> None:
    for shape, axis in (((200, 57), -1), ((57, 200), 0), ((3, 5000), -1), ((30, 6, 9), (0, 2)), ((2, 9000), None)):
        x = (3 * rng.standard_normal(shape)).astype(dtype_of(dtype))
        for b in (rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.choice([1e-200, 1e200, 0], shape)):
            expected = xce.logsumexp(x, axis, b=b, return_sign=True)
            for place in (np.asfortranarray, misaligned, lambda a: np.flip(np.flip(a).copy()), _spread):
                found = xce.logsumexp(place(x), axis, b=place(b), return_sign=True)
                np.testing.assert_array_equal(found, expected)
            alone = [
                xce.logsumexp(row, b=f, return_sign=True) for row, f in zip(x, np.broadcast_to(b, shape), strict=True)
            ]
            if axis == -1:  # nor on the other rows
                np.testing.assert_array_equal(np.transpose(alone), expected)


def _spread(x: Array) -> Array:
    """The same numbers with room between them."""
    return np.repeat(x, 2, axis=-1)[..., ::2]


def test_one_axis_of_a_tuple_is_an_axis(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 5))
    for function in (*MAPS, xce.logsumexp):
        for axis in (0, 1, -1):
            np.testing.assert_array_equal(function(x, axis=(axis,)), function(x, axis=axis))
            np.testing.assert_array_equal(function(x, axis=[axis]), function(x, axis=axis))
        np.testing.assert_array_equal(function(x[0], axis=None), function(x[0]))


def test_sums_in_blocks_are_sums_of_rows(rng: np.random.Generator) -> None:
    """The blocks of rows that a weighted sum is formed in do not show."""
    x, b = rng.standard_normal((5, 130, 257)), rng.standard_normal(257)
    whole = xce.logsumexp(x, b=b, return_sign=True)
    for i, j in ((0, 0), (4, 129), (2, 63), (2, 64)):
        for a, one in zip(whole, xce.logsumexp(x[i, j], b=b, return_sign=True), strict=True):
            assert a[i, j] == one


def test_zero_dimensions() -> None:
    assert xce.logsumexp(np.float32(3), axis=None) == 3
    assert xce.softmax(np.float32(3), axis=None) == 1
    assert xce.log_softmax(np.float32(3), axis=()) == 0


def test_errors() -> None:
    x = np.zeros((2, 3))
    for axis, error, message in (
        ((0, 0), ValueError, r"axis=\(0, 0\) has axis 0 twice"),
        ((0, -2), ValueError, r"axis=\(0, -2\) has axis 0 twice"),
        ((0, 2), np.exceptions.AxisError, "axis=2 is out of range for x of 2 dimensions"),
        ((0, 1.0), TypeError, "axis is a float: expected an integer"),
        (True, TypeError, "axis is a bool: expected an integer"),
        ("0", TypeError, "axis is a str"),
    ):
        for function in (*MAPS, xce.logsumexp):
            with pytest.raises(error, match=message):
                function(x, axis=axis)
    for options, error, message in (
        ({"where": np.ones((2, 3))}, TypeError, "where has dtype float64"),
        ({"where": np.ones(2, bool)}, ValueError, r"where has shape \(2,\), which does not broadcast to \(2, 3\)"),
        ({"where": np.ones((4, 2, 3), bool), "axis": None}, ValueError, "where has shape"),
    ):
        for function in (*MAPS, xce.logsumexp):
            with pytest.raises(error, match=message):
                function(x, **options)
    with pytest.raises(ValueError, match=r"b has shape \(2,\), which does not broadcast"):
        xce.logsumexp(x, b=np.ones(2))
    with pytest.raises(TypeError, match="b has dtype complex128"):
        xce.logsumexp(x, b=np.ones(3, complex))
    with pytest.raises(TypeError, match="b is a str"):
        xce.logsumexp(x, b="1")
    with pytest.raises(TypeError, match="return_sign is an int"):
        xce.logsumexp(x, return_sign=1)
    for function in MAPS:
        with pytest.raises(ValueError, match=r"x of shape \(0, 3\) has no classes"):
            function(x[:0], axis=0)
    for bad in ([[1.0], [1.0, 2.0]], (1.0, object())):
        for function in (*MAPS, xce.logsumexp):
            with pytest.raises(TypeError, match=r"^x (is a list that is no array: expected|has dtype object)"):
                function(bad)
    with pytest.raises(TypeError, match="x has dtype bool"):
        xce.softmax([True, False])


def test_lists_are_arrays(rng: np.random.Generator) -> None:
    rows = rng.integers(-3, 4, (3, 4)).tolist()
    for x in (
        rows,
        tuple(map(tuple, rows)),
        np.asarray(rows, float).tolist(),
        [np.asarray(row, float) for row in rows],
    ):
        for function in (*MAPS, xce.logsumexp):
            for axis in (-1, None):
                same_bits(function(x, axis), function(np.asarray(rows, float), axis))
    same_bits(xce.logsumexp(rows, b=[1, 2, 3, 4]), xce.logsumexp(np.asarray(rows, float), b=np.array([1, 2, 3, 4])))
    where = [True, False, True, True]
    same_bits(xce.softmax(rows, where=where), xce.softmax(np.asarray(rows, float), where=np.asarray(where)))
    assert xce.softmax([np.float32(1), np.float32(2)]).dtype == np.float32


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy", "array_api_strict"])
def test_log_sum_exp_of_nothing(library: str) -> None:
    """The logarithm of 0, as in SciPy."""
    xp = pytest.importorskip(library)
    for shape, axis in (((2, 0), -1), ((0, 3), 0), ((2, 0), None), ((2, 0), 0), ((0,), -1), ((2, 0, 0), (1, 2))):
        for keepdims in (False, True):
            x = np.zeros(shape, np.float32)
            with np.errstate(divide="ignore"):
                expected = np.log(np.sum(x, axis, keepdims=keepdims))
            for b in (None, 2.0):
                found = xce.logsumexp(xp.asarray(x), axis, b=b, keepdims=keepdims)
                assert "float32" in str(found.dtype)
                np.testing.assert_array_equal(np.asarray(found), expected)
                lse, sign = xce.logsumexp(xp.asarray(x), axis, b=b, keepdims=keepdims, return_sign=True)
                np.testing.assert_array_equal(np.asarray(lse), expected)
                np.testing.assert_array_equal(np.asarray(sign), np.zeros_like(expected))
    assert xce.logsumexp([]) == -INF
    assert xce.logsumexp(np.zeros((2, 0), np.float64)).dtype == np.float64

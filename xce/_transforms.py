"""softmax, log_softmax and logsumexp over one axis or several: SciPy's arguments to calls over one, and results back.

Axes that can be joined without a copy are; others are brought side by side in a copy, as one class axis at the end.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any

import numpy as np

from xce import _checks as check
from xce._arrays import Array, device_of, dtype_name, in_float64, namespace, parts, widen
from xce._call import Call
from xce._engines import Engine
from xce._engines.numbers import fill
from xce._libraries import arrays_of
from xce._options import checked
from xce._rows import map_call, see

__all__ = ["log_sum_exp", "transform"]

_BLOCK = 1 << 13  # numbers of a weighted sum that are computed on at a time, in float64
_FAR = 700.0  # exp of it, or of minus it, is within the range of float64
# Factors as far apart as this, or as far from 1, are taken together with their exponentials.
_ALIKE, _LEAST = 2.0**100, 2.0**-500
_SHIFT = 600  # binary places by which those near an end of their range are moved to its middle


def transform(op: str, x: Array, axis: Any, out: Array | None, options: Any) -> Any:
    """Return softmax or log_softmax of `x` over any axes."""
    x, given = _of_numbers(x, "x"), checked(op, options)
    given |= {"where": _of_numbers(given.get("where"), "where"), "out": out}
    arrays, axis = arrays_of(x, "x"), _one_axis(axis, x)
    with arrays.place():
        x = arrays.view_first()
        given |= see(arrays, x, given)
        if isinstance(axis, Integral):
            result = arrays.engine.run(map_call(op, x, axis, given))
        else:
            result = _over_axes(arrays.engine, x, op, axis, given)
    return arrays.wrap(result) if out is None else out


def _over_axes(engine: Engine, x: Array, op: str, axis: Any, given: dict[str, Any]) -> Any:
    out, (x, axes, where) = given.pop("out"), _checked(x, axis, given["where"])
    if out is not None:
        check.buffers(x, "x", {"out": out}, {"where": where})
    call = _joined_call(op, x, axes, given | {"where": where})
    return fill(out, _parted(engine.run(call), x.shape, axes))


def log_sum_exp(x: Array, axis: Any, b: Array, keepdims: Any, return_sign: Any, where: Array, n_threads: Any) -> Any:
    """Return log(sum(b exp(x))) over any axes, and the sign of the sum if that is asked for."""
    x, b, where = _of_numbers(x, "x"), _of_numbers(b, "b"), _of_numbers(where, "where")
    arrays, axis = arrays_of(x, "x"), _one_axis(axis, x)
    keepdims, return_sign = check.flag("keepdims", keepdims), check.flag("return_sign", return_sign)
    options = checked("softmax", {"where": where, "n_threads": n_threads})
    with arrays.place():
        x = arrays.view_first()
        given = options | see(arrays, x, {"where": where, "b": b}, ("b",))
        if isinstance(axis, Integral) and b is None:
            call = map_call("logsumexp", x, axis, given)
            found: Any = _lse_of(arrays.engine, call), None, (call.axis,)
        else:
            found = _lse_over_axes(arrays.engine, x, axis, given)
        lse, sign, axes = found
        if return_sign and sign is None:  # that of a sum of exponentials: 0 if none is left, NaN if one is
            xp = namespace(lse)
            sign = xp.where(xp.isnan(lse), lse, xp.astype(lse > -math.inf, lse.dtype))
        elif sign is not None and not return_sign:
            lse = namespace(lse).where(sign < 0, math.nan, lse)
        for axis in axes if keepdims else ():
            lse, sign = (None if a is None else a[(slice(None),) * axis + (None, ...)] for a in (lse, sign))
    return (arrays.wrap(lse), arrays.wrap(sign)) if return_sign else arrays.wrap(lse)


def _lse_over_axes(
    engine: Engine, x: Array, axis: Any, given: dict[str, Any]
) -> tuple[Array, Array | None, tuple[int, ...]]:
    """Return the log of the sum's size, the sign of a weighted sum, and the axes."""
    (x, axes, where), b = _checked(x, axis, given.get("where")), given.pop("b", None)
    if b is not None:
        b = check.broadcast(check.of_dtype(b, "b", *check.NUMBERS), "b", x.shape, "x")
    if b is None or not math.prod(x.shape[axis] for axis in axes):
        return _lse_of(engine, _joined_call("logsumexp", x, axes, given | {"where": where})), None, axes
    return *_weighted(x, b, where, axes), axes


def _lse_of(engine: Engine, call: Call) -> Array:
    """Return the log-sum-exp of rows: -inf where there are no classes, as SciPy does."""
    x, axis = call.logits, call.axis
    if x.shape[axis]:
        return engine.run(call)
    xp = namespace(x)
    dtype = xp.float64 if dtype_name(x.dtype) == "float64" else xp.float32
    return xp.full(x.shape[:axis] + x.shape[axis + 1 :], -math.inf, dtype=dtype, device=device_of(x))


def _of_numbers(x: Any, name: str) -> Any:
    """Return lists and tuples as arrays of NumPy, whole numbers in logits as float64, and anything else as it is."""
    if not isinstance(x, list | tuple):
        return x
    x = check.from_list(x, name)
    return x.astype(np.float64) if name == "x" and x.dtype.kind in "iu" else x


def _one_axis(axis: Any, x: Array) -> Any:
    """Return the axis alone where there is one, which needs no joining."""
    if axis is None and len(x.shape) == 1:
        return -1
    return axis[0] if isinstance(axis, tuple | list) and len(axis) == 1 else axis


def _checked(x: Array, axis: Any, where: Array) -> tuple[Array, tuple[int, ...], Array]:
    """Return what is computed on, the axes, and the mask, broadcast, or None."""
    x = check.of_dtype(x, "x", *check.FLOATS)
    axes = check.axes(axis, len(x.shape), "x")
    if where is not None:
        where = check.broadcast(check.typed(where, "where", "bool"), "where", x.shape, "x")
    return x, axes, where


def _joined_call(op: str, x: Array, axes: tuple[int, ...], given: dict[str, Any]) -> Call:
    """Return the checked call over axes that are joined."""
    where = None if given["where"] is None else _joined(given["where"], axes)
    return map_call(op, _joined(x, axes), -1, given | {"where": where})


def _joined(x: Array, axes: tuple[int, ...]) -> Array:
    """Return `x` with the axes joined to one, the last."""
    xp = namespace(x)
    rows = [axis for axis in range(len(x.shape)) if axis not in axes]
    n_classes = math.prod(x.shape[axis] for axis in axes)
    x = xp.permute_dims(x, (*rows, *axes))
    return xp.reshape(x, (*(x.shape[: len(rows)]), n_classes))


def _parted(x: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Return what `_joined` has joined in the shape that it had."""
    xp = namespace(x)
    order = [axis for axis in range(len(shape)) if axis not in axes] + list(axes)
    x = xp.reshape(x, tuple(shape[axis] for axis in order))
    return xp.permute_dims(x, tuple(order.index(axis) for axis in range(len(shape))))


def _weighted(x: Array, b: Array, where: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return log|sum(b exp(x))| and the sign of the sum over some axes.

    What is computed on at a time, and in which order, depends on the shape alone.
    """
    xp = namespace(x)
    dtype = xp.float64 if dtype_name(x.dtype) == "float64" else xp.float32
    rows = [axis for axis in range(len(x.shape)) if axis not in axes]
    shape, classes = (tuple(x.shape[axis] for axis in some) for some in (rows, axes))
    x, b, where = (None if a is None else xp.permute_dims(a, (*axes, *rows)) for a in (x, b, where))
    lse, sign = (xp.empty(shape, dtype=dtype, device=device_of(x)) for _ in range(2))
    width = _size(next(parts(classes, _BLOCK)))
    with np.errstate(all="ignore"):
        for part in parts(shape, max(_BLOCK // width, 1)):
            blocks: Any = functools.partial(_blocks, xp, x, b, where, part, classes)
            if width == math.prod(classes):  # several are read twice
                blocks = list(blocks()).copy
            weighted = _WeightedSum(xp, blocks, xp.zeros(_size(part), dtype=xp.float64, device=device_of(x)))
            to = lse[(*part, ...)].shape
            for out, result in zip((lse, sign), weighted.log_and_sign(), strict=True):
                out[(*part, ...)] = xp.astype(xp.reshape(result, to), dtype)
    return lse, sign


def _size(part: tuple[slice, ...]) -> int:
    return math.prod(at.stop - at.start for at in part)


def _blocks(
    xp: Any, x: Array, b: Array, where: Array | None, part: tuple[slice, ...], classes: tuple[int, ...]
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yield logits and factors of some rows, side by side, class by class, and which of them count, or None: all."""

    def block(a: Array) -> Array:
        return xp.reshape(widen(a[(*some, *part, ...)]), (-1,))

    for some in parts(classes, _BLOCK):
        shape = _size(some), _size(part)
        z, factor = (xp.reshape(in_float64(block(a)), shape) for a in (x, b))
        counts = factor != 0
        if where is not None:
            counts = counts & xp.reshape(xp.astype(block(where), xp.bool), shape)
        yield z, factor, None if bool(xp.all(counts)) else counts


class _WeightedSum:
    """The sum of b exp(x) over the blocks of some rows, in units of exp(reference) and in two parts.

    The reference is the greatest x. Rows with factors of very different sizes, or near an end of their range, are
    *hard*: their reference is that of the greatest term, scaled by a power of two. What is not finite is kept apart.
    """

    def __init__(
        self, xp: Any, blocks: Callable[[], Iterable[tuple[Array, Array, Array | None]]], zeros: Array
    ) -> None:
        self.xp = xp
        greatest, low, high = zeros - math.inf, zeros + math.inf, zeros
        for x, b, counts in blocks():
            sizes = xp.abs(b)
            kept = (
                (x, sizes, sizes)
                if counts is None
                else (xp.where(counts, x, -math.inf), xp.where(counts, sizes, math.inf), xp.where(counts, sizes, 0.0))
            )
            greatest = xp.maximum(greatest, _folded(xp, xp.maximum, kept[0]))
            low = xp.minimum(low, _folded(xp, xp.minimum, kept[1]))
            high = xp.maximum(high, _folded(xp, xp.maximum, kept[2]))
        is_alike = (low >= _LEAST) & (high <= 1 / _LEAST) & (high <= _ALIKE * low)
        self.is_hard = ~(is_alike & (greatest < math.inf))
        self.x, self.scale, self.others = xp.where(xp.isfinite(greatest), greatest, 0.0), zeros + 1, zeros
        self.any_hard, bound = bool(xp.any(self.is_hard)), high
        if self.any_hard:
            bound = self._look_at_terms(blocks(), zeros, high)
        self.unit = 4 * _BLOCK * bound
        self.total = functools.reduce(_added, (self._sum_of(*block) for block in blocks()))

    def _look_at_terms(self, blocks: Iterable[tuple[Array, Array, Array | None]], zeros: Array, bound: Array) -> Array:
        """Find the greatest terms of rows that are hard, and those that are not finite; return bounds of all terms."""
        xp, greatest, of_x, of_b = self.xp, zeros - math.inf, zeros, zeros + 1
        for x, b, counts in blocks:
            size = _log_of_term(xp, x, b, counts)
            is_other = xp.isnan(size) | (size == math.inf)
            others = xp.where(is_other, xp.where(xp.isnan(size), size, b * math.inf), 0.0)
            self.others = self.others + xp.sum(others, axis=0)
            size = xp.where(is_other, -math.inf, size)
            place = xp.argmax(size, axis=0)[None, :]
            size, x, b = (xp.take_along_axis(a, place, axis=0)[0, :] for a in (size, x, b))
            is_greater = size > greatest
            greatest, of_x, of_b = (
                xp.where(is_greater, new, old) for new, old in ((size, greatest), (x, of_x), (b, of_b))
            )
        of_b = xp.abs(of_b)
        scale = xp.where(of_b < _LEAST, 2.0**_SHIFT, xp.where(of_b > 1 / _LEAST, 2.0**-_SHIFT, self.scale))
        self.x, self.scale = xp.where(self.is_hard, of_x, self.x), xp.where(self.is_hard, scale, self.scale)
        return xp.where(self.is_hard, of_b * self.scale, bound)

    def _sum_of(self, x: Array, b: Array, counts: Array | None) -> tuple[Array, Array]:
        """Return the sums of the terms of a block, added in a tree."""
        xp = self.xp
        if self.any_hard:
            counts = xp.isfinite(_log_of_term(xp, x, b, counts))
        if counts is not None:
            x, b = xp.where(counts, x, self.x), xp.where(counts, b, 0.0)
        d = x - self.x
        terms = b * xp.exp(d)
        if self.any_hard:  # neither a factor nor an exponential alone need be within the range of their product
            near, is_first = xp.clip(d, -_FAR, _FAR), (xp.abs(b) < 1) == (self.scale > 1)
            hard = b * xp.where(is_first, self.scale, 1.0) * xp.exp(near)
            hard = hard * xp.where(is_first, 1.0, self.scale) * xp.exp(d - near)
            terms = xp.where(self.is_hard, hard, terms)
        # multiples of a unit that is so large that their sums are exact, and what these leave
        high = (terms + self.unit) - self.unit
        return _folded(xp, operator.add, high), _folded(xp, operator.add, terms - high)

    def log_and_sign(self) -> tuple[Array, Array]:
        """Return the logarithm of the sum's size, and its sign."""
        xp = self.xp
        total, low = _added((self.total[0], 0.0), (self.total[1], 0.0))
        sign, size, rest = xp.sign(total), xp.abs(total), xp.where(total < 0, -low, low)
        is_near = (size > 0.5) & (size < 2)  # where the logarithm lives on what is beside 1
        log = xp.where(is_near, xp.log1p((size - 1) + rest), xp.log(size) + rest / size) - xp.log(self.scale)
        lse = xp.where(size == 0, -math.inf, self.x + log)
        is_other = self.others != 0
        return xp.where(is_other, xp.abs(self.others), lse), xp.where(is_other, xp.sign(self.others), sign)


def _folded(xp: Any, function: Callable[[Array, Array], Array], x: Array) -> Array:
    """Return the greatest, the least or the sum of each column, taken in a tree whatever the strides.

    Where rows are short, NumPy's own reductions take ten times as long.
    """
    while (n := x.shape[0]) > 1:
        half = n // 2
        folded = function(x[:half, :], x[half : 2 * half, :])
        x = xp.concat([folded, x[-1:, :]], axis=0) if n % 2 else folded
    return x[0, :]


def _log_of_term(xp: Any, x: Array, b: Array, counts: Array | None) -> Array:
    size = x + xp.log(xp.abs(b))
    return size if counts is None else xp.where(counts, size, -math.inf)


def _added(a: tuple[Array, Any], b: tuple[Array, Any]) -> tuple[Array, Array]:
    """Return the sum of two numbers in two parts each, what it rounds away added to the second (Knuth's two-sum)."""
    total = a[0] + b[0]
    back = total - a[0]
    return total, (a[1] + b[1]) + ((a[0] - (total - back)) + (b[0] - back))

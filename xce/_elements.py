"""Losses of single elements: arguments to one checked `ElementCall`; what `_rows` is for the losses of rows."""

from __future__ import annotations

import decimal
import math
from functools import lru_cache
from typing import Any, NamedTuple

from numpy import ndarray

from xce import _checks as check
from xce._arrays import Array, dtype_name, namespace
from xce._call import ElementCall
from xce._core import plain_element_loss
from xce._engines import Engine
from xce._libraries import Arrays, arrays_of
from xce._options import DEFAULTS, checked
from xce._rows import finish, outputs, returned, see

# dtypes of targets that are signs
SIGNS = ("int8", "int16", "int32", "int64", *check.FLOATS)

# what factors of elements may be
_SIGNED = (-math.inf, None, "expected finite weights")
_FACTORS = {"pos_weight": check.FINITE_NOT_NEGATIVE, "alpha": (0.0, 1.0, "expected alphas between 0 and 1")}


class ElementLoss(NamedTuple):
    """What a public loss of single elements takes."""

    function: str  # its name
    formula: str
    name: str = "logits"  # of what it is a function of
    kinds: tuple[str, ...] = check.NUMBERS  # dtypes of the target
    range: tuple[float, float | None, str] | None = None  # of that, and
    target_range: tuple[float, float | None, str] | None = check.BETWEEN_0_AND_1
    factors: tuple[str, str] = ("weight", "pos_weight")  # the names of the two that it may take besides sample weights


def element_loss(
    loss: ElementLoss,
    params: tuple[float, ...],
    x: Array,
    target: Array,
    options: Any,
    factors: tuple[Array | None, Array | None] = (None, None),
    axis: Any = None,
    reduction: str | None = None,
) -> Any:
    """Return what a public loss of single elements returns; `axis` is that of means over the classes of a row.

    A reduction that is not among the options is an own parameter of the loss, and checked.
    """
    arrays, result = arrays_of(x, loss.name), None
    names = *loss.factors, "sample_weight"
    with arrays.place():
        seen, y = arrays.view_first(), arrays.view(target, "target")
        found = see(arrays, seen, dict(zip(loss.factors, factors, strict=True)) | options, names)
        if type(seen) is ndarray is not type(x) and axis is factors[0] is factors[1] is None:
            result = plain_element_loss(loss, params, seen, y, options | found, reduction)
        if result is None:
            given = checked(loss.function, options) | found
            if reduction is not None:
                given["reduction"] = reduction
            call = element_call(arrays, loss, params, seen, y, given, axis)
            result = returned(call, arrays.engine.run(call))
    return finish(arrays, result, options)


def element_call(
    arrays: Arrays,
    loss: ElementLoss,
    params: tuple[float, ...],
    x: Array,
    target: Array,
    options: dict[str, Any],
    axis: Any,
) -> ElementCall:
    """Return the checked call, of arrays that are seen and options that are checked; factors are among these."""
    engine, name, given = arrays.engine, loss.name, DEFAULTS | options
    x = check.of_dtype(x, name, *check.FLOATS)
    target = check.of_dtype(target, "target", *loss.kinds)
    if target.shape != x.shape:
        raise ValueError(f"target has shape {target.shape}: expected {x.shape}, the shape of {name}")
    validate = given["validate"]
    if axis is not None:
        axis = check.class_axis(axis, len(x.shape), name)
        if x.shape[axis] == 0:
            raise ValueError(f"{name} of shape {x.shape} has no classes: expected at least one on axis {axis}")
    named = {key: given.get(key) for key in (*loss.factors, "sample_weight")}
    for key, factor in named.items():
        if factor is not None:
            named[key] = _factor(engine, factor, key, x, name, axis, validate)
    weight, pos_weight, sample_weight = named.values()
    if validate:
        removing = tuple(w for w in (weight, sample_weight) if w is not None)
        if loss.range is not None:
            check.values(engine, x, name, *loss.range, weights=removing)
        if loss.target_range is not None and dtype_name(target.dtype) != "bool":
            check.values(engine, target, "target", *loss.target_range, weights=removing)
    fields = outputs(x, name, given, {"target": target} | named)
    return ElementCall(
        "element", loss.formula, params, x, target, weight, pos_weight, sample_weight, axis, validate, **fields
    )


def _factor(engine: Engine, factor: Array, key: str, x: Array, name: str, axis: int | None, validate: bool) -> Array:
    """Return factors of the elements, checked and broadcast to them."""
    factor = check.of_dtype(factor, key, *check.NUMBERS)
    if validate and dtype_name(factor.dtype) != "bool":
        is_class_weight = axis is not None and key == "weight"
        allowed = check.FINITE_NOT_NEGATIVE if is_class_weight else _FACTORS.get(key, _SIGNED)
        check.values(engine, factor, key, *allowed)
    if axis is None:
        return check.broadcast(factor, key, x.shape, name)
    xp = namespace(x)
    if key == "sample_weight":  # one per row
        rows = x.shape[:axis] + x.shape[axis + 1 :]
        factor = xp.expand_dims(check.broadcast(factor, key, rows, "the rows"), axis=axis)
    else:  # one per class
        if factor.shape != (x.shape[axis],):
            raise ValueError(f"{key} has shape {factor.shape}: expected {(x.shape[axis],)}, one {key} per class")
        factor = xp.reshape(factor, (-1, *(1,) * (len(x.shape) - axis - 1)))
    return xp.broadcast_to(factor, x.shape)


@lru_cache(maxsize=64)
def logit_in_two_parts(p: float) -> tuple[float, float]:
    """Return log(p / (1 - p)) for 0 < p < 1 as a number and what it lacks."""
    with decimal.localcontext(decimal.Context(prec=60)):
        exact = decimal.Decimal(p)
        logit = exact.ln() - (1 - exact).ln()
        high = float(logit)
        return high, float(logit - decimal.Decimal(high))

"""Losses of single elements: arguments to one checked `ElementCall`; what `_call` is for the losses of rows."""

from __future__ import annotations

import decimal
import math
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from xce import _check as check
from xce._call import finish, outputs, plain_views, viewed_buffers, wrapped
from xce._check import Array
from xce._core import plain_element_loss
from xce._dispatch import namespace, owner_of, placed, view
from xce._options import DEFAULTS, checked

__all__ = ["SIGNS", "ElementCall", "ElementLoss", "element_call", "element_loss", "logit_in_two_parts"]

# kinds of targets: the dtypes that they may have
LABELS = ("bool", *check.INTEGERS, *check.FLOATS)
SIGNS = ("int8", "int16", "int32", "int64", *check.FLOATS)

# what factors of elements may be
_SIGNED = (-math.inf, None, "expected finite weights")
_FACTORS = {"pos_weight": check.FINITE_NOT_NEGATIVE, "alpha": (0.0, 1.0, "expected alphas between 0 and 1")}


class ElementCall(NamedTuple):
    """One checked computation of f(x, y) for every element; see `_call.Call`."""

    op: str  # "element"
    formula: str  # the function f, and
    params: tuple[float, ...]  # its parameters
    logits: Array  # x: logits, or whatever the loss is a function of; floating
    target: Array  # y, of the same shape: bool, integers or floating
    weight: Array  # None, or factors of the elements, broadcast to the shape of x: bool, integers or floating
    pos_weight: Array  # None, or a second parameter of f, which may also be the alpha of a class, likewise
    sample_weight: Array  # None, or factors that the mean counts, likewise
    axis: int | None  # the axis over which elements are averaged to rows
    validate: bool
    reduction: str  # "mean" | "batchmean" | "sum" | "none"
    return_grad: bool
    return_hess: bool
    n_threads: int | None
    grad_out: Array
    hess_out: Array


class ElementLoss(NamedTuple):
    """What a public loss of single elements takes."""

    function: str  # its name
    formula: str
    name: str = "logits"  # of what it is a function of
    kinds: tuple[str, ...] = LABELS  # dtypes of the target
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
    owner = owner_of(x, loss.name)
    is_bare = axis is factors[0] is factors[1] is None
    if is_bare and (arrays := plain_views(owner, loss.name, x, target, options)) is not None:
        result = plain_element_loss(loss, params, *arrays, options, reduction)
        if result is not None:
            return wrapped(owner, result)
    options = checked(loss.function, options)
    if reduction is not None:
        options["reduction"] = reduction
    call = element_call(owner, loss, params, x, target, options, factors, axis)
    return finish(owner, call, owner.run(call), options)


@placed(3)
def element_call(
    owner: ModuleType,
    loss: ElementLoss,
    params: tuple[float, ...],
    x: Array,
    target: Array,
    options: dict[str, Any],
    factors: tuple[Array | None, Array | None],
    axis: Any,
) -> ElementCall:
    """Return the checked call, whose options have been checked as far as alone."""
    name, first, given = loss.name, x, DEFAULTS | options
    x = check.of_dtype(owner.view(first, name), name, *check.FLOATS)
    target = check.of_dtype(view(owner, first, target, "target", name), "target", *loss.kinds)
    if target.shape != x.shape:
        raise ValueError(f"target has shape {target.shape}: expected {x.shape}, the shape of {name}")
    validate = given["validate"]
    if axis is not None:
        axis = check.class_axis(axis, len(x.shape), name)
        if x.shape[axis] == 0:
            raise ValueError(f"{name} of shape {x.shape} has no classes: expected at least one on axis {axis}")
    named = dict(zip((*loss.factors, "sample_weight"), (*factors, given["sample_weight"]), strict=True))
    for key, factor in named.items():
        if factor is not None:
            array = check.view_factors(owner, first, name, x, factor, key)
            named[key] = _factor(owner, array, key, x, name, axis, validate)
    weight, pos_weight, sample_weight = named.values()
    if validate:
        removing = tuple(w for w in (weight, sample_weight) if w is not None)
        if loss.range is not None:
            check.values(owner, x, name, *loss.range, weights=removing)
        if loss.target_range is not None and check.dtype_name(target.dtype) != "bool":
            check.values(owner, target, "target", *loss.target_range, weights=removing)
    returned = outputs(x, name, given, viewed_buffers(owner, first, given, name), {"target": target} | named)
    return ElementCall(
        "element", loss.formula, params, x, target, weight, pos_weight, sample_weight, axis, validate, **returned
    )


def _factor(owner: ModuleType, factor: Array, key: str, x: Array, name: str, axis: int | None, validate: bool) -> Array:
    """Return factors of the elements, checked and broadcast to them."""
    factor = check.of_dtype(factor, key, *LABELS)
    if validate and check.dtype_name(factor.dtype) != "bool":
        is_class_weight = axis is not None and key == "weight"
        allowed = check.FINITE_NOT_NEGATIVE if is_class_weight else _FACTORS.get(key, _SIGNED)
        check.values(owner, factor, key, *allowed)
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

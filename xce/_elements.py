"""Losses of single elements: arguments to one checked `ElementCall`; what `_call` is for the losses of rows."""

from __future__ import annotations

import decimal
import math
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

from xce import _check as check
from xce._check import REDUCTIONS, Array
from xce._dispatch import namespace, placed, view, view_buffer

__all__ = ["ElementCall", "logit_in_two_parts", "normalise_elements"]

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
    reduction: str  # "mean" | "batchmean" | "sum" | "none"
    return_grad: bool
    return_hess: bool
    grad_out: Array
    hess_out: Array
    n_threads: int | None
    validate: bool


@placed(3)
def normalise_elements(
    owner: ModuleType,
    formula: str,
    params: tuple[float, ...],
    x: Array,
    name: str,
    target: Array,
    kinds: tuple[str, ...],
    *,
    x_range: tuple[float, float | None, str] | None = None,
    target_range: tuple[float, float | None, str] | None = None,
    weight: Array | float | None = None,
    pos_weight: Array | float | None = None,
    pos_weight_name: str = "pos_weight",
    sample_weight: Array | float | None,
    axis: int | None = None,
    reduction: str,
    reductions: tuple[str, ...] = REDUCTIONS,
    return_grad: bool,
    return_hess: bool,
    grad_out: Array | None,
    hess_out: Array | None,
    n_threads: int | None,
    validate: bool,
) -> ElementCall:
    """Return the checked call; `name` is what the user calls x, `kinds` are the dtypes of the target."""
    first, x = x, check.of_dtype(owner.view(x, name), name, *check.FLOATS)
    target = check.of_dtype(view(owner, first, target, "target", name), "target", *kinds)
    if target.shape != x.shape:
        raise ValueError(f"target has shape {target.shape}: expected {x.shape}, the shape of {name}")
    validate = check.flag("validate", validate)
    if axis is not None:
        axis = check.class_axis(axis, len(x.shape), name)
        if x.shape[axis] == 0:
            raise ValueError(f"{name} of shape {x.shape} has no classes: expected at least one on axis {axis}")
    factors = {"weight": weight, pos_weight_name: pos_weight, "sample_weight": sample_weight}
    if not (weight is pos_weight is sample_weight is None):
        for key, factor in factors.items():
            if factor is not None:
                array = check.view_factors(owner, first, name, x, factor, key)
                factors[key] = _factor(owner, array, key, x, name, axis, validate)
    if validate:
        removing = tuple(w for w in (factors["weight"], factors["sample_weight"]) if w is not None)
        if x_range is not None:
            check.values(owner, x, name, *x_range, weights=removing)
        if target_range is not None and check.dtype_name(target.dtype) != "bool":
            check.values(owner, target, "target", *target_range, weights=removing)
    return_grad, return_hess = check.flag("return_grad", return_grad), check.flag("return_hess", return_hess)
    if not (grad_out is hess_out is None):
        grad_out = view_buffer(owner, first, grad_out, "grad_out", name)
        hess_out = view_buffer(owner, first, hess_out, "hess_out", name)
        check.asked((grad_out, return_grad, "grad"), (hess_out, return_hess, "hess"))
        check.buffers(x, name, {"grad_out": grad_out, "hess_out": hess_out}, {"target": target} | factors)
    return ElementCall(
        op="element",
        formula=formula,
        params=params,
        logits=x,
        target=target,
        weight=factors["weight"],
        pos_weight=factors[pos_weight_name],
        sample_weight=factors["sample_weight"],
        axis=axis,
        reduction=check.choice("reduction", reduction, reductions),
        return_grad=return_grad,
        return_hess=return_hess,
        grad_out=grad_out,
        hess_out=hess_out,
        n_threads=check.thread_count("n_threads", n_threads),
        validate=validate,
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

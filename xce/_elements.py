"""Losses of single elements: arguments to one checked `ElementCall`; what `_call` is for the losses of rows."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from xce import _check as check
from xce._check import REDUCTIONS, Array
from xce._dispatch import placed, view

__all__ = ["ElementCall", "normalise_elements"]

# kinds of targets: the dtypes that they may have
LABELS = ("bool", *check.INTEGERS, *check.FLOATS)
SIGNS = ("int8", "int16", "int32", "int64", *check.FLOATS)


class ElementCall(NamedTuple):
    """One checked computation of f(x, y) for every element; see `_call.Call`."""

    op: str  # "element"
    formula: str  # the function f, and
    params: tuple[float, ...]  # its parameters
    logits: Array  # x: logits, or whatever the loss is a function of; floating
    target: Array  # y, of the same shape: bool, integers or floating
    weight: Array  # None, or factors of the elements, broadcast to the shape of x
    pos_weight: Array  # None, or a second parameter of f, likewise
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
    weight: Array | None = None,
    pos_weight: Array | None = None,
    sample_weight: Array | None,
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
    first, x = x, check.typed(owner.view(x, name), name, *check.FLOATS)
    target = check.typed(view(owner, first, target, "target", name), "target", *kinds)
    if target.shape != x.shape:
        raise ValueError(f"target has shape {target.shape} but must have {x.shape}, the shape of {name}")
    validate = check.flag("validate", validate)
    if axis is not None:
        axis = check.class_axis(axis, len(x.shape), name)
        if x.shape[axis] == 0:
            raise ValueError(f"{name} of shape {x.shape} has no classes: axis {axis} must have at least one")
    if validate:
        if x_range is not None:
            check.values(owner, x, name, *x_range)
        if target_range is not None and check.dtype_name(target.dtype) != "bool":
            check.values(owner, target, "target", *target_range)
    factors = {"weight": weight, "pos_weight": pos_weight, "sample_weight": sample_weight}
    if not (weight is pos_weight is sample_weight is None):
        for key, factor in factors.items():
            if factor is not None:
                factors[key] = _factor(owner, view(owner, first, factor, key, name), key, x, name, axis, validate)
    return_grad, return_hess = check.flag("return_grad", return_grad), check.flag("return_hess", return_hess)
    if not (grad_out is hess_out is None):
        grad_out = None if grad_out is None else view(owner, first, grad_out, "grad_out", name)
        hess_out = None if hess_out is None else view(owner, first, hess_out, "hess_out", name)
        check.asked((grad_out, return_grad, "grad"), (hess_out, return_hess, "hess"))
        check.buffers(x, name, {"grad_out": grad_out, "hess_out": hess_out}, {"target": target} | factors)
    return ElementCall(
        op="element",
        formula=formula,
        params=params,
        logits=x,
        target=target,
        **factors,
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
    factor = check.factors(owner, factor, key, validate)
    if axis is None:
        return check.broadcast(factor, key, x.shape, name)
    from array_api_compat import array_namespace

    xp = array_namespace(x)
    if key == "sample_weight":  # one per row
        rows = x.shape[:axis] + x.shape[axis + 1 :]
        factor = xp.expand_dims(check.broadcast(factor, key, rows, "the rows"), axis=axis)
    else:  # one per class
        if factor.shape != (x.shape[axis],):
            raise ValueError(f"{key} has shape {factor.shape} but must have {(x.shape[axis],)}, one {key} per class")
        factor = xp.reshape(factor, (-1, *(1,) * (len(x.shape) - axis - 1)))
    return xp.broadcast_to(factor, x.shape)

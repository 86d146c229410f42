"""The options and layouts of `xce.cross_entropy`, which have targets of their own in PERFORMANCE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import xce

from .common import Array, class_labels, make_logits, parse_shape

Arguments = tuple[Array, dict[str, Any]]  # the target, and the options


def class_weight(logits: Array) -> Array:
    """A weight in 0.5 to 1.5 for each class."""
    weight: Array = np.random.default_rng(2).uniform(0.5, 1.5, logits.shape[-1])
    return weight.astype(logits.dtype)


def some_ignored(logits: Array) -> Array:
    """Labels of which one in ten is -100."""
    (labels,) = class_labels(logits)
    labels[::10] = -100
    return labels


def probabilities(logits: Array) -> Array:
    """One distribution over the classes for each row."""
    q: Array = np.exp(np.random.default_rng(3).standard_normal(logits.shape, np.float32))
    q /= q.sum(-1, keepdims=True)
    return q.astype(logits.dtype, copy=False)


# name of the variant: what makes its target and its options
VARIANTS: dict[str, Callable[[Array], Arguments]] = {
    "plain": lambda x: (class_labels(x)[0], {}),
    "label_smoothing": lambda x: (class_labels(x)[0], {"label_smoothing": 0.1}),
    "weight": lambda x: (class_labels(x)[0], {"weight": class_weight(x)}),
    "ignore_index": lambda x: (some_ignored(x), {}),
    "probabilities": lambda x: (probabilities(x), {}),
    "where": lambda x: (class_labels(x)[0], {"where": np.arange(x.shape[-1]) >= 0}),
    "softcap": lambda x: (class_labels(x)[0], {"softcap": 30.0}),
    "z_loss": lambda x: (class_labels(x)[0], {"z_loss": 1e-4}),
}


def variant_call(variant: str, logits: Array, returns: str) -> Callable[[], Any]:
    """A call of `cross_entropy` with that target and those options; the gradient's buffer is reused."""
    target, options = VARIANTS[variant](logits)
    if returns == "grad":
        options = options | {"return_grad": True, "grad_out": np.full_like(logits, 1)}
    return partial(xce.cross_entropy, logits, target, **options)


class Variant:
    """One option on one array, to be compared with `plain`."""

    params = (list(VARIANTS), ["32x10", "65536x10", "8192x1000"], ["value", "grad"])
    param_names = ("variant", "shape", "returns")

    def setup(self, variant: str, shape: str, returns: str) -> None:
        self.call = variant_call(variant, make_logits(parse_shape(shape)), returns)

    def time_cross_entropy(self, *_: str) -> None:
        self.call()


class Segmentation:
    """Classes on axis 1 of (N, C, H, W), as they lie or with the axis moved by hand first."""

    params = (["axis=1", "moved"], ["1x3x4x4", "2x19x512x512"], ["value", "grad"])
    param_names = ("layout", "shape", "returns")

    def setup(self, layout: str, shape: str, returns: str) -> None:
        self.call = segmentation_call(layout, parse_shape(shape), returns)

    def time_cross_entropy(self, *_: str) -> None:
        self.call()


def segmentation_call(layout: str, shape: tuple[int, ...], returns: str) -> Callable[[], Any]:
    """One image batch; `moved` counts the copy that brings the classes to the last axis."""
    logits = make_logits(shape)
    last = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    (labels,) = class_labels(last)
    out = logits if layout == "axis=1" else last
    options: dict[str, Any] = {}
    if returns == "grad":
        options = {"return_grad": True, "grad_out": np.full_like(out, 1)}
    if layout == "axis=1":
        return partial(xce.cross_entropy, logits, labels, axis=1, **options)
    return lambda: xce.cross_entropy(np.ascontiguousarray(np.moveaxis(logits, 1, -1)), labels, **options)

"""The losses and options that the tests run over: one row per loss, one generator of option combinations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import xce
from xce import _dispatch
from xce._backends import generic


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]
    phi: str
    params: tuple[dict[str, float], ...]  # values of the loss's own parameter to try
    modes: tuple[str, ...]  # what a target may be


LOSSES = (Case("cross_entropy", xce.cross_entropy, "cross_entropy", ({},), ("index", "probabilities")),)

# Every option, off and on; True stands for a random `weight`, `sample_weight`, `where` or ignored label.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "weight": (False, True),
    "sample_weight": (False, True),
    "where": (False, True),
    "ignore": (False, True),
    "label_smoothing": (0.0, 0.1),
    "temperature": (1.0, 0.7),
    "softcap": (None, 3.0),
    "z_loss": (0.0, 0.01),
    "reduction": ("mean", "sum", "none"),
}

# Shapes with their class axis: unbatched, batched, and the class axis first, in the middle and of one class.
SHAPES = (((7,), 0), ((5, 7), -1), ((6, 4), 0), ((2, 5, 3, 2), 1), ((3, 1), 1))


def combinations(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the given values of options, by default of `OPTIONS`."""
    options = options or OPTIONS
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


def problem(
    features: dict[str, Any],
    mode: str = "index",
    shape: tuple[int, ...] = (5, 7),
    axis: int = -1,
    dtype: Any = np.float64,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Random logits, target and options with the features of one of `combinations`."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"axis": axis} | {k: v for k, v in features.items() if not isinstance(v, bool)}
    axis %= len(shape)
    rows, n_classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    if mode == "index":
        target = rng.integers(n_classes, size=rows)
        if features.get("ignore") and target.size:
            options["ignore_index"] = ignored = 255 if rng.integers(2) else n_classes - 1
            target = np.where(rng.random(rows) < 0.3, ignored, target)
    else:
        target = rng.random(shape)
        target[rng.random(shape) < 0.2] = 0
        target = (target / (target.sum(axis, keepdims=True) + 1e-300)).astype(dtype)
    if features.get("weight"):
        options["weight"] = (rng.random(n_classes) + 0.5).astype(dtype)
    if features.get("sample_weight"):
        options["sample_weight"] = np.asarray(rng.random(rows) + 0.5).astype(dtype)
    if features.get("where"):
        kept = rng.random(shape) < 0.8
        if mode == "index":  # a removed target would make the loss infinite
            label = np.expand_dims(np.minimum(target, n_classes - 1), axis)
            np.put_along_axis(kept, label, True, axis)
        else:
            kept |= target > 0
        kept |= ~kept.any(axis, keepdims=True)
        options["where"] = kept
    return logits, target, options


def oracle(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a public function, with NumPy arrays computed by the reference instead of the kernels."""
    with mock.patch.dict(_dispatch._owners, {np.ndarray: generic}):
        return function(*args, **options)

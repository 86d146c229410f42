"""Random calls of every public function against an oracle in longdouble, `oracle.py`, which shares no code with xce.

    python tests/fuzz.py --calls 100000 --seed 0
    python tests/fuzz.py --seed 0 --index 4711                 # one call again, and what it was
    python tests/fuzz.py --function focal_loss --processor v3 --without temperature,float_labels
    python tests/fuzz.py --plant smooths_the_others            # a fault put in from outside: expected found

A call is a function of (seed, index). Its results may differ from the oracle's by the limit that the library promises,
in ULP of the size that `oracle.Bound` says. One in ten calls is hostile: something about it is wrong; it must end in
an error that the documentation names and leave all buffers alone. No call may let a warning out, change its inputs, or
return another dtype or kind of array than documented.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import oracle
from cases import computed_by
from checks import at_level, misaligned
from numpy.exceptions import AxisError
from oracle import LD, Bound, Losses

import xce
from xce import metrics

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {
    "float32": np.dtype("float32"), "float64": np.dtype("float64"), "float16": np.dtype("float16"),
    "bfloat16": BFLOAT16,
}  # fmt: skip
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ERRORS = (TypeError, ValueError, xce.LabelError, AxisError)  # what a wrong call may raise

# Groups of features that `--without` leaves out: while the library lacks them, or to look at something else.
GROUPS = {
    "temperature": "temperature and softcap other than the defaults",
    "weight_0": "what a sample_weight of 0 removes holds NaN, infinities and bad labels",
    "weight_0_elements": "the same for the element-wise `weight`",
    "signed": "negative sample weights",
    "float_labels": "class labels as whole-numbered floats, int4 and uint4",
    "emptied": "rows that `where` leaves without a class",
    "epsilon": "poly_loss with a negative epsilon",
    "alpha": "sigmoid_focal_loss with alpha=None or an array",
    "integer_weights": "integers as class weights and pos_weight; numbers for pos_weight and sample_weight",
    "transforms": "where, axis=None and tuples, keepdims, b, return_sign of softmax, log_softmax and logsumexp",
    "where_distillation": "where of distillation_loss",
    "near_divergence": "divergences to 16 and 32 eps however near or far",
    "gce": "generalized_cross_entropy",
    "soft_phi": "losses other than cross entropy with probabilities",
    "binary_smoothing": "label_smoothing of the binary loss",
    "clip": "asymmetric_loss with p near clip",
    "where_mass": "probabilities on classes that `where` removes",
    "strict_integers": "integer targets of elements in libraries that have no kernels",
    "precise_targets": "float64 targets of elements that float32 rounds, where logits are narrower",
    "extreme": "logits whose differences, or whose square, overflow",
    "class_sums": "multilabel_soft_margin_loss of float64 over many classes",
    "one_minus": "alpha and label_smoothing close to 1",
    "warnings": "perplexities beyond the type, whose overflow must not be heard",
    "edges": "NaN, infinities",
    "hostile": "wrong calls",
    "libraries": "other libraries than NumPy",
    "state": "LossState with shards",
}


# Numbers


class Kind(NamedTuple):
    """A floating type: bits of the fraction, least exponent, greatest number."""

    fraction: int
    least: int
    greatest: float


KINDS = {
    np.dtype("float16"): Kind(10, -14, 65504.0),
    BFLOAT16: Kind(7, -126, float(ml_dtypes.finfo(BFLOAT16).max)),
    np.dtype("float32"): Kind(23, -126, float(np.finfo("f4").max)),
    np.dtype("float64"): Kind(52, -1022, float(np.finfo("f8").max)),
}


def ulp(x: Array, dtype: np.dtype[Any]) -> Array:
    """The distance of neighbouring numbers of a type at x."""
    kind = KINDS[dtype]
    exponent = np.maximum(np.frexp(np.where(np.isfinite(x), x, LD(1)))[1] - 1, kind.least)
    return np.ldexp(LD(1), exponent - kind.fraction)


def work_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype("float64") if dtype == np.float64 else np.dtype("float32")


def tiny_of(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(work_type(dtype)).tiny)


# Choices


class Chooser:
    """The random choices of one call."""

    def __init__(self, seed: int, index: int, without: frozenset[str]) -> None:
        self.rng = np.random.default_rng([seed, index])
        self.without = without

    def chance(self, probability: float, group: str | None = None) -> bool:
        return bool(self.rng.random() < probability) and group not in self.without

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def has(self, group: str) -> bool:
        return group not in self.without


# One call


@dataclass
class Expected:
    name: str
    bound: Bound
    limit: float  # in ULP of bound.size
    dtype: np.dtype[Any]  # of the result
    work: np.dtype[Any]  # of the computation
    skip: Array | None = None  # entries about which nothing is promised
    in_eps: bool = False  # whether the limit is in eps of the size, which is up to two ULP


@dataclass
class Call:
    function: str
    library: str
    args: list[Any]
    options: dict[str, Any]
    expected: Callable[[], list[Expected]]
    kinds: tuple[str, ...] = ()  # what the mutations of a hostile call may touch
    note: str = ""
    buffers: dict[str, Any] = field(default_factory=dict)
    raises: tuple[type[Exception], ...] = ()  # a hostile call


class Failure(NamedTuple):
    call: Call
    text: str


class Report:
    """What is counted over all calls."""

    def __init__(self) -> None:
        self.calls = self.refusals = self.comparisons = 0
        self.worst: dict[tuple[str, str], tuple[float, float, int]] = {}

    def saw(self, call: Call, expected: Expected, error: float, index: int) -> None:
        key = call.function + " (reference)" * (call.library == "strict"), expected.name
        used = error / expected.limit / SLACK[-1]
        if key not in self.worst or used > self.worst[key][0]:
            self.worst[key] = used, error, index


# Arrays: how they lie in memory, and whose they are


def spread(a: Array, axis: int) -> Array:
    """Every other place along an axis; what lies between is nonsense."""
    shape = list(a.shape)
    shape[axis] *= 2
    full = np.full(shape, 1 if a.dtype.kind in "biu" else np.nan, a.dtype)
    places = tuple(slice(None, None, 2) if k == axis else slice(None) for k in range(a.ndim))
    full[places] = a
    return full[places]


def reversed_memory(a: Array, axis: int) -> Array:
    return np.flip(np.flip(a, axis).copy(), axis)


def swapped(a: Array) -> Array:
    return a.astype(a.dtype.newbyteorder(">")) if a.dtype.itemsize > 1 and a.dtype != BFLOAT16 else a


def transposed_memory(g: Chooser, a: Array) -> Array:
    order = g.rng.permutation(a.ndim)
    return np.transpose(np.ascontiguousarray(np.transpose(a, order)), np.argsort(order))


def laid_out(g: Chooser, a: Array, writable: bool = False) -> Array:
    """The same numbers elsewhere: any order, strides, direction, byte order, alignment."""
    if isinstance(a, np.generic):
        return np.array(a)
    if not isinstance(a, np.ndarray):
        return a
    a = a.copy()
    if not a.ndim:
        return a
    axis = int(g.rng.integers(a.ndim))
    way = g.one_of("C", "C", "C", "F", "spread", "reversed", "order", "swapped", "misaligned", "read-only")
    if way == "F":
        return np.asfortranarray(a)
    if way == "spread":
        return spread(a, axis)
    if way == "reversed":
        return reversed_memory(a, axis)
    if way == "order":
        return transposed_memory(g, a)
    if way == "misaligned" and a.dtype.itemsize > 1:
        return misaligned(a)
    if way == "swapped" and not writable and PROCESSOR[-1] != "emulated":  # a GPU has no such arrays
        return swapped(a)
    if way == "read-only" and not writable:
        a.flags.writeable = False
    return a


@cache
def torch() -> Any:
    import torch

    return torch


@cache
def jax_numpy() -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy


@cache
def strict() -> Any:
    import array_api_strict

    return array_api_strict


def to_library(library: str, x: Any) -> Any:
    if not isinstance(x, np.ndarray) or library == "numpy":
        return x
    if library == "strict" and x.dtype.itemsize == 2 and x.dtype.kind in "fV":
        x = x.astype(np.float32)
    if library != "jax" and x.dtype.name in ("int4", "uint4"):
        x = x.astype(x.dtype.name.replace("4", "8"))
    x = np.require(x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("=")), requirements=["A", "W"])
    if any(stride < 0 for stride in x.strides) or library != "torch":
        x = x.copy()
    if library == "torch":
        if x.dtype == BFLOAT16:
            return torch().from_numpy(x.view(np.int16)).view(torch().bfloat16)
        return torch().from_numpy(x)
    return (jax_numpy() if library == "jax" else strict()).asarray(x)


def to_numpy(x: Any) -> Array:
    if isinstance(x, (np.ndarray, np.generic, float, int)):
        return np.asarray(x)
    if type(x).__module__.startswith("torch"):
        return x.view(torch().int16).numpy().view(BFLOAT16) if x.dtype == torch().bfloat16 else x.numpy()
    return np.asarray(x)


def library_of(g: Chooser, dtype: np.dtype[Any]) -> str:
    library = g.one_of(*["numpy"] * 17, "torch", "torch", "jax", "strict")
    if PROCESSOR[-1] == "reference":
        library = "strict"
    if library == "strict" and dtype.itemsize == 2:
        return "numpy"
    return library if g.has("libraries") else "numpy"


# Random arguments

CLASSES = (1, 2, 2, 3, 3, 4, 5, 7, 8, 10, 10, 15, 16, 17, 31, 33, 64, 65, 100, 129, 260)
LARGE = (((70, 1000), 1), ((7000, 10), 1), ((3, 23333), 1), ((10, 7000), 0), ((1, 70_001), 1), ((4, 20, 900), 1))


def shape_of(g: Chooser, library: str) -> tuple[Shape, int]:
    """A shape and its class axis; JAX compiles anew for each."""
    if library == "jax":
        return g.one_of(((4, 5), 1), ((7,), 0), ((3, 17), 0), ((2, 5, 3), 1))
    if g.chance(0.01):
        return g.one_of(*LARGE)
    n_classes = g.one_of(*CLASSES)
    most = max(1, 2000 // n_classes)
    n_axes = g.one_of(0, 1, 1, 1, 1, 2, 2, 3)
    rows: list[int] = []
    for _ in range(n_axes):
        rows.append(int(g.rng.integers(0 if g.chance(0.02) else 1, 1 + min(most, g.one_of(3, 8, 40)))))
        most = max(1, most // max(rows[-1], 1))
    axis = int(g.rng.integers(n_axes + 1)) if g.chance(0.4) else n_axes
    return (*rows[:axis], n_classes, *rows[axis:]), axis


def dtype_of(g: Chooser) -> np.dtype[Any]:
    return FLOATS[g.one_of("float32", "float32", "float32", "float64", "float64", "float16", "bfloat16")]


def cast(x: Array, dtype: np.dtype[Any]) -> Array:
    """To a type, finite numbers staying finite."""
    most = KINDS[dtype].greatest
    return np.where(np.isfinite(x), np.clip(x, -most, most), x).astype(dtype)


def numbers(g: Chooser, shape: Shape) -> Array:
    """Logits of every size, finite."""
    x = g.rng.standard_normal(shape)
    kind = g.one_of(
        "random",
        "random",
        "random",
        "wide",
        "wide",
        "offset",
        "offset",
        "rounded",
        "small",
        "subnormal",
        "huge",
        "zero",
    )
    if kind == "wide":
        x = x * g.one_of(10, 30, 100)
    elif kind == "offset":
        x = x * g.one_of(1, 10) + g.one_of(50, -300, 1e4, -1e4, 1e6)
    elif kind == "rounded":
        x = np.round(2 * x)
    elif kind == "small":
        x = x * g.one_of(1e-3, 1e-8, 1e-30)
    elif kind == "subnormal":
        x = x * g.one_of(1e-40, 1e-310)
    elif kind == "huge":
        x = x * g.one_of(1e4, 1e30, 3e38)
    elif kind == "zero":
        x = x * 0
    return x


def confident(g: Chooser, x: Array, labels: Array) -> Array:
    """With some rows whose label stands out, by 5 to 40; rows by classes."""
    chosen = g.rng.random(len(x)) < g.one_of(0.3, 1.0)
    n = np.arange(len(x))[chosen]
    x[n, labels[chosen]] = x[n].max(-1, initial=0) + g.rng.uniform(5, 40, len(n))
    return x


def with_edges(g: Chooser, x: Array) -> Array:
    """With -inf, and rows that are NaN, infinite or empty; rows by classes."""
    if g.chance(0.25, "edges"):
        x = np.where(g.rng.random(x.shape) < g.one_of(0.02, 0.3, 0.8), -np.inf, x)
    if g.chance(0.12, "edges"):
        x = np.where(g.rng.random(x.shape) < g.one_of(0.01, 0.1), g.one_of(np.nan, np.inf), x)
    if g.chance(0.05, "edges"):
        x = np.where(g.rng.random((len(x), 1)) < 0.2, -np.inf, x)
    return x


def to_rows(a: Array, axis: int) -> Array:
    return np.moveaxis(a, axis, -1).reshape(math.prod(a.shape[:axis] + a.shape[axis + 1 :]), a.shape[axis])


def from_rows(a: Array, shape: Shape, axis: int) -> Array:
    rows = shape[:axis] + shape[axis + 1 :]
    return np.ascontiguousarray(np.moveaxis(np.reshape(a, (*rows, shape[axis])), -1, axis))


def some_shape(g: Chooser, shape: Shape) -> Shape:
    """One that broadcasts to a shape."""
    if g.chance(0.5):
        return shape
    kept = tuple(n if g.chance(0.6) else 1 for n in shape)
    return kept[g.rng.integers(len(shape) + 1) :] if g.chance(0.4) else kept


def sample_weights(g: Chooser, rows: Shape, what: str = "weight_0") -> Any:
    """Weights of rows, in a shape that broadcasts to them; sums are exact, so that it is known which are 0."""
    shape = some_shape(g, rows)
    if g.chance(0.08, "integer_weights"):
        return g.one_of(2, 0.5, 0.0, 1.5)
    w = g.rng.integers(1, 17, size=shape) / 8
    if g.chance(0.4):
        w = np.where(g.rng.random(shape) < g.one_of(0.2, 0.6), 0, w)
    if g.chance(0.3, "signed"):
        w = np.where(g.rng.random(shape) < 0.5, -w, w)
    if g.chance(0.03):
        w = w * 0
    if g.chance(0.15):
        return np.asarray(w > 0.5)
    if g.chance(0.15):
        return np.asarray(np.trunc(w)).astype(
            g.one_of("int8", "int32", "int64") if (w < 0).any() else g.one_of(*INTEGERS)
        )
    return np.asarray(w).astype(g.one_of("float32", "float64", "float64", "float16"))


def class_weights(g: Chooser, n_classes: int, dtype: np.dtype[Any]) -> Array:
    w = g.rng.uniform(0.25, 4, n_classes)
    if g.chance(0.3):
        w = np.where(g.rng.random(n_classes) < 0.3, 0, w)
    if g.chance(0.15, "integer_weights"):
        return np.trunc(w).astype(g.one_of(*INTEGERS))
    return cast(w, g.one_of(dtype, np.dtype("float32"), np.dtype("float64"), np.dtype("float16")))


def label_type(g: Chooser, labels: Array) -> Array:
    """Labels in a type that holds them."""
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    fits = [kind for kind in INTEGERS if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max]
    if g.chance(0.1, "float_labels") and abs(lowest) < 2**11 and abs(highest) < 2**11:
        kinds = ["float32", "float64", "float16"] + ["int4"] * (lowest >= -8 and highest <= 7)
        kind = g.one_of(*kinds + ["uint4"] * (lowest >= 0 and highest <= 15))
        if PROCESSOR[-1] == "emulated":  # CuPy has none of 4 bits
            kind = kind.replace("4", "8") if kind.endswith("int4") else kind
        return labels.astype(getattr(ml_dtypes, kind) if kind.endswith("int4") else kind)
    return labels.astype(g.one_of(*fits, "int64") if fits else "int64")


def derivative_flags(g: Chooser, options: dict[str, Any]) -> None:
    if g.chance(0.7):
        options["return_grad"] = True
    if g.chance(0.35):
        options["return_hess"] = True


def buffers(g: Chooser, call: Call, x: Array) -> None:
    """Give some calls buffers, or let the gradient overwrite the logits."""
    if call.library not in ("numpy", "torch"):
        return
    for name in ("grad", "hess"):
        if not call.options.get(f"return_{name}") or not g.chance(0.3):
            continue
        mine = call.args[0]
        is_writable = call.library == "torch" or (mine.flags.writeable and mine.dtype.isnative)
        if name == "grad" and g.chance(0.5) and is_writable and not overlaps(call.args[0]):
            buffer = call.args[0]
        else:
            junk = np.full(x.shape, 7, x.dtype)
            buffer = to_library(call.library, laid_out(g, junk, writable=True))
        call.options[f"{name}_out"] = call.buffers[f"{name}_out"] = buffer


def overlaps(x: Any) -> bool:
    """Whether entries share memory."""
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    return any(stride == 0 and n > 1 for stride, n in zip(strides, x.shape, strict=True))


def common_options(g: Chooser, options: dict[str, Any], reductions: tuple[str, ...] = ("mean", "sum", "none")) -> str:
    reduction = g.one_of(*reductions)
    options["reduction"] = reduction
    derivative_flags(g, options)
    if g.chance(0.2):
        options["n_threads"] = g.one_of(1, 2, 3, 100)
    return str(reduction)


def results_of(
    found: Losses, options: dict[str, Any], dtype: np.dtype[Any], limits: tuple[float, float, float],
    skip: tuple[Array | None, Array | None] = (None, None),
) -> list[Expected]:  # fmt: skip
    """What a call returns, in its order."""
    work = work_type(dtype)
    results = [Expected("loss", found.loss, limits[0], work, work, skip[0])]
    if options.get("return_grad"):
        results.append(Expected("grad", found.grad, limits[1], dtype, work, skip[1]))
    if options.get("return_hess"):
        results.append(Expected("hess", found.hess, limits[2], dtype, work, skip[1]))
    return results


def mapped(found: Losses, rows: Shape, shape: Shape, axis: int) -> Losses:
    """From rows by classes to the shapes that the caller sees."""
    loss = Bound(*(np.reshape(a, rows) for a in found.loss))
    grad, hess = (Bound(*(from_rows(a, shape, axis) for a in b)) for b in found[1:])
    return Losses(loss, grad, hess)


# Softmax losses

PARAMETERS: dict[str, tuple[str, tuple[float, ...]]] = {
    "cross_entropy": ("", (0.0,)),
    "focal_loss": ("gamma", (2.0, 2.0, 0.0, 0.5, 1.0, 5.0, 30.0, 1e4, 1e8)),
    "poly_loss": ("epsilon", (1.0, 0.0, 4.0, 0.3)),
    "generalized_cross_entropy": ("q", (0.7, 0.7, 0.0, 1.0, 0.1)),
    "nll_loss": ("", (0.0,)),
}
IGNORE = (-100, -100, -1, 255, -(2**63), 2**63 - 1)


class Rows(NamedTuple):
    """Random logits, rows by classes and as they are handed over, and their labels."""

    x: Array  # rows by classes, in the type of the call
    labels: Array
    shape: Shape
    axis: int
    rows: Shape


def random_rows(g: Chooser, dtype: np.dtype[Any], library: str, log_probs: bool = False) -> Rows:
    shape, axis = shape_of(g, library)
    rows = shape[:axis] + shape[axis + 1 :]
    n_rows, n_classes = math.prod(rows), shape[axis]
    x = numbers(g, (n_rows, n_classes))
    labels = g.rng.integers(n_classes, size=n_rows)
    if g.chance(0.3):
        labels[:] = n_classes - 1
    if g.chance(0.3):
        x = confident(g, x, labels)
    if log_probs:
        x = -np.abs(x)
    if not g.has("extreme"):
        x = np.clip(x, -KINDS[dtype].greatest / 16, KINDS[dtype].greatest / 16)
    if g.chance(0.05) and n_rows:  # one row, again and again
        x[:] = x[:1]
    return Rows(cast(with_edges(g, x), dtype), labels, shape, axis, rows)


def handed_over(g: Chooser, library: str, x: Array, shape: Shape, axis: int) -> Any:
    """Logits as an argument: rows by classes in their shape, somewhere in memory."""
    full = from_rows(x, shape, axis)
    varying = [k for k, n in enumerate(shape) if k != axis and n > 1]
    if library == "numpy" and varying and g.chance(0.5):
        k = varying[0]
        first = full.take([0], k)
        if np.array_equal(full, np.broadcast_to(first, shape), equal_nan=True):
            return np.broadcast_to(first, shape)  # a stride of 0
    return to_library(library, laid_out(g, full))


def softmax_loss(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    rows_ = random_rows(g, dtype, library, name == "nll_loss")
    x, labels, shape, axis, rows = rows_
    n_rows, n_classes = x.shape
    key, values = PARAMETERS[name]
    parameter = g.one_of(*values)
    if name == "poly_loss" and g.chance(0.3, "epsilon"):
        parameter = g.one_of(-1.0, -0.5, -3.0)
    options: dict[str, Any] = {key: parameter} if key else {}
    reduction = common_options(g, options)
    options |= axis_option(g, axis, shape)

    is_soft = name != "nll_loss" and g.chance(0.35) and (name == "cross_entropy" or g.has("soft_phi"))
    ignore_index, smoothing, temperature, softcap, z_loss = -100, 0.0, 1.0, None, 0.0
    if g.chance(0.4):
        options["ignore_index"] = ignore_index = int(g.one_of(*IGNORE, 0, n_classes - 1))
    if name != "nll_loss":
        if g.chance(0.3):
            options["label_smoothing"] = smoothing = g.one_of(
                0.1, 0.1, 0.5, 1.0, 1e-6, *([0.999, 1 - 1e-6] * g.has("one_minus"))
            )
        if g.chance(0.25, "temperature"):
            options["temperature"] = temperature = g.one_of(0.7, 3.0, 2.0, 0.01, 1e3, 1e-30, 1e30, 1e-3)
        if g.chance(0.15, "temperature"):
            options["softcap"] = softcap = g.one_of(3.0, 30.0, 0.5, 1e6)
        if g.chance(0.2) and (temperature >= 0.01 or g.has("extreme")):
            options["z_loss"] = z_loss = g.one_of(0.01, 1e-4, 1.0)

    weight = class_weights(g, n_classes, dtype) if g.chance(0.25) else None
    sample_weight = sample_weights(g, rows) if g.chance(0.35) else None
    s = None if sample_weight is None else np.broadcast_to(np.asarray(sample_weight), rows).ravel()
    kept = np.ones(x.shape, bool)
    where = None
    if name != "nll_loss" and g.chance(0.2):
        where = g.rng.random(some_shape(g, shape)) < g.one_of(0.5, 0.8)
        kept = to_rows(np.broadcast_to(where, shape), axis)
        if not g.has("emptied") and not kept.any(-1).all():
            where, kept = np.ones(shape, bool), np.ones(x.shape, bool)
        options["where"] = laid_out(g, where)

    target: Array
    is_checked = True
    if is_soft:
        q = g.rng.random(x.shape)
        q[g.rng.random(x.shape) < 0.3] = 0
        if g.chance(0.8):
            q /= np.maximum(q.sum(-1, keepdims=True), 1e-30)
        if g.chance(0.2):  # labels, spelt out
            q = (np.arange(n_classes) == labels[:, None]).astype(float)
        if not g.has("where_mass"):
            q = np.where(kept, q, 0)
        target = cast(q, g.one_of(dtype, dtype, *FLOATS.values()))
    else:
        target = labels
        if g.chance(0.4):
            target = np.where(g.rng.random(n_rows) < g.one_of(0.2, 1.0), ignore_index, labels)
        is_checked = not g.chance(0.1)
        if not is_checked and g.chance(0.5) and ignore_index != n_classes + 3 < 128:
            bad = (g.rng.random(n_rows) < 0.2) & (g.has("weight_0") or s is None or s != 0)
            target = np.where(bad, n_classes + 3, target)
        target = label_type(g, target)
    if s is not None and (s == 0).any():
        nothing = s == 0
        if g.chance(0.5, "weight_0"):
            x = np.where(
                nothing[:, None] & (g.rng.random(x.shape) < 0.5),
                cast(np.array(g.one_of(np.nan, np.inf, -np.inf)), dtype),
                x,
            )
            if is_soft:
                target = np.where(
                    nothing[:, None], cast(np.array(g.one_of(np.nan, -1.0, np.inf)), target.dtype), target
                )
            elif ignore_index != n_classes < 8:
                target = np.where(nothing, target.dtype.type(n_classes), target)
        elif not g.has("weight_0"):
            x = np.where(nothing[:, None], cast(g.rng.standard_normal(x.shape), dtype), x)
    if not is_checked or g.chance(0.1):
        options["validate"] = False
    logits = handed_over(g, library, x, shape, axis)
    if weight is not None:
        options["weight"] = laid_out(g, weight)
    if sample_weight is not None:
        options["sample_weight"] = laid_out(g, sample_weight)
    given = from_rows(target, shape, axis) if is_soft else target.reshape(rows)
    given = int(given) if not given.ndim and given.dtype.kind in "iu" and g.chance(0.5) else laid_out(g, given)
    options = {k: to_library(library, v) for k, v in options.items()}
    call = Call(name, library, [logits, to_library(library, given)], options, list)
    buffers(g, call, from_rows(x, shape, axis))

    def expected() -> list[Expected]:
        chosen = oracle.coefficients(
            target, x.shape, weight=weight, sample_weight=s, kept=kept, ignore_index=ignore_index,
            label_smoothing=smoothing,
        )  # fmt: skip
        exact = oracle.wide(x)
        if name != "nll_loss" and softcap is None:
            is_beyond = not 1e-30 < temperature < 1e30 and library != "strict"  # of float32: computed in float64
            is_wide = is_beyond or (name == "focal_loss" and parameter > 10)
            exact = as_limit(exact, kept, temperature, FLOATS["float64"] if is_wide else work_type(dtype))
        if name == "nll_loss":
            found = oracle.nll(exact, chosen)
        else:
            found = oracle.softmax_loss(
                name, parameter, exact, chosen, kept, temperature=temperature, softcap=softcap, z_loss=z_loss,
                tiny=tiny_of(dtype), is_dense=is_soft or smoothing > 0,
            )  # fmt: skip
        total = oracle.reduced(found, reduction, chosen.share, ~chosen.removed)
        total = Losses(total.loss, *(bound.at(~kept, 0) for bound in total[1:]))
        if reduction == "none":
            total = mapped(total, rows, shape, axis)
        else:
            total = (
                Losses(total.loss, *mapped(found, rows, shape, axis)[1:])
                if reduction == "sum"
                else Losses(total.loss, *(Bound(*(from_rows(a, shape, axis) for a in b)) for b in total[1:]))
            )
        more = (weight is not None) + (s is not None) + (is_soft or smoothing > 0) + (reduction == "mean")
        skip: list[Array | None] = [None, None]
        nan_rows = np.isnan(found.grad.value).any(-1)
        if reduction == "mean" and not np.any(chosen.share != 0):  # NaN rows of a mean over nothing
            skip[1] = from_rows(np.broadcast_to(nan_rows[:, None], x.shape), shape, axis)
        if name == "nll_loss":  # a log-probability of NaN that weighs nothing
            odd = np.isnan(exact).any(-1)
            skip[0] = np.asarray(odd.any()) if reduction != "none" else odd.reshape(rows)
            skip[1] = from_rows(np.broadcast_to(odd[:, None], x.shape), shape, axis)
        if chosen.invalid.any() and reduction == "mean":  # whose weight is anybody's guess; the mean is NaN
            skip[1] = np.ones(shape, bool)
        limits = row_limits(name, parameter, is_soft or smoothing > 0, more)
        if name == "focal_loss" and parameter > 10 and softcap is not None:  # of which twice the limit is promised
            limits = (2 * limits[0], 2 * limits[1], 2 * limits[2])
        if dtype == np.float64 and reduction != "none":  # equal rows, one after the other in eight sums, err alike
            limits = (limits[0] + min(n_rows, 1024) / 16, *limits[1:])
        return results_of(total, options, dtype, limits, (skip[0], skip[1]))

    call.expected = expected
    return call


def as_limit(x: Array, kept: Array, temperature: float, work: np.dtype[Any]) -> Array:
    """Logits of which those are -inf whose distance from the greatest one is beyond the type of the computation."""
    with np.errstate(all="ignore"):
        top = np.where(kept & ~np.isnan(x), x, -np.inf).max(-1, keepdims=True)
        return np.where((top - x) / LD(temperature) > KINDS[work].greatest, -oracle.INF, x)


def row_limits(name: str, parameter: float, is_soft: bool, more: int) -> tuple[float, float, float]:
    """The promised ULP of loss, gradient and Hessian; each factor and quotient adds one rounding or two."""
    loss, grad, hess = 4.0, 6.0, 8.0
    if name == "focal_loss":  # (1 - p)^gamma has gamma times the error of 1 - p, in the same direction as -log p
        loss, grad, hess = (min(a + 1 + 2.5 * parameter, 32.0) for a in (loss, grad, hess))
    if name == "generalized_cross_entropy" and parameter:
        loss, grad, hess = 8.0, 32.0, 32.0
    if name != "cross_entropy" and is_soft:
        loss, grad, hess = (max(32.0, a) for a in (loss, grad, hess))
    return loss + more, grad + more, hess + more


# Losses of single elements


def element_targets(g: Chooser, shape: Shape, dtype: np.dtype[Any], name: str) -> Array:
    """In [0, 1]; of soft_margin_loss any number."""
    signed = name == "soft_margin_loss"
    if signed and g.chance(0.3):
        return cast(2 * g.rng.standard_normal(shape), g.one_of(dtype, np.dtype("float32")))
    if not signed and g.chance(0.4):
        y = g.rng.random(shape) ** g.one_of(1, 20)
        y = np.where(g.rng.random(shape) < 0.3, np.round(y), y)
        return cast(y, g.one_of(dtype, dtype, *FLOATS.values()))
    y = g.rng.integers(2, size=shape)
    if signed:
        return (2 * y - 1).astype(g.one_of("int8", "int32", "int64", "float32", dtype))
    return np.asarray(y).astype(g.one_of("bool", *INTEGERS, *FLOATS.values()))


def element_numbers(g: Chooser, name: str, shape: Shape, dtype: np.dtype[Any], clip: float) -> Array:
    if name == "binary_cross_entropy":
        p = g.rng.random(shape) ** g.one_of(1, 4, 30)
        p = np.where(g.rng.random(shape) < 0.3, 1 - p, p)
        p = np.where(g.rng.random(shape) < 0.1, np.round(p), p)
        return np.clip(p, 0, 1).astype(dtype)
    x = numbers(g, shape)
    if name == "kl_div":
        x = -np.abs(x)
    if name == "asymmetric_loss" and clip and g.chance(0.2, "clip"):
        x = math.log(clip) - math.log1p(-clip) + g.one_of(1e-3, 1e-6, 0.1) * g.rng.standard_normal(shape)
    if g.chance(0.1, "edges"):
        x = np.where(g.rng.random(shape) < 0.1, g.one_of(np.nan, -np.inf, np.inf), x)
    return cast(x, dtype)


def element_loss(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    shape, axis = shape_of(g, library)
    if name != "multilabel_soft_margin_loss" and g.chance(0.05):
        shape, axis = (), 0
    if name == "multilabel_soft_margin_loss" and not g.has("class_sums") and shape[axis] > 300:
        shape, axis = (5, 7), 1
    options: dict[str, Any] = {}
    reductions = ("mean", "sum", "none", "batchmean") if name == "kl_div" and shape else ("mean", "sum", "none")
    reduction = common_options(g, options, reductions)
    params: dict[str, Any] = {}
    if name == "binary_cross_entropy_with_logits" and g.chance(0.3, "binary_smoothing"):
        params = {"label_smoothing": g.one_of(0.1, 1e-6, 0.5, 1.0, *([0.999, 1 - 1e-6] * g.has("one_minus")))}
    elif name == "binary_cross_entropy" and g.chance(0.5):
        params = {"log_clamp": g.one_of(None, -100.0, -10.0, 0.0)}
    elif name == "sigmoid_focal_loss":
        alphas = (0.25, 0.25, 0.5, -1.0, 0.0, 1.0, *((0.9, 0.999, 1 - 1e-6) if g.has("one_minus") else ()))
        params = {"alpha": g.one_of(*alphas), "gamma": g.one_of(2.0, 2.0, 0.0, 0.5, 1.0, 5.0, 30.0, 1e4, 1e8)}
        if g.chance(0.3, "alpha"):
            n = shape[-1:] if shape else ()
            params["alpha"] = None if g.chance(0.4) or not n else cast(g.rng.random(n), dtype)
    elif name == "asymmetric_loss":
        params = {
            "gamma_pos": g.one_of(0.0, 1.0, 2.5, 30.0),
            "gamma_neg": g.one_of(4.0, 0.0, 1.0, 0.5, 30.0, 1e4, 1e8),
            "clip": g.one_of(0.05, 0.0, 0.2) if g.has("clip") else 0.0,
        }
    elif name == "kl_div":
        params = {"log_target": g.chance(0.4)}
    x = element_numbers(g, name, shape, dtype, params.get("clip", 0.0))
    y = element_targets(g, shape, dtype, name)
    if library == "strict" and y.dtype.kind in "biu" and not g.has("strict_integers"):
        y = y.astype("float32")
    if name == "kl_div":
        y = -np.abs(numbers(g, shape)) if params["log_target"] else g.rng.random(shape) * (g.rng.random(shape) < 0.8)
        y = cast(
            np.where(g.rng.random(shape) < 0.1, -np.inf, y) if params["log_target"] and g.has("edges") else y,
            g.one_of(dtype, dtype, *FLOATS.values()),
        )
    if y.dtype == np.float64 and not g.has("precise_targets"):
        y = y.astype(work_type(dtype)).astype(y.dtype)
    has_classes = name == "multilabel_soft_margin_loss"
    rows = shape[:axis] + shape[axis + 1 :] if has_classes else shape
    if has_classes:
        options |= axis_option(g, axis, shape)

    factors: dict[str, Any] = {}
    if name in ("binary_cross_entropy", "binary_cross_entropy_with_logits") and g.chance(0.25):
        w = sample_weights(g, shape)
        factors["weight"] = w if np.ndim(w) or isinstance(w, np.ndarray) else np.asarray(w)
        if factors["weight"].dtype.kind in "biu" and not g.has("integer_weights"):
            factors["weight"] = factors["weight"].astype(dtype)
    if has_classes and g.chance(0.3):
        factors["weight"] = class_weights(g, shape[axis], dtype)
    if name == "binary_cross_entropy_with_logits" and g.chance(0.25):
        factors["pos_weight"] = cast(g.rng.uniform(0, 4, some_shape(g, shape)), g.one_of(dtype, np.dtype("float64")))
        if g.chance(0.2, "integer_weights"):
            factors["pos_weight"] = g.one_of(2, 0.5, np.trunc(factors["pos_weight"]).astype("int32"))
    if g.chance(0.3):
        factors["sample_weight"] = sample_weights(g, rows)

    def full(value: Any) -> Array:
        value = np.ones(()) if value is None else np.asarray(value)
        if has_classes and value is not None and value.ndim:
            value = np.expand_dims(value, axis)
        return np.broadcast_to(oracle.wide(value), shape)

    s = np.broadcast_to(oracle.wide(1 if factors.get("sample_weight") is None else factors["sample_weight"]), rows)
    s_full = np.broadcast_to(np.expand_dims(s, axis), shape) if has_classes else s
    w = factors.get("weight")
    if has_classes and w is not None:
        w_full = np.broadcast_to(
            np.moveaxis(np.reshape(oracle.wide(w), (-1, *(1,) * (len(shape) - 1))), 0, axis), shape
        )
    else:
        w_full = np.broadcast_to(oracle.wide(1 if w is None else w), shape)
    pos = np.broadcast_to(oracle.wide(1 if factors.get("pos_weight") is None else factors["pos_weight"]), shape)
    gone = (s_full == 0) | ((w_full == 0) & (not has_classes))
    if gone.any() and g.chance(0.5, "weight_0") and (g.has("weight_0_elements") or w is None or has_classes):
        x = np.where(gone, cast(np.array(g.one_of(np.nan, np.inf, -np.inf, 3.0)), dtype), x)
        if y.dtype.kind not in "biu":
            y = np.where(gone, cast(np.array(g.one_of(np.nan, -1.0, 2.0)), y.dtype), y)
    elif gone.any() and not g.has("weight_0"):
        fine = np.array(0.5).astype(dtype) if name == "binary_cross_entropy" else np.array(-1.0).astype(dtype)
        x = np.where(gone, fine, x)
    if g.chance(0.1):
        options["validate"] = False
    given = {k: laid_out(g, v) for k, v in (params | factors).items()}
    options |= {k: to_library(library, v) for k, v in given.items()}
    args = [to_library(library, laid_out(g, x)), to_library(library, laid_out(g, y))]
    call = Call(name, library, args, options, list)
    buffers(g, call, x)

    def expected() -> list[Expected]:
        a, b = oracle.wide(x), oracle.wide(y)
        a, b = np.where(gone, LD(0.5) if name == "binary_cross_entropy" else LD(-1), a), np.where(gone, LD(1), b)
        found = element_formula(name, a, b, pos, params)
        if name != "kl_div":  # which does not look at what a target of 0 multiplies
            found = Losses(*(bound.at(np.isnan(a), oracle.NAN) for bound in found))
        lost = (
            16
            * LD(tiny_of(dtype))
            * (1 + np.abs(np.where(np.isfinite(a), a, 0)) + np.abs(np.where(np.isfinite(b), b, 0)))
            * (1 + pos)
        )
        found = Losses(*(bound._replace(lost=np.broadcast_to(lost, shape)) for bound in found))
        if name == "binary_cross_entropy":  # what the target loses counts as often as it does in the derivatives
            p, q = np.maximum(a, LD(1e-12)), np.maximum(1 - a, LD(1e-12))
            steep = 1 / np.maximum(a * (1 - a), LD(1e-12)), 1 / p**2 + 1 / q**2
            more_lost = (bound._replace(lost=bound.lost * by) for bound, by in zip(found[1:], steep, strict=True))
            found = Losses(found.loss, *more_lost)
        if max(params.get(k, 0.0) for k in ("gamma", "gamma_pos", "gamma_neg")) > 10:  # multiples of what underflows
            furthest = -math.log(tiny_of(dtype))
            hess_lost = found.hess.lost * furthest**2
            found = Losses(
                found.loss, found.grad._replace(lost=found.grad.lost * furthest), found.hess._replace(lost=hess_lost)
            )
        c = s_full * w_full
        # a target that may have become 0 decides whether what is infinite counts
        skip = (np.isinf(a) | np.isinf(found.loss.value)) & (b != 0) & (np.abs(b) < tiny_of(dtype)) & ~gone
        # a loss that the type does not hold is infinite, and weights of both signs make infinities of both signs of it
        is_beyond = (np.abs(found.loss.value) > KINDS[work_type(dtype)].greatest) & ~gone
        found = Losses(*(bound.scaled(c).at(gone, 0) for bound in found))
        counts, share, n = ~gone, s_full, 1
        if has_classes:
            n = shape[axis]
            found = Losses(*(bound.scaled(LD(1) / n) for bound in found))
            found = Losses(Bound(*(oracle.added(v, axis) for v in found.loss)), *found[1:])
            counts, share = s != 0, s
        total = oracle.reduced(
            found,
            "mean" if reduction == "batchmean" else reduction,
            share,
            np.expand_dims(counts, axis) if has_classes and reduction == "mean" else counts,
        )
        if reduction == "batchmean":
            total = (
                Losses(*(bound.scaled(LD(math.prod(shape[1:]))) for bound in total)) if total.loss.value.size else total
            )
        if has_classes:  # a class weight of 0 removes its class, from a mean that is NaN as well
            total = Losses(total.loss, *(bound.at(w_full == 0, 0) for bound in total[1:]))
        more: float = len(factors) + (reduction in ("mean", "batchmean"))
        if dtype == np.float64 and reduction != "none":  # added in the type of the terms
            more += math.log2(max(math.prod(shape), 1)) / 2
        more += has_classes
        if has_classes and reduction == "none":
            skip = skip.any(axis)
        if name == "kl_div":  # of what is impossible, and so unlikely that it may have become 0
            skip = ~np.isfinite(a) & (found.grad.value != 0) & (np.abs(found.grad.value) < 1e3 * tiny_of(dtype))
        skip = skip if reduction == "none" else np.asarray(skip.any() or (is_beyond.any() and (c < 0).any()))
        return results_of(total, options, dtype, element_limits(name, params, y, more), (skip, None))

    call.expected = expected
    return call


def element_formula(name: str, x: Array, y: Array, pos: Array, params: dict[str, Any]) -> Losses:
    if name == "binary_cross_entropy":
        return oracle.binary_of_probs(x, y, params.get("log_clamp", -100.0))
    if name in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
        return oracle.binary(x, y, pos, params.get("label_smoothing", 0.0))
    if name == "soft_margin_loss":
        return oracle.soft_margin(x, y)
    if name == "kl_div":
        return oracle.kl_div(x, y, params["log_target"])
    if name == "asymmetric_loss":
        return oracle.asymmetric(x, y, **params)
    alpha = params["alpha"]
    if alpha is None or (np.ndim(alpha) == 0 and alpha == -1):
        return oracle.sigmoid_focal(x, y, None, params["gamma"])
    return oracle.sigmoid_focal(x, y, oracle.wide(alpha), params["gamma"])


def element_limits(name: str, params: dict[str, Any], y: Array, more: float) -> tuple[float, float, float]:
    loss, grad, hess = 4.0, 6.0, 8.0
    if name in ("binary_cross_entropy_with_logits", "soft_margin_loss", "multilabel_soft_margin_loss"):
        loss = 2.0 + (y.dtype.kind not in "biu" or bool(params))
    gamma, of_base = max(params.get("gamma", 0.0), params.get("gamma_pos", 0.0), params.get("gamma_neg", 0.0)), 2.5
    if params.get("clip"):
        # p - clip is p times a complement and an expm1: 2.5 ULP more; -log(1 - d) has up to 1.44 times the error of d
        of_base, more = of_base + 2.5, more + 6
    if {"gamma", "gamma_pos"} & set(params) and y.dtype.kind not in "biu":
        # y q + (1 - y) p has a complement, two products and a sum, 1.5 ULP more; the balance of alpha likewise
        of_base, more = of_base + 1.5, more + 1.5
    more += of_base * min(gamma, 10.0)  # a greater one counts no more: the power is then that of two parts
    return loss + more, grad + more, hess + more


# Divergences


def distillation(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    x, _, shape, axis, rows = random_rows(g, dtype, library)
    n_rows, n_classes = x.shape
    options: dict[str, Any] = {}
    reduction = common_options(g, options)
    options |= axis_option(g, axis, shape)
    divergence = g.one_of("forward", "reverse", "js")
    if divergence != "forward" or g.chance(0.3):
        options["divergence"] = divergence
    temperature = 1.0
    if g.chance(0.4, "temperature"):
        options["temperature"] = temperature = g.one_of(2.0, 0.7, 4.0, 0.05, 1e3)
    teacher_type = g.one_of(dtype, dtype, *FLOATS.values())
    how = g.one_of("near", "near", "far", "shifted", "other")
    noise = g.rng.standard_normal(x.shape)
    finite = np.where(np.isfinite(x), x, 0).astype(np.float64)
    if how == "near":
        y = finite + g.one_of(1e-3, 1e-6, 0.1) * noise * g.one_of(1, finite)
    elif how == "shifted":
        y = finite + g.one_of(1e4, -300.0, 10.0) + g.one_of(0.0, 1e-2) * noise
    elif how == "far":
        y = finite + g.one_of(1.0, 10.0) * noise
    else:
        y = numbers(g, x.shape)
    y = with_edges(g, cast(y, teacher_type)) if how in ("far", "other") else cast(y, teacher_type)
    if not g.has("extreme"):
        most = teacher_type.type(min(KINDS[teacher_type].greatest, KINDS[work_type(dtype)].greatest) / 16)
        y = np.where(np.isfinite(y), np.clip(y, -most, most), y)
    y = y.astype(teacher_type)
    indices = None
    if divergence != "reverse" and g.chance(0.3):
        k = int(g.rng.integers(1, n_classes + 1))
        indices = np.argsort(g.rng.random(x.shape), -1)[:, :k]
        given = np.take_along_axis(y, indices, -1)
        y = np.full_like(y, -np.inf)
        np.put_along_axis(y, indices, given, -1)
    kept = np.ones(x.shape, bool)
    if indices is None and g.chance(0.15, "where_distillation"):
        where = g.rng.random(some_shape(g, shape)) < 0.7
        kept = to_rows(np.broadcast_to(where, shape), axis)
        if not g.has("emptied") and not kept.any(-1).all():
            where, kept = np.ones(shape, bool), np.ones(x.shape, bool)
        options["where"] = laid_out(g, where)
    sample_weight = sample_weights(g, rows) if g.chance(0.3) else None
    s = oracle.wide(
        np.ones(n_rows) if sample_weight is None else np.broadcast_to(np.asarray(sample_weight), rows).ravel()
    )
    if (s == 0).any() and (g.chance(0.5, "weight_0") or not g.has("weight_0")):
        junk = g.one_of(np.nan, np.inf, -np.inf) if g.has("weight_0") else 0.0
        x = np.where((s == 0)[:, None], np.array(junk).astype(dtype), x)
        y = np.where((s == 0)[:, None], np.array(junk).astype(y.dtype), y)
    if g.chance(0.1):
        options["validate"] = False
    if indices is None:
        teacher = handed_over(g, library, y, shape, axis)
    else:
        sparse = (*shape[:axis], indices.shape[1], *shape[axis + 1 :])
        fits = [kind for kind in INTEGERS if np.iinfo(kind).max >= n_classes - 1]
        teacher = handed_over(g, library, np.take_along_axis(y, indices, -1), sparse, axis)
        options["teacher_indices"] = laid_out(g, from_rows(indices, sparse, axis).astype(g.one_of(*fits)))
    if sample_weight is not None:
        options["sample_weight"] = laid_out(g, sample_weight)
    options = {k: to_library(library, v) for k, v in options.items()}
    call = Call(name, library, [handed_over(g, library, x, shape, axis), teacher], options, list, note=how)
    buffers(g, call, from_rows(x, shape, axis))

    def expected() -> list[Expected]:
        a, b = oracle.wide(x), oracle.wide(y)
        computed = work_type(dtype if y.dtype != np.float64 else y.dtype)
        a, b = (as_limit(v, kept, temperature, computed) for v in (a, b))
        found = oracle.distillation(divergence, a, b, kept, s, temperature, tiny_of(dtype))
        removed = (s == 0) | ~kept.any(-1)
        share = np.where(removed, LD(0), s)
        total = oracle.reduced(found, reduction, share, ~removed)
        total = Losses(total.loss, *(bound.at(~kept, 0) for bound in total[1:]))
        if reduction == "none":
            total = mapped(total, rows, shape, axis)
        else:
            total = Losses(total.loss, *(Bound(*(from_rows(v, shape, axis) for v in bound)) for bound in total[1:]))
        skip: list[Array | None] = [None, None]
        # Where one of the two is -inf, and the other so unlikely that it may have become 0, the loss is 0 or +inf.
        own = oracle.softmax(np.where(kept, b if divergence == "forward" else a, -oracle.INF), temperature).p
        finite, endless = (b, np.isneginf(a)) if divergence == "forward" else (a, np.isneginf(b))
        endless = endless & np.isfinite(finite) & kept & ~removed[:, None] & (divergence != "js")
        undecided = (endless & (own > 0) & (own < 16 * tiny_of(dtype))).any(-1)
        skip[0] = undecided.reshape(rows) if reduction == "none" else np.asarray(undecided.any())
        if divergence == "reverse":  # of an infinite loss only the gradient that is +inf is said
            endless &= own > 0
            is_said = endless & ~undecided[:, None] & ("return_hess" not in options)
            skip[1] = from_rows(endless.any(-1, keepdims=True) & ~is_said, shape, axis)
        if reduction == "mean" and not np.any(share != 0):
            skip[1] = np.ones(shape, bool)
        more = (sample_weight is not None) + (reduction == "mean")
        limits = (16.0 + more, 32.0 + more, 64.0 + more)
        if not g.has("near_divergence"):
            limits = (1e30, 1e30, 1e30)
        results = results_of(total, options, dtype, limits, (skip[0], skip[1]))
        return [replace(result, in_eps=True) for result in results]

    call.expected = expected
    return call


# Transforms and statistics


def transform(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    x, _, shape, axis, _ = random_rows(g, dtype, library)
    options: dict[str, Any] = {}
    options |= axis_option(g, axis, shape)
    temperature = 1.0
    if name != "logsumexp" and g.chance(0.4, "temperature"):
        options["temperature"] = temperature = g.one_of(2.0, 0.7, 3.0, 0.01, 1e3, 1e-30, 1e30)
    if g.chance(0.2):
        options["n_threads"] = g.one_of(1, 2)
    kept = np.ones(x.shape, bool)
    if g.chance(0.25, "transforms"):
        where = g.rng.random(some_shape(g, shape)) < g.one_of(0.3, 0.8)
        kept = to_rows(np.broadcast_to(where, shape), axis)
        options["where"] = to_library(library, laid_out(g, where))
    keepdims = name == "logsumexp" and g.chance(0.3)
    if keepdims:
        options["keepdims"] = True
    call = Call(name, library, [handed_over(g, library, x, shape, axis)], options, list)
    if name != "logsumexp" and library in ("numpy", "torch") and g.chance(0.3):
        mine = call.args[0]
        writable = library == "torch" or (mine.flags.writeable and mine.dtype.isnative)
        in_place = g.chance(0.5) and writable and not overlaps(mine)
        junk = np.full(shape, 7, dtype)
        buffer = mine if in_place else to_library(library, laid_out(g, junk, writable=True))
        options["out"] = call.buffers["out"] = buffer

    def expected() -> list[Expected]:
        a = np.where(kept, oracle.wide(x), -oracle.INF)
        z = oracle.softmax(a, temperature)
        empty, work = ~kept.any(-1, keepdims=True), work_type(dtype)
        zero = np.zeros_like(z.u)
        lost = zero + 8 * x.shape[1] * LD(tiny_of(dtype))
        is_moved = temperature != 1.0
        if name == "softmax":
            bound = Bound(z.p, z.p * (1 + is_moved) + is_moved * z.pu / 6, lost).at(empty, 0).at(~kept, 0)
            return [Expected("out", Bound(*(from_rows(v, shape, axis) for v in bound)), 6.0, dtype, work)]
        if name == "log_softmax":
            bound = Bound(z.u, np.abs(z.u) * (1 + is_moved), lost).at(empty, -oracle.INF)
            bound = bound.at(~kept & (empty | ~z.bad), -oracle.INF)
            skip = from_rows(~kept & ~empty & z.bad, shape, axis)
            return [Expected("out", Bound(*(from_rows(v, shape, axis) for v in bound)), 4.0, dtype, work, skip)]
        lse = lse_of(a, z, tiny_of(dtype))
        where_to = shape[:axis] + (1,) * keepdims + shape[axis + 1 :]
        return [Expected("lse", Bound(*(np.reshape(v, where_to) for v in lse)), 4.0, work, work)]

    call.expected = expected
    return call


def axis_option(g: Chooser, axis: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The axis, counted from either end, or sometimes nothing where it is the last."""
    return {"axis": axis - g.one_of(0, len(shape))} if axis != len(shape) - 1 or g.chance(0.3) else {}


def lse_of(a: Array, z: oracle.Softmax, tiny: float) -> Bound:
    """Log-sum-exp of rows, infinities included."""
    top = np.where(np.isnan(a), -np.inf, a).max(-1)
    value = np.where(z.has_nan[:, 0], oracle.NAN, np.where(np.isinf(top), top, z.lse[:, 0]))
    size = np.where(np.isfinite(value), np.maximum(np.abs(value), np.abs(np.where(np.isfinite(top), top, 0))), 0)
    return Bound(value, size, 8 * a.shape[1] * LD(tiny) + 0 * size)


def statistics(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    x, labels, shape, axis, rows = random_rows(g, dtype, library)
    n_rows, n_classes = x.shape
    options: dict[str, Any] = {}
    options |= axis_option(g, axis, shape)
    ignore_index = -100
    if g.chance(0.4):
        options["ignore_index"] = ignore_index = int(g.one_of(*IGNORE, 0, n_classes - 1))
    target = np.where(g.rng.random(n_rows) < g.one_of(0.0, 0.2), ignore_index, labels)
    target = label_type(g, target)
    args = [handed_over(g, library, x, shape, axis), to_library(library, laid_out(g, target.reshape(rows)))]

    def expected() -> list[Expected]:
        a, work = oracle.wide(x), work_type(dtype)
        z = oracle.softmax(a)
        y = np.array([int(v) for v in target], object)
        ignored = np.array([v == ignore_index for v in y], bool)
        safe = np.where(ignored, 0, y).astype(np.int64)
        x_y = np.take_along_axis(a, safe[:, None], -1)[:, 0]
        nan = z.has_nan[:, 0]
        rank = np.where(nan | ignored, -1, (a > x_y[:, None]).sum(-1))
        argmax = np.where(nan, np.isnan(a).argmax(-1), a.argmax(-1))
        entropy = oracle.added(oracle.times(z.p, -z.u), -1)
        lost = 8 * n_classes * LD(tiny_of(dtype)) + 0 * entropy
        whole = np.dtype("int64")

        def exactly(v: Array) -> Bound:
            return Bound(*(np.reshape(w, rows) for w in (oracle.wide(v), 0 * oracle.wide(rank), 0 * oracle.wide(rank))))

        return [
            Expected("lse", Bound(*(np.reshape(v, rows) for v in lse_of(a, z, tiny_of(dtype)))), 4.0, work, work),
            Expected("target_logit", exactly(np.where(ignored, oracle.NAN, x_y)), 1.0, work, work),
            Expected("argmax", exactly(argmax), 1.0, whole, work),
            Expected("rank", exactly(rank), 1.0, whole, work),
            Expected(
                "entropy",
                Bound(*(np.reshape(v, rows) for v in (entropy, np.abs(entropy), lost * 100))),
                6.0,
                work,
                work,
            ),
        ]

    return Call(name, library, args, options, expected)


# Linear layers


def linear(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    rows = g.one_of((), (5,), (17,), (3, 4), (40,))
    n_rows, width, n_classes = math.prod(rows), g.one_of(1, 3, 8), g.one_of(1, 2, 5, 10, 33, 130)
    scale = g.one_of(0.3, 1.0, 3.0)
    x = cast(scale * g.rng.standard_normal((n_rows, width)), dtype)
    w = cast(g.rng.standard_normal((n_classes, width)), dtype)
    bias = cast(g.rng.standard_normal(n_classes), dtype) if g.chance(0.5) else None
    labels = g.rng.integers(n_classes, size=n_rows)
    options: dict[str, Any] = {"reduction": g.one_of("mean", "sum", "none"), "return_grad": g.chance(0.7)}
    ignore_index, smoothing = -100, 0.0
    if g.chance(0.3):
        options["ignore_index"] = ignore_index = int(g.one_of(-1, 0, n_classes - 1))
    if g.chance(0.3):
        options["label_smoothing"] = smoothing = g.one_of(0.1, 1.0)
    weight = class_weights(g, n_classes, dtype) if g.chance(0.25) else None
    sample_weight = sample_weights(g, rows) if g.chance(0.3) else None
    s = None if sample_weight is None else np.broadcast_to(np.asarray(sample_weight), rows).ravel()
    if dtype.itemsize > 2 and g.chance(0.5):
        options["chunk_rows"] = g.one_of(1, 4, 100)
    kept = np.ones((n_rows, n_classes), bool)
    if g.chance(0.2):
        where = g.rng.random(some_shape(g, (*rows, n_classes))) < 0.8
        kept = np.broadcast_to(where, (*rows, n_classes)).reshape(n_rows, n_classes)
        if not g.has("emptied") and not kept.any(-1).all():
            where, kept = np.ones((*rows, n_classes), bool), np.ones((n_rows, n_classes), bool)
        options["where"] = laid_out(g, where)
    is_soft = g.chance(0.3)
    if is_soft:
        target = cast(g.rng.random((n_rows, n_classes)) * (kept | g.has("where_mass")), g.one_of(dtype, np.dtype("f4")))
    else:
        target = label_type(g, np.where(g.rng.random(n_rows) < 0.2, ignore_index, labels))
    if weight is not None:
        options["weight"] = laid_out(g, weight)
    if sample_weight is not None:
        options["sample_weight"] = laid_out(g, sample_weight)
    if bias is not None:
        options["linear_bias"] = laid_out(g, bias)
    options = {k: to_library(library, v) for k, v in options.items()}
    given = target.reshape((*rows, n_classes) if is_soft else rows)
    args = [to_library(library, laid_out(g, v)) for v in (x.reshape((*rows, width)), w, given)]

    def expected() -> list[Expected]:
        a, b, c = oracle.wide(x), oracle.wide(w), LD(0) if bias is None else oracle.wide(bias)
        z = a @ b.T + c
        error = (width + 2) * (np.abs(a) @ np.abs(b).T + np.abs(c)).max(-1, initial=0)  # of the logits, in eps
        chosen = oracle.coefficients(
            target, z.shape, weight=weight, sample_weight=s, kept=kept, ignore_index=ignore_index,
            label_smoothing=smoothing,
        )  # fmt: skip
        found = oracle.softmax_loss("cross_entropy", 0.0, z, chosen, kept, tiny=tiny_of(dtype))
        mass = oracle.added(np.abs(chosen.a), -1)
        p = oracle.softmax(np.where(kept, z, -oracle.INF)).p
        p = np.where(np.isfinite(p), p, 0)
        found = Losses(
            found.loss._replace(size=found.loss.size + 2 * mass * error),
            found.grad._replace(size=found.grad.size + np.where(chosen.removed, 0, 2 * mass * error)[:, None] * p),
            found.hess,
        )
        reduction = str(options["reduction"])
        total = oracle.reduced(found, reduction, chosen.share, ~chosen.removed)
        loss = Bound(*(np.reshape(v, rows) for v in total.loss)) if reduction == "none" else total.loss
        limit, work = 16.0 + n_classes, work_type(dtype)
        results = [Expected("loss", loss, limit, work, work)]
        if (
            SLACK[-1] == SLACKS["emulated"] and dtype.itemsize == 2
        ):  # products of 16 bits: what they multiply is rounded
            limit += float(ulp(LD(1), dtype) / ulp(LD(1), work))
        if options["return_grad"]:
            grad = total.grad
            lost = grad.lost.max(initial=0)
            gone = chosen.removed[:, None]
            d_x = Bound(grad.value @ b, grad.size @ np.abs(b), lost * 100 + np.zeros(x.shape, LD)).at(gone, 0)
            d_w = Bound(grad.value.T @ a, grad.size.T @ np.abs(a), lost * 100 + np.zeros(w.shape, LD))
            skip = None
            if reduction == "mean" and not np.any(chosen.share != 0):
                d_x, d_w = d_x.at(True, 0), d_w.at(True, 0)
            results.append(
                Expected("d_inputs", Bound(*(np.reshape(v, (*rows, width)) for v in d_x)), limit, dtype, work, skip)
            )
            results.append(Expected("d_weight", d_w, limit + n_rows, dtype, work, skip))
            if bias is not None:
                d_b = Bound(*(oracle.added(v, 0) for v in grad))
                results.append(
                    Expected("d_bias", d_b._replace(lost=d_b.lost + lost * 100), limit + n_rows, dtype, work, skip)
                )
        return results

    return Call(name, library, args, options, expected)


# Metrics


def classification(g: Chooser, name: str) -> Call:
    """perplexity, brier_score, top_k_accuracy: of logits and labels."""
    dtype = dtype_of(g)
    library = library_of(g, dtype)
    x, labels, shape, axis, rows = random_rows(g, dtype, library)
    n_rows, n_classes = x.shape
    options: dict[str, Any] = {}
    options |= axis_option(g, axis, shape)
    ignore_index = -100
    if g.chance(0.4):
        options["ignore_index"] = ignore_index = int(g.one_of(-1, -100, 0, n_classes - 1))
    if name == "perplexity" and not g.has("warnings"):
        x = np.clip(x, dtype.type(-40), dtype.type(40))
    target = np.where(g.rng.random(n_rows) < g.one_of(0.0, 0.2), ignore_index, labels)
    without = g.without
    g.without = without | {"float_labels"}
    target = label_type(g, target)
    g.without = without
    k = 1
    if name == "top_k_accuracy" and g.chance(0.6):
        options["k"] = k = g.one_of(2, 3, 5, 1000)
    sample_weight = None
    if name == "perplexity" and g.chance(0.3):
        sample_weight = np.abs(sample_weights(g, rows)) if g.has("signed") else sample_weights(g, rows)
        options["sample_weight"] = to_library(library, laid_out(g, sample_weight))
    s = None if sample_weight is None else np.broadcast_to(np.asarray(sample_weight), rows).ravel()
    if s is not None and not g.has("weight_0"):
        x = np.where((s == 0)[:, None], dtype.type(0), x)
    args = [handed_over(g, library, x, shape, axis), to_library(library, laid_out(g, target.reshape(rows)))]

    def expected() -> list[Expected]:
        a, work = oracle.wide(x), work_type(dtype)
        kept = np.ones(x.shape, bool)
        chosen = oracle.coefficients(
            target, x.shape, weight=None, sample_weight=s, kept=kept, ignore_index=ignore_index, label_smoothing=0.0
        )
        counted = ~chosen.removed
        if name == "perplexity":
            found = oracle.softmax_loss("cross_entropy", 0.0, a, chosen, kept, tiny=tiny_of(dtype))
            loss = oracle.reduced(found, "mean", chosen.share, counted).loss
            value = np.exp(loss.value)
            return [Expected("perplexity", Bound(value, value * (1 + loss.size), value * loss.lost), 7.0, work, work)]
        double = np.dtype("float64")
        n = int(counted.sum())
        y = np.array([int(v) if c else 0 for v, c in zip(target, counted, strict=True)], np.int64)
        z = oracle.softmax(a)
        if name == "brier_score":
            onehot = np.arange(n_classes) == y[:, None]
            rows_ = oracle.added(np.where(onehot, z.q, z.p) ** 2, -1)
            total = oracle.added(np.where(counted, rows_, 0)) / LD(n) if n else oracle.NAN
            coarse = LD(1e-2) if dtype.itemsize == 2 else LD(0)
            return [
                Expected(
                    "score",
                    Bound(np.asarray(total), np.asarray(total), np.asarray(coarse + LD(tiny_of(dtype)))),
                    40.0,
                    double,
                    work,
                )
            ]
        x_y = np.take_along_axis(a, y[:, None], -1)
        before = (a > x_y) | ((a == x_y) & (np.arange(n_classes) < y[:, None]))
        hits = (before.sum(-1) < k) & ~z.has_nan[:, 0] & counted
        value = LD(int(hits.sum())) / LD(n) if n else oracle.NAN
        return [
            Expected("accuracy", Bound(np.asarray(value), np.asarray(value), np.asarray(LD(0))), 1.0, double, double)
        ]

    return Call(name, library, args, options, expected)


def log_loss(g: Chooser, name: str) -> Call:
    dtype = g.one_of(FLOATS["float32"], FLOATS["float64"], FLOATS["float16"])
    n_rows, n_classes = int(g.rng.integers(1, 40)), g.one_of(2, 3, 10)
    p = g.rng.random((n_rows, n_classes)) ** g.one_of(1, 8)
    p[np.arange(n_rows), g.rng.integers(n_classes, size=n_rows)] += 1e-3
    p = (p / p.sum(-1, keepdims=True)).astype(dtype)
    y = g.rng.integers(n_classes, size=n_rows)
    options: dict[str, Any] = {"labels": list(range(n_classes)), "normalize": g.chance(0.5)}
    is_soft = g.chance(0.3)
    s = np.ones(n_rows)
    if g.chance(0.4):
        s = np.asarray(sample_weights(g, (n_rows,)))
        options["sample_weight"] = s = np.array(np.broadcast_to(s, (n_rows,)))
    truth: Any = p[::-1].copy() if is_soft else y
    if is_soft:
        del options["labels"]
    given = laid_out(g, truth) if g.chance(0.5) else truth.tolist()

    def expected() -> list[Expected]:
        eps = LD(np.finfo(dtype).eps)
        logs = -np.log(np.clip(oracle.wide(p), eps, 1 - eps))
        q = oracle.wide(truth) if is_soft else (np.arange(n_classes) == y[:, None]).astype(LD)
        w = oracle.wide(s)
        losses, size = oracle.times(w, oracle.added(q * logs, -1)), np.abs(w) * oracle.added(q * logs, -1)
        total, size, denominator = oracle.added(losses), oracle.added(size), oracle.added(w)
        if options["normalize"]:
            factor = 1 / denominator if denominator else oracle.NAN
            total, size = total * factor, size * np.abs(factor)
        bound = Bound(np.asarray(total), np.asarray(size), np.asarray(LD(tiny_of(dtype))))
        return [Expected("loss", bound, 6.0 + n_classes, np.dtype("float64"), work_type(dtype))]

    return Call(name, "numpy", [given, laid_out(g, p)], options, expected)


# LossState


def state_of(n_classes: int | None, pieces: list[tuple[Any, ...]], reduction: str, **options: Any) -> Any:
    """The result of a state, or of several that are merged, to which pieces came in some order."""
    states = [xce.LossState(n_classes, **options) for _ in range(1 + max((p[0] for p in pieces), default=0))]
    for which, logits, labels, class_offset, row_offset, weights in pieces:
        states[which].update(logits, labels, class_offset, row_offset=row_offset, sample_weight=weights)
    for other in states[1:]:
        states[0].merge(other)
    return states[0].result(reduction)


def loss_state(g: Chooser, name: str) -> Call:
    dtype = dtype_of(g)
    n_rows, n_classes = int(g.rng.integers(0, 30)), g.one_of(*CLASSES)
    x = numbers(g, (n_rows, n_classes))
    labels = g.rng.integers(n_classes, size=n_rows)
    if g.chance(0.3):
        x = confident(g, x, labels)
    x = cast(with_edges(g, x) if g.chance(0.5) else x, dtype)
    if not g.has("extreme"):
        x = np.where(np.isfinite(x), np.clip(x, -KINDS[dtype].greatest / 16, KINDS[dtype].greatest / 16), x).astype(
            dtype
        )
    options: dict[str, Any] = {"keep_rows": g.chance(0.5)}
    ignore_index, smoothing = -100, 0.0
    if g.chance(0.4):
        options["ignore_index"] = ignore_index = int(g.one_of(*IGNORE[:4], 0, n_classes - 1))
    if g.chance(0.3):
        options["label_smoothing"] = smoothing = g.one_of(0.1, 1.0)
    weight = class_weights(g, n_classes, dtype) if g.chance(0.3) else None
    if weight is not None:
        options["weight"] = weight
    target = np.where(g.rng.random(n_rows) < 0.2, ignore_index, labels)
    s = None
    if g.chance(0.4):
        s = np.array(np.broadcast_to(np.asarray(sample_weights(g, (n_rows,))), (n_rows,)))
        if not g.has("weight_0"):
            x = np.where((s == 0)[:, None], dtype.type(0), x)
    reduction = g.one_of("mean", "sum", *["none"] * options["keep_rows"])
    cuts = sorted({0, n_rows, *g.rng.integers(0, n_rows + 1, size=g.one_of(0, 1, 3)).tolist()})
    shards = sorted({0, n_classes, *g.rng.integers(0, n_classes + 1, size=g.one_of(0, 1, 3)).tolist()})
    n_states = g.one_of(1, 2, 3)
    pieces = []
    for first, last in itertools.pairwise(cuts):
        for start, stop in itertools.pairwise(shards):
            part = None if s is None else s[first:last]
            pieces.append(
                (
                    int(g.rng.integers(n_states)),
                    laid_out(g, x[first:last, start:stop]),
                    target[first:last],
                    start,
                    first,
                    part,
                )
            )
    pieces = [pieces[i] for i in g.rng.permutation(len(pieces))]

    def expected() -> list[Expected]:
        chosen = oracle.coefficients(
            target, x.shape, weight=weight, sample_weight=s, kept=np.ones(x.shape, bool), ignore_index=ignore_index,
            label_smoothing=smoothing,
        )  # fmt: skip
        kept, double = np.ones(x.shape, bool), np.dtype("float64")
        found = oracle.softmax_loss("cross_entropy", 0.0, oracle.wide(x), chosen, kept, tiny=tiny_of(dtype))
        total = oracle.reduced(found, reduction, chosen.share, ~chosen.removed)
        return [Expected(reduction, total.loss, 8.0, double, work_type(dtype))]

    return Call(name, "numpy", [n_classes, pieces, reduction], options, expected)


# Which functions there are

ROWS = ("cross_entropy", "focal_loss", "poly_loss", "generalized_cross_entropy", "nll_loss")
ELEMENTS = (
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "sigmoid_focal_loss", "asymmetric_loss",
    "soft_margin_loss", "multilabel_soft_margin_loss", "kl_div",
)  # fmt: skip
MAKERS: dict[str, Callable[[Chooser, str], Call]] = {
    **dict.fromkeys(ROWS, softmax_loss),
    **dict.fromkeys(ELEMENTS, element_loss),
    "distillation_loss": distillation,
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), transform),
    "logit_stats": statistics,
    "linear_cross_entropy": linear,
    **dict.fromkeys(("perplexity", "brier_score", "top_k_accuracy"), classification),
    "log_loss": log_loss,
    "LossState": loss_state,
}
OFTEN = ("cross_entropy",) * 6 + ("distillation_loss",) * 2


# Hostile calls: one thing about a right call is made wrong


class Mutation(NamedTuple):
    argument: str  # what is changed: a parameter of the function, or "0" and "1", the first and second argument
    change: Callable[[Any], Any]  # from the right value, or None
    raises: tuple[type[Exception], ...]
    rows_must_count: bool = False  # where nothing that weighs 0 is looked at


def some(x: Any, make: Callable[[Array], Any]) -> Any:
    """A changed copy of an array; None if it has no entries."""
    a = to_numpy(x).copy()
    return make(a) if a.size else None


def with_first(value: Any) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        def make(a: Array) -> Any:
            if a.dtype.name in ("int4", "uint4") or (isinstance(value, float) and a.dtype.kind in "biu"):
                return None
            if isinstance(value, int) and not np.iinfo(a.dtype).min <= value <= np.iinfo(a.dtype).max:
                return None
            a.reshape(-1)[:1] = value
            return a

        return some(x, make) if hasattr(x, "shape") else None

    return change


def longer(x: Any) -> Any:
    return np.concatenate([to_numpy(x)] * 2, -1) if getattr(x, "ndim", 0) and to_numpy(x).shape[-1] else None


MUTATIONS = (
    *(
        Mutation("0", change, (TypeError,))
        for change in (
            lambda x: to_numpy(x).astype(np.int64) if np.isfinite(to_numpy(x).astype(float)).all() else None,
            lambda x: to_numpy(x).astype(np.complex64),
            lambda x: to_numpy(x).astype(object),
            lambda x: to_numpy(x).astype(np.longdouble),
            lambda x: to_numpy(x).tolist(),
            lambda x: np.ma.masked_array(to_numpy(x)),
            lambda x: None,
        )
    ),
    Mutation("1", lambda y: to_numpy(y).astype(np.complex64), (TypeError,)),
    Mutation("1", lambda y: to_numpy(y).astype(float).astype(str), (TypeError,)),
    Mutation(
        "1", lambda y: to_numpy(y).astype("datetime64[s]") if to_numpy(y).dtype.kind in "iu" else None, (TypeError,)
    ),
    Mutation("1", longer, (ValueError,)),
    Mutation("label", with_first(300), (xce.LabelError,), True),
    Mutation("label", with_first(-3), (xce.LabelError,), True),
    Mutation("label", with_first(2**40), (xce.LabelError,), True),
    Mutation("label", lambda y: some(y, lambda a: a.astype(bool)), (TypeError,)),
    Mutation("probability", with_first(-0.5), (ValueError,), True),
    Mutation("probability", with_first(np.nan), (ValueError,), True),
    *(
        Mutation(name, lambda _, value=value: value, (ValueError,))
        for name, values in {
            "label_smoothing": (-0.1, 1.5, math.nan),
            "temperature": (0.0, -1.0, math.nan, math.inf),
            "softcap": (0.0, -1.0, math.nan),
            "z_loss": (-1.0, math.inf, math.nan),
            "gamma": (-1.0, math.nan),
            "epsilon": (math.nan, math.inf),
            "q": (-0.1, 1.5, math.nan),
            "clip": (1.0, -0.1, math.nan),
            "alpha": (1.5, -0.5, math.nan),
            "log_clamp": (1.0, math.nan),
            "n_threads": (0, -1),
            "chunk_rows": (0,),
            "reduction": ("avg", ""),
            "divergence": ("up",),
            "ignore_index": (2**63, -(10**30)),
            "k": (0,),
        }.items()
        for value in values
    ),
    *(
        Mutation(name, lambda _, value=value: value, (TypeError,))
        for name, values in {
            "label_smoothing": ("0", [0.1], 1j),
            "temperature": ("1", None, [1.0]),
            "softcap": ("1",),
            "z_loss": ("0", None),
            "gamma": ("2",),
            "epsilon": (None,),
            "q": ("1",),
            "n_threads": ("2", 1.5, True),
            "reduction": (None, 1),
            "ignore_index": (1.5, "0", None),
            "return_grad": (1, "yes"),
            "return_hess": (0, None),
            "validate": (1,),
            "where": (True, [True]),
            "axis": ("1", 1.5),
            "k": (1.5, "1"),
            "log_target": (1,),
            "nonsense": (1,),
            "divergence": (None,),
        }.items()
        for value in values
    ),
    Mutation("axis", lambda _: 17, (AxisError,)),
    Mutation("axis", lambda _: -18, (AxisError,)),
    Mutation("weight", lambda w: longer(np.ones(3) if w is None else w), (ValueError,)),
    Mutation("weight", lambda w: None if w is None else np.array(["a"]), (TypeError,)),
    Mutation("weight", with_first(np.nan), (ValueError,), True),
    Mutation("weight", with_first(np.inf), (ValueError,), True),
    Mutation("pos_weight", with_first(-1.0), (ValueError,), True),
    Mutation("sample_weight", with_first(np.nan), (ValueError,)),
    Mutation("sample_weight", with_first(np.inf), (ValueError,)),
    Mutation("sample_weight", lambda s: np.ones((2, 3, 5, 7, 11)), (ValueError,)),
    Mutation("where", lambda w: None if w is None else to_numpy(w).astype(np.int64), (TypeError,)),
    Mutation("where", lambda w: np.ones((2, 3, 5, 7, 11), bool), (ValueError,)),
    Mutation("grad_out", lambda b: None if b is None else to_numpy(b).astype(">f8"), (ValueError,)),
    Mutation("grad_out", lambda b: None if b is None else np.empty((3, 1, 4, 1, 5), to_numpy(b).dtype), (ValueError,)),
    Mutation("grad_out", lambda b: None if b is None else [0.0], (TypeError,)),
    Mutation("hess_out", lambda b: None if b is None else np.broadcast_to(to_numpy(b), b.shape), (ValueError,)),
)
UNTOUCHED = 7


def hostile(g: Chooser, call: Call) -> Call | None:
    """The call with something wrong about it, or None where that does not apply."""
    function = function_of(call.function)
    known = inspect.signature(function).parameters
    mutation = MUTATIONS[g.rng.integers(len(MUTATIONS))]
    options = dict(call.options)
    args = list(call.args)
    name = mutation.argument
    if name not in known and name not in ("0", "1", "label", "probability", "nonsense"):
        return None
    if call.library != "numpy" or call.function in ("LossState", "log_loss", "linear_cross_entropy"):
        return None
    if not options.pop("validate", True):  # which may hide something else that is wrong
        return None
    if mutation.rows_must_count:  # what counts nothing is not looked at
        for key in ("sample_weight", "where", *(["weight"] if name != "weight" else [])):
            options.pop(key, None)
    for key in ("grad_out", "hess_out"):
        if key in options:
            options[key] = np.full(args[0].shape, UNTOUCHED, args[0].dtype.newbyteorder("="))
    options.pop("out", None)
    if name in ("0", "1", "label", "probability"):
        position = int(name == "1" or name in ("label", "probability"))
        if position >= len(args) or not hasattr(args[position], "shape"):
            return None
        is_label = args[position].dtype.kind in "iu" and position == 1 and "ignore_index" in known
        if (name == "label") != is_label and name in ("label", "probability"):
            return None
        if name == "probability" and ("ignore_index" not in known or not position):
            return None
        if name == "1" and call.function == "distillation_loss" and "teacher_indices" in options:
            return None
        changed = mutation.change(args[position])
        is_ignored = isinstance(changed, np.ndarray) and options.get("ignore_index", -100) in changed.reshape(-1)[:1]
        if name == "label" and is_ignored:
            return None
        if changed is None and not (name == "0" and mutation.change(np.zeros(1)) is None):
            return None
        args[position] = changed
    else:
        changed = mutation.change(options.get(name))
        if changed is None and name in ("weight", "pos_weight", "sample_weight", "where", "grad_out", "hess_out"):
            return None
        if name == "weight" and changed.dtype.kind == "f" and np.isfinite(changed).all():  # longer, and may fit so
            shape, kept = args[0].shape, changed.shape
            if all(n in (1, m) for n, m in zip(kept[::-1], shape[::-1], strict=False)) and len(kept) <= len(shape):
                return None
        options[name] = changed
    if isinstance(changed, list) and name in ("0", "where") and "x" in known:  # softmax and its like take lists
        return None
    buffers = {k: v for k, v in options.items() if k in ("grad_out", "hess_out") and isinstance(v, np.ndarray)}
    return replace(call, args=args, options=options, raises=mutation.raises, buffers=buffers, note=name)


# Carrying out, and judging


def carry_out(function: Callable[..., Any], call: Call, report: Report, index: int) -> str | None:
    """Make the call; what is wrong, or None."""
    before = [snapshot(a) for a in (*call.args, *call.options.values())]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = function(*call.args, **call.options)
    except ERRORS as error:
        if isinstance(error, call.raises):
            report.refusals += 1
            touched = [key for key, b in call.buffers.items() if (b != UNTOUCHED).any()]
            return f"refused, but {touched[0]} was written to" if touched and "out" not in call.note else None
        wanted = f" instead of {call.raises[0].__name__}" if call.raises else ""
        return f"refused{wanted}: {type(error).__name__}: {error}"
    except Exception:
        return f"raised:\n{traceback.format_exc(limit=-4)}"
    if call.raises:
        return "was not refused"
    in_place = [id(b) for b in call.buffers.values()]
    for value, old in zip((*call.args, *call.options.values()), before, strict=True):
        if id(value) not in in_place and old is not None and snapshot(value) != old:
            return "an input has changed"
    with np.errstate(all="ignore"):
        expected = call.expected()
    results = [part for part in flat(result) if part is not None]
    if len(results) != len(expected):
        return f"{len(results)} results instead of {len(expected)}"
    for value, wanted in zip(results, expected, strict=True):
        buffer = call.buffers.get("out" if wanted.name == "out" else f"{wanted.name}_out")
        if buffer is not None and not is_same(value, buffer):
            return f"{wanted.name} is not the buffer"
        if wrong := judged(to_numpy(value), wanted, report, call, index):
            return wrong
    return None


def flat(result: Any) -> Iterator[Any]:
    """The arrays of a result, tuples within it included."""
    if isinstance(result, tuple | list):
        for part in result:
            yield from flat(part)
    else:
        yield result


def is_same(value: Any, buffer: Any) -> bool:
    """Whether a result is the buffer; of PyTorch: lies in its memory."""
    if isinstance(buffer, np.ndarray):
        return value is buffer
    return bool(value.data_ptr() == buffer.data_ptr())


def snapshot(x: Any) -> bytes | None:
    """The numbers of an array, to see whether they change."""
    return to_numpy(x).tobytes() if hasattr(x, "shape") and to_numpy(x).size <= 5000 else None


def judged(found: Array, wanted: Expected, report: Report, call: Call, index: int) -> str | None:
    exact, size, lost = wanted.bound
    if found.dtype != wanted.dtype:
        return f"{wanted.name} has dtype {found.dtype}, not {wanted.dtype}"
    if found.shape != exact.shape:
        return f"{wanted.name} has shape {found.shape}, not {exact.shape}"
    if found.dtype.kind == "i":
        wanted = replace(wanted, dtype=np.dtype("float64"), work=np.dtype("float64"))
    with np.errstate(all="ignore"):
        slack = SLACKS["reference"] if call.library == "strict" else SLACK[-1]
        if PROCESSOR[-1] == "emulated" and is_short(call):  # 2^x is not taken apart: as many ULP as half its exponent
            slack *= 16
        value = oracle.wide(found)
        unit = ulp(np.where(np.isfinite(size), size, LD(1)), wanted.work)
        if wanted.in_eps:
            unit = np.maximum(unit, np.where(np.isfinite(size), size, LD(1)) * LD(2) ** -KINDS[wanted.work].fraction)
        allowed = wanted.limit * slack * unit + lost
        near = np.abs(exact) + allowed
        half = LD(0) if wanted.dtype == wanted.work else ulp(near, wanted.dtype) / 2
        excess = np.maximum(np.abs(value - exact) - lost - half, 0)
        error = excess / unit
        # the reference divides the derivatives of a mean last
        margin = 64 if call.library != "strict" else 1e6
        overflows = (near > KINDS[wanted.dtype].greatest) | (size > KINDS[wanted.work].greatest / margin)
        # of the right sign, or of that which the allowed error gives it
        overflows &= ~(value * exact < 0) | (np.sign(value) * exact + allowed > KINDS[wanted.dtype].greatest)
        is_right = (error <= wanted.limit * slack) | (value == exact) | (np.isnan(value) & np.isnan(exact))
        is_right |= np.isinf(value) & overflows & ~np.isnan(exact)
        if call.library == "strict":  # the reference adds in the type of the terms, infinities of both signs at last
            is_right |= np.isnan(value) & overflows
        if wanted.name == "loss" and is_signed(call):  # infinite rows of both signs
            is_right |= np.isnan(value) & (size > KINDS[wanted.work].greatest / margin)
        if wanted.skip is not None:
            is_right |= wanted.skip
    report.comparisons += int(value.size)
    if is_right.all():
        finite = np.isfinite(error) & np.isfinite(value)
        if wanted.skip is not None:
            finite &= ~wanted.skip
        if finite.any():
            report.saw(call, wanted, float(error[finite].max()), index)
        return None
    wrong = np.argmax(np.where(is_right, -1, np.where(np.isnan(error), np.inf, error)))
    at = tuple(int(i) for i in np.unravel_index(wrong, value.shape))
    return (
        f"{wanted.name}{list(at)} = {float(value[at])!r} instead of {float(exact[at])!r}: {float(error[at]):.4g} ULP "
        f"of {float(size[at]):.4g}, {wanted.limit * slack:g} allowed; {int((~is_right).sum())} of {value.size} wrong"
    )


# By how much the limits of a processor are wider; the last one of SLACK counts.
SLACKS = {"reference": 128.0, "emulated": 2.0}
SLACK = [1.0]
PROCESSOR = [""]


def is_signed(call: Call) -> bool:
    """Whether rows may count negatively."""
    weight = call.options.get("sample_weight")
    return weight is not None and bool(np.any(np.asarray(to_numpy(weight), np.float64) < 0))


def is_short(call: Call) -> bool:
    """Whether logits have 16 bits."""
    arrays = [piece[1] for piece in call.args[1]] if call.function == "LossState" else call.args[:1]
    return any(to_numpy(x).dtype.itemsize == 2 for x in arrays)


def described(x: Any) -> str:
    """An argument in short."""
    if isinstance(x, tuple | list) and len(x) < 30 and any(hasattr(part, "shape") for part in flat(tuple(x))):
        return f"({', '.join(map(described, x))})"
    if not hasattr(x, "shape"):
        return repr(x) if len(repr(x)) < 200 else f"{type(x).__name__} of {len(x)}"
    a = to_numpy(x)
    strides = "" if not isinstance(x, np.ndarray) or x.flags.c_contiguous else f" strides {x.strides}"
    kind = "" if isinstance(x, np.ndarray) else f"{type(x).__module__.partition('.')[0]} "
    if a.size <= 12:
        return f"{kind}{a.dtype}{strides} {a.tolist()}"
    return f"{kind}{a.dtype}{list(a.shape)}{strides}"


# Processors


@contextmanager
def processor(name: str) -> Iterator[None]:
    """Let NumPy arrays go to the kernels of a level or the emulated GPU; or make all arrays those of the reference."""
    with ExitStack() as stack:
        PROCESSOR.append(name)
        stack.callback(PROCESSOR.pop)
        if name == "emulated":
            import emulated

            stack.enter_context(computed_by(emulated, emulated.view))
            SLACK.append(SLACKS[name])
            stack.callback(SLACK.pop)
        elif name not in ("", "reference"):
            stack.enter_context(at_level(name))
        yield


# Faults put in from outside: each wraps a public function, calls it, and spoils arguments or results


def counts_ignored_rows(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The mean divides by all rows."""
    result = function(*args, **options)
    if options.get("reduction") != "mean" or not isinstance(args[1], np.ndarray) or args[1].dtype.kind not in "iu":
        return result
    counted = np.mean(args[1] != options.get("ignore_index", -100))
    return with_loss(result, lambda loss: type(loss)(loss * counted))


def smooths_the_others(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Label smoothing over the C - 1 other classes."""
    eps, n_classes = options.get("label_smoothing", 0.0), args[0].shape[options.get("axis", -1)] if args[0].ndim else 1
    if eps and n_classes > 1:
        options["label_smoothing"] = min(eps * n_classes / (n_classes - 1), 1.0)
    return function(*args, **options)


def z_loss_without_sample_weight(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    result = function(*args, **options)
    if not options.get("z_loss") or options.get("sample_weight") is None or options["reduction"] != "sum":
        return result
    own = {k: v for k, v in options.items() if k not in ("return_grad", "return_hess", "grad_out", "hess_out")}
    plain = {k: v for k, v in own.items() if k != "sample_weight"}
    loss = (
        function(*args, **{**own, "z_loss": 0.0})
        - function(*args, **{**plain, "z_loss": 0.0})
        + function(*args, **plain)
    )
    return with_loss(result, lambda old: type(old)(loss))


def forgets_strides(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The gradient is written as if its buffer were contiguous."""
    result = function(*args, **options)
    buffer = options.get("grad_out")
    if isinstance(buffer, np.ndarray) and not buffer.flags.c_contiguous:
        buffer[...] = buffer.ravel("K").reshape(buffer.shape)
    return result


def weight_0_times_nan(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A row of NaN makes the loss NaN whatever it weighs."""
    result = function(*args, **options)
    has_nan = isinstance(args[0], np.ndarray) and np.isnan(args[0]).any()
    if has_nan and options.get("sample_weight") is not None and options.get("reduction") != "none":
        return with_loss(result, lambda loss: type(loss)(np.nan))
    return result


def last_class_off_by_one(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A label of the last class is taken for the one before."""
    if len(args) > 1 and isinstance(args[1], np.ndarray) and args[1].dtype.kind in "iu" and args[0].ndim > args[1].ndim:
        last = args[0].shape[options.get("axis", -1)] - 1
        moved = (args[1] == last) & (last > 0) & (options.get("ignore_index", -100) != last)
        args = (args[0], np.where(moved, args[1] - (args[1] > 0).astype(args[1].dtype), args[1]), *args[2:])
    return function(*args, **options)


def divides_before_the_maximum(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The logits are divided by the temperature, and rounded, before anything is subtracted."""
    temperature = options.get("temperature", 1.0)
    if temperature == 1.0 or not isinstance(args[0], np.ndarray) or options.get("softcap"):
        return function(*args, **options)
    if (
        any(options.get(key) is not None for key in ("grad_out", "hess_out", "out"))
        or function is xce.distillation_loss
    ):
        return function(*args, **options)
    with np.errstate(all="ignore"):
        divided = (args[0] / args[0].dtype.type(temperature)).astype(args[0].dtype)
    return function(divided, *args[1:], **{**options, "temperature": 1.0})


def forty_ulps(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The loss is off by 40 ULP."""
    return with_loss(
        function(*args, **options),
        lambda loss: loss * (1 + 40 * np.finfo(loss.dtype).eps) if isinstance(loss, np.generic | np.ndarray) else loss,
    )


def confident_gradient_cancels(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The gradient is formed as p - 1 at the label: its digits below the eps of 1 are gone."""
    result = function(*args, **options)
    if isinstance(result, tuple) and options.get("return_grad") and options.get("reduction") == "none":
        grad = result[1]
        if isinstance(grad, np.ndarray) and grad.dtype == np.float32 and grad.flags.writeable:
            negative = (grad < 0) & (grad > -0.5)
            grad[negative] = (grad[negative] + np.float32(1)) - np.float32(1)
    return result


def hessian_of_p(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The Hessian is 2 p (1 - p), as of XGBoost."""
    result = function(*args, **options)
    if isinstance(result, tuple) and options.get("return_hess") and isinstance(result[-1], np.ndarray):
        np.multiply(result[-1], 2, out=result[-1])
    return result


def writes_before_checking(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call that is refused has written to its buffer."""
    try:
        return function(*args, **options)
    except ERRORS:
        if isinstance(buffer := options.get("grad_out"), np.ndarray) and buffer.flags.writeable:
            buffer[...] = 0
        raise


def with_loss(result: Any, change: Callable[[Any], Any]) -> Any:
    """The result with another loss."""
    with np.errstate(all="ignore"):
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


PLANTS: dict[str, Callable[..., Any]] = {
    plant.__name__: plant
    for plant in (
        counts_ignored_rows, smooths_the_others, z_loss_without_sample_weight, forgets_strides, weight_0_times_nan,
        last_class_off_by_one, divides_before_the_maximum, forty_ulps, confident_gradient_cancels, hessian_of_p,
        writes_before_checking,
    )
}  # fmt: skip


# The command


def function_of(name: str) -> Callable[..., Any]:
    return state_of if name == "LossState" else getattr(xce, name, None) or getattr(metrics, name)


def made(seed: int, index: int, functions: tuple[str, ...] = (), without: frozenset[str] = frozenset()) -> Call:
    """The call of an index."""
    g = Chooser(seed, index, without)
    name = g.one_of(*(functions or (*MAKERS, *OFTEN)))
    if name == "generalized_cross_entropy" and not g.has("gce"):
        name = "cross_entropy"
    with np.errstate(all="ignore"):
        call = MAKERS[name](g, name)
        return (g.chance(0.1, "hostile") and hostile(g, call)) or call


def run(
    calls: Iterator[int] | range,
    seed: int = 0,
    functions: tuple[str, ...] = (),
    without: frozenset[str] = frozenset(),
    plant: str = "",
    on_failure: Callable[[int, Call, str], bool] = lambda *_: True,
) -> Report:
    """Make the calls of some indices; `on_failure` says whether to stop."""
    report = Report()
    for index in calls:
        call = made(seed, index, functions, without)
        report.calls += 1
        function = function_of(call.function)
        if plant:
            function = planted(plant, function)
        wrong = carry_out(function, call, report, index)
        if wrong and on_failure(index, call, wrong):
            break
    return report


def planted(plant: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of labels with the fault; other functions as they are."""
    if function.__name__ not in ROWS:
        return function
    return lambda *args, **options: PLANTS[plant](function, *args, **options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="make this call only, and show it")
    parser.add_argument("--start", type=int, default=0, help="the first index")
    parser.add_argument("--function", default="", help="names of functions, with commas")
    parser.add_argument("--processor", default="", help="v2, v3, v4, reference or emulated")
    parser.add_argument("--without", default="", help=f"groups of features: {', '.join(GROUPS)}")
    parser.add_argument("--plant", default="", choices=["", *PLANTS])
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    options = parser.parse_args(arguments)
    without = frozenset(filter(None, options.without.split(",")))
    if unknown := without - set(GROUPS):
        parser.error(f"unknown groups {', '.join(sorted(unknown))}: expected {', '.join(GROUPS)}")
    functions = tuple(filter(None, options.function.split(",")))
    if unknown := set(functions) - set(MAKERS):
        parser.error(f"unknown functions {', '.join(sorted(unknown))}: expected {', '.join(MAKERS)}")
    failures = []

    def on_failure(index: int, call: Call, wrong: str) -> bool:
        failures.append(index)
        flags = f" --processor {options.processor}" * bool(options.processor)
        flags += f" --function {options.function}" * bool(options.function)
        flags += f" --without {options.without}" * bool(options.without)
        print(
            f"\npython tests/fuzz.py --seed {options.seed} --index {index}{flags}\n"
            f"  {call.function} ({call.library}): {wrong}"
        )
        for key, value in itertools.chain(enumerate(call.args), call.options.items()):
            print(f"    {key}: {described(value)}")
        return len(failures) >= options.failures

    started = time.perf_counter()
    calls = (
        range(options.start, options.start + options.calls)
        if options.index is None
        else range(options.index, options.index + 1)
    )
    with processor(options.processor):
        report = run(calls, options.seed, functions, without, options.plant, on_failure)
    seconds = time.perf_counter() - started
    print(f"\n{'function':34} {'result':8} {'ULP':>9} {'of limit':>9}  index")
    for (name, result), (used, error, index) in sorted(report.worst.items()):
        print(f"{name:34} {result:8} {error:9.3g} {used:9.0%}  {index}")
    print(
        f"{report.calls} calls from seed {options.seed}, {report.refusals} refused as they must be, "
        f"{report.comparisons} numbers compared, {len(failures)} failures, {report.calls / seconds:.0f} calls/s"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

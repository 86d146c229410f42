"""The losses and options that the tests run over: one row per loss, one generator of arguments for all of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import xce
from xce._engines import Engine, reference
from xce._libraries import numpy as library

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """One public loss. What it has of `OPTIONS`, its signature says."""

    function: Callable[..., Any]
    # "rows" of logits, or of "log-probabilities" as they are; "pairs" of logits; or "elements"
    kind: str
    # the textbook's formula in the functions of mpmath, m: of a log-probability (and the teacher's), or of x and y
    definition: Callable[..., Any]
    modes: tuple[str, ...]  # what a target may be: keys of TARGETS
    params: tuple[dict[str, float], ...] = ({},)  # values of the loss's own parameters to try
    inputs: str = "logits"  # what the first argument holds: a key of INPUTS
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    cancels: bool = False  # whether derivatives have terms of both signs even where the target is a whole number

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def options(self) -> dict[str, tuple[Any, ...]]:
        """Those of `OPTIONS` that it has."""
        names = inspect.signature(self.function).parameters
        own = {name: values for name, values in OPTIONS.items() if ARGUMENTS.get(name, name) in names}
        return own | {"reduction": self.reductions}

    @property
    def has_classes(self) -> bool:
        return "axis" in inspect.signature(self.function).parameters


# Every option, off and on; True stands for a random `weight`, `sample_weight`, `where` or ignored label.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "weight": (False, True),
    "pos_weight": (False, True),
    "sample_weight": (False, True),
    "where": (False, True),
    "ignore": (False, True),
    "label_smoothing": (0.0, 0.1),
    "temperature": (1.0, 0.7),
    "softcap": (None, 3.0),
    "z_loss": (0.0, 0.01),
    "reduction": ("mean", "sum", "none"),
}
ARGUMENTS = {"ignore": "ignore_index"}  # options whose argument has another name

# Shapes with their class axis: unbatched, batched, and the class axis first, in the middle and of one class.
SHAPES = (((7,), 0), ((5, 7), -1), ((6, 4), 0), ((2, 5, 3, 2), 1), ((3, 1), 1))


# The definitions


def sigmoid(m: Any, x: Any) -> Any:
    return 1 / (1 + m.exp(-x))


def xlogy(m: Any, x: Any, y: Any) -> Any:
    return x * m.log(y) if x else x


def divergence(m: Any, u: Any, v: Any, divergence: str) -> Any:
    p, t = m.exp(u), m.exp(v)
    if divergence == "forward":
        return t * (v - u) if t else t
    if divergence == "reverse":
        return p * (u - v)
    mean = m.log((p + t) / 2)
    return (p * (u - mean) + (t * (v - mean) if t else t)) / 2


def binary(m: Any, x: Any, y: Any, w: Any = 1, label_smoothing: float = 0.0) -> Any:
    y = (1 - label_smoothing) * y + label_smoothing / 2
    return -w * y * m.log(sigmoid(m, x)) - (1 - y) * m.log(sigmoid(m, -x))


def binary_of_probs(m: Any, p: Any, y: Any, log_clamp: float | None) -> Any:
    bound = -m.inf if log_clamp is None else log_clamp
    return -sum(a * max(m.log(q), bound) for a, q in ((y, p), (1 - y, 1 - p)) if a)


def sigmoid_focal(m: Any, x: Any, y: Any, alpha: float, gamma: float) -> Any:
    p = sigmoid(m, x)
    right, share = y * p + (1 - y) * (1 - p), y * alpha + (1 - y) * (1 - alpha)
    return (1 if alpha < 0 else share) * (1 - right) ** gamma * binary(m, x, y)


def asymmetric(m: Any, x: Any, y: Any, gamma_pos: float, gamma_neg: float, clip: float) -> Any:
    p = sigmoid(m, x)
    shifted = max(p - clip, 0 * p)
    right, gamma = y * p + (1 - y) * (1 - shifted), y * gamma_pos + (1 - y) * gamma_neg
    return -((1 - right) ** gamma) * (y * m.log(p) + (1 - y) * m.log(1 - shifted))


LOSSES = (
    Case(xce.cross_entropy, "rows", lambda m, u: -u, ("index", "probabilities")),
    Case(
        xce.focal_loss, "rows", lambda m, u, gamma: -((1 - m.exp(u)) ** gamma) * u, ("index", "probabilities"),
        ({"gamma": 2.0}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 5.0}, {"gamma": 30.0}), cancels=True,
    ),
    Case(
        xce.poly_loss, "rows", lambda m, u, epsilon: -u + epsilon * (1 - m.exp(u)), ("index", "probabilities"),
        ({"epsilon": 1.0}, {"epsilon": 0.0}, {"epsilon": 4.0}, {"epsilon": -1.0}, {"epsilon": -0.25}), cancels=True,
    ),
    Case(
        xce.generalized_cross_entropy, "rows", lambda m, u, q: (1 - m.exp(q * u)) / q if q else -u,
        ("index", "probabilities"), ({"q": 0.7}, {"q": 0.0}, {"q": 1.0}, {"q": 0.01}), cancels=True,
    ),
    Case(xce.nll_loss, "log-probabilities", lambda m, u: -u, ("index",), inputs="log_probs"),
    Case(
        xce.distillation_loss, "pairs", divergence,
        ("forward", "reverse", "js", "sparse forward", "sparse js"), cancels=True,
    ),
    Case(
        xce.binary_cross_entropy_with_logits, "elements", binary, ("labels", "fractions"),
    ),
    Case(
        xce.binary_cross_entropy, "elements", binary_of_probs, ("labels", "fractions"),
        ({"log_clamp": -100.0}, {"log_clamp": None}), inputs="probs",
    ),
    Case(
        xce.sigmoid_focal_loss, "elements", sigmoid_focal, ("labels", "fractions"),
        ({"alpha": 0.25, "gamma": 2.0}, {"alpha": -1.0, "gamma": 0.5}, {"alpha": 0.9, "gamma": 0.0},
         {"alpha": 0.5, "gamma": 3.5}, {"alpha": 0.75, "gamma": 30.0}),
        cancels=True,
    ),
    Case(
        xce.asymmetric_loss, "elements", asymmetric, ("labels", "fractions"),
        ({"gamma_pos": 0.0, "gamma_neg": 4.0, "clip": 0.05}, {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.0},
         {"gamma_pos": 2.5, "gamma_neg": 3.0, "clip": 0.2}, {"gamma_pos": 0.0, "gamma_neg": 0.0, "clip": 0.0}),
        cancels=True,
    ),
    Case(
        xce.soft_margin_loss, "elements", lambda m, x, y: m.log(1 + m.exp(-y * x)), ("signs", "numbers"),
    ),
    Case(
        xce.multilabel_soft_margin_loss, "elements", binary, ("labels", "fractions"),
    ),
    Case(
        xce.kl_div, "elements",
        lambda m, u, t, log_target: m.exp(t) * (t - u) if log_target else xlogy(m, t, t) - t * u,
        ("masses", "log masses"), inputs="log_probs", reductions=("mean", "batchmean", "sum", "none"),
    ),
)  # fmt: skip

CASE_OF = {case.function: case for case in LOSSES}
TARGETS_OF_LOSSES = tuple((case, mode) for case in LOSSES for mode in case.modes)


def combinations(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the given values of options, by default of `OPTIONS`."""
    options = options or OPTIONS
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


# Arguments

Shape = tuple[int, ...]
Made = tuple[Array, dict[str, Any]]  # a target, and the options that say what it is


def class_indices(rng: np.random.Generator, x: Array, axis: int) -> Made:
    return rng.integers(x.shape[axis], size=x.shape[:axis] + x.shape[axis + 1 :]), {}


def probabilities(rng: np.random.Generator, x: Array, axis: int) -> Made:
    target = rng.random(x.shape)
    target[rng.random(x.shape) < 0.2] = 0
    return (target / (target.sum(axis, keepdims=True) + 1e-300)).astype(x.dtype), {}


def teacher(rng: np.random.Generator, x: Array, axis: int) -> Made:
    """Far from the student, or close to it."""
    far = rng.choice([0.01, 3.0])
    return (x.astype(np.float64) + far * rng.standard_normal(x.shape)).astype(x.dtype), {}


def sparse_teacher(rng: np.random.Generator, x: Array, axis: int) -> Made:
    """Of some classes, in any order; of long rows of few, for the reference compares each with all classes."""
    kind = rng.choice(["int32", "int64", "uint16"]) if x.shape[axis] <= 1 << 16 else "int64"
    indices = np.argsort(rng.random(x.shape), axis).astype(kind)
    most = x.shape[axis] if x.shape[axis] <= 2000 else 100
    indices = np.take(indices, range(rng.integers(most) + 1), axis)
    return np.take_along_axis(teacher(rng, x, axis)[0], indices.astype(np.int64), axis), {"teacher_indices": indices}


def labels(rng: np.random.Generator, x: Array, axis: int) -> Made:
    kind = rng.choice(["bool", "int8", "int64", "uint8", "float32", str(x.dtype)])
    return np.asarray(rng.integers(2, size=x.shape)).astype(x.dtype if kind == "bfloat16" else kind), {}


def fractions(rng: np.random.Generator, x: Array, axis: int) -> Made:
    y = np.round(2 * np.asarray(rng.random(x.shape)) - 0.5, 1).clip(0, 1)  # half of them 0 or 1
    return np.asarray(y).astype(x.dtype), {}


def masses(rng: np.random.Generator, x: Array, axis: int) -> Made:
    t = np.asarray(rng.random(x.shape) * (rng.random(x.shape) < 0.8))
    return t.astype(x.dtype), {}


# what a target may be -> the target for some first argument
TARGETS: dict[str, Callable[[np.random.Generator, Array, int], Made]] = {
    "index": class_indices,
    "probabilities": probabilities,
    "forward": lambda *args: (teacher(*args)[0], {"divergence": "forward"}),
    "reverse": lambda *args: (teacher(*args)[0], {"divergence": "reverse"}),
    "js": lambda *args: (teacher(*args)[0], {"divergence": "js"}),
    "sparse forward": lambda *args: added(sparse_teacher(*args), divergence="forward"),
    "sparse js": lambda *args: added(sparse_teacher(*args), divergence="js"),
    "labels": labels,
    "fractions": fractions,
    "signs": lambda rng, x, axis: (2 * np.asarray(rng.integers(2, size=x.shape)) - 1, {}),
    "numbers": lambda rng, x, axis: (np.asarray(2 * rng.standard_normal(x.shape)).astype(x.dtype), {}),
    "masses": lambda *args: added(masses(*args), log_target=False),
    "log masses": lambda rng, x, axis: (INPUTS["log_probs"](rng, x.shape).astype(x.dtype), {"log_target": True}),
}


def added(made: Made, **options: Any) -> Made:
    return made[0], made[1] | options


# what a first argument may hold; derivatives by differences need room on both sides
INPUTS: dict[str, Callable[[np.random.Generator, Shape], Array]] = {
    "logits": lambda rng, shape: np.asarray(3 * rng.standard_normal(shape)),
    "log_probs": lambda rng, shape: np.asarray(-3 * np.abs(rng.standard_normal(shape))),
    "probs": lambda rng, shape: np.asarray(0.001 + 0.998 * rng.random(shape)),
}


def problem(
    features: dict[str, Any],
    mode: str = "index",
    shape: Shape = (5, 7),
    axis: int = -1,
    dtype: Any = np.float64,
    seed: int = 0,
    case: Case = LOSSES[0],
) -> tuple[Array, Array, dict[str, Any]]:
    """Random arguments of a loss: with the features, of one of `combinations`, that it has."""
    rng = np.random.default_rng(seed)
    features = {name: value for name, value in features.items() if name in case.options}
    options: dict[str, Any] = {"axis": axis} if case.has_classes else {}
    options |= {k: v for k, v in features.items() if not isinstance(v, bool)}
    axis %= max(len(shape), 1)
    x = INPUTS[case.inputs](rng, shape).astype(dtype)
    target, of_target = TARGETS[mode](rng, x, axis)
    options |= of_target
    rows, n_classes = (shape[:axis] + shape[axis + 1 :], shape[axis]) if case.has_classes else (shape, 0)
    if features.get("ignore") and mode == "index":
        options["ignore_index"] = ignored = 255 if rng.integers(2) else n_classes - 1
        target = np.where(rng.random(rows) < 0.3, ignored, target)
    for name in ("weight", "pos_weight", "sample_weight"):
        if features.get(name):
            size = rows if name == "sample_weight" else (n_classes,) if case.has_classes else some_axes(rng, shape)
            options[name] = np.asarray(rng.random(size) + 0.5).astype(dtype)
    if features.get("where"):
        kept = rng.random(shape) < 0.8
        if "teacher_indices" in options:  # the teacher must have a class that is left
            first = np.take(options["teacher_indices"], [0], axis).astype(np.int64)
            np.put_along_axis(kept, first, True, axis)
        elif mode == "index":  # a removed target would make the loss infinite
            label = np.expand_dims(np.minimum(target, n_classes - 1), axis)
            np.put_along_axis(kept, label, True, axis)
        else:
            kept |= target > 0
        kept |= ~kept.any(axis, keepdims=True)
        options["where"] = kept
    return x, target, options


def some_axes(rng: np.random.Generator, shape: Shape) -> Shape:
    """A shape that broadcasts to `shape`."""
    kept = tuple(n if rng.integers(2) else 1 for n in shape)
    return kept[rng.integers(len(shape) + 1) :] if rng.integers(2) else kept


def rows_at(
    place: Any, x: Array, target: Array, options: dict[str, Any], case: Case
) -> tuple[Any, Any, dict[str, Any]]:
    """The arguments of a call with some entries of their first axis alone, which is not that of the classes."""
    whole = {"where", "sample_weight", "teacher_indices"} | (set() if case.has_classes else {"weight", "pos_weight"})
    own = {
        name: (value if case.has_classes else np.broadcast_to(value, x.shape))[place] if name in whole else value
        for name, value in options.items()
    }
    return x[place], target[place], own


def oracle(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a public function, with NumPy arrays computed by the reference instead of the kernels."""
    with computed_by(reference):
        return function(*args, **options)


@contextmanager
def computed_by(engine: Engine, view: Callable[[Any, str], Any] = library.view) -> Iterator[None]:
    """Let an engine compute on the arrays of NumPy; it may see them otherwise."""
    with mock.patch.multiple(library, engine=lambda x: engine, view=view):
        yield

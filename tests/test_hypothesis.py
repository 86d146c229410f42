"""Random valid calls against the reference in float64.

``HYPOTHESIS_PROFILE`` of the environment chooses ``long`` (2,000 examples a test) or ``random`` (new examples in
every run); the default has 200 examples, the same ones in every run.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from cases import Case, problem
from checks import DTYPES, LAYOUTS, check_loss, check_maps, check_stats, dtype_of, every_target, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xce

settings.register_profile(
    "fixed", max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False)
settings.register_profile("long", settings.get_profile("fixed"), derandomize=False, max_examples=2000)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

N_CLASSES = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 63, 64, 65, 100, 128, 129, 260, 1030])
LAYOUT = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.__getitem__)
SCALES = st.sampled_from([0.0, 1e-30, 0.1, 1.0, 1.0, 10.0, 100.0])
OFFSETS = st.sampled_from([0.0, 0.0, 0.0, 50.0, -300.0, 1e4])
SIGNED = st.sampled_from(["i1", "i2", "i4", "i8"])
LABELS = SIGNED | st.sampled_from(["u1", "u2", "u4", "u8"])
INF = np.inf


@st.composite
def shapes(draw: Any) -> tuple[tuple[int, ...], int]:
    """A shape of any number of axes, with the class axis anywhere."""
    rows = draw(st.lists(st.integers(0, 20), max_size=1) | st.lists(st.integers(1, 4), max_size=4))
    axis = draw(st.integers(0, len(rows)))
    shape = (*rows[:axis], draw(N_CLASSES), *rows[axis:])
    return shape, axis - draw(st.sampled_from([0, len(shape)]))


@st.composite
def logits_of(draw: Any, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> np.ndarray:
    """Logits of any size, some of them infinite, equal, or NaN, anywhere in memory."""
    x = draw(SCALES) * rng.standard_normal(shape) + draw(OFFSETS)
    if draw(st.booleans()):
        x = np.round(x)
    special = draw(st.sampled_from([None, None, None, -np.inf, np.inf, np.nan]))
    if special is not None:
        x = np.where(rng.random(shape) < draw(st.sampled_from([0.01, 0.3])), special, x)
    return x.astype(dtype)


def placed(draw: Any, x: Any) -> Any:
    return draw(LAYOUT)(x) if isinstance(x, np.ndarray) and x.ndim else x


def first_argument(draw: Any, case: Case, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> np.ndarray:
    if case.inputs == "probs":
        p = rng.random(shape) ** draw(st.sampled_from([1, 4, 30]))
        return np.where(rng.random(shape) < 0.1, rng.integers(2, size=shape), p).astype(dtype)
    x = draw(logits_of(shape, dtype, rng))
    return -np.abs(x) if case.inputs == "log_probs" else x


@PROFILE
@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=shapes(), seed=st.integers(0, 10**6))
@every_target
def test_losses(case: Case, mode: str, data: Any, dtype: str, shape: Any, seed: int) -> None:
    draw = data.draw
    features = {name: draw(st.sampled_from(values), label=name) for name, values in case.options.items()}
    kind, rng = dtype_of(dtype), np.random.default_rng(seed)
    _, target, options = problem(features, mode, *shape, kind, seed, case)
    x = first_argument(draw, case, shape[0], kind, rng)
    if "where" in options:  # NaN rows that lack classes have a test of their own
        x = np.where(np.isfinite(x), x, x.dtype.type(0))
    if case.kind == "pairs" and mode != "reverse":  # a certain teacher
        target = np.where(
            rng.random(target.shape) < draw(st.sampled_from([0, 0, 0.2])), target.dtype.type(-INF), target
        )
    if mode in ("index", "signs"):
        narrow = np.dtype(draw(LABELS)) if mode == "index" else np.dtype(draw(SIGNED))
        if np.all((target >= np.iinfo(narrow).min) & (target <= np.iinfo(narrow).max)):
            target = np.asarray(target).astype(narrow)
    options |= draw(st.sampled_from(case.params))
    options = {name: placed(draw, value) for name, value in options.items()}
    x, target = placed(draw, x), placed(draw, target)

    value, grad, hess = check_loss(case.function, x, target, **options)
    same_bits(case.function(x, target, **options), value)
    buffer = placed(draw, np.ones_like(x))
    result = case.function(x, target, return_grad=True, grad_out=buffer, **options)
    assert result[1] is buffer
    same_bits(result[0], value)
    same_bits(buffer, grad)
    same_bits(case.function(x, target, return_hess=True, **options)[1], hess)


@PROFILE
@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=shapes(), seed=st.integers(0, 10**6))
def test_other_functions(data: Any, dtype: str, shape: Any, seed: int) -> None:
    draw, rng = data.draw, np.random.default_rng(seed)
    shape, axis = shape
    x = placed(draw, draw(logits_of(shape, dtype_of(dtype), rng)))
    check_maps(x, axis=axis, temperature=draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])))
    rows = np.delete(shape, axis)
    target = rng.integers(-1, shape[axis], size=rows)
    check_stats(x, placed(draw, np.asarray(target)), axis=axis, ignore_index=-1)
    same_bits(xce.logsumexp(x, axis=axis, keepdims=True).squeeze(axis), xce.logsumexp(x, axis=axis))

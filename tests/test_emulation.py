"""The CUDA kernels, run by the CPU (`emulation.h`), against the reference: every loss, any layout, every regime.

``XCE_SANITIZE=1`` compiles them with the address and undefined-behaviour sanitizers, whose library must be preloaded:
CONTRIBUTING.md has the command.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from cases import LOSSES, TARGETS_OF_LOSSES, Case, combinations, problem
from checks import FLAGS, check_loss, check_maps, check_stats, dtype_of, every_target, same_bits

emulated = pytest.importorskip("emulated")
if emulated.COMPILER is None:
    pytest.skip("needs a C++ compiler, to run the kernels of CUDA", allow_module_level=True)

import xce  # noqa: E402
from xce import _dispatch  # noqa: E402
from xce._backends import _cuda  # noqa: E402

SANITIZED = bool(os.environ.get("XCE_SANITIZE"))
Regime = _cuda.Regime

# The regimes at sizes that fibres can do: groups within a warp, a block, and clusters of blocks.
REGIMES = ((64, Regime(8, 1, 16)), (160, Regime(32, 1, 64)), (400, Regime(64, 1, 64)))
CLUSTERS = ((800, Regime(64, 2, 64)), (math.inf, Regime(64, 4, 64)))
SHAPES = (
    ((3, 5), 1),
    ((5, 3), 0),
    ((2, 33), 1),
    ((3, 3, 2), 1),
    ((1, 101), 1),
    ((2, 203), 1),
    ((1, 407), 1),
    ((4,), 0),
)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with (
        mock.patch.dict(_dispatch._owners, {np.ndarray: emulated}),
        mock.patch.multiple(_cuda, _REGIMES=REGIMES, _CLUSTERS=CLUSTERS),
    ):
        yield


@every_target
@pytest.mark.parametrize("dtype", ["float32"] if SANITIZED else ["float32", "float64", "float16", "bfloat16"])
def test_losses(case: Case, mode: str, dtype: str) -> None:
    """Options and shapes in turns, so that each option meets each regime over all losses."""
    options_of = list(combinations(**case.options))
    picked = np.random.default_rng(len(mode) + len(case.name)).permutation(len(options_of))[: 4 if SANITIZED else 16]
    for seed, (features, (shape, axis)) in enumerate(
        zip((options_of[i] for i in picked), itertools.cycle(SHAPES), strict=False)
    ):
        x, target, options = problem(features, mode, shape, axis, dtype_of(dtype), seed, case=case)
        params = case.params[seed % len(case.params)]
        check_loss(case.function, x, target, **options, **params)


@every_target
def test_layouts_and_buffers(case: Case, mode: str) -> None:
    for seed, (shape, axis) in enumerate((((3, 37), 1), ((4, 9), 1), ((2, 6, 3), 1))):
        x, target, options = problem({}, mode, shape, axis, np.dtype("float32"), seed, case=case)
        expected = case.function(x, target, **options, **FLAGS)
        for place in (shifted, np.asfortranarray, lambda a: np.flip(np.flip(a).copy())):
            grad = place(np.ones_like(x))
            results = case.function(place(x), place(target), **options, **FLAGS, grad_out=grad)
            for a, b in zip(results, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        own = x.copy()
        results = case.function(own, target, **options, return_grad=True, grad_out=own)
        same_bits(results[1], expected[1])


def shifted(a: np.ndarray) -> np.ndarray:
    """The same numbers, one entry beyond a boundary of 16 bytes."""
    memory = np.zeros(a.size + 4, a.dtype)
    start = next(i for i in range(4) if memory[i:].ctypes.data % 16 == a.dtype.itemsize % 16)
    result = memory[start : start + a.size].reshape(a.shape)
    result[...] = a
    return result


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_maps_and_statistics(dtype: str, rng: np.random.Generator) -> None:
    for seed, (shape, axis) in enumerate(SHAPES):
        x = np.round(4 * rng.standard_normal(shape)).astype(dtype_of(dtype))
        if seed % 3 == 2:
            x[(0,) * x.ndim] = (np.nan, np.inf, -np.inf)[seed % 3]
        check_maps(x, axis=axis)
        rows = xce.logsumexp(x, axis=axis).shape
        check_stats(x, np.asarray(rng.integers(-1, shape[axis], size=rows)), axis=axis, ignore_index=-1)


def test_edges() -> None:
    x = np.array([[0, 1, np.nan], [np.inf, 0, 0], [-np.inf] * 3, [-np.inf, 0, 1], [1e30, 0, 0]], np.float32)
    for labels in (np.zeros(5, int), np.array([0, -100, 1, 0, 2]), np.array([2, 9, -7, 1, 0], np.int8)):
        check_loss(xce.cross_entropy, x, labels, reduction="none", validate=False)
        check_loss(xce.cross_entropy, x, labels, reduction="none", validate=False, label_smoothing=0.1)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = xce.cross_entropy(np.zeros((0, 3)), np.zeros(0, int), reduction=reduction, return_grad=True)
        np.testing.assert_array_equal(loss, value)
        assert grad.shape == (0, 3)
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3"):
        xce.cross_entropy(np.zeros((2, 3)), np.array([0, 3]))


def test_every_run_has_the_same_bits() -> None:
    x, y, _ = problem({}, shape=(7, 203), dtype=np.float32)
    runs = [xce.cross_entropy(x, y, return_grad=True, label_smoothing=0.1) for _ in range(3)]
    for value, grad in runs[1:]:
        same_bits(value, runs[0][0])
        same_bits(grad, runs[0][1])


def test_the_cases_are_all_losses() -> None:
    assert {case.name for case, _ in TARGETS_OF_LOSSES} == {case.name for case in LOSSES}

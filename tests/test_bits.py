"""The same bits on every CPU with fma, for any number of threads, batch, layout, and set of results asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import LOSSES, TARGETS_OF_LOSSES, Case, problem, rows_at
from checks import DTYPES, FLAGS, LAYOUTS, at_level, dtype_of, dtypes_of, every_target, laid_out, machine_of, same_bits

import xce
from xce import _cpu

FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"weight": True, "ignore": True, "sample_weight": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "weight": True, "where": True, "z_loss": 0.02},
    {"temperature": 0.7, "softcap": 5.0, "ignore": True},
)


def results_of(shapes: Any, dtype: Any) -> Iterator[np.ndarray]:
    """What every loss and every other function says, over features and modes."""
    calls = itertools.product(TARGETS_OF_LOSSES, FEATURES, shapes)
    for turn, ((case, mode), features, (shape, axis)) in enumerate(calls):
        if case is not LOSSES[0] and turn % 2:  # 15 shapes, an odd number: each with other features
            continue
        for seed, reduction in enumerate(case.reductions):
            params = case.params if reduction == "none" else case.params[:1]
            for param in params:
                x, y, options = problem(features | {"reduction": reduction}, mode, shape, axis, dtype, seed, case)
                yield from case.function(x, y, **options, **param, **FLAGS)
    for shape, axis in shapes:
        x, y, _ = problem({}, "index", shape, axis, dtype)
        yield from (xce.softmax(x, axis=axis), xce.log_softmax(x, axis=axis), xce.logsumexp(x, axis=axis))
        yield xce.softmax(x, axis=axis, temperature=0.7)
        yield from xce.logit_stats(x, y, axis=axis)


def assert_same(results: Any, expected: Any) -> None:
    for result, value in zip(results, expected, strict=True):
        same_bits(result, value)


# Instruction sets

SMALL = (
    ((1, 1), -1), ((9,), 0), ((17, 2), -1), ((3, 10), -1), ((33, 16), -1), ((5, 64), -1), ((3, 65), -1),
    ((19, 127), -1),
    ((2, 129), -1), ((3, 1025), -1), ((1, 5000), -1), ((10, 33), 0), ((300, 3), 0), ((2, 70, 9), 1), ((2, 2100, 3), 1),
)  # fmt: skip


@pytest.mark.skipif(not {"v3", "v4"} <= set(_cpu.available_levels()), reason="this CPU has no AVX-512")
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx2_and_avx512_have_the_same_bits(dtype: str) -> None:
    with at_level("v3"):
        expected = list(results_of(SMALL, dtype_of(dtype)))
    with at_level("v4"):
        assert_same(results_of(SMALL, dtype_of(dtype)), expected)


LEVEL = """
import numpy, xce
print(xce.show_config("dicts")["cpu"]["level"], xce.cross_entropy(numpy.zeros((1, 4)), numpy.zeros(1, int)))
"""


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("level", _cpu.available_levels())
def test_the_environment_chooses_the_instruction_set(level: str) -> None:
    result = in_new_process(LEVEL, XCE_CPU=level)
    assert result.stdout.split() == [level, "1.3862943611198906"], result.stderr


def test_without_a_choice_the_best_instruction_set_is_used() -> None:
    assert in_new_process(LEVEL, XCE_CPU="").stdout.split()[0] == _cpu.available_levels()[0]


def test_an_unknown_instruction_set_is_an_error() -> None:
    result = in_new_process(LEVEL, XCE_CPU="nonsense")
    assert result.returncode == 1
    levels = ", ".join(_cpu.available_levels())
    assert f"ImportError: XCE_CPU='nonsense' is not available here; choose one of {levels}" in result.stderr


# Threads

LARGE = (
    ((4133, 100), -1),
    ((311, 1000), -1),
    ((37, 10007), -1),
    ((2, 150_001), -1),
    ((90_001, 3), -1),
    ((3, 3, 50_003), 1),
)


def assert_threads_do_not_show(case: Case, x: Any, y: Any, **options: Any) -> None:
    results = []
    with machine_of(8):
        for n, reduction in itertools.product((1, 2, 3, 8), case.reductions):
            results.append(case.function(x, y, n_threads=n, **FLAGS, **options | {"reduction": reduction}))
    for result, alone in zip(results, itertools.cycle(results[: len(case.reductions)]), strict=False):
        assert_same(result, alone)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_any_number_of_threads(shape: Any, level: str) -> None:
    for dtype, features in (("float32", {}), ("float16", FEATURES[1]), ("float64", FEATURES[3])):
        x, y, options = problem(features, "index", shape[0], shape[1], dtype)
        assert_threads_do_not_show(LOSSES[0], x, y, **options)


@every_target
def test_any_number_of_threads_for_every_loss(case: Case, mode: str) -> None:
    for dtype, (shape, axis), features in zip(
        DTYPES, (LARGE[0], LARGE[1], LARGE[4], LARGE[0]), FEATURES[1:], strict=True
    ):
        x, y, options = problem(features, mode, shape, axis, dtype_of(dtype), case=case)
        assert_threads_do_not_show(case, x, y, **options)


def test_any_number_of_threads_for_the_other_functions() -> None:
    x, y, _ = problem({}, "index", (311, 1000), dtype=np.float32)
    with machine_of(8):
        for function in (xce.softmax, xce.log_softmax, xce.logsumexp):
            for n in (2, 3, 8):
                same_bits(function(x, n_threads=n), function(x, n_threads=1))
        for n in (2, 3, 8):
            assert_same(xce.logit_stats(x, y, n_threads=n), xce.logit_stats(x, y, n_threads=1))


def test_run_to_run() -> None:
    x, y, _ = problem({}, "index", (4133, 100), dtype=np.float32)
    expected = xce.cross_entropy(x, y, **FLAGS)
    with machine_of(8):
        for _ in range(30):
            assert_same(xce.cross_entropy(x, y, **FLAGS), expected)


THREADS_RUN = """
import os, numpy, xce
from xce import _threads
_threads.hardware_limit = _threads.runtime.max_threads = lambda: 8
before = len(os.listdir("/proc/self/task"))
xce.cross_entropy(numpy.zeros((4096, 100), "f4"), numpy.zeros(4096, int), n_threads={n})
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts the threads by /proc")
@pytest.mark.parametrize("n", [1, 3, 8])
def test_that_many_threads_do_run(n: int) -> None:
    if not xce.show_config("dicts")["openmp"]:
        pytest.skip("built without OpenMP")
    result = in_new_process(THREADS_RUN.format(n=n))
    assert result.stdout.strip() == str(n - 1), result.stderr


# Batches and layouts


@every_target
def test_a_row_alone_or_in_a_batch(case: Case, mode: str, level: str) -> None:
    thrice = np.tile(np.arange(3, 19), 3)
    for seed, (n_classes, features) in enumerate(itertools.product((3, 16, 65, 1500), FEATURES)):
        for dtype in dtypes_of(case, seed):
            param = case.params[seed % len(case.params)]
            features = features | {"reduction": "none"}
            x, y, options = problem(features, mode, (19, n_classes), -1, dtype, seed, case)
            batch = case.function(x, y, **options, **param, **FLAGS)
            for place in (slice(1), slice(7, 8), slice(18, 19), thrice):
                one, target, own = rows_at(place, x, y, options, case)
                assert_same(case.function(one, target, **own, **param, **FLAGS), [result[place] for result in batch])


@every_target
def test_any_strides(case: Case, mode: str, level: str) -> None:
    for seed, (shape, features) in enumerate(itertools.product(((3, 5, 16), (2, 3, 65), (2, 2, 1100)), FEATURES)):
        for dtype in dtypes_of(case, seed):
            x, y, options = problem(features, mode, shape, -1, dtype, seed, case)
            options |= case.params[seed % len(case.params)]
            expected = case.function(x, y, **options, **FLAGS)
            for layout in LAYOUTS.values():
                assert_same(case.function(layout(x), layout(y), **laid_out(layout, options), **FLAGS), expected)


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case, mode in TARGETS_OF_LOSSES if case.has_classes],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_any_axis(case: Case, mode: str, level: str) -> None:
    for seed, (shape, features) in enumerate(itertools.product(((3, 5, 16), (2, 3, 65), (2, 2, 1100)), FEATURES)):
        for dtype in dtypes_of(case, seed):
            x, y, options = problem(features | {"reduction": "none"}, mode, shape, -1, dtype, seed, case)
            options |= case.params[seed % len(case.params)]
            expected = case.function(x, y, **options, **FLAGS)
            for axis, order in itertools.product((0, 1), ("C", "K")):
                moved = options | {"axis": axis}
                for name in {"where", "teacher_indices"} & set(options):
                    moved[name] = np.moveaxis(options[name], -1, axis)
                z = np.moveaxis(x, -1, axis).copy(order=order)
                target = y if mode == "index" else np.moveaxis(y, -1, axis).copy(order=order)
                value, *derivatives = case.function(z, target, **moved, **FLAGS)
                assert_same([value, *(np.moveaxis(d, axis, -1) for d in derivatives)], expected)


# Results


@every_target
def test_whatever_else_is_asked_for(case: Case, mode: str, level: str) -> None:
    shapes = ((19, 16), (7, 65), (3, 1100), (2, 40_000))
    for seed, (shape, features) in enumerate(itertools.product(shapes, FEATURES)):
        for dtype in dtypes_of(case, seed):
            if mode.startswith("sparse") and shape[1] > 2000 and features:
                continue
            x, y, options = problem(features, mode, shape, -1, dtype, seed, case)
            options |= case.params[seed % len(case.params)]
            value, grad, hess = case.function(x, y, **options, **FLAGS)
            same_bits(case.function(x, y, **options), value)
            assert_same(case.function(x, y, return_grad=True, **options), (value, grad))
            assert_same(case.function(x, y, return_hess=True, **options), (value, hess))
            hess_out = np.asfortranarray(np.zeros_like(x))
            assert_same(case.function(x, y, grad_out=x, hess_out=hess_out, **options, **FLAGS), (value, grad, hess))
            same_bits(x, grad)
            same_bits(hess_out, hess)


def test_softmax_in_place(level: str) -> None:
    for function, dtype, n in itertools.product((xce.softmax, xce.log_softmax), DTYPES, (5, 64, 65, 3000, 40_000)):
        x, _, _ = problem({}, "index", (3, n), -1, dtype_of(dtype))
        expected = function(x)
        assert function(x, out=x) is x
        same_bits(x, expected)

"""Calls on a GPU by plans: what the first call of a kind found out holds for all others, and for no other kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cases import CASE_OF, LOSSES, Case, computed_by, problem
from checks import FLAGS, same_bits

emulated = pytest.importorskip("emulated")
if emulated.COMPILER is None:
    pytest.skip("needs a C++ compiler, to run the kernels of CUDA", allow_module_level=True)

import xce  # noqa: E402
from xce._engines import plans  # noqa: E402


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with computed_by(emulated, emulated.view), mock.patch.object(emulated.DEVICE, "plans", {}):
        yield


def same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        same_bits(a, b)


def fresh(function: Any, *args: Any, **options: Any) -> Any:
    """The results of a call that no plan is there for."""
    with mock.patch.object(emulated.DEVICE, "plans", {}):
        return function(*args, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_calls_of_a_kind_have_the_bits_of_their_own(case: Case, reduction: str) -> None:
    for mode in CASE_OF[case.function].modes:
        for seed in range(3):  # other numbers of the same shapes
            x, target, options = problem({"reduction": reduction}, mode, (5, 7), 1, np.dtype("f4"), seed, case=case)
            expected = fresh(case.function, x, target, **options, **FLAGS)
            same(case.function(x, target, **options, **FLAGS), expected)


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.ones((5, 7), np.float32), np.arange(5)
    expected = xce.cross_entropy(x, y, return_grad=True)
    monkeypatch.setattr(plans._Notes, "__init__", None)
    same(xce.cross_entropy(x.copy(), y.copy(), return_grad=True), expected)
    with pytest.raises(TypeError, match="not callable"):
        xce.cross_entropy(x, y, return_grad=True, return_hess=True)


def test_a_call_in_place_is_of_another_kind() -> None:
    x, other = (np.random.default_rng(seed).normal(size=(5, 7)).astype("f4") for seed in (0, 1))
    classes = np.tile(np.array([0, 3, 6]), (5, 1))
    for grad_out in (np.empty_like(x), x):
        expected = fresh(xce.distillation_loss, x.copy(), other[:, :3], teacher_indices=classes, return_grad=True)
        found = xce.distillation_loss(x, other[:, :3], teacher_indices=classes, return_grad=True, grad_out=grad_out)
        assert found[1] is grad_out
        same(found, expected)


def test_an_ignored_label_is_no_address() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f4")
    for ignored in ((plans._TOKEN << 32) + i for i in range(4)):
        y = np.array([1, ignored, 2])
        for _ in range(2):
            found = xce.cross_entropy(x, y, ignore_index=ignored, reduction="none", return_grad=True)
            same(found, xce.cross_entropy(x, np.array([1, -100, 2]), reduction="none", return_grad=True))


def test_plans_are_not_kept_for_ever() -> None:
    for n in range(plans._KEPT // 2 + 2):  # each call has two, one for its labels
        xce.cross_entropy(np.zeros((1, n + 1), np.float32), np.zeros(1, int))
    assert 0 < len(emulated.DEVICE.plans) <= plans._KEPT

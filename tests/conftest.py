"""Set-up of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from checks import at_level

from xce import _cpu


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)


@pytest.fixture(autouse=True)
def nothing_goes_to_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test on a GPU is one of the kernels: `xce.torch` must not let PyTorch compute instead."""
    if request.node.get_closest_marker("gpu") and find_spec("torch"):
        monkeypatch.setattr("xce.torch._falls_back", False)


@pytest.fixture(params=_cpu.available_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the test runs on: each that this machine has."""
    with at_level(request.param):
        yield request.param

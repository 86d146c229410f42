"""Set-up of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from checks import at_level

from xce import _cpu


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)


@pytest.fixture(params=_cpu.available_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the test runs on: each that this machine has."""
    with at_level(request.param):
        yield request.param

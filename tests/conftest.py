"""Set-up of all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # cases.py: pytest's import mode adds no path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)

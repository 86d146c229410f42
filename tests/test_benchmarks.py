"""Every benchmark runs once; peers.py prints its tables and refuses wrong answers. No time is asserted."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ASV = Path(__file__).parents[1] / "asv_benchmarks"
if not ASV.exists():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(ASV))

import benchmarks  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import targets  # noqa: E402
from benchmarks import common  # noqa: E402

import xce  # noqa: E402

KINDS = ("time_", "peakmem_", "track_")


def benchmark_classes() -> Iterator[type]:
    for module in pkgutil.iter_modules(benchmarks.__path__):
        for member in vars(importlib.import_module(f"benchmarks.{module.name}")).values():
            if isinstance(member, type) and any(name.startswith(KINDS) for name in dir(member)):
                yield member


def parameters(cls: Any) -> Iterator[tuple[str, ...]]:
    """All combinations of the parameters, but of the shapes only the smallest, which is the first."""
    if not hasattr(cls, "params"):
        return iter([()])
    axes = zip(cls.param_names, cls.params, strict=True)
    return itertools.product(*(values[:1] if name == "shape" else values for name, values in axes))


CASES = [
    pytest.param(cls, method, params, id="-".join([cls.__name__, method, *params]))
    for cls in benchmark_classes()
    for method in dir(cls)
    if method.startswith(KINDS)
    for params in parameters(cls)
]


@pytest.mark.parametrize(("cls", "method", "params"), CASES)
def test_benchmark_runs(cls: type, method: str, params: tuple[str, ...]) -> None:
    benchmark = cls()
    try:
        if hasattr(benchmark, "setup"):
            benchmark.setup(*params)
        result = getattr(benchmark, method)(*params)
    except NotImplementedError as reason:  # asv skips it too
        pytest.skip(str(reason))
    assert method.startswith("track_") == (result is not None)


def test_every_public_loss_has_a_benchmark() -> None:
    public = {name: getattr(xce, name) for name in xce.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    losses = {name for name, f in functions.items() if "return_grad" in inspect.signature(f).parameters}
    assert losses == set(common.LOSSES) | set(common.LAYERS)
    assert not set(common.LOSSES) & set(common.LAYERS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between the contenders, and one small image."""
    monkeypatch.setattr(measure, "SETTLE", 0.0)
    monkeypatch.setattr(measure, "BURST", 0.0)
    monkeypatch.setattr(targets, "SEGMENTATION", (1, 3, 4, 4))
    monkeypatch.setattr(targets, "LAYER", (4, 3, 5))


class Right(contenders.Scipy):
    name = "right"


class WrongValue(Right):
    name = "wrong value"

    def value(self, x: Any, y: Any) -> Any:
        return super().value(x, y) + 0.01


class WrongGradient(Right):
    """Wrong in one element, the smallest of all."""

    name = "wrong gradient"

    def value_and_grad(self, x: Any, y: Any) -> Any:
        loss, grad = super().value_and_grad(x, y)
        grad.flat[np.argmin(np.abs(grad))] = 0
        return loss, grad


class Missing(Right):
    name = "missing peer"

    def __init__(self, _threads: int) -> None:
        import no_such_package  # noqa: F401


@pytest.mark.usefixtures("quick")
def test_wrong_and_missing_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    file = tmp_path / "out.json"
    options = ["--shapes", "32x10", "--repeat", "1", "--threads", "1", "--json", str(file)]
    peers.main(options, [Right, WrongValue, WrongGradient, Missing])
    printed = capsys.readouterr().out
    assert "wrong value, 32x10 value: refused: values disagree" in printed
    assert "wrong value, 32x10 value + gradient: refused: values disagree" not in printed
    assert "wrong gradient, 32x10 value + gradient: refused: values disagree" in printed
    assert "missing peer: missing: No module named" in printed
    seconds = json.loads(file.read_text())["seconds"]
    assert {"xce", "right", "wrong gradient"} == contenders_of(seconds["value"])
    assert {"xce", "right", "wrong value"} == contenders_of(seconds["grad"])


def contenders_of(columns: dict[str, dict[str, Any]]) -> set[str]:
    """Who was timed, the floors apart."""
    return {name for column in columns.values() for name in column if "(" not in name}


@pytest.mark.usefixtures("quick")
def test_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    what = "value,grad,hess,small,targets"
    peers.main(["--shapes", "16x12", "--what", what, "--repeat", "1", "--markdown"], peers=[])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| xce +\|", printed, re.MULTILINE)) == 4
    assert "refused" not in printed
    assert "failed" not in printed
    assert "1x3x4x4 grad: speed on axis 1" in printed
    assert "4x3x5 linear: value and both gradients over the three products" in printed


def test_peers_that_are_installed() -> None:
    """As the user runs it, and in a process of its own, since it imports and tunes every framework."""
    command = [sys.executable, str(ASV / "peers.py"), "--shapes", "32x10", "--what", "value", "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nxce " in done.stdout
    assert "refused" not in done.stdout

"""Every benchmark runs once; peers.py prints its tables and refuses wrong answers. No time is asserted."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cases import computed_by

ASV = Path(__file__).parents[1] / "asv_benchmarks"
if not ASV.exists():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(ASV))

import benchmarks  # noqa: E402
import contenders  # noqa: E402
import gpu  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_smoke  # noqa: E402
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
    finally:
        if hasattr(benchmark, "teardown"):
            benchmark.teardown(*params)
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
    assert len(re.findall(r"^\| xce +\|", printed, re.MULTILINE)) == 5
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


# gpu.py, whose GPU is the CPU here


class Stage:
    """A machine of NumPy's arrays, with a clock that counts the calls."""

    xp = np
    cache_bytes = 1 << 10

    def __init__(self) -> None:
        self.timed: list[tuple[str, int]] = []

    def time(self, calls: Any, library: str, seconds: float) -> gpu.Times:
        for call in calls:
            call()
        self.timed.append((library, len(calls)))
        return gpu.Times(2e-6, 1e-6, "calls")

    def copy(self, source: Any, to: Any) -> None:
        to[...] = source

    def wait(self) -> None:
        pass

    def free(self) -> None:
        pass

    def about(self) -> dict[str, str]:
        return {"device": "a stage"}


def rows_of_json(file: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["task"], r["what"], r["contender"]): r for r in json.loads(file.read_text())["rows"]}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # casts of NumPy to small floats
def test_every_table_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("ml_dtypes")
    small = gpu.unique(
        gpu.Task(t.loss, t.dtype, (2, 5, 4, 4) if t.axis != -1 else (6, 11), t.axis, t.options)
        for t in gpu.tasks_of(gpu.parse([]))
    )
    monkeypatch.setattr(gpu, "tasks_of", lambda options: small)
    monkeypatch.setattr(gpu, "contenders_of", lambda machine, notes: eager_only(machine))
    file = tmp_path / "results" / "stage.json"
    gpu.main(["--json", str(file)], Stage, (6, 5, 7))
    printed = capsys.readouterr().out
    assert "refused" not in printed
    assert "failed" not in printed
    rows = rows_of_json(file)
    for task in small:
        found = {what for title, what, name in rows if title == task.title and name == "xce"}
        assert {what for what in found if "host" not in what} == set(gpu.WHAT)
        assert (task.title, "copy", "copy") in rows
    host = {what: row for (_, what, name), row in rows.items() if "host" in what and name == "xce"}
    assert set(host) == {f"{what}: time of the host" for what in gpu.WHAT}
    assert all(row["timed"] == "host" and row["shape"] == "32x10" for row in host.values())
    assert ("linear_cross_entropy, bfloat16", "gradient", "xce") in rows
    gpu.main(["--table", str(file)])
    again = capsys.readouterr().out
    assert again.strip() in printed
    assert "### cross_entropy, axis=1, float32: GB/s (share of the copy)" in again
    assert re.search(r"^\| linear_cross_entropy", again, re.MULTILINE) is None


def eager_only(machine: Any) -> tuple[list[Any], list[Any]]:
    try:
        return [gpu.Torch(machine.xp)], []
    except ImportError:
        return [], []


def test_the_first_calls_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each regime, on a GPU that the CPU plays."""
    emulated = pytest.importorskip("emulated")
    pytest.importorskip("ml_dtypes")
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler, to run the kernels of CUDA")
    from xce import _libraries
    from xce._engines import cuda as _cuda

    class There(np.ndarray):  # an array of CuPy
        pass

    played = SimpleNamespace(
        asarray=lambda a: a.view(There),
        asnumpy=np.asarray,
        cuda=SimpleNamespace(Device=lambda: SimpleNamespace(synchronize=lambda: None)),
    )
    with (
        mock.patch.dict(_libraries._known, {There: _libraries.library_of(np.zeros(0), "x")}),
        computed_by(emulated, emulated.view),
        mock.patch.dict(sys.modules, {"cupy": played}),
        mock.patch.multiple(
            _cuda, _REGIMES=((64, _cuda.Regime(8, 1, 16)),), _CLUSTERS=((math.inf, _cuda.Regime(64, 2, 64)),)
        ),
        mock.patch.object(gpu_smoke, "DTYPES", ("float32",)),
    ):
        names = gpu_smoke.all_names()
        assert names == ["strided", "8x1x16", "64x2x64", "elements", "linear", "checks"]
        for name in ("8x1x16", "64x2x64", "elements"):
            assert gpu_smoke.run(name), capsys.readouterr().out
    printed = capsys.readouterr().out
    assert printed.count("right, first call") == 7
    assert "WRONG" not in printed


def test_bytes_that_a_gpu_must_move() -> None:
    rows = gpu.Task("cross_entropy", "bfloat16", (8, 100))
    assert [rows.moved(what) for what in gpu.WHAT] == [1600, 3200, 3200, 1600, 3200, 1600, 3200]
    elements = gpu.Task("binary_cross_entropy_with_logits", "float32", (8, 100))
    assert [elements.moved(what) for what in gpu.WHAT[:2]] == [6400, 9600]
    made = {"rows": [
        {"task": "t", "shape": "s", "what": "copy", "contender": "copy", "bytes": 4e9, "seconds": 1e-3, "best": 1e-3},
        {"task": "t", "shape": "s", "what": "value", "contender": "xce", "bytes": 2e9, "seconds": 1e-3, "best": 1e-3},
        {"task": "t", "shape": "s", "what": "value", "contender": "other", "bytes": 2e9, "seconds": 3e-3, "best": 1e-3},
    ]}  # fmt: skip
    ((title, table),) = gpu.tables(made)
    assert title == "t: GB/s (share of the copy)"
    assert table == [
        ["", "s"], ["copy", "4000"], ["value, xce", "2000 (50%)"], ["value, other", "667 (17%)"],
        ["value: other / xce", "3.00x"],
    ]  # fmt: skip


def test_sets_of_arrays_exceed_the_cache_and_differ() -> None:
    machine = Stage()
    sets = gpu.inputs_of(gpu.Task("cross_entropy", "float32", (8, 32)), machine)
    assert len(sets) == 4
    assert len({s.x.tobytes() for s in sets}) == 4
    x = gpu.random_array(np, (3, 5, 7), np.float16, 1)
    assert x.dtype == np.float16
    assert np.std(x.astype(float)) > 0.5


def test_random_arrays_repeat_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "BLOCK", 1 << 10)
    x = gpu.random_array(np, (64, 64), np.float32, 0)
    assert len({row.tobytes() for row in x}) == 64


class WrongOnStage(gpu.Xce):
    name = "wrong"

    def answer(self, call: Any) -> tuple[Any, Any]:
        value, grad = super().answer(call)
        if grad is None:
            return value * 1.01, None
        grad = grad.copy()
        grad.flat[np.abs(grad).argmin()] = 0
        return value, grad


def test_wrong_answers_are_refused_on_a_gpu() -> None:
    task = gpu.Task("cross_entropy", "float32", (6, 11))
    race = gpu.Race(Stage(), 0.0, 60.0)
    race.run(task, [gpu.Xce(), WrongOnStage()])
    assert {r["contender"] for r in race.rows} == {"xce", "copy"}
    assert sum("refused: disagrees with float64" in note for note in race.notes) == len(gpu.WHAT)
    late = gpu.Race(Stage(), 0.0, -1.0)
    late.run(task, [gpu.Xce()])
    assert late.rows == []
    assert "no time left for xce" in late.notes[0]


def test_regimes_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    emulated = pytest.importorskip("emulated")
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler, to run the kernels of CUDA")
    from xce._engines import cuda as _cuda

    regimes = _cuda._REGIMES
    with (
        computed_by(emulated, emulated.view),
        mock.patch.object(gpu, "CANDIDATES", ((8, 1, 16),)),
    ):
        gpu.main(["--regimes", "--shapes", "3x40", "--dtypes", "float32"], Stage)
    assert _cuda._REGIMES is regimes
    printed = capsys.readouterr().out
    assert "| 8x1x16 | 2.0 us, 0 GB/s | 2.0 us, 0 GB/s |" in printed

"""Print how fast xce is on this GPU: in bytes a second, beside the copy of as many, and beside PyTorch and its kernels.

    python asv_benchmarks/gpu.py                         everything, within three minutes
    python asv_benchmarks/gpu.py --quick                 three shapes of one loss
    python asv_benchmarks/gpu.py --json asv_benchmarks/results/NVIDIA-H200.json
    python asv_benchmarks/gpu.py --table FILE            the Markdown of such a file; needs no GPU
    python asv_benchmarks/gpu.py --regimes --shapes 32768x1024,8192x262144 --dtypes bfloat16

Logits are random, and sets of them and of gradients take turns, more than the cache holds. Calls are captured in a
graph and its replays timed by events, so that nothing of Python is in the numbers; what cannot be captured, as what
checks the labels, is timed call by call. An answer that disagrees with float64 is refused. What begins slowly, such as
torch.compile, comes last, as far as the time goes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from benchmarks.common import numpy_dtype, parse_shape
from gpu_contenders import Contender, Liger, Quack, Torch, TorchCompiled, Xce
from gpu_machine import (
    CHUNK,
    Cuda,
    Inputs,
    Machine,
    Oracle,
    Task,
    Times,
    inputs_of,
    output_of,
    random_array,
    refilled,
    widened,
)

import xce

SHAPES = ["32768x256", "32768x1024", "32768x4096", "32768x16384", "32768x65536", "16384x131072", "8192x262144"]
QUICK = ["32768x1024", "32768x16384", "16384x131072"]
LAYER = (4096, 4096, 128256)  # rows, width, classes
CANDIDATES = (  # regimes: threads of a row, blocks of a row, threads of a block
    *((group, 1, threads) for group in (4, 8, 16, 32) for threads in (128, 256)),
    *((threads, 1, threads) for threads in (64, 128, 256, 512, 1024)),
    *((threads, blocks, threads) for blocks in (2, 4, 8) for threads in (128, 256, 512)),
)
WHAT = (
    "value", "gradient", "gradient in place", "value, none", "gradient, none", "value, checked", "gradient, checked",
)  # fmt: skip
HOST = (32, 10)  # so few that a call takes as long as its Python


def tasks_of(options: argparse.Namespace) -> list[Task]:
    shapes = [parse_shape(shape) for shape in options.shapes]
    found = [Task("cross_entropy", dtype, shape) for dtype, shape in itertools.product(options.dtypes, shapes)]
    if options.quick or not options.is_whole:
        return found
    rows = (32768, 4096)
    return [
        *found,
        Task("cross_entropy", "float16", rows),
        Task("cross_entropy", "bfloat16", rows, options=(("label_smoothing", 0.1),)),
        Task("focal_loss", "bfloat16", rows, options=(("gamma", 2.0),)),
        Task("cross_entropy", "float32", (8, 19, 512, 512), axis=1),
        Task("binary_cross_entropy_with_logits", "bfloat16", (32768, 1024)),
        Task("binary_cross_entropy_with_logits", "float32", (32768, 1024)),
    ]


class Race:
    """The results of one run."""

    def __init__(self, machine: Machine, seconds: float, budget: float) -> None:
        self.machine, self.seconds, self.end = machine, seconds, time.monotonic() + budget
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def run(
        self, task: Task, contenders: Iterable[Contender], whats: Sequence[str] = WHAT, floors: bool = True
    ) -> None:
        """Check and time the contenders at one task, as far as the time goes."""
        if time.monotonic() > self.end:
            self.notes.append(f"{task.title}, {by(task.shape)}: no time left for {names(contenders)}")
            return
        try:
            sets = inputs_of(task, self.machine)
            oracle = Oracle(task, self.machine, sets[0])
            if floors:
                copies = [lambda s=s: self.machine.copy(s.x, s.grad) for s in sets]  # type: ignore[misc]
                self.note(task, "copy", "copy", 2 * task.array_bytes, self.machine.time(copies, "cupy", self.seconds))
            for contender, what in itertools.product(contenders, WHAT):
                self._one(task, what, contender, sets, oracle)
        except MemoryError as error:
            self.notes.append(f"{task.title}, {by(task.shape)}: {error}")
        finally:
            sets = oracle = copies = None  # type: ignore[assignment]
            self.machine.free()

    def _one(self, task: Task, what: str, contender: Contender, sets: Sequence[Inputs], oracle: Oracle) -> None:
        title = f"{contender.name}, {task.title}, {by(task.shape)}, {what}"
        try:
            calls = contender.calls(task, what, sets)
            wrong = oracle.disagreement(*contender.answer(calls[0]), of_rows="none" in what)
            if wrong:
                self.notes.append(f"{title}: refused: disagrees with float64: {wrong}")
            else:
                library = "" if "checked" in what else contender.library  # which no graph captures
                times = self.machine.time(calls, library, self.seconds)
                self.note(task, what, contender.name, task.moved(what), times)
        except NotImplementedError:
            return
        except Exception as error:  # one that lacks a dtype, or memory, is no reason to stop
            self.notes.append(f"{title}: failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
        if "in place" in what:
            for seed, arrays in enumerate(sets):
                refilled(self.machine.xp, arrays.x, seed)

    def note(self, task: Task, what: str, name: str, moved: int, times: Times) -> None:
        self.rows.append({
            "task": task.title, "shape": by(task.shape), "what": what, "contender": name, "bytes": moved,
            "seconds": times.median, "best": times.best, "timed": times.how,
        })  # fmt: skip


def host(race: Race, contenders: Iterable[Contender]) -> None:
    """Seconds of Python a call: many in a row, for none of which anybody waits, but those that check the labels."""
    task = Task("cross_entropy", "float32", HOST)
    sets = inputs_of(task, race.machine)[:1]
    for contender, what in itertools.product(contenders, WHAT):
        try:
            (call,) = contender.calls(task, what, sets)
            call()
        except NotImplementedError:
            continue
        taken = []
        for _ in range(20):
            race.machine.wait()
            began = time.perf_counter()
            for _ in range(50):
                call()
            taken.append((time.perf_counter() - began) / 50)
        race.machine.wait()
        race.note(task, f"{what}: time of the host", contender.name, 0, Times(sorted(taken)[10], min(taken), "host"))


def by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def names(contenders: Iterable[Contender]) -> str:
    return ", ".join(contender.name for contender in contenders)


def layer(race: Race, shape: tuple[int, int, int], torch: Torch | None) -> None:
    """`linear_cross_entropy`: value and both gradients, against the three products alone."""
    rows, width, classes = shape
    xp, dtype = race.machine.xp, numpy_dtype("bfloat16")
    x = random_array(xp, (rows, width), dtype, 0)
    w = random_array(xp, (classes, width), dtype, 1, width**-0.5)
    y = xp.asarray(np.random.default_rng(2).integers(0, classes, rows))
    out = (x.copy(), w.copy(), None)
    task, what = Task("linear_cross_entropy", "bfloat16", shape), "gradient"

    def ours() -> tuple[Any, Any]:
        value, grads = xce.linear_cross_entropy(x, w, y, return_grad=True, grad_out=out, validate=False)
        return value, grads[:2]

    calls: dict[str, Callable[[], tuple[Any, Any]]] = {"xce": ours}
    if torch is not None:
        a, b, labels = torch.tensor(x), torch.tensor(w), torch.tensor(y)
        functional = torch.torch.nn.functional

        def eager() -> tuple[Any, Any]:
            leaves = a.detach().requires_grad_(), b.detach().requires_grad_()
            loss = functional.cross_entropy(functional.linear(*leaves).float(), labels)
            return float(loss.detach()), [torch.array(g) for g in torch.torch.autograd.grad(loss, leaves)]

        def products() -> tuple[Any, Any]:
            logits = a @ b.T
            return None, (logits @ b, logits.T @ a)

        calls |= {torch.name: eager, "products": products}
    exact = exact_layer(xp, x, w, y)
    for name, call in calls.items():
        try:
            if name != "products" and (wrong := layer_disagreement(xp, call(), exact)):
                race.notes.append(f"{name}, {task.title}: refused: {wrong}")
                continue
            times = race.machine.time([call], "", race.seconds)
        except Exception as error:
            race.notes.append(f"{name}, {task.title}: failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        race.note(task, what, name, 0, times)


def exact_layer(xp: Any, x: Any, w: Any, y: Any) -> tuple[float, tuple[Any, Any]]:
    """Value and gradients in float64, some rows at a time."""
    wide, step = widened(xp, w), max(1, CHUNK // len(w))
    value, d_x, d_w = 0.0, xp.empty(x.shape), xp.zeros(w.shape)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        rows = widened(xp, x[part])
        u = rows @ wide.T
        u -= u.max(-1, keepdims=True)
        u -= xp.log(xp.exp(u).sum(-1, keepdims=True))
        labels = y[part][:, None]
        value -= float(xp.take_along_axis(u, labels, -1).sum()) / len(x)
        g = (xp.exp(u) - (xp.arange(len(w)) == labels)) / len(x)
        d_x[part] = g @ wide
        d_w += g.T @ rows
    return value, (d_x, d_w)


def layer_disagreement(xp: Any, answer: tuple[Any, Any], exact: tuple[float, Any]) -> str | None:
    """Gradients are compared by norms: their entries are sums of both signs."""
    if not abs(float(answer[0]) - exact[0]) <= 1e-2 * abs(exact[0]):
        return f"value {float(answer[0]):.9g}, not {exact[0]:.9g}"
    for found, right in zip(answer[1], exact[1], strict=True):
        error = float(xp.linalg.norm(widened(xp, found) - right) / xp.linalg.norm(right))
        if not error <= 2e-2:
            return f"gradient of shape {right.shape} wrong by {error:.2g}"
    return None


# Regimes


def regimes(machine: Machine, tasks: Iterable[Task], seconds: float) -> Iterator[tuple[str, list[list[str]]]]:
    """Tables of what other numbers of threads, and of blocks, would take for a row: to tune `_cuda._REGIMES`."""
    from xce._engines import cuda as _cuda

    for task in tasks:
        sets = inputs_of(task, machine)
        oracle = Oracle(task, machine, sets[0])
        found = []
        for regime in itertools.starmap(_cuda.Regime, CANDIDATES):
            cells = []
            for what in WHAT[:2]:
                with mock.patch.multiple(_cuda, _REGIMES=((math.inf, regime),), _CLUSTERS=((math.inf, regime),)):
                    try:
                        calls = Xce().calls(task, what, sets)
                        wrong = oracle.disagreement(*calls[0]())
                        took = machine.time(calls, "cupy", seconds).median
                        cells.append((took, wrong or f"{1e6 * took:.1f} us, {1e-9 * task.moved(what) / took:.0f} GB/s"))
                    except Exception as error:  # more shared memory than there is, say
                        cells.append((math.inf, f"{type(error).__name__}"))
            found.append((cells[-1][0], [by(regime), *(text for _, text in cells)]))
        yield (
            f"{task.title}, {by(task.shape)}",
            [["threads x blocks x block", *WHAT[:2]], *(r for _, r in sorted(found))],
        )
        sets = oracle = None  # type: ignore[assignment]
        machine.free()


# What is printed


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Titles and rows, of results as they are in a file: GB/s and the share of the copy's, by shape."""
    rows = found["rows"]
    at = {(r["task"], r["shape"], r["what"], r["contender"]): r for r in rows}
    for task in unique(r["task"] for r in rows):
        shapes = unique(r["shape"] for r in rows if r["task"] == task)
        lines = unique((r["what"], r["contender"]) for r in rows if r["task"] == task)

        def cell(line: tuple[str, str], shape: str, task: str = task) -> str:
            row = at.get((task, shape, *line))
            if row is None:
                return "-"
            if not row["bytes"]:
                return f"{1e6 * row['seconds']:.1f} us" if row["seconds"] < 1e-3 else f"{1e3 * row['seconds']:.2f} ms"
            speed, copy = row["bytes"] / row["seconds"], at.get((task, shape, "copy", "copy"))
            share = f" ({speed * copy['seconds'] / copy['bytes']:.0%})" if copy and line[0] != "copy" else ""
            return f"{1e-9 * speed:.0f}{share}"

        table = [
            [", ".join(unique(line)), *(cell(line, shape) for shape in shapes)] for line in sorted(lines, key=order)
        ]
        for what, rival in lines:
            if rival in ("xce", "copy") or (what, "xce") not in lines:
                continue
            ratios = []
            for shape in shapes:
                theirs, ours = (at.get((task, shape, what, name)) for name in (rival, "xce"))
                ratios.append(f"{theirs['seconds'] / ours['seconds']:.2f}x" if theirs and ours else "-")
            table.append([f"{what}: {rival} / xce", *ratios])
        yield f"{task}: GB/s (share of the copy)", [["", *shapes], *table]


def order(line: tuple[str, str]) -> tuple[bool, int, bool]:
    what, name = line
    return what != "copy", (*WHAT, what).index(what), name != "xce"


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def markdown(title: str, rows: list[list[str]]) -> str:
    lines = [" | ".join(row) for row in rows]
    return "\n".join(
        [f"\n### {title}\n", f"| {lines[0]} |", "|" + " --- |" * len(rows[0]), *(f"| {r} |" for r in lines[1:])]
    )


def about(machine: Machine) -> dict[str, str]:
    """What the numbers depend on."""
    versions = {}
    for package in ("xce", "numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "triton", "liger-kernel", "quack-kernels"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    here = Path(__file__).parent
    commit = output_of("git", "-C", str(here), "rev-parse", "HEAD") or "unknown"
    changed = "+" if output_of("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no") else ""
    return {
        **machine.about(),
        **versions,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit + changed,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text, _, usage = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, epilog=usage, formatter_class=raw)
    comma = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shapes", type=comma, help="rows x classes: 32768x1024,8192x262144")
    parser.add_argument("--dtypes", type=comma, default=["bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true", help="three shapes, xce and PyTorch eager, half a minute")
    parser.add_argument("--regimes", action="store_true", help="time other regimes for these shapes")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds after which nothing new begins")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument("--table", metavar="FILE", type=Path, help="print the tables of a file, and nothing else")
    options = parser.parse_args(arguments)
    options.is_whole = options.shapes is None
    options.shapes = options.shapes or (QUICK if options.quick else SHAPES)
    return options


def main(
    arguments: Sequence[str] | None = None,
    make_machine: Callable[[], Machine] = Cuda,
    layer_shape: tuple[int, int, int] = LAYER,
) -> None:
    """Run what the command line asks for and print it."""
    options = parse(arguments)
    if options.table:
        print(*(markdown(*table) for table in tables(json.loads(options.table.read_text()))), sep="\n")
        return
    machine, tasks = make_machine(), tasks_of(options)
    seconds = 0.03 if options.quick else 0.1
    if options.regimes:
        for table in regimes(machine, tasks, seconds):
            print(markdown(*table), flush=True)
        return
    race = Race(machine, seconds, options.budget)
    quick, slow = contenders_of(machine, race.notes)
    host(race, [Xce(), *quick])
    for task in tasks:
        race.run(task, [Xce(), *quick])
    if not options.quick:
        if options.is_whole:
            layer(race, layer_shape, next(iter(quick), None))
        for task in tasks:
            if slow:
                race.run(task, slow, floors=False)
    found = {"about": about(machine), "rows": race.rows, "notes": race.notes}
    print(*(f"{name}: {text}" for name, text in found["about"].items()), sep="\n")
    print(*(markdown(*table) for table in tables(found)), sep="\n")
    print("", *race.notes, sep="\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def contenders_of(machine: Machine, notes: list[str]) -> tuple[list[Torch], list[Torch]]:
    """The libraries that are installed: those that begin at once, and those that first compile."""
    made: list[Torch] = []
    for make in (Torch, Quack, Liger, TorchCompiled):
        try:
            made.append(make(machine.xp))
        except Exception as error:  # a package that is there may still not load
            notes.append(f"{make.name}: missing: {error}")
    return [c for c in made if type(c) is Torch], [c for c in made if type(c) is not Torch]


if __name__ == "__main__":
    main()

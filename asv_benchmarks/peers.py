"""Print how fast xce is beside its peers and beside the memory itself: the tables of README.md.

    python asv_benchmarks/peers.py                               value and gradient, every peer, five shapes
    python asv_benchmarks/peers.py --what value --shapes 8192x1000 --repeat 3
    python asv_benchmarks/peers.py --what value,grad,hess,small,targets --json results.json --markdown

Everything runs in one process on the same arrays and the same number of threads, in turns (`measure.race`).
An answer that disagrees with a float64 oracle is refused and counts nowhere. `targets` judges xce against
itself and what the other tables of the same run have shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import DTYPES, class_labels, make_logits, parse_shape
from contenders import PEERS, Peer, Xce, copy_floors, read_floors, write_floors
from measure import Call, Oracle, Times, race
from targets import Target, option_targets

import xce

SHAPES = ["65536x10", "65536x100", "8192x1000", "512x32000", "256x128256"]
SMALL = ["32x10", "256x100"]
METHODS = {
    "value": "value",
    "grad": "value_and_grad",
    "hess": "value_grad_and_hess",
    "small": "value",
    "small_grad": "value_and_grad",  # `small` asks for it, too
}
TITLES = {
    "value": "value",
    "grad": "value + gradient",
    "hess": "value + gradient + Hessian",
    "small": "value, one small call",
    "small_grad": "value + gradient, one small call",
}


class Race:
    """The results of one run: times by kind, shape and contender, targets, and what did not count."""

    def __init__(self, peers: Sequence[Peer], options: argparse.Namespace) -> None:
        self.peers, self.options = peers, options
        self.times: dict[str, dict[str, dict[str, Times]]] = {}
        self.targets: list[Target] = []
        self.notes: list[str] = []

    def run(self, kind: str, shape: str) -> None:
        """Check every contender's answer, time those that are right, judge the targets that this decides."""
        x = make_logits(parse_shape(shape), self.options.dtype)
        (y,) = class_labels(x)
        oracle = Oracle(x, y)
        calls = self._floors(kind, x)
        for peer in self.peers:
            if call := self._checked(peer, METHODS[kind], oracle, f"{peer.name}, {shape} {TITLES[kind]}"):
                calls[peer.name] = call
            if kind == "hess" and isinstance(peer, Xce):
                calls["xce without Hessian"] = partial(peer.value_and_grad, x, y)
        times = race(calls, self.options.repeat, number=200 if "small" in kind else 1)
        self.times.setdefault(kind, {})[shape] = times
        self.targets += table_targets(kind, shape, times)

    def _floors(self, kind: str, x: np.ndarray[Any, Any]) -> dict[str, Call]:
        floors = {"value": read_floors, "grad": copy_floors, "hess": write_floors}
        return floors[kind](x, self.options.threads) if kind in floors else {}

    def _checked(self, peer: Peer, method: str, oracle: Oracle, title: str) -> Call | None:
        """The timed call of a peer on its own arrays, or None with a note."""
        if not hasattr(peer, method):  # the Hessian is ours alone
            return None
        try:
            own = peer.take(oracle.logits, oracle.labels)
            call = partial(getattr(peer, method), *own)
            answer = call()  # untimed: compilers compile here
            wrong = oracle.disagreement(*answer) if isinstance(answer, tuple) else oracle.disagreement(answer)
        except Exception as error:  # a peer that lacks the dtype, or a compiler, is no reason to stop
            first_line, *_ = str(error).split("\n")
            self.notes.append(f"{title}: failed: {type(error).__name__}: {first_line}")
            return None
        if wrong:
            self.notes.append(f"{title}: refused: values disagree with the float64 oracle: {wrong}")
            return None
        return call


def fastest(times: dict[str, Times], names: Iterable[str]) -> str | None:
    """The name of the fastest of those that were timed."""
    return min((name for name in names if name in times), key=lambda name: times[name].best, default=None)


def fastest_floor(times: dict[str, Times]) -> str | None:
    """The name of the fastest floor; every floor is named 'read (how)', 'copy (how)' or 'write (how)'."""
    return fastest(times, (name for name in times if name.startswith(("read (", "copy (", "write ("))))


def fastest_peer(times: dict[str, Times]) -> str | None:
    """The name of the fastest peer."""
    ours = {name for name in times if name.startswith(("xce", "read (", "copy (", "write ("))}
    return fastest(times, times.keys() - ours)


def table_targets(kind: str, shape: str, times: dict[str, Times]) -> list[Target]:
    """The targets on which one column of a table decides."""
    if "xce" not in times:
        return []
    best = times["xce"].best
    if "small" in kind:
        if (kind, shape) != ("small", SMALL[0]):
            return []
        return [Target(f"{shape} through the public function", 3, 1e6 * best, False, "us")]
    bottom, rival, classes = fastest_floor(times), fastest_peer(times), parse_shape(shape)[1]
    assert bottom is not None  # kinds other than small have one
    if kind == "hess":
        added = (best - times["xce without Hessian"].best) / times[bottom].best
        return [Target(f"{shape}: Hessian added, over the time of one written array", 1, added, False)]
    found = []
    if rival:
        bound = 3 if kind == "grad" and classes > 100 else 2
        found.append(Target(f"{shape} {kind}: over {rival}", bound, times[rival].best / best, True))
    if classes >= 1000:
        share, name = (55, "reading") if kind == "value" else (85, "copying")
        reached = 100 * times[bottom].best / best
        found.append(Target(f"{shape} {kind}: share of the speed of {name}", share, reached, True, "%"))
    return found


def main(arguments: Sequence[str] | None = None, peers: Sequence[Callable[[int], Peer]] = PEERS) -> None:
    """Run the race that the command line asks for and print it."""
    options = parse(arguments)
    kinds = [kind for kind in METHODS if kind in options.what or (kind == "small_grad" and "small" in options.what)]
    with ExitStack() as limits:
        limits.enter_context(xce.num_threads(options.threads))
        made, missing = make_peers(peers, options.threads)
        limit_thread_pools(limits, options.threads)
        outcome = Race([Xce(), *made], options)
        for kind in kinds:
            for shape in SMALL if "small" in kind else options.shapes:
                outcome.run(kind, shape)
        if "targets" in options.what:
            shape = "8192x1000" if "8192x1000" in options.shapes else options.shapes[0]
            rows, classes = parse_shape(shape)
            outcome.targets += option_targets((rows, classes), options.threads, options.repeat)
    about = machine(options)
    print(*(f"{key}: {text}" for key, text in about.items()), sep="\n")
    show = partial(print_table, markdown=options.markdown)
    for kind in kinds:
        show(*time_table(kind, outcome.times[kind]))
    if "targets" in options.what:
        cells = [target.cells() for target in outcome.targets]
        show("targets", [["target", "bound", "reached", "met"], *cells])
    print("", *outcome.notes, *missing, sep="\n")
    if options.json:
        write_json(options.json, about, outcome, missing)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `shapes` and `what` become lists."""
    text, _, usage = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, epilog=usage, formatter_class=raw)
    parser.add_argument("--shapes", type=comma, default=SHAPES, help="rows x classes: 8192x1000,65536x10")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--what", type=comma, default=["value", "grad"], help=",".join([*METHODS, "targets"]))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contender")
    parser.add_argument("--repeat", type=int, default=7, help="rounds; each runs every contender for a while")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results there")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(arguments)
    if unknown := set(options.what) - {*METHODS, "targets"}:
        parser.error(f"--what: unknown {', '.join(sorted(unknown))}")
    return options


def comma(text: str) -> list[str]:
    """`"a,b"` as `["a", "b"]`."""
    return text.split(",")


def make_peers(classes: Iterable[Callable[[int], Peer]], threads: int) -> tuple[list[Peer], list[str]]:
    """The peers that are installed, and a line for each that is not."""
    made, missing = [], []
    for make in classes:
        try:
            made.append(make(threads))
        except ImportError as error:
            missing.append(f"{getattr(make, 'name', make)}: missing: {error}")
    return made, missing


def limit_thread_pools(stack: ExitStack, threads: int) -> None:
    """Give the OpenMP and BLAS pools that are loaded by now the same number of threads."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    stack.enter_context(threadpool_limits(threads))


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    packages = ["xce", "numpy", "scipy", "scikit-learn", "torch", "jax", "optax", "ml_dtypes"]
    versions = [f"Python {platform.python_version()}", *filter(None, map(installed, packages))]
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores, {options.threads} threads used",
        "dtype": options.dtype,
        "versions": ", ".join(versions),
    }


def installed(package: str) -> str:
    """Name and version, or nothing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def time_table(kind: str, columns: dict[str, dict[str, Times]]) -> tuple[str, list[list[str]]]:
    """Title and rows: a contender each, best and median for each shape, then the ratios of the best times."""
    unit, scale = ("us", 1e6) if "small" in kind else ("ms", 1e3)
    names = list(dict.fromkeys(name for times in columns.values() for name in times))

    def row(title: str, cell: Callable[[dict[str, Times]], str]) -> list[str]:
        return [title, *map(cell, columns.values())]

    def seconds(times: dict[str, Times], name: str) -> str:
        if name not in times:
            return "-"
        best, median = (f"{t:.0f}" if t >= 100 else f"{t:.3g}" for t in (scale * t for t in times[name]))
        return f"{best} ({median})"

    def ratio(times: dict[str, Times], name: str | None, form: str) -> str:
        return form.format(times[name].best / times["xce"].best) if name and "xce" in times else "-"

    rows = [["", *columns], *(row(name, partial(seconds, name=name)) for name in names)]
    if kind != "hess":
        rows.append(row("fastest peer / xce", lambda times: ratio(times, fastest_peer(times), "{:.2f}x")))
    if kind in ("value", "grad"):
        share = {"value": "xce at that share of reading", "grad": "xce at that share of copying"}[kind]
        rows.append(row(share, lambda times: ratio(times, fastest_floor(times), "{:.0%}")))
    return f"{TITLES[kind]}, {unit}, best (median)", rows


def print_table(title: str, rows: list[list[str]], markdown: bool) -> None:
    """A table in columns, or in Markdown."""
    print(f"\n{'### ' * markdown}{title}\n")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and index == 0:
            print("|" + " --- |" * len(row))


def write_json(file: Path, about: dict[str, str], outcome: Race, missing: list[str]) -> None:
    """Everything that was printed, times in seconds."""
    times = {
        kind: {shape: {name: t._asdict() for name, t in column.items()} for shape, column in columns.items()}
        for kind, columns in outcome.times.items()
    }
    targets = [target._asdict() | {"met": target.met} for target in outcome.targets]
    found = {"machine": about, "seconds": times, "targets": targets, "notes": outcome.notes + missing}
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How the tests run the commands, and an oracle for what they report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xce.cli import command_group

click_testing = pytest.importorskip("click.testing")
pytest.importorskip("rich")

RNG = np.random.default_rng(20240501)


def run(*args: object) -> Any:
    result = click_testing.CliRunner().invoke(command_group(), [str(arg) for arg in args], prog_name="xce")
    # A SystemExit is how click ends; anything else would be a traceback for the user.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(*args: object, code: int = 1) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout; return that line."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr.strip()


def report(*args: object) -> dict[str, Any]:
    """Run ``xce score --json`` and parse what it prints, refusing NaN and Infinity."""
    result = run("score", *args, "--json")
    assert result.exit_code == 0, result.output

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    parsed = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def save(folder: Path, name: str, array: np.ndarray) -> Path:
    path = folder / name
    np.save(path, array)
    return path


def npy_with_header(path: Path, header: str, data: bytes = b"") -> Path:
    text = header.encode().ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)
    return path


def oracle(logits: np.ndarray, labels: np.ndarray, ignore_index: int = -100) -> dict[str, float]:
    """Everything that is reported, row by row and in float64."""
    log_softmax = pytest.importorskip("scipy.special").log_softmax
    rows = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    flat = labels.reshape(-1)
    kept = [i for i in range(flat.size) if flat[i] != ignore_index]
    losses, entropies, places, right, confidence = [], [], [], [], []
    for i in kept:
        u = log_softmax(rows[i])
        losses.append(-u[flat[i]])
        entropies.append(-sum(math.exp(v) * v for v in u))
        order = sorted(range(len(u)), key=lambda c: (-rows[i][c], c))
        places.append(order.index(flat[i]))
        right.append(places[-1] == 0)
        confidence.append(math.exp(u[order[0]]))
    gap = 0.0
    for k in range(15):
        members = [j for j, c in enumerate(confidence) if k / 15 < c <= (k + 1) / 15]
        gap += abs(sum(right[j] for j in members) - sum(confidence[j] for j in members))
    return {
        "rows": flat.size,
        "ignored_rows": flat.size - len(kept),
        "scored_rows": len(kept),
        "loss": np.mean(losses),
        "loss_standard_error": np.std(losses, ddof=1) / math.sqrt(len(kept)),
        "perplexity": math.exp(np.mean(losses)),
        "bits": np.mean(losses) / math.log(2),
        "top1_accuracy": np.mean(right),
        "top5_accuracy": np.mean(np.array(places) < 5),
        "entropy": np.mean(entropies),
        "calibration_error": gap / len(kept),
    }


def check(found: dict[str, Any], expected: dict[str, float], rel: float = 2e-6) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=rel), key


Data = tuple[Path, Path, np.ndarray, np.ndarray]


def make_data(folder: Path) -> Data:
    """Write logits and labels, some of them ignored; return the two paths and the two arrays."""
    logits = (3 * RNG.standard_normal((203, 12))).astype(np.float32)
    labels = RNG.integers(0, 12, 203)
    labels[::2] = logits[::2].argmax(-1)
    labels[5::17] = -100
    return save(folder, "logits.npy", logits), save(folder, "labels.npy", labels), logits, labels

"""The commands, as a user runs them; the numbers against SciPy and naive NumPy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import RNG, Data, check, fails, make_data, oracle, report, run, save

import xce
from xce.cli import _io
from xce.cli._scoring import Score, score_files
from xce.cli._stats import Calibration, Moments, Rows, WorstRows


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return make_data(tmp_path)


# ---------------------------------------------------------------- numbers


def test_score_reports_what_scipy_computes(data: Data) -> None:
    logits_path, labels_path, logits, labels = data
    found = report(logits_path, labels_path)
    check(found, oracle(logits, labels))
    assert (found["classes"], found["input"], found["infinite_rows"], found["nan_rows"]) == (
        12,
        "logits",
        0,
        0,
    )


@pytest.mark.parametrize("chunk_bytes", [1, 12 * 4 * 7, 1 << 20])
def test_chunks_do_not_change_the_result(data: Data, chunk_bytes: int) -> None:
    logits_path, labels_path, logits, labels = data
    done: list[int] = []
    files = _io.open_array(str(logits_path)), _io.open_array(str(labels_path))
    result = score_files(*files, chunk_bytes=chunk_bytes, worst=9, advance=done.append)
    check(result.as_dict(), oracle(logits, labels))
    assert sum(done) == logits.nbytes
    whole = score_files(*files, worst=9).as_dict()
    assert result.as_dict()["worst"] == whole["worst"]


def test_worst_rows(data: Data) -> None:
    log_softmax = pytest.importorskip("scipy.special").log_softmax
    logits_path, labels_path, logits, labels = data
    u = log_softmax(logits.astype(np.float64), axis=-1)
    loss = np.where(labels == -100, -np.inf, -u[np.arange(len(u)), labels.clip(0)])
    expected = np.argsort(-loss, kind="stable")[:3]
    found = report(logits_path, labels_path, "--worst", 3)["worst"]
    assert [entry["row"] for entry in found] == expected.tolist()
    for entry, row in zip(found, expected, strict=True):
        assert entry["label"] == labels[row]
        assert entry["loss"] == pytest.approx(loss[row], rel=1e-6)
        assert entry["probability"] == pytest.approx(math.exp(-loss[row]), rel=1e-5)
        assert entry["predicted"] == logits[row].argmax()
        assert entry["predicted_probability"] == pytest.approx(math.exp(u[row].max()), rel=1e-5)
    assert report(logits_path, labels_path, "--worst", 0)["worst"] == []
    assert len(report(logits_path, labels_path, "--worst", 1000)["worst"]) == np.count_nonzero(labels != -100)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("label_dtype", ["int8", "uint16", ">i4", "uint64"])
def test_dtypes(tmp_path: Path, dtype: str, label_dtype: str) -> None:
    logits = RNG.standard_normal((40, 7)).astype(dtype)
    labels = RNG.integers(0, 7, 40).astype(label_dtype)
    found = report(save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels))
    check(found, oracle(logits, labels))


def test_ignore_index_of_an_unsigned_label(tmp_path: Path) -> None:
    logits = RNG.standard_normal((40, 7))
    labels = RNG.integers(0, 7, 40).astype(np.uint8)
    labels[::3] = 255
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels)
    check(report(*paths, "--ignore-index", 255), oracle(logits, labels, 255), rel=1e-9)
    labels[labels == 255] = 4
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels)
    check(report(*paths, "--ignore-index", 4), oracle(logits, labels, 4), rel=1e-9)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (30, 4), (5, 6, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("how", ["npy", "stored", "compressed"])
def test_layouts(tmp_path: Path, how: str, shape: tuple[int, ...], order: Any) -> None:
    logits = np.asarray(RNG.standard_normal(shape), order=order)
    labels = np.asarray(RNG.integers(0, 4, shape[:-1]), order=order)
    if how == "npy":
        names = [str(save(tmp_path, "x.npy", logits)), str(save(tmp_path, "y.npy", labels))]
    else:
        writer: Any = np.savez if how == "stored" else np.savez_compressed
        writer(tmp_path / "both.npz", x=logits, y=labels)
        names = [f"{tmp_path / 'both.npz'}:x", f"{tmp_path / 'both.npz'}:y"]
    files = [_io.open_array(name) for name in names]
    if how == "stored":
        assert files[0].offset is not None  # read in place
    result = score_files(*files, chunk_bytes=7 * 4 * 8, worst=2)
    if labels.size > 1:
        check(result.as_dict(), oracle(logits, labels), rel=1e-9)
    rows = np.concatenate([np.array(block) for block in files[0].blocks(7, row_ndim=1)])
    assert np.array_equal(rows, logits.reshape(-1, 4))
    if len(shape) > 2:
        for entry in result.as_dict()["worst"]:
            assert labels[tuple(entry["index"])] == entry["label"]
            assert np.ravel_multi_index(entry["index"], labels.shape) == entry["row"]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("how", ["npy", "npz"])
def test_every_version_of_the_format(data: Data, tmp_path: Path, version: tuple[int, int], how: str) -> None:
    _, labels_path, logits, labels = data
    path = tmp_path / "versioned.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, logits, version=version)
    if how == "npz":
        with zipfile.ZipFile(tmp_path / "versioned.npz", "w") as archive:
            archive.write(path, "x.npy")
        path = tmp_path / "versioned.npz"
    check(report(path, labels_path), oracle(logits, labels))


@pytest.mark.parametrize("shape", [(203, 1), (1, 203), (1, 203, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_labels_in_a_column_or_a_row(data: Data, tmp_path: Path, shape: tuple[int, ...], order: Any) -> None:
    logits_path, _, logits, labels = data
    path = save(tmp_path, "column.npy", np.asarray(labels.reshape(shape), order=order))
    found = report(logits_path, path)
    check(found, oracle(logits, labels))
    assert found["worst"] == report(*data[:2])["worst"]


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "bfloat16"])
def test_labels_that_are_whole_floats(data: Data, tmp_path: Path, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    logits_path, _, logits, labels = data
    found = report(logits_path, save(tmp_path, "floats.npy", labels.astype(dtype)))
    check(found, oracle(logits, labels))
    assert all(isinstance(entry["label"], int) for entry in found["worst"])


def test_the_only_array_of_an_npz_needs_no_name(data: Data, tmp_path: Path) -> None:
    _, labels_path, logits, labels = data
    np.savez_compressed(tmp_path / "one.npz", anything=logits)
    check(report(tmp_path / "one.npz", labels_path), oracle(logits, labels))


def test_bfloat16(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = RNG.standard_normal((50, 9)).astype(ml_dtypes.bfloat16)
    labels = RNG.integers(0, 9, 50)
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels)
    check(report(*paths), oracle(logits.astype(np.float32), labels))
    np.savez_compressed(tmp_path / "x.npz", logits)
    check(report(tmp_path / "x.npz", paths[1]), oracle(logits.astype(np.float32), labels))


def test_confident_rows_keep_their_small_losses(tmp_path: Path) -> None:
    logits = np.full((10, 3), 0.0, np.float32)
    logits[:, 0] = 20.0
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", np.zeros(10, np.int64))
    assert report(*paths)["loss"] == pytest.approx(2 * math.exp(-20.0), rel=1e-5)


def test_ties_rank_in_the_order_of_the_classes(tmp_path: Path) -> None:
    logits, labels = np.zeros((10, 10), np.float32), np.arange(10)
    found = report(save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels))
    assert (found["top1_accuracy"], found["top5_accuracy"]) == (0.1, 0.5)
    assert found["loss"] == pytest.approx(math.log(10))
    coarse = RNG.integers(0, 4, (200, 12)).astype(np.float16)
    labels = RNG.integers(0, 12, 200)
    check(report(save(tmp_path, "x.npy", coarse), save(tmp_path, "y.npy", labels)), oracle(coarse, labels))


def test_infinite_and_nan_rows(tmp_path: Path) -> None:
    logits = RNG.standard_normal((20, 4))
    labels = RNG.integers(0, 4, 20)
    logits[3, labels[3]] = logits[7, labels[7]] = -np.inf
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels)
    found = report(*paths)
    others = np.setdiff1d(np.arange(20), [3, 7])
    assert (found["infinite_rows"], found["nan_rows"]) == (2, 0)
    assert found["loss"] is None
    assert found["perplexity"] is None
    assert found["finite_loss"] == pytest.approx(oracle(logits[others], labels[others])["loss"])
    assert [entry["row"] for entry in found["worst"][:2]] == [3, 7]
    assert found["worst"][0]["probability"] == 0.0
    assert found["worst"][0]["loss"] is None
    text = run("score", *paths).stdout
    assert "inf" in text
    assert "infinite rows" in text

    logits[11, 2] = np.nan
    logits[12, 1] = np.inf
    found = report(save(tmp_path, "x.npy", logits), paths[1])
    assert (found["infinite_rows"], found["nan_rows"], found["loss"]) == (2, 2, None)
    assert [entry["row"] for entry in found["worst"][:4]] == [11, 12, 3, 7]
    assert found["worst"][0]["predicted"] is None
    assert math.isfinite(found["entropy"])
    assert "NaN rows" in run("score", *paths).stdout


def test_ignored_rows_are_not_read(tmp_path: Path) -> None:
    logits = RNG.standard_normal((20, 4))
    labels = RNG.integers(0, 4, 20)
    labels[4] = -100
    expected = oracle(logits, labels)
    logits[4] = [np.nan, np.inf, -1, 0]
    found = report(save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels))
    check(found, expected, rel=1e-9)
    assert found["nan_rows"] == 0


def test_all_rows_ignored(tmp_path: Path) -> None:
    paths = save(tmp_path, "x.npy", np.zeros((5, 4))), save(tmp_path, "y.npy", np.full(5, -100))
    found = report(*paths)
    assert (found["ignored_rows"], found["scored_rows"], found["loss"]) == (5, 0, None)
    assert found["worst"] == []
    assert "all rows are ignored" in run("score", *paths).stdout
    assert run("score", *paths, "--quiet").stdout == "nan\n"


def test_one_row_has_no_standard_error(tmp_path: Path) -> None:
    paths = save(tmp_path, "x.npy", np.zeros((1, 4))), save(tmp_path, "y.npy", np.array([2]))
    assert report(*paths)["loss_standard_error"] is None
    assert "standard error" not in run("score", *paths).stdout


def test_huge_losses_have_an_infinite_perplexity(tmp_path: Path) -> None:
    logits = np.array([[1e30, 0.0], [0.0, 1e30]])
    paths = save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", np.array([1, 0]))
    found = report(*paths)
    assert found["loss"] == pytest.approx(1e30)
    assert found["perplexity"] is None
    assert found["infinite_rows"] == 0
    assert run("score", *paths).exit_code == 0


# ---------------------------------------------------------------- output


def test_table_and_quiet(data: Data) -> None:
    logits_path, labels_path, logits, labels = data
    result = run("score", logits_path, labels_path)
    assert result.exit_code == 0
    assert result.stderr == ""
    words = (
        "rows",
        "loss",
        "nats",
        "standard error",
        "perplexity",
        "bits",
        "top-1",
        "top-5",
        "entropy",
        "worst",
    )
    assert all(word in result.stdout for word in words)
    assert f"{oracle(logits, labels)['loss']:.4f}" in result.stdout
    quiet = run("score", logits_path, labels_path, "--quiet")
    assert float(quiet.stdout) == pytest.approx(oracle(logits, labels)["loss"], rel=1e-6)
    assert quiet.stdout.count("\n") == 1


def test_file_names_are_no_markup(tmp_path: Path) -> None:
    logits = save(tmp_path, "[red]x[0].npy", np.eye(3) * 2)
    result = run("score", logits, save(tmp_path, "y.npy", np.arange(3)))
    assert "[red]x[0].npy" in result.stdout.replace("\n", "")


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plot(data: Data, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"figure.{ending}"
    result = run("score", *data[:2], "--plot", plot, "--json")
    assert result.exit_code == 0, result.stderr
    assert plot.stat().st_size > 1000
    json.loads(result.stdout)


def test_plot_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = save(tmp_path, "x.npy", np.zeros((5, 4))), save(tmp_path, "y.npy", np.full(5, -100))
    assert run("score", *paths, "--plot", tmp_path / "p.png").exit_code == 0


@pytest.mark.parametrize("where", ["between", "last", "first"])
def test_plot_has_a_default_name(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    files = list(data[:2])
    args = {"between": [*files, "--plot", "--json"], "last": [*files, "--plot"], "first": ["--plot", *files]}
    result = run("score", *args[where])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "figure written to score.png\n"
    assert (tmp_path / "score.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- probabilities


def test_probabilities_are_noticed(tmp_path: Path) -> None:
    softmax = pytest.importorskip("scipy.special").softmax
    logits = RNG.standard_normal((300, 6))
    labels = RNG.integers(0, 6, 300)
    labels[:20] = -100
    for dtype in ("float16", "float32", "float64"):
        probabilities = softmax(logits, axis=-1).astype(dtype)
        probabilities[:20] = 0.0  # padding must not hide them
        paths = save(tmp_path, "p.npy", probabilities), save(tmp_path, "y.npy", labels)
        message = fails("score", *paths, "--json", code=2)
        assert "seems to hold probabilities" in message
        assert "--probabilities" in message
        assert "--logits" in message
        found = report(*paths, "--probabilities")
        assert found["input"] == "probabilities"
        check(found, oracle(logits, labels), rel=2e-3 if dtype == "float16" else 1e-5)
        check(report(*paths, "--logits"), oracle(probabilities, labels), rel=1e-5)
    # Logarithms of probabilities are logits, and need no message.
    check(
        report(save(tmp_path, "u.npy", np.log(softmax(logits, axis=-1))), paths[1]),
        oracle(logits, labels),
        1e-9,
    )


def test_probabilities_in_bfloat16_are_noticed(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    softmax = pytest.importorskip("scipy.special").softmax
    probabilities = softmax(3 * RNG.standard_normal((300, 6)), axis=-1).astype(ml_dtypes.bfloat16)
    paths = save(tmp_path, "p.npy", probabilities), save(tmp_path, "y.npy", np.zeros(300, np.int64))
    assert "seems to hold probabilities" in fails("score", *paths, code=2)
    check(report(*paths, "--probabilities"), {"loss": -np.log(probabilities[:, 0].astype(float)).mean()}, 1e-2)


def test_a_probability_of_zero(tmp_path: Path) -> None:
    probabilities = np.array([[0.0, 1.0], [0.25, 0.75]])
    paths = save(tmp_path, "p.npy", probabilities), save(tmp_path, "y.npy", np.array([0, 0]))
    found = report(*paths, "--probabilities")
    assert found["infinite_rows"] == 1
    assert found["finite_loss"] == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("row", "message"),
    [([-0.5, 1.5], "holds -0.5"), ([0.5, 0.75], "sums to 1.25"), ([math.nan, 1.0], "holds nan")],
)
def test_what_is_no_probability(tmp_path: Path, row: list[float], message: str) -> None:
    probabilities = np.array([[0.5, 0.5], [0.1, 0.9], row])
    paths = save(tmp_path, "p.npy", probabilities), save(tmp_path, "y.npy", np.array([0, 0, 1]))
    assert f"row 2, {message}" in fails("score", *paths, "--probabilities")


def test_probabilities_and_logits_exclude_each_other(data: Data) -> None:
    assert run("score", *data[:2], "--probabilities", "--logits").exit_code == 2


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["npy", "npy-fortran", "stored", "compressed"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    rows, classes = 16384, 1024  # 64 MiB of zeros: sparse on disk, and small when compressed
    path, labels = tmp_path / "x.npy", save(tmp_path, "y.npy", np.zeros(rows, np.int8))
    mapped = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(rows, classes), fortran_order=kind == "npy-fortran"
    )
    mapped.flush()
    del mapped
    if not kind.startswith("npy"):
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method, compresslevel=1) as archive:
            archive.write(path, "x.npy")
        path = tmp_path / "x.npz"
    files = _io.open_array(str(path)), _io.open_array(str(labels))
    tracemalloc.start()
    try:
        result = score_files(*files, chunk_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.loss.mean == pytest.approx(math.log(classes), rel=1e-6)
    assert peak < 20 << 20, f"{peak / 2**20:.1f} MiB for chunks of 1 MiB"


# ---------------------------------------------------------------- statistics


def test_moments_merge_in_any_order_without_cancellation() -> None:
    values = 1e8 + RNG.standard_normal(10_001)
    pieces = [Moments() for _ in range(5)]
    for piece, part in zip(pieces, np.array_split(values, 5), strict=True):
        for chunk in np.array_split(part, [1, 1, 500]):
            piece.update(chunk)
    total = Moments()
    for piece in reversed(pieces):
        total.merge(piece)
    total.merge(Moments())
    assert total.count == values.size
    assert total.mean == pytest.approx(values.mean(), rel=1e-14)
    assert total.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(values.size), rel=1e-9)


def test_calibration_edges() -> None:
    calibration = Calibration(bins=4)
    assert math.isnan(calibration.error)
    calibration.update(np.array([0.0, 0.25, 0.5, 1.0]), np.array([True, False, True, True]))
    assert calibration.count.tolist() == [2, 1, 0, 1]
    assert calibration.error == pytest.approx((abs(1 - 0.25) + abs(1 - 0.5) + 0) / 4)


def test_worst_rows_keep_equal_losses_in_order() -> None:
    worst = WorstRows(3)
    for start in range(0, 12, 4):
        row = np.arange(start, start + 4)
        worst.update(Rows(row, row, np.ones(4), row, np.ones(4)))
    assert worst.rows.row.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    for module in ("scipy", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("a demo") / "out"
    return run("demo", "--out", out), out


def test_demo_writes_what_score_reads(demonstration: tuple[Any, Path]) -> None:
    result, out = demonstration
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "labels.npy", "logits.npy"]
    logits, labels = np.load(out / "logits.npy"), np.load(out / "labels.npy")
    expected = oracle(logits, labels)
    assert expected["top1_accuracy"] > 0.95
    assert f"{expected['loss']:.4f}" in result.stdout
    assert f"{expected['top1_accuracy']:.2%}" in result.stdout
    assert f"{expected['perplexity']:.3f}" in result.stdout
    assert f"{expected['calibration_error']:.2%}" in result.stdout
    assert "evaluations" in result.stdout
    assert "inside xce" in result.stdout
    # The last line is a command that works as it stands, also with a space in the folder.
    last = result.stdout.splitlines()[-1].strip()
    assert last == f"xce score '{out / 'logits.npy'}' '{out / 'labels.npy'}'"
    check(report(out / "logits.npy", out / "labels.npy"), expected)


def test_demo_figure_is_a_wide_png(demonstration: tuple[Any, Path]) -> None:
    header = (demonstration[1] / "demo.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert width > 2 * height > 1000


def test_demo_finds_the_minimum_that_scikit_learn_finds() -> None:
    pytest.importorskip("scipy")
    linear_model = pytest.importorskip("sklearn.linear_model")
    from xce.cli.demo import L2, digits, fit

    split = digits()
    model = fit(split, max_iterations=400)
    peer = linear_model.LogisticRegression(C=1 / (L2 * len(split.train_y)), tol=1e-6, max_iter=2000)
    peer.fit(split.train_x, split.train_y)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = split.train_x @ weight.T + bias
        return oracle(logits, split.train_y)["loss"] + 0.5 * L2 * float(np.sum(weight**2))

    assert objective(model.weight, model.bias) == pytest.approx(objective(peer.coef_, peer.intercept_), rel=1e-3)
    assert model.evaluations >= len(model.train_curve) - 1 == len(model.test_curve) - 1 > 20
    assert model.train_curve[0] == pytest.approx(math.log(10))
    assert 0 < model.xce_seconds < model.seconds


def test_demo_cannot_write(tmp_path: Path) -> None:
    for module in ("scipy", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails("demo", "--out", tmp_path / "file" / "out")


# ---------------------------------------------------------------- info, help, missing extras


FACTS: dict[str, Any] = {
    "xce": "1.2.3",
    "numpy": "2.4.6",
    "cpu": {"level": "v4", "available": ["v2", "v3", "v4"]},
    "threads": {"default": 8, "pinned": False},
    "openmp": None,
    "gpu": {"devices": [{"name": "Card [0]", "memory": 1}]},
}


def test_info_prints_whatever_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xce, "show_config", lambda **_: FACTS, raising=False)
    text = run("info").stdout
    lines = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in text.splitlines()}
    assert lines["xce"] == "1.2.3"
    assert lines["cpu.available"] == "v2, v3, v4"
    assert lines["threads.pinned"] == "no"
    assert lines["openmp"] == "none"
    assert lines["gpu.devices[0].name"] == "Card [0]"
    assert lines["packages.click"]
    parsed = json.loads(run("info", "--json").stdout)
    assert parsed | FACTS == parsed
    assert parsed["packages"]["rich"]


def test_info_with_the_installed_library() -> None:
    parsed = json.loads(run("info", "--json").stdout)
    assert {"xce", "numpy", "packages"} <= set(parsed)
    assert run("info").exit_code == 0


@pytest.mark.parametrize("command", ["demo", "score", "info"])
def test_help(command: str) -> None:
    assert command in run("--help").stdout
    assert "Usage: xce" in run(command, "-h").stdout


@pytest.mark.parametrize("module", ["xce", "xce.cli"])
def test_python_m(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("xce, version ")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_click_or_rich(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import xce.cli; xce.cli.main(['info'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"Error: the command xce needs {missing}, which comes with: pip install 'xce[demo]'\n"


@pytest.mark.parametrize("missing", ["matplotlib", "scipy", "sklearn"])
def test_demo_without_its_packages(missing: str, tmp_path: Path) -> None:
    # In another process: here the modules may be loaded already.
    out = tmp_path / "out"
    code = f"import sys; sys.modules[{missing!r}] = None; import xce.cli; xce.cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    name = "scikit-learn" if missing == "sklearn" else missing
    assert done.stderr == f"Error: this command needs {name}, which comes with: pip install 'xce[demo]'\n"
    assert not out.exists()


def test_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; from xce.cli import command_group; command_group(); "
        "print([m for m in ('scipy', 'sklearn', 'matplotlib', 'torch', 'jax', 'dask') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_progress_needs_a_terminal(data: Data) -> None:
    assert run("score", *data[:2]).stderr == ""


def test_score_of_nothing_is_nan() -> None:
    assert math.isnan(Score((0,), 3, WorstRows(5)).as_dict()["loss"])

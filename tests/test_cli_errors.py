"""What the commands say when something goes wrong: one line, and the documented exit code."""

from __future__ import annotations

import errno
import gzip
import importlib.metadata
import io
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import RNG, Data, check, fails, make_data, npy_with_header, oracle, report, run, save

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /dev/full and /proc")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return make_data(tmp_path)


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("bad", [12, -1, -7, 2**40])
def test_a_bad_label_is_named_and_nothing_is_written(data: Data, tmp_path: Path, bad: int) -> None:
    logits_path, labels_path, _, labels = data
    labels[190] = bad
    np.save(labels_path, labels)
    plot = tmp_path / "figure.png"
    message = fails("score", logits_path, labels_path, "--json", "--plot", plot)
    assert f"row 190: label {bad} is out of range: expected one of the 12 classes, 0..11" in message
    assert "--ignore-index -100" in message
    assert not plot.exists()


def test_a_bad_label_behind_int64(tmp_path: Path) -> None:
    labels = np.array([0, 2**64 - 1], np.uint64)
    paths = save(tmp_path, "x.npy", np.zeros((2, 3))), save(tmp_path, "y.npy", labels)
    assert "row 1: label 18446744073709551615" in fails("score", *paths)


def test_a_bad_label_of_a_batch(tmp_path: Path) -> None:
    labels = np.zeros((4, 5), np.int64)
    labels[2, 3] = 9
    paths = save(tmp_path, "x.npy", np.zeros((4, 5, 3))), save(tmp_path, "y.npy", labels)
    assert "row 13 (index 2, 3): label 9" in fails("score", *paths)


def shape_cases() -> list[tuple[np.ndarray, np.ndarray, str]]:
    x, y = np.zeros((6, 3)), np.zeros(6, np.int64)
    return [
        (x, np.zeros(5, np.int64), "has shape (5,), but"),
        (x, np.zeros((6, 3), np.int64), "one-hot"),
        (np.zeros((2, 3, 4)), np.zeros((2, 4), np.int64), "numpy.moveaxis(logits, 1, -1)"),
        (np.zeros((3, 6)), y, "numpy.moveaxis(logits, 0, -1)"),
        (x, x, "labels.argmax(-1)"),
        (x, y.astype(bool), "has dtype bool"),
        (y, x, "the order is LOGITS LABELS"),
        (y.astype(float), x, "the order is LOGITS LABELS"),
        (x, y.astype("M8[s]"), "expected labels, integers from 0"),
        (x.astype("V4"), y, "save x.astype('float32')"),
        (x.astype(int), y, "has dtype int64, expected logits of float16, bfloat16, float32, float64"),
        (x.astype(complex), y, "has dtype complex128"),
        (np.zeros((0, 3)), y[:0], "0 rows"),
        (np.zeros((6, 0)), y, "0 classes"),
        (np.array(3.0), y, "a single number"),
        (np.array(["a", "b"]), y, "has dtype <U1"),
        (np.zeros(6, [("a", "f4"), ("b", "f4")]), y, "has dtype [('a'"),
    ]


@pytest.mark.parametrize("case", range(len(shape_cases())))
def test_wrong_arrays(tmp_path: Path, case: int) -> None:
    logits, labels, message = shape_cases()[case]
    assert message in fails("score", save(tmp_path, "x.npy", logits), save(tmp_path, "y.npy", labels))


def test_labels_that_are_no_whole_numbers(tmp_path: Path) -> None:
    logits = save(tmp_path, "x.npy", np.zeros((4, 3)))
    for bad in (0.5, np.nan, np.inf):
        labels = save(tmp_path, "y.npy", np.array([0, 1, bad, 2]))
        assert f"row 2: label {bad} is not a whole number: expected one of the 3 classes" in fails(
            "score", logits, labels
        )
    labels = save(tmp_path, "y.npy", np.array([0, 1, 3.0, 2]))
    assert "row 2: label 3.0 is out of range" in fails("score", logits, labels)


# ---------------------------------------------------------------- wrong usage


@pytest.mark.parametrize("value", [10**20, 2**63, -(2**63) - 1, "10**20", 1.5])
def test_ignore_index_is_an_integer_of_64_bits(data: Data, value: object) -> None:
    message = fails("score", *data[:2], f"--ignore-index={value}", code=2)
    assert message.startswith("Error: Invalid value for '--ignore-index': ")
    assert str(value) in message
    assert message.endswith("(see: xce score --help)")


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63)])
def test_ignore_index_takes_all_of_64_bits(tmp_path: Path, value: int) -> None:
    paths = save(tmp_path, "x.npy", np.zeros((3, 2))), save(tmp_path, "y.npy", np.array([0, value, 1]))
    assert report(*paths, "--ignore-index", value)["ignored_rows"] == 1


def test_wrong_usage_is_one_line(data: Data) -> None:
    for args in ((), data[:1], (*data[:2], "more"), (*data[:2], "--unknown"), (*data[:2], "--worst", -1)):
        assert fails("score", *args, code=2).endswith("(see: xce score --help)")
    assert fails("nothing", code=2).endswith("(see: xce --help)")


# ---------------------------------------------------------------- files


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = save(tmp_path, "y.npy", np.zeros(3, np.int64))
    assert "nowhere.npy: no such file" in fails("score", tmp_path / "nowhere.npy", labels)
    assert "nowhere.npz: no such file" in fails("score", f"{tmp_path / 'nowhere.npz'}:x", labels)
    assert "is a directory; expected a .npy or .npz file" in fails("score", tmp_path, labels)
    assert "a device; expected" in fails("score", os.devnull, labels)
    assert "File name too long" in fails("score", "x" * 5000, labels)
    # One line, whatever the name is.
    assert r"a\nb.npy: no such file" in fails("score", "a\nb.npy", labels)

    def refuse(self: Path, *args: object, **options: object) -> None:  # root may read anything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "y.npy: Permission denied" in fails("score", labels, labels)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    labels = save(tmp_path, "y.npy", np.zeros(3, np.int64))
    assert "is a pipe, which can be read only once; expected" in fails("score", tmp_path / "pipe", labels)


NUMBERS = np.arange(6.0).reshape(2, 3)


def other_formats() -> dict[str, tuple[bytes, str, str | None]]:
    """Files that are no arrays of NumPy: content, what they are, and the conversion that must work as it stands."""
    text, comma, table = io.StringIO(), io.StringIO(), json.dumps({"a": {"dtype": "F32", "shape": [0]}}).encode()
    np.savetxt(text, NUMBERS)
    np.savetxt(comma, NUMBERS, delimiter=",")
    header = "first,second,third\n" + comma.getvalue()
    workbook = io.BytesIO()
    with zipfile.ZipFile(workbook, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    return {
        "x.txt": (text.getvalue().encode(), "is text", "numpy.loadtxt({name!r})"),
        "x.csv": (comma.getvalue().encode(), "is text", "numpy.loadtxt({name!r}, delimiter=',')"),
        "h.csv": (header.encode(), "is text", "numpy.loadtxt({name!r}, delimiter=',', skiprows=1)"),
        "counted.csv": (
            b"0,1,2\n" + comma.getvalue().encode(),
            "is text",
            "numpy.loadtxt({name!r}, delimiter=',', skiprows=1)",
        ),
        "counts.csv": (b"0,1,2\n", "is text", "numpy.loadtxt({name!r}, delimiter=',')"),
        "pandas.csv": (
            b",0,1,2\n0,0,1,2\n1,3,4,5\n",
            "is text with an index",
            "pandas.read_csv({name!r}, index_col=0).to_numpy()",
        ),
        "R.tsv": (
            b'""\t"V1"\n"1"\t0.5\n',
            "is text with an index",
            "pandas.read_csv({name!r}, sep='\\t', index_col=0).to_numpy()",
        ),
        "x.tsv": (comma.getvalue().replace(",", "\t").encode(), "is text", "numpy.loadtxt({name!r}, delimiter='\\t')"),
        "x.json": (json.dumps(NUMBERS.tolist()).encode(), "is JSON text", "json.load(open({name!r}))"),
        "x.pkl": (pickle.dumps(NUMBERS), "is a pickle", "pickle.load(open({name!r}, 'rb'))"),
        "x.npy": (pickle.dumps(NUMBERS), "is a pickle", "pickle.load(open({name!r}, 'rb'))"),
        "x.bin": (
            np.float32(NUMBERS).tobytes(),
            "is of unknown format",
            "numpy.fromfile({name!r}, 'float32').reshape(-1, CLASSES)",
        ),
        "x.parquet": (b"PAR1" + bytes(9), "is a Parquet file", "pandas.read_parquet({name!r}).to_numpy()"),
        "x.feather": (b"ARROW1" + bytes(9), "is an Arrow (Feather) file", "pandas.read_feather({name!r}).to_numpy()"),
        "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file", "h5py.File({name!r})['NAME'][()]"),
        "x.safetensors": (
            len(table).to_bytes(8, "little") + table,
            "is a safetensors file",
            "safetensors.numpy.load_file({name!r})['NAME']",
        ),
        "x.xlsx": (workbook.getvalue(), "is an Excel workbook", "pandas.read_excel({name!r}, header=None).to_numpy()"),
        "x.npy.gz": (gzip.compress(b"content"), "is compressed", None),
        "lfs.npy": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS", None),
        "empty.npy": (b"", "is empty", None),
    }


@pytest.mark.parametrize("name", other_formats())
def test_other_formats_are_named_with_their_conversion(tmp_path: Path, name: str) -> None:
    content, what, conversion = other_formats()[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = fails("score", path, path)
    assert f"{path} {what}; expected a .npy or .npz file" in message
    if conversion is None:
        return
    command = message.partition("convert it by ")[2]
    assert conversion.format(name=str(path)) in command
    if "pandas" in command or "h5py" in command or "safetensors" in command:
        return
    scope: dict[str, Any] = {"numpy": np, "json": json, "pickle": pickle, "CLASSES": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the short form does not close what it opens
        exec(command, scope)
    converted = path.with_name("x-array.npy" if name == "x.npy" else f"{path.stem}.npy")
    assert np.array_equal(np.load(converted), NUMBERS[0] if name == "counts.csv" else NUMBERS)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pytorch_files_are_named_with_their_conversion(tmp_path: Path, is_zip: bool) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save(torch.tensor(NUMBERS), path, _use_new_zipfile_serialization=is_zip)
    message = fails("score", path, path)
    assert "is a PyTorch file; expected" in message
    exec(message.partition("convert it by ")[2], {"numpy": np, "torch": torch})
    assert np.array_equal(np.load(tmp_path / "x.npy"), NUMBERS)


def test_matlab_files_are_named_with_their_conversion(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    path = tmp_path / "x.mat"
    scipy_io.savemat(path, {"NAME": NUMBERS})
    message = fails("score", path, path)
    assert "is a MATLAB file; expected" in message
    exec("import numpy, scipy.io; " + message.partition("convert it by ")[2])
    assert np.array_equal(np.load(tmp_path / "x.npy"), NUMBERS)


def test_zip_files_without_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"...")
    assert "is a zip file without any .npy array" in fails("score", path, path)
    labels = save(tmp_path, "y.npy", np.zeros(3, np.int64))
    assert "holds one array without a name" in fails("score", f"{labels}:x", labels)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (30, 3)}", "needs 720 bytes of data, it has 72"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 3)}", "shape (-3, 3)"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 3)}", "bytes of data"),
        ("{'descr': '<f8', 'fortran_order': False}", "its header cannot be read"),
        ("{'descr': 'what', 'fortran_order': False, 'shape': (3, 3)}", "its header cannot be read"),
        ("__import__('os').abort()", "its header cannot be read"),
        ("(" * 100, "its header cannot be read"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: str, message: str) -> None:
    path = npy_with_header(tmp_path / "x.npy", header, bytes(72))
    text = fails("score", path, save(tmp_path, "y.npy", np.zeros(3, np.int64)))
    assert "is damaged" in text
    assert message in text


def test_truncated_header(tmp_path: Path) -> None:
    path = save(tmp_path, "x.npy", np.zeros((3, 3)))
    whole = path.read_bytes()
    for length in (7, 9, 40):
        path.write_bytes(whole[:length])
        assert "is damaged" in fails("score", path, path)
    path.write_bytes(b"\x93NUMPY\x09\x00" + whole[8:])
    assert "is damaged" in fails("score", path, path)


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    array = np.empty((3, 1), object)
    array[:] = Trap()
    labels = save(tmp_path, "y.npy", np.zeros(3, np.int64))
    np.savez(tmp_path / "x.npz", x=array)
    for path in (save(tmp_path, "x.npy", array), tmp_path / "x.npz"):
        assert "holds Python objects (dtype object), which are never unpickled" in fails("score", path, labels)
    assert not (tmp_path / "sprung").exists()


def test_npz_names(data: Data, tmp_path: Path) -> None:
    _, labels_path, logits, labels = data
    path = tmp_path / "two.npz"
    np.savez(path, first=logits, second=labels)
    message = fails("score", path, labels_path)
    assert "holds 2 arrays (first, second)" in message
    assert f"{path}:first" in message
    message = fails("score", f"{path}:third", labels_path)
    assert "holds no array 'third', only: first, second" in message
    check(report(f"{path}:first", f"{path}:second"), oracle(logits, labels))


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_damaged_npz(data: Data, tmp_path: Path, writer: Any) -> None:
    _, labels_path, logits, _ = data
    path = tmp_path / "x.npz"
    writer(path, logits)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in fails("score", path, labels_path)
    if writer is np.savez_compressed:
        whole[400:1400] = bytes(1000)
        path.write_bytes(whole)
        assert "is damaged" in fails("score", path, labels_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_files_that_numpy_does_not_write(data: Data, tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.write(data[0], "x.npy")
    message = fails("score", tmp_path / "x.npz", data[1])
    assert f"is compressed by zip's method {method}; expected what numpy.savez_compressed writes" in message


def test_any_damage_is_one_line(tmp_path: Path) -> None:
    logits, labels = RNG.standard_normal((2, 4, 3)), save(tmp_path, "y.npy", np.zeros((2, 4), np.int64))
    plain, fortran = save(tmp_path, "c.npy", logits), save(tmp_path, "f.npy", np.asfortranarray(logits))
    np.savez(tmp_path / "s.npz", logits)
    np.savez_compressed(tmp_path / "z.npz", logits)
    path = tmp_path / "damaged"
    for original in (plain, fortran, tmp_path / "s.npz", tmp_path / "z.npz"):
        whole = original.read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for position in RNG.integers(0, len(whole), RNG.integers(1, 5)):
                content[position] = RNG.integers(0, 256)
            path.write_bytes(content[: RNG.integers(len(whole) // 2, 2 * len(whole))])
            result = run("score", path, labels, "--quiet", "--logits")
            assert result.exit_code in (0, 1)
            assert len(result.stderr.splitlines()) == result.exit_code


def test_npz_member_shorter_than_its_header_says(tmp_path: Path) -> None:
    inner = npy_with_header(tmp_path / "inner", "{'descr': '<f8', 'fortran_order': False, 'shape': (9, 3)}", bytes(72))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(inner, "x.npy")
    labels = save(tmp_path, "y.npy", np.zeros(9, np.int64))
    assert "needs 216 bytes of data, it has 72" in fails("score", tmp_path / "x.npz", labels)


def test_bfloat16_without_ml_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npy_with_header(tmp_path / "x.npy", "{'descr': '|V2', 'fortran_order': False, 'shape': (3, 3)}", bytes(18))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert "pip install ml_dtypes" in fails("score", path, save(tmp_path, "y.npy", np.zeros(3, np.int64)))


# ---------------------------------------------------------------- in a process of its own


def spawn(*args: object, before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in another process, after a few lines of Python."""
    code = f"import os, signal, sys\nimport xce.cli\n{textwrap.dedent(before)}\nxce.cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, args)]
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def is_one_line(text: str) -> bool:
    return text.startswith("Error: ") and text.endswith("\n") and text.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [("npy", "logits"), ("npy", "labels"), ("npz", "logits"), ("npz", "labels"), ("fortran", "logits")],
)
def test_a_file_that_is_shortened_while_it_is_read(tmp_path: Path, kind: str, what: str) -> None:
    """What was mapped ended the process with SIGBUS."""
    shape = (1 << 20, 8)  # several blocks, sparse on the disk
    files = {}
    for name, dtype, dims in (("logits", "f8", shape), ("labels", "i8", shape[:-1])):
        is_fortran = kind == "fortran"
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, dims, fortran_order=is_fortran).flush()
        files[name] = tmp_path / f"{name}.npy"
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.write(files[what], f"{what}.npy")
        files[what] = tmp_path / "x.npz"
    before = f"""
        import xce.cli._scoring as scoring
        def shorten(rows):
            os.truncate({str(files[what])!r}, 4096)
            return False
        scoring._are_probabilities = shorten  # called once, with the first block in memory
    """
    done = spawn("score", *files.values(), "--json", before=before)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert is_one_line(done.stderr)
    assert f"{files[what]} is damaged: its data end too early" in done.stderr


def test_a_file_that_is_shortened_after_it_was_copied(tmp_path: Path) -> None:
    path, labels = tmp_path / "x.npy", save(tmp_path, "y.npy", np.zeros((1 << 10, 16), np.int64))
    np.lib.format.open_memmap(path, "w+", "f8", (1 << 10, 16, 256), fortran_order=True).flush()
    before = f"""
        import xce.cli._scoring as scoring
        scoring._are_probabilities = lambda rows: os.truncate({str(path)!r}, 4096)
    """
    done = spawn("score", path, labels, "--quiet", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == pytest.approx(math.log(256))


def test_labels_that_change_while_they_are_read(tmp_path: Path) -> None:
    labels = save(tmp_path, "y.npy", np.zeros(9, np.int64))
    before = f"""
        import numpy as np
        import xce.cli._scoring as scoring
        check = scoring._checked_labels
        def change(*args):
            yield from check(*args)
            np.save({str(labels)!r}, np.full(9, 7))
        scoring._checked_labels = change
    """
    done = spawn("score", save(tmp_path, "x.npy", np.zeros((9, 3))), labels, before=before)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr)
    assert "row 0: label 7 is out of range" in done.stderr


@needs_linux
def test_too_little_memory(tmp_path: Path) -> None:
    path, labels = tmp_path / "x.npy", save(tmp_path, "y.npy", np.zeros(1, np.int64))
    np.lib.format.open_memmap(path, "w+", np.float32, (1, 1 << 29)).flush()
    before = """
        import resource
        in_use = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), -1))
    """
    done = spawn("score", path, labels, before=before)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr)
    assert done.stderr.startswith("Error: too little memory: ")


def test_interrupted(data: Data) -> None:
    before = """
        import xce.cli._scoring as scoring
        scoring._are_probabilities = lambda rows: os.kill(os.getpid(), signal.SIGINT)
    """
    done = spawn("score", *data[:2], before=before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: interrupted\n")
    early = "xce.cli.command_group = lambda: os.kill(os.getpid(), signal.SIGINT)"
    assert spawn("info", before=early).returncode == 130


OUTPUTS = [
    ("score",),
    ("score", "--json"),
    ("score", "--quiet"),
    ("score", "--help"),
    ("info",),
    ("info", "--json"),
    (),
]


@needs_linux
@pytest.mark.parametrize("args", [*OUTPUTS, ("--help",), ("--version",)])
@pytest.mark.parametrize("how", ["full", "no reader", "closed"])
def test_standard_output_that_cannot_be_written(data: Data, args: tuple[str, ...], how: str) -> None:
    if args and args[0] == "score" and "--help" not in args:
        args = (*args, *map(str, data[:2]))
    if how == "full":
        with open("/dev/full", "w") as full:
            done = spawn(*args, stdout=full)
    elif how == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
        done = spawn(*args, stdout=writer)
        os.close(writer)
    else:
        done = spawn(*args, before="sys.stdout = None")
    assert done.returncode == 4, done.stderr
    assert is_one_line(done.stderr)
    assert "standard output" in done.stderr


@needs_linux
@pytest.mark.parametrize("how", ["full", "no reader"])
def test_demo_without_standard_output(tmp_path: Path, how: str) -> None:
    for module in ("scipy", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        done = spawn("demo", "--out", tmp_path, stdout=full if how == "full" else writer)
    os.close(writer)
    assert done.returncode == 4
    assert is_one_line(done.stderr)


def full_disk(path: Path) -> Path:
    path.symlink_to("/dev/full")
    return path


@needs_linux
@pytest.mark.parametrize("output", ["--json", "--quiet", None])
@pytest.mark.parametrize("where", ["full.png", "full.pdf", "/proc/x.png"])
def test_a_figure_that_cannot_be_written_loses_no_score(
    data: Data, tmp_path: Path, where: str, output: str | None
) -> None:
    pytest.importorskip("matplotlib")
    plot = full_disk(tmp_path / where) if where.startswith("full") else tmp_path / where
    options = [output] if output else []
    expected = run("score", *data[:2], *options)
    result = run("score", *data[:2], *options, "--plot", plot)
    assert result.exit_code == 3
    assert result.stdout == expected.stdout
    assert is_one_line(result.stderr)
    assert f"Error: the figure {plot} could not be written: " in result.stderr


@pytest.mark.parametrize(
    ("where", "problem"),
    [("x.unknown", "expected a name that ends in one of "), ("x", "expected a name that ends in one of "),
     ("nowhere/x.png", "there is no directory "), ("folder.png", "it is a directory")],
)  # fmt: skip
def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_read(
    data: Data, tmp_path: Path, where: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("xce.cli.score.open_array", None)
    message = fails("score", *data[:2], "--plot", tmp_path / where, code=2)
    assert message.startswith(f"Error: the figure {tmp_path / where} cannot be written: {problem}")


def test_a_figure_without_matplotlib_is_refused_before_anything_is_read(data: Data, tmp_path: Path) -> None:
    for before, message in (
        (
            "sys.modules['matplotlib'] = None",
            "this command needs matplotlib, which comes with: pip install 'xce[demo]'",
        ),
        (
            "import types; sys.modules['matplotlib.backend_bases'] = types.ModuleType('x')",
            "matplotlib cannot be loaded: ",
        ),
    ):
        done = spawn("score", *data[:2], "--plot", tmp_path / "p.png", before=before)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"Error: {message}")
        assert is_one_line(done.stderr)


@pytest.mark.parametrize("is_column", [True, False])
def test_one_column_is_no_two_classes(tmp_path: Path, is_column: bool) -> None:
    """What the message says to save is what the user means."""
    x, y = RNG.standard_normal((9, 1)), RNG.integers(2, size=9)
    own, labels = (x if is_column else x[:, 0]), save(tmp_path, "y.npy", y)
    p = 1 / (1 + np.exp(-own))
    expected = np.mean(np.logaddexp(0, x[:, 0]) - y * x[:, 0])
    for name, array, options in (("x", own, []), ("p", p, ["--probabilities"])):
        path = save(tmp_path, f"{name}.npy", array)
        message = fails("score", path, labels, *options)
        assert f"has shape {array.shape}: expected a column for each class, two at least; if it holds the" in message
        both = eval(message.partition(", save ")[2], {"numpy": np, name: array})
        result = run("score", save(tmp_path, "both.npy", both), labels, "--quiet", *options)
        assert float(result.stdout) == pytest.approx(expected, rel=1e-6)


@needs_linux
@pytest.mark.parametrize("name", ["demo.png", "logits.npy"])
def test_demo_that_cannot_write_a_file(tmp_path: Path, name: str) -> None:
    for module in ("scipy", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    path = full_disk(tmp_path / name)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 3
    assert "held out" in result.stdout
    assert is_one_line(result.stderr)
    assert f"{path} could not be written: No space left on device" in result.stderr


def test_a_copy_in_fortran_order_that_cannot_be_written(tmp_path: Path) -> None:
    x, labels = np.asfortranarray(RNG.standard_normal((40, 3))), save(tmp_path, "y.npy", np.zeros(40, np.int64))
    np.savez_compressed(tmp_path / "x.npz", x)
    before = """
        import io, errno, xce.cli._io
        class Full(io.BytesIO):
            def write(self, content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        xce.cli._io.tempfile.TemporaryFile = lambda **options: Full()
    """
    done = spawn("score", tmp_path / "x.npz", labels, before=before)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr)
    assert "No space left on device; numpy.ascontiguousarray(x), saved, needs no copy" in done.stderr


def test_no_warning_reaches_the_terminal(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    environment = os.environ | {"PYTHONWARNINGS": "error", "MPLCONFIGDIR": "/proc/nowhere"}
    huge = save(tmp_path, "huge.npy", np.full((50, 3), [1.7e308, -1.7e308, np.inf]) * [1, 1, -1])
    labels = save(tmp_path, "y.npy", np.ones(50))
    plot = tmp_path / "x.png"
    for files in (data[:2], (huge, labels)):
        done = spawn("score", *files, "--plot", plot, env=environment)
        assert (done.returncode, done.stderr) == (0, f"figure written to {plot}\n")


@pytest.mark.parametrize(("name", "value"), [("XCE_CPU", "v9"), ("XCE_NUM_THREADS", "abc")])
def test_a_wrong_environment_variable_is_one_line(name: str, value: str, data: Data) -> None:
    for args in (("info",), ("score", *data[:2])):
        done = spawn(*args, env=os.environ | {name: value})
        assert (done.returncode, done.stdout) == (1, "")
        assert is_one_line(done.stderr)
        assert f"{name}={value!r}" in done.stderr


@pytest.mark.parametrize("args", [("--help",), ("score", "--help"), ("demo", "--help"), ("info", "--help"), ()])
def test_help_documents_the_exit_codes(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 0
    codes = result.stdout.partition("Exit codes:\n")[2]
    assert [int(line.split()[0]) for line in codes.splitlines()] == [0, 1, 2, 3, 4, 130]


def test_a_name_that_the_terminal_cannot_show(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "\N{GREEK SMALL LETTER PSI}.npy"
    path.write_bytes(data[0].read_bytes())
    done = spawn("score", path, data[1], env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u03c8.npy" in done.stdout.replace("\n", "")


# ---------------------------------------------------------------- what nobody can read, and when


@pytest.mark.parametrize("width", ["0", "12", "40"])
def test_a_narrow_terminal_takes_no_digits(data: Data, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    expected = {args: run(*args).stdout for args in (("score", *data[:2]), ("info",))}
    monkeypatch.setenv("COLUMNS", width)
    for args, text in expected.items():
        assert run(*args).stdout == text
    assert "calibration error" in text or "python" in text


@pytest.mark.parametrize("member", ["c", "column", "rows", "y", "labels"])
def test_a_flipped_bit_in_a_zip(tmp_path: Path, member: str) -> None:
    """Stored members are read where they lie, and their checksums are theirs to be checked."""
    rng, path = np.random.default_rng(0), tmp_path / "x.npz"
    x, y = rng.standard_normal((1 << 12, 16)), rng.integers(16, size=1 << 12)
    arrays = {"c": x, "column": np.asfortranarray(x), "rows": np.asfortranarray(x.reshape(4, -1, 16)), "y": y}
    np.savez(path, **arrays, labels=y.reshape(4, -1))
    pairs = {"c": "y", "column": "y", "rows": "labels", "y": "y", "labels": "labels"}
    first = {"y": "c", "labels": "rows"}.get(member, member)
    args = "score", f"{path}:{first}", f"{path}:{pairs[member]}", "--quiet"
    assert run(*args).exit_code == 0
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{member}.npy")
    content = bytearray(path.read_bytes())
    content[info.header_offset + info.file_size // 2] ^= 1
    path.write_bytes(content)
    assert f"{path}:{member} is damaged: the checksum (CRC-32) of {member}.npy is another" in fails(*args)


@needs_linux
def test_standard_error_that_cannot_be_written(data: Data, tmp_path: Path) -> None:
    """The exit code tells what happened all the same."""
    figure = tmp_path / "p.png"
    for args, code in (
        (("score", *data[:2], "--plot", figure), 0), (("score", data[0]), 2), (("score", data[0], tmp_path / "no"), 1),
        (("score", *data[:2], "--plot", full_disk(tmp_path / "q.png")), 3),
    ):  # fmt: skip
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "xce.cli", *map(str, args)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
        assert done.returncode == code, args
        assert bool(done.stdout) == (code in (0, 3))
    assert figure.exists()


@needs_linux
@pytest.mark.parametrize("imports", ["", "import xce.cli.demo, xce.cli.info, xce.cli.score"])
def test_too_many_open_files(data: Data, imports: str) -> None:
    """Whatever it is that can no longer be opened, standard output can be written."""
    for limit in range(3, 9):
        before = f"""
            import resource
            {imports}
            resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        """
        done = spawn("score", *data[:2], before=before)
        assert done.returncode in (0, 1), done.stderr
        if done.returncode:
            assert done.stdout == ""
            assert is_one_line(done.stderr), done.stderr
            assert "Too many open files" in done.stderr
            assert "standard output" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
@pytest.mark.parametrize("module", ["numpy", "xce._call", "xce.cli", "click", "xce.cli.score", "scipy.optimize"])
@pytest.mark.parametrize("is_ignored", [False, True])
def test_an_interrupt_while_modules_are_imported(module: str, is_ignored: bool, tmp_path: Path) -> None:
    code = f"""
        import os, signal, sys
        class Interrupting:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting)
        if {is_ignored}:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        from _xce_command import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = (0, "") if is_ignored else (130, "Error: interrupted\n")
    assert (done.returncode, done.stderr) == expected


def test_the_command_is_what_handles_interrupts() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="xce")
    assert entry.value == "_xce_command:main"

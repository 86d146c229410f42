"""What a file is that is no array of NumPy, and how it becomes one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FIRST_BYTES", "describe", "describe_zip"]

FIRST_BYTES = 4096  # how much of a file `describe` looks at
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before PyTorch 1.6
_TORCH = ("a PyTorch file", "torch.load({path!r}).numpy(force=True)")

# First bytes -> what it is, and the expression that reads it; the first match counts.
_FORMATS = (
    (b"PAR1", "a Parquet file", "pandas.read_parquet({path!r}).to_numpy()"),
    (b"ARROW1", "an Arrow (Feather) file", "pandas.read_feather({path!r}).to_numpy()"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "h5py.File({path!r})['NAME'][()]"),
    (b"MATLAB 7.3", "a MATLAB 7.3 file", "h5py.File({path!r})['NAME'][()].T"),
    (b"MATLAB", "a MATLAB file", "scipy.io.loadmat({path!r})['NAME']"),
    (_LEGACY_TORCH, *_TORCH),
    *((bytes([0x80, protocol]), "a pickle", "pickle.load(open({path!r}, 'rb'))") for protocol in (2, 3, 4, 5)),
)
# First bytes -> what it is, and the command that makes a file of it.
_WRAPPERS = (
    (b"\x1f\x8b", "compressed", "gunzip {path}"),
    (b"BZh", "compressed", "bunzip2 {path}"),
    (b"\xfd7zXZ\x00", "compressed", "unxz {path}"),
    (b"\x28\xb5\x2f\xfd", "compressed", "unzstd {path}"),
    (b"version https://git-lfs", "a pointer of Git LFS", "git lfs pull"),
)


def describe(path: Path, start: bytes) -> str:
    """Say what a file is, from its first bytes, and how to convert it.

    Parameters
    ----------
    path : Path
        The file.
    start : bytes
        Its first `FIRST_BYTES`.

    Returns
    -------
    str
        The rest of a sentence that starts with the name of the file.
    """
    if not start:
        return "is empty; expected a .npy or .npz file"
    for magic, what, command in _WRAPPERS:
        if start.startswith(magic):
            return f"is {what}; expected a .npy or .npz file: first run {command.format(path=path)}"
    for magic, what, reader in _FORMATS:
        if start.startswith(magic):
            return _sentence(path, what, reader)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20:  # the longest header they allow
        return _sentence(path, "a safetensors file", "safetensors.numpy.load_file({path!r})['NAME']")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut in two
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return _sentence(path, "of unknown format", "numpy.fromfile({path!r}, 'float32').reshape(-1, CLASSES)")
    return _sentence(path, *_describe_text(text))


def _describe_text(text: str) -> tuple[str, str]:
    if text.lstrip()[:1] in ("[", "{"):
        return "JSON text", "json.load(open({path!r}))"
    first, _, rest = text.partition("\n")
    delimiter = next((mark for mark in (",", ";", "\t") if mark in first), None)
    words = [word.strip().strip('"') for word in first.split(delimiter)]
    if delimiter and not words[0]:  # the header of an index, as pandas and R write it
        options = "" if delimiter == "," else f", sep={delimiter!r}"
        return "text with an index", f"pandas.read_csv({{path!r}}{options}, index_col=0).to_numpy()"
    options = f", delimiter={delimiter!r}" if delimiter else ""
    is_counted = len(words) > 1 and words == [str(i) for i in range(len(words))]  # the header of pandas without names
    if not all(map(_is_number, filter(None, words))) or (is_counted and rest.strip()):
        options += ", skiprows=1"
    return "text", f"numpy.loadtxt({{path!r}}{options})"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def describe_zip(path: Path, names: Iterable[str]) -> str:
    """Say what a zip file is that holds no array, from the names of its members; like `describe`."""
    names = list(names)
    if any(name.endswith("data.pkl") for name in names):
        return _sentence(path, *_TORCH)
    if "xl/workbook.xml" in names:
        return _sentence(path, "an Excel workbook", "pandas.read_excel({path!r}, header=None).to_numpy()")
    return "is a zip file without any .npy array; expected one that numpy.savez wrote"


def _sentence(path: Path, what: str, reader: str) -> str:
    array = path.with_name(f"{path.stem}{'-array' if path.suffix == '.npy' else ''}.npy")
    save = f"numpy.save({str(array)!r}, {reader.format(path=str(path))})"
    return f"is {what}; expected a .npy or .npz file: convert it by {save}"

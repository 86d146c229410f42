"""Arrays in ``.npy`` and ``.npz`` files, read in blocks of rows without ever holding a whole file in memory.

Nothing is mapped: a file that another process shortens would end this one with SIGBUS. Uncompressed members of
an ``.npz`` are read at their place inside the zip, compressed ones are decompressed block by block. Nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import math
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xce._checks import counted

from ._errors import OneLineError, one_line
from ._formats import FIRST_BYTES, describe, describe_zip

__all__ = ["ArrayFile", "InputError", "open_array"]

_LONGEST_HEADER = 10_000  # of what NumPy writes for an array of numbers; it trusts no longer one, either
_PIECE_BYTES = 1 << 20  # what is decompressed at once
_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


# What reading a damaged zip file or header raises.
_DAMAGE = (EOFError, NotImplementedError, OverflowError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe, which can be read only once"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class InputError(OneLineError):
    """A file that cannot be scored; the message is for the user."""


@dataclass(frozen=True)
class ArrayFile:
    """An array in a file, not read yet.

    Attributes
    ----------
    name : str
        The file as the user gave it, for messages.
    path : Path
        The file that holds the array.
    member : str or None
        The member of the zip that holds it; None for a plain ``.npy`` file.
    shape : tuple of int
        Its shape.
    dtype : numpy.dtype
        Its dtype; bfloat16 where it was saved as two-byte void and ml_dtypes is installed.
    fortran_order : bool
        Whether the first axis runs fastest.
    offset : int or None
        Where its bytes start in the file; None when they are compressed and must be streamed.
    start : int
        Where the member starts that is not compressed; what lies between it and `offset` is the header.
    """

    name: str
    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int | None
    start: int = 0

    def blocks(self, rows_per_block: int, *, row_ndim: int) -> Iterator[NDArray[Any]]:
        """Iterate over the rows in C order, block by block.

        Parameters
        ----------
        rows_per_block : int
            The largest number of rows in a block.
        row_ndim : int
            How many trailing axes make a row: 1 for logits, 0 for labels. All leading axes are flattened.

        Yields
        ------
        numpy.ndarray
            ``(rows, *row_shape)``; the next block takes its memory.

        Raises
        ------
        InputError
            When the file turns out to be damaged, or is shortened while it is read.
        """
        split = len(self.shape) - row_ndim
        lead, row_shape = self.shape[:split], self.shape[split:]
        rows, row_size = math.prod(lead), math.prod(row_shape)
        starts = range(0, rows, rows_per_block)
        with contextlib.ExitStack() as stack:
            try:
                if self.is_fortran and sum(n > 1 for n in lead) > 1:
                    copy: Any = stack.enter_context(self._copied())
                    # A plain ndarray: the memmap subclass would travel through every result.
                    array = np.asarray(np.memmap(copy, self.dtype, mode="r", shape=self.shape, order="F"))
                    for start in starts:
                        index = np.arange(start, min(start + rows_per_block, rows))
                        yield array[np.unravel_index(index, lead)]
                    return
                must_seek = self.is_fortran and self.offset is None
                if self.is_fortran and self.member is not None and not must_seek:
                    with self._open() as stream:
                        _finish(stream)
                stream = stack.enter_context(self._copied() if must_seek else self._open(checked=not self.is_fortran))
                origin = stream.tell()
                row_bytes = row_size * self.dtype.itemsize
                buffer = np.empty(min(rows_per_block, rows) * row_bytes, np.uint8)
                for start in starts:
                    count = min(rows_per_block, rows - start)
                    content = buffer[: count * row_bytes]
                    if self.is_fortran:  # class by class: the rows of one lie side by side
                        for number, piece in enumerate(content.reshape(row_size, -1)):
                            stream.seek(origin + (number * rows + start) * self.dtype.itemsize)
                            _fill(stream, piece)
                        yield content.view(self.dtype).reshape(row_size, count).T
                    else:
                        _fill(stream, content)
                        yield content.view(self.dtype).reshape(count, *row_shape)
                if not self.is_fortran:
                    _finish(stream)
            except _DAMAGE as error:
                raise InputError(f"{self.name} is damaged: {one_line(error)}") from None
            except OSError as error:
                raise InputError(f"{self.name}: {one_line(error)}") from None

    @property
    def is_fortran(self) -> bool:
        """Whether the order of the axes matters, and the first one runs fastest."""
        return self.fortran_order and sum(n > 1 for n in self.shape) > 1

    @contextlib.contextmanager
    def _open(self, checked: bool = True) -> Iterator[Any]:
        """Open the file at its first element; a compressed or checked one cannot seek."""
        if self.offset is None:
            with _open_member(self.path, self.member) as stream:
                _read_header(stream)
                yield stream
        else:
            file: Any  # without a buffer of its own, it reads to where the elements are used
            with self.path.open("rb", buffering=0) as file:
                if self.member is None or not checked:
                    file.seek(self.offset)
                    yield file
                else:
                    yield _Checked(file, self)

    @contextlib.contextmanager
    def _copied(self) -> Iterator[IO[bytes]]:
        """Copy the elements, uncompressed, to a file without a name, which no other process can shorten."""
        left = math.prod(self.shape) * self.dtype.itemsize
        piece = np.empty(min(left, _PIECE_BYTES), np.uint8)
        with self._open() as stream, tempfile.TemporaryFile(prefix="xce-") as copy:
            while left:
                piece = piece[:left]
                _fill(stream, piece)
                left -= piece.size
                try:
                    copy.write(piece.data)
                    copy.flush()
                except OSError as error:
                    raise InputError(
                        f"{self.name} is in Fortran order, and its copy in {tempfile.gettempdir()} could not be "
                        f"written: {one_line(error)}; numpy.ascontiguousarray(x), saved, needs no copy"
                    ) from None
            _finish(stream)
            copy.seek(0)
            yield copy


class _Checked:
    """The elements of a member of a zip that is not compressed, whose checksum is checked at its end."""

    def __init__(self, file: Any, array: ArrayFile) -> None:
        assert array.offset is not None
        with zipfile.ZipFile(array.path) as archive:
            info = archive.getinfo(array.member or "")
        self.file, self.name, self.expected, self.sum = file, info.filename, info.CRC, 0
        self.left = info.file_size
        file.seek(array.start)
        _fill(self, np.empty(array.offset - array.start, np.uint8))

    def tell(self) -> int:
        """Return the place in the file."""
        return int(self.file.tell())

    def readinto(self, content: Any) -> int:
        """Read what follows; nothing at the end of the member."""
        count = int(self.file.readinto(content[: self.left]))
        self.left -= count
        self.sum = zlib.crc32(content[:count], self.sum)
        if self.left == 0 and self.sum != self.expected:
            raise zipfile.BadZipFile(f"the checksum (CRC-32) of {self.name} is another")
        return count

    def read(self, size: int) -> bytes:
        """Read what follows, of `size` bytes at most."""
        content = np.empty(size, np.uint8)
        return content[: self.readinto(content)].tobytes()


def _finish(stream: Any) -> None:
    """Read a member of a zip to its end, where its checksum is checked."""
    if isinstance(stream, _Checked | zipfile.ZipExtFile):
        while stream.read(_PIECE_BYTES):
            pass


def _fill(stream: Any, content: NDArray[np.uint8]) -> None:
    """Read exactly as many bytes as `content` takes."""
    filled = 0
    while filled < content.size:
        count = stream.readinto(content[filled : filled + _PIECE_BYTES])
        if not count:
            raise EOFError("its data end too early (was it cut short, or written to meanwhile?)")
        filled += count


def open_array(name: str) -> ArrayFile:
    """Find an array and read its header.

    Parameters
    ----------
    name : str
        Path of a ``.npy`` file, of an ``.npz`` file with one array, or ``file.npz:array``.

    Returns
    -------
    ArrayFile
        The array, its data still on disk.

    Raises
    ------
    InputError
        When there is no such file or array, or it is not one that can be read safely.
    """
    try:
        path, member = _split_name(name)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = next((text for is_kind, text in _KINDS if is_kind(mode)), "no file")
            raise InputError(f"{path} is {what}; expected a .npy or .npz file")
        with path.open("rb") as file:
            start = file.read(FIRST_BYTES)
            if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                return _open_npz(name, path, member)
            if not start.startswith(b"\x93NUMPY"):
                raise InputError(f"{path} {describe(path, start)}")
            if member is not None:
                raise InputError(f"{name}: {path} is a .npy file and holds one array without a name")
            file.seek(0)
            shape, fortran_order, dtype = _read_header(file)
            offset = file.tell()
            available = path.stat().st_size - offset
        return _array_file(name, path, None, shape, dtype, fortran_order, offset, available)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or name}: no such file") from None
    except _DAMAGE as error:
        raise InputError(f"{name} is damaged: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{error.filename or name}: {one_line(error)}") from None


def _split_name(name: str) -> tuple[Path, str | None]:
    """Split ``file.npz:array`` at the first colon behind which no longer a file name can follow."""
    if not Path(name).exists():
        for position, character in enumerate(name):
            if character == ":" and Path(name[:position]).is_file():
                return Path(name[:position]), name[position + 1 :]
        stem, colon, member = name.rpartition(":")
        if colon and stem.lower().endswith(".npz"):
            return Path(stem), member
    return Path(name), None


def _open_npz(name: str, path: Path, wanted: str | None) -> ArrayFile:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise EOFError("the directory at its end is missing: was the copy cut short?") from None
    with archive:
        members = {info.filename[:-4]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        names = ", ".join(members)
        if not members:
            raise InputError(f"{path} {describe_zip(path, archive.namelist())}")
        if wanted is None and len(members) > 1:
            first = next(iter(members))
            raise InputError(f"{path} holds {len(members)} arrays ({names}): name one, as in {path}:{first}")
        key = next(iter(members)) if wanted is None else wanted
        if key not in members:
            raise InputError(f"{path} holds no array {key!r}, only: {names}")
        info = members[key]
        if info.flag_bits & 0x1:
            raise InputError(f"{name} is encrypted; expected what numpy.savez writes")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = info.compress_type
            raise InputError(
                f"{name} is compressed by zip's method {method}; expected what numpy.savez_compressed writes"
            )
        with archive.open(info) as stream:
            shape, fortran_order, dtype = _read_header(stream)
            header = stream.tell()
        offset, start = None, 0
        if info.compress_type == zipfile.ZIP_STORED:
            start = _stored_offset(path, info)
            offset = start + header
        array = _array_file(name, path, info.filename, shape, dtype, fortran_order, offset, info.file_size - header)
        return dataclasses.replace(array, start=start)


def _stored_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member start: behind its local header, whose lengths are its own."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        signature, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(file.read(_ZIP_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("the zip directory points at something else")
    return int(info.header_offset) + _ZIP_LOCAL_HEADER.size + int(name_length) + int(extra_length)


@contextlib.contextmanager
def _open_member(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    assert member is not None
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        yield stream


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a ``.npy`` header; the stream is left at the first byte of the data."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version[0]}.{version[1]} of the .npy format, expected 1.0, 2.0 or 3.0")
        size = stream.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(size, "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"it has {length} bytes, expected at most {_LONGEST_HEADER}")
        header = io.BytesIO(size + stream.read(length))
        # 3.0 differs from 2.0 in how names of fields are encoded, and an array with fields is no input.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(header)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise EOFError(f"its header cannot be read ({one_line(error)})") from None
    return tuple(shape), bool(fortran_order), dtype


def _array_file(
    name: str,
    path: Path,
    member: str | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    fortran_order: bool,
    offset: int | None,
    available: int,
) -> ArrayFile:
    if dtype.hasobject:
        raise InputError(f"{name} holds Python objects (dtype {dtype}), which are never unpickled")
    if any(length < 0 for length in shape):
        raise InputError(f"{name} is damaged: shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if needed > available:
        raise InputError(
            f"{name} is damaged: shape {shape} needs {counted(needed, 'byte', 'bytes')} of data, it has {available}"
        )
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None:
        dtype = _bfloat16(name)
    return ArrayFile(name, path, member, shape, dtype, fortran_order, offset)


def _bfloat16(name: str) -> np.dtype[Any]:
    # numpy.save writes bfloat16 as two bytes without a meaning; only ml_dtypes can give it back.
    try:
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ModuleNotFoundError:
        raise InputError(
            f"{name} holds two-byte void elements, which is how bfloat16 is saved: to read it, pip install ml_dtypes"
        ) from None
    return bfloat16

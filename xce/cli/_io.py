"""Arrays in ``.npy`` and ``.npz`` files, read in blocks of rows without ever holding a whole file in memory.

What can be mapped is mapped: ``.npy`` files, and the uncompressed members of an ``.npz`` (`numpy.load` reads
those into memory) at their place inside the zip. Compressed members are decompressed block by block. Nothing
is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import shutil
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

__all__ = ["ArrayFile", "InputError", "open_array"]

_ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


class InputError(Exception):
    """A file that cannot be scored; the message is one line for the user."""


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
    """

    name: str
    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int | None

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
            ``(rows, *row_shape)``, read-only; valid until the next block is asked for.

        Raises
        ------
        InputError
            When the file turns out to be damaged.
        """
        split = len(self.shape) - row_ndim
        lead, row_shape = self.shape[:split], self.shape[split:]
        rows = math.prod(lead)
        starts = range(0, rows, rows_per_block)
        with contextlib.ExitStack() as stack:
            try:
                if self.offset is None and not self.fortran_order:
                    stream = stack.enter_context(_open_member(self.path, self.member))
                    _read_header(stream)
                    for start in starts:
                        count = min(rows_per_block, rows - start)
                        yield self._read(stream, count, row_shape)
                    return
                array = self._map(stack)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
                raise InputError(f"{self.name} is damaged: {error}") from None
            if not self.fortran_order:
                array = array.reshape(rows, *row_shape)
            elif split != 1:
                # Flattening a Fortran-ordered array in C order would copy all of it; gather blocks instead.
                for start in starts:
                    index = np.arange(start, min(start + rows_per_block, rows))
                    yield array[np.unravel_index(index, lead)] if lead else array[np.newaxis]
                return
            for start in starts:
                yield array[start : start + rows_per_block]

    def _read(self, stream: IO[bytes], count: int, row_shape: tuple[int, ...]) -> NDArray[Any]:
        block = np.empty((count, *row_shape), self.dtype)
        content = block.reshape(-1).view(np.uint8)
        filled = 0
        while filled < content.size:
            data = stream.read(min(content.size - filled, 1 << 20))
            if not data:
                raise EOFError("the compressed data end too early")
            content[filled : filled + len(data)] = np.frombuffer(data, np.uint8)
            filled += len(data)
        return block

    def _map(self, stack: contextlib.ExitStack) -> NDArray[Any]:
        source: Path | IO[bytes] = self.path
        offset = self.offset
        if offset is None:
            # Compressed and Fortran-ordered: a row is scattered over the whole stream, so unpack it to disk.
            unpacked = stack.enter_context(tempfile.TemporaryFile(prefix="xce-"))  # noqa: SIM115
            with _open_member(self.path, self.member) as stream:
                _read_header(stream)
                shutil.copyfileobj(stream, unpacked, 1 << 20)
            unpacked.flush()
            source, offset = unpacked, 0
        order = "F" if self.fortran_order else "C"
        # A plain ndarray: the memmap subclass would travel through every result.
        return np.asarray(
            np.memmap(source, self.dtype, mode="r", offset=offset, shape=self.shape, order=order)  # type: ignore[call-overload]
        )


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
    path, member = _split_name(name)
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                return _open_npz(name, path, member)
            if magic != b"\x93NUMPY":
                what = "is empty" if not magic else "is neither a .npy nor an .npz file"
                raise InputError(f"{name} {what}")
            if member is not None:
                raise InputError(f"{name}: {path} is a .npy file and holds one array without a name")
            file.seek(0)
            shape, fortran_order, dtype = _read_header(file)
            offset = file.tell()
            available = path.stat().st_size - offset
        return _array_file(name, path, None, shape, dtype, fortran_order, offset, available)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{name} is damaged: {_one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


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
    with zipfile.ZipFile(path) as archive:
        members = {info.filename[:-4]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        names = ", ".join(members)
        if not members:
            raise InputError(f"{path} is a zip file without any .npy array")
        if wanted is None and len(members) > 1:
            first = next(iter(members))
            raise InputError(f"{path} holds {len(members)} arrays ({names}): name one, as in {path}:{first}")
        key = next(iter(members)) if wanted is None else wanted
        if key not in members:
            raise InputError(f"{path} holds no array {key!r}, only: {names}")
        info = members[key]
        if info.flag_bits & 0x1:
            raise InputError(f"{name} is encrypted")
        try:
            with archive.open(info) as stream:
                shape, fortran_order, dtype = _read_header(stream)
                header = stream.tell()
        except NotImplementedError as error:
            raise InputError(f"{name}: {error}") from None
        offset = None
        if info.compress_type == zipfile.ZIP_STORED:
            offset = _stored_offset(path, info) + header
        return _array_file(name, path, info.filename, shape, dtype, fortran_order, offset, info.file_size - header)


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
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version[0]}.{version[1]} of the .npy format")
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        raise EOFError(f"its header cannot be read ({_one_line(error)})") from None
    shape, fortran_order, dtype = header
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
        raise InputError(f"{name} is damaged: shape {shape} needs {needed} bytes of data, it has {available}")
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Calls with arrays of NumPy, carried out on a GPU: the tests of results are the same for every processor.

`Elsewhere` takes the memory under the arguments to another place, where arrays lie in it as they lie here: the same
strides, the same distance from a boundary of 16 bytes, and those that overlap here overlap there. Afterwards it brings
the memory back. That place is a GPU (`Gpu`) or, to test this file without one, other memory of NumPy (`Host`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.array_utils import byte_bounds

Array = np.ndarray[Any, Any]
BUFFERS = ("grad_out", "hess_out", "out")  # arguments that are written
ALIGNMENT = 16  # bytes: the widest load of the kernels


@cache
def missing() -> str:
    """Why nothing can run on a GPU here, or nothing."""
    try:
        import cupy
    except ImportError:
        return "needs a CUDA device, and CuPy"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "needs a CUDA device: CuPy finds none"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs a CUDA device: {error}"


class Place(Protocol):
    """Where calls are computed."""

    array: type  # of its arrays

    def put(self, data: Array, offset: int) -> Any:
        """Copy bytes to memory that begins `offset` bytes behind a boundary; return what `view` and `get` take."""

    def get(self, memory: Any, data: Array) -> None:
        """Copy memory back."""

    def view(self, memory: Any, start: int, like: Array) -> Any:
        """An array of `like`'s shape, dtype and strides whose first entry is `start` bytes from the beginning."""

    def numpy(self, x: Any) -> Array:
        """An array of this place as one of NumPy."""


class Gpu:
    """The current device of CuPy."""

    def __init__(self) -> None:
        import cupy

        self.cupy, self.array = cupy, cupy.ndarray

    def put(self, data: Array, offset: int) -> Any:
        pointer = self.cupy.cuda.alloc(offset + data.size) + offset
        pointer.copy_from_host(data.ctypes.data, data.size)
        return pointer

    def get(self, memory: Any, data: Array) -> None:
        memory.copy_to_host(data.ctypes.data, data.size)

    def view(self, memory: Any, start: int, like: Array) -> Any:
        if memory is None:
            return self.cupy.empty(like.shape, like.dtype)
        return self.cupy.ndarray(like.shape, like.dtype, memptr=memory + start, strides=like.strides)

    def numpy(self, x: Any) -> Array:
        return np.asarray(x.get())


class Host:
    """Other memory of this machine."""

    array = np.ndarray

    def put(self, data: Array, offset: int) -> Any:
        memory = np.empty(offset + data.size + ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % ALIGNMENT + offset
        memory = memory[first : first + data.size]
        memory[...] = data
        return memory

    def get(self, memory: Any, data: Array) -> None:
        data[...] = memory

    def view(self, memory: Any, start: int, like: Array) -> Any:
        if memory is None:
            return np.empty(like.shape, like.dtype)
        return np.ndarray(like.shape, like.dtype, memory, start, like.strides)

    def numpy(self, x: Any) -> Array:
        return np.asarray(x).copy()


class Piece(NamedTuple):
    """Memory of some arguments: addresses here, and where it is there."""

    start: int
    end: int
    there: Any

    def bytes_here(self) -> Array:
        return np.frombuffer((ctypes.c_uint8 * (self.end - self.start)).from_address(self.start), np.uint8)


class Elsewhere:
    """Calls functions at a place; see the top of this file."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        arrays: list[Array] = []
        mapped(arrays.append, (args, options))
        pieces = self._pieces(arrays)
        moved: dict[int, Array] = {}  # by the identity of the array there

        def there(a: Array) -> Any:
            piece = next((p for p in pieces if a.size and p.start <= byte_bounds(a)[0] < p.end), None)
            start = 0 if piece is None else a.ctypes.data - piece.start
            result = self.place.view(None if piece is None else piece.there, start, a)
            moved[id(result)] = a
            return result

        args_there, options_there = mapped(there, (args, options))
        written: list[Array] = []
        mapped(written.append, {name: options.get(name) for name in BUFFERS})
        try:
            results = function(*args_there, **options_there)
        finally:  # an error must leave buffers as they were: the test looks
            self._bring_back(pieces, written)

        def home(x: Any) -> Any:
            return moved[id(x)] if id(x) in moved else self.place.numpy(x)  # a buffer is itself

        return mapped(home, results, self.place.array)

    def _pieces(self, arrays: list[Array]) -> list[Piece]:
        """The memory that arrays lie in, taken over; what overlaps is one piece."""
        spans: list[tuple[int, int]] = []
        for start, end in sorted(span(a) for a in arrays if a.size):
            if spans and start < spans[-1][1]:
                spans[-1] = spans[-1][0], max(end, spans[-1][1])
            else:
                spans.append((start, end))
        bare = [Piece(start, end, None) for start, end in spans]
        return [p._replace(there=self.place.put(p.bytes_here(), p.start % ALIGNMENT)) for p in bare]

    def _bring_back(self, pieces: list[Piece], written: list[Array]) -> None:
        """Copy what buffers lie in; all else must not have changed."""
        for piece in pieces:
            here, now = piece.bytes_here(), np.empty(piece.end - piece.start, np.uint8)
            self.place.get(piece.there, now)
            if any(a.size and piece.start <= byte_bounds(a)[0] < piece.end for a in written):
                here[...] = now
            else:
                np.testing.assert_array_equal(now, here, err_msg="an argument that is no buffer was written")


def span(a: Array) -> tuple[int, int]:
    """The addresses of the whole memory that an array is a view of, so that gaps and what is around it are seen."""
    low, high = byte_bounds(a)
    while isinstance(a.base, np.ndarray):
        a = a.base
        if a.size:
            around = byte_bounds(a)
            low, high = min(low, around[0]), max(high, around[1])
    return low, high


def mapped(function: Callable[[Any], Any], tree: Any, leaf: type = np.ndarray) -> Any:
    """Tuples, lists and dictionaries with every `leaf` in them replaced."""
    if isinstance(tree, leaf):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, value, leaf) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [mapped(function, value, leaf) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree

"""What xce uses of CuPy, on memory of the CPU: the way of tensors to a GPU and back, without one.

Arrays are arrays of NumPy whose type is another, DLPack is real, and the kernels are those of `emulated`. Devices and
streams are numbers: which are current is kept as CuPy keeps it, and `Log` has what was computed where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import array_api_compat.numpy
import emulated
import numpy as np

import xce._engines
import xce._libraries
from xce._engines import cuda as _cuda

Array = np.ndarray[Any, Any]


# cupy.cuda


class State:
    """What is current."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, list[int]] = {0: [0], 1: [0]}
        self.allocator: Callable[[int], MemoryPointer] = own_memory
        self.runs: list[tuple[int, int]] = []  # device and stream of each computation
        self.synchronized: list[int] = []

    def stream(self) -> int:
        return self.streams[self.device][-1]


class Device:
    def __init__(self, number: int | None = None) -> None:
        self.id = state.device if number is None else number
        self.before: list[int] = []

    def __enter__(self) -> None:
        self.before.append(state.device)
        state.device = self.id

    def __exit__(self, *_: object) -> None:
        state.device = self.before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        version, ptr = stream.__cuda_stream__()
        assert version == 0
        return cls(ptr)

    def __enter__(self) -> None:
        state.streams[state.device].append(self.ptr)

    def __exit__(self, *_: object) -> None:
        state.streams[state.device].pop()

    def synchronize(self) -> None:
        state.synchronized.append(state.device)


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: object, device_id: int = 0) -> None:
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset


def own_memory(size: int) -> MemoryPointer:
    memory = np.full(max(size, 1), 0xAA, np.uint8)
    return MemoryPointer(UnownedMemory(memory.ctypes.data, size, memory, state.device), 0)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    before, state.allocator = state.allocator, allocator
    try:
        yield
    finally:
        state.allocator = before


# cupy


class ndarray(np.ndarray):  # type: ignore[type-arg]  # noqa: N801
    """An array; `data` is found by its address, as arithmetic makes memory of its own."""

    __module__ = "cupy"

    @property
    def data(self) -> MemoryPointer:  # type: ignore[override]
        base: Any = self
        while base is not None:
            if isinstance(base, Interface):
                return MemoryPointer(base.pointer.mem, self.ctypes.data - base.pointer.mem.ptr)
            base = base.base if isinstance(base, np.ndarray) else None
        # of NumPy's arithmetic, which took it on the current device
        return MemoryPointer(UnownedMemory(self.ctypes.data, self.nbytes, self, state.device), 0)

    @property
    def device(self) -> Device:  # type: ignore[override]
        return Device(self.data.mem.device_id)

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:  # type: ignore[override]
        assert stream == -1  # nobody is to wait
        if self.dtype.kind == "V":
            import jax

            return jax.numpy.asarray(np.asarray(self)).__dlpack__()
        return np.asarray(self).__dlpack__()


class Interface:
    """Bytes at an address."""

    def __init__(self, pointer: MemoryPointer, size: int) -> None:
        self.pointer = pointer
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (pointer.ptr, False)}


def at(pointer: MemoryPointer, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> ndarray:
    """The array at an address, which keeps the memory."""
    dtype = np.dtype(dtype)
    ends = [(n - 1) * abs(s) for n, s in zip(shape, strides or (), strict=False)]
    size = int(np.prod(shape)) * dtype.itemsize if strides is None else sum(ends) + dtype.itemsize
    if 0 in shape:
        return np.empty(shape, dtype).view(ndarray)
    flat = np.asarray(Interface(pointer, size))
    return np.ndarray(shape, dtype, flat, strides=strides).view(ndarray)


def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return at(state.allocator(size), shape, dtype)


class Namespace:
    """The array API for these arrays: NumPy's, but what it makes is of this kind."""

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.numpy, name)

    def asarray(self, x: Any) -> ndarray:
        return asarray(x)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> ndarray:
        return asarray(np.zeros(shape, dtype))

    def broadcast_to(self, x: ndarray, shape: tuple[int, ...]) -> Any:
        return np.broadcast_to(x, shape, subok=True)


def namespace_of(*arrays: Any, of_others: Callable[..., Any] = array_api_compat.array_namespace) -> Any:
    return Namespace() if any(isinstance(x, ndarray) for x in arrays) else of_others(*arrays)


class Capsule:
    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def from_dlpack(x: Any) -> ndarray:
    """The array of a capsule, or of an object that has one."""
    array: Array
    if hasattr(x, "__dlpack_device__"):
        array = np.asarray(x) if str(x.dtype) == "bfloat16" else np.from_dlpack(x)
    else:
        array = np.from_dlpack(Capsule(x))
    memory = UnownedMemory(array.ctypes.data, array.nbytes, array, device_of(array.ctypes.data))
    return at(MemoryPointer(memory, 0), array.shape, array.dtype, array.strides)


def device_of(address: int) -> int:
    return next((device for start, stop, device in places if start <= address < stop), 0)


places: list[tuple[int, int, int]] = []  # memory of other devices than 0: start, stop, device


def asarray(x: Any, device: int | None = None, blocking: bool = False) -> ndarray:
    """A copy on a device, or on the current one."""
    own = np.array(x)
    memory = UnownedMemory(own.ctypes.data, own.nbytes, own, state.device if device is None else device)
    return at(MemoryPointer(memory, 0), own.shape, own.dtype)


class Emulated(emulated.Emulated):
    """Kernels on memory from CuPy's allocator."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        result = empty(shape, dtype)
        result[...] = np.nan if np.dtype(dtype).kind == "f" else 7
        return result

    def launch(self, *args: Any) -> None:
        assert state.device == self.number
        state.runs.append((state.device, state.stream()))
        super().launch(*args)


state = State()


def module() -> ModuleType:
    """The module `cupy`."""
    cuda = ModuleType("cupy.cuda")
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.__dict__.update(getDevice=lambda: state.device, CUDARuntimeError=RuntimeError)
    cuda.__dict__.update(
        runtime=runtime, Device=Device, Stream=Stream, UnownedMemory=UnownedMemory, MemoryPointer=MemoryPointer,
        using_allocator=using_allocator, get_allocator=lambda: state.allocator,
        get_current_stream=lambda: Stream(state.stream()),
    )  # fmt: skip
    cupy = ModuleType("cupy")
    cupy.__dict__.update(
        cuda=cuda, ndarray=ndarray, from_dlpack=from_dlpack, empty=empty, asarray=asarray, asnumpy=np.array
    )
    return cupy


OF_CUPY = (xce._engines, "cupy"), (xce._libraries, "cupy"), (xce._libraries, "torch_cuda")


def without_cupy(patch: Any) -> None:
    """Let xce import what needs CuPy anew."""
    for package, name in OF_CUPY:
        patch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        patch.delattr(package, name, raising=False)


@contextmanager
def installed(patch: Any) -> Iterator[State]:
    """Let xce find this CuPy, and no other; `patch` is pytest's monkeypatch."""
    global state
    state = State()
    without_cupy(patch)
    patch.setitem(sys.modules, "cupy", module())
    patch.setattr(xce._libraries, "_known", {})
    from xce._engines import cupy as backend

    devices = {number: Emulated(number) for number in (0, 1)}
    patch.setattr(backend, "_device", devices.__getitem__)
    patch.setattr(array_api_compat, "array_namespace", namespace_of)
    assert backend._cuda is _cuda
    try:
        yield state
    finally:
        places.clear()
        for package, name in OF_CUPY:
            sys.modules.pop(f"{package.__name__}.{name}", None)
            if hasattr(package, name):
                delattr(package, name)

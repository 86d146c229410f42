"""What takes the arrays of the tests to a GPU, tried without one: NumPy's own memory plays the GPU's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import on_gpu
import pytest
from cases import CASE_OF, problem
from checks import LAYOUTS, call, called_by, check_loss, check_maps, check_stats, dtype_of, misaligned

import xce
from xce import _checks
from xce._engines import cuda as _cuda

elsewhere = on_gpu.Elsewhere(on_gpu.Host())
ROWS = np.arange(60, dtype=np.float32).reshape(5, 12)
BUFFERS = pytest.mark.parametrize("name", on_gpu.BUFFERS)


def views() -> dict[str, np.ndarray]:
    """Ways to lie in memory."""
    found = {name: layout(ROWS) for name, layout in LAYOUTS.items()}
    found |= {
        "of one entry": ROWS[2, 3],
        "0-d": np.array(7.0),
        "empty": np.zeros((0, 3)),
        "broadcast": np.broadcast_to(np.float32([1, 2, 3]), (4, 3)),
        "no memory": np.lib.stride_tricks.as_strided(ROWS, (3, 2**40), (48, 0)),
        "backwards": ROWS[::-2, ::-1],
        "read-only": np.frombuffer(ROWS.tobytes(), np.float32),
        "bool": ROWS > 7,
    }
    return {name: a if isinstance(a, np.ndarray) else np.array(a) for name, a in found.items()}


@pytest.mark.parametrize("name", views())
def test_an_array_lies_there_as_it_lies_here(name: str) -> None:
    here = views()[name]

    def look(there: Any) -> int:
        assert there is not here
        assert (there.shape, there.strides, there.dtype) == (here.shape, here.strides, here.dtype)
        if here.size:
            assert not np.may_share_memory(there, here)
            assert (there.ctypes.data - here.ctypes.data) % on_gpu.ALIGNMENT == 0
        if here.size < 1000:
            np.testing.assert_array_equal(there, here)
        return 5

    assert elsewhere(look, here) == 5


def test_arrays_that_overlap_do_so_there() -> None:
    memory = np.arange(40.0)
    a, b, c, other = memory[:30], memory[20:], memory[::-1], np.arange(3.0)

    def look(a: Any, *, b: Any, pair: Any) -> None:
        c, other = pair
        assert b.ctypes.data - a.ctypes.data == 20 * 8
        assert c.ctypes.data - a.ctypes.data == 39 * 8
        assert not np.may_share_memory(other, a)

    elsewhere(look, a, b=b, pair=(c, other))


def test_bfloat16_goes_there() -> None:
    x = np.arange(6).astype(dtype_of("bfloat16"))
    result = elsewhere(lambda a: a + a, x[1:])
    assert result.dtype == x.dtype
    np.testing.assert_array_equal(result, x[1:] + x[1:])


@BUFFERS
def test_buffers_come_back_and_are_themselves(name: str) -> None:
    memory = np.zeros((3, 8), np.float32)
    buffer = memory[:, 1::2]

    def write(x: Any, **there: Any) -> tuple[Any, Any]:
        there[name][...] = x
        return x.sum(), there[name]

    total, same = elsewhere(write, ROWS[:3, :4], **{name: buffer})
    assert total == ROWS[:3, :4].sum()
    assert same is buffer
    np.testing.assert_array_equal(buffer, ROWS[:3, :4])
    assert not memory[:, ::2].any()


def test_a_tuple_of_buffers() -> None:
    first, second = np.zeros(3), np.zeros(2)

    def write(grad_out: Any) -> Any:
        grad_out[0][...], grad_out[1][...] = 1, 2
        return grad_out

    assert elsewhere(write, grad_out=(first, second, None))[1] is second
    assert (first.sum(), second.sum()) == (3, 4)


def test_logits_that_are_the_buffer() -> None:
    x = ROWS.copy()

    def overwrite(x: Any, grad_out: Any) -> Any:
        x += 1
        np.testing.assert_array_equal(x, grad_out)
        return grad_out

    assert elsewhere(overwrite, x, grad_out=x) is x
    np.testing.assert_array_equal(x, ROWS + 1)


def test_what_an_error_has_written_is_seen() -> None:
    buffer = np.zeros(3)

    def fail(grad_out: Any) -> None:
        grad_out[1] = 7
        raise KeyError("after it wrote")

    with pytest.raises(KeyError):
        elsewhere(fail, grad_out=buffer)
    assert buffer[1] == 7


def test_arguments_that_are_no_buffers_must_not_be_written() -> None:
    def overwrite(x: Any) -> None:
        x[1] = 7

    with pytest.raises(AssertionError, match="no buffer"):
        elsewhere(overwrite, np.zeros(3))


def test_results_keep_their_types() -> None:
    x, y, _ = problem({}, dtype=np.float32)
    stats = elsewhere(xce.logit_stats, x, y)
    assert isinstance(stats, xce.LogitStats)
    value, grad = elsewhere(xce.cross_entropy, x, y, return_grad=True)
    assert isinstance(value, np.float32)
    assert grad.dtype == np.float32
    assert elsewhere(lambda: None) is None


def test_the_checks_call_there() -> None:
    """They are what test_gpu is made of: each must go through the hook."""
    x, y, _ = problem({}, shape=(4, 9), dtype=np.float32)
    hook = mock.Mock(wraps=elsewhere)
    with called_by(hook):
        check_loss(xce.cross_entropy, misaligned(x), y, label_smoothing=0.1)
        check_maps(x)
        check_stats(x, y)
    called = {call.args[0] for call in hook.call_args_list}
    assert called == {xce.cross_entropy, xce.softmax, xce.log_softmax, xce.logsumexp, xce.logit_stats}
    assert CASE_OF[xce.cross_entropy].function in called


def test_cupy_makes_these_views() -> None:
    """Its arrays, without a GPU: over memory of NumPy."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy, of CUDA")
    place = on_gpu.Gpu()
    for name, here in views().items():
        if not here.size or here.nbytes > 1e9:
            continue
        start, end = on_gpu.span(here)
        memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(start, end - start, here, device_id=0), 0)
        there = place.view(memory, here.ctypes.data - start, here)
        assert isinstance(there, place.array)
        found = (there.data.ptr, there.shape, there.strides, there.dtype)
        assert found == (here.ctypes.data, here.shape, here.strides, here.dtype), name


# CuPy's own arrays over memory of NumPy: all of its backend but the launch


@pytest.fixture
def mirror() -> Iterator[on_gpu.Elsewhere]:
    """A GPU whose memory is the CPU's and whose kernels are emulated."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy, of CUDA")
    emulated = pytest.importorskip("emulated")
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler, to run the kernels of CUDA")
    from xce._engines import cupy as backend

    kept = []

    def allocate(n: int) -> Any:
        memory = np.full(n + 256, 0xFF, np.uint8)
        kept.append(memory)
        owner = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.size, memory, device_id=0)
        return cupy.cuda.MemoryPointer(owner, -memory.ctypes.data % 256)

    class Memory(on_gpu.Gpu):
        def put(self, data: np.ndarray, offset: int) -> Any:
            pointer = allocate(offset + data.size) + offset
            ctypes.memmove(pointer.ptr, data.ctypes.data, data.size)
            return pointer

        def get(self, memory: Any, data: np.ndarray) -> None:
            ctypes.memmove(data.ctypes.data, memory.ptr, data.size)

        def numpy(self, x: Any) -> np.ndarray:
            assert isinstance(x, cupy.ndarray)
            assert x.flags.c_contiguous
            data = np.empty(x.nbytes, np.uint8)
            self.get(x.data, data)
            return data.view(x.dtype).reshape(x.shape)

    class Device(emulated.Emulated):
        def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
            return cupy.empty(shape, dtype)

        def pointer(self, x: Any) -> int:
            return int(x.data.ptr)

    def memory(x: Any) -> np.ndarray:
        """As `_checks._memory`, whose way through the current stream needs a driver."""
        if isinstance(x, np.ndarray):
            return x
        about = {"shape": x.shape, "strides": x.strides, "typestr": f"|V{x.itemsize}", "data": (x.data.ptr, False)}
        return np.asarray(mock.Mock(__array_interface__={"version": 3, **about}, spec=["__array_interface__"]))

    with (
        cupy.cuda.using_allocator(allocate),
        mock.patch.object(_checks, "_memory", memory),
        mock.patch.object(cupy.cuda, "Device", return_value=mock.MagicMock(id=0)),
        mock.patch.object(cupy.cuda.runtime, "getDevice", return_value=0),
        mock.patch.object(backend, "_device", return_value=Device()),
        mock.patch.multiple(
            _cuda, _REGIMES=((64, _cuda.Regime(8, 1, 16)),), _CLUSTERS=((1e9, _cuda.Regime(64, 2, 64)),)
        ),
    ):
        yield on_gpu.Elsewhere(Memory())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backend_of_cupy_but_for_the_launch(dtype: str, mirror: on_gpu.Elsewhere) -> None:
    with called_by(mirror):
        for n in (5, 301):
            x, y, _ = problem({}, shape=(3, n), dtype=dtype_of(dtype))
            for place in (np.ascontiguousarray, np.asfortranarray, lambda a: a[::-1]):
                grad = place(np.zeros_like(x))
                options = {"validate": False, "label_smoothing": 0.1, "reduction": "none"}
                results = check_loss(xce.cross_entropy, place(x), y, grad_out=grad, **options)
                assert results[1] is grad
            own = x.copy()
            assert call(xce.focal_loss, own, y, validate=False, return_grad=True, grad_out=own)[1] is own
            check_maps(x)

"""Linear cross entropy on a GPU: rows go through cuBLAS in chunks, and their logits become gradients.

    logits = x W' + b,   g = d loss / d logits,   dW = g' x,   db = sum g,   dx = g W

The logits of a chunk are float32 (float64 for float64), whatever the parameters are: rounded to 16 bits they would
cost the loss its accuracy. g has the type of the parameters, since tensor cores multiply 16 bits or nothing, and is
added up in float32. Nothing waits for the GPU, unless a checked call has float64 weights.

The products have the bits of cuBLAS: the same in every run with one version of it on one model of GPU, as long as no
other stream uses cuBLAS at the same time (CUBLAS_WORKSPACE_CONFIG=:4096:8 lifts that). Everything else is added in a
fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from xce._call import Call, LinearCall
from xce._engines import cuda as _cuda
from xce._engines.cuda import AXES
from xce._engines.device import Device, Module, Product
from xce._engines.numbers import FLOAT32, FLOAT64, number_kind

# Rows of a chunk, for milliseconds of 8192 rows in bfloat16 as others measured them on an H200: 256 rows 53, 2048 37.7,
# 4096 35.1. Not measured with these kernels yet.
CHUNK_ROWS = 4096
CHUNK_SHARE = 32  # of the GPU's memory, for a chunk: 4.4 GB of an H200's, 5700 rows of 128256 classes in bfloat16
ALIGNED_BYTES = 16  # of the rows of what is allocated here: what tensor cores want, and loads of 16 bytes
COPY_TURNS = 4  # TURNS of linear.cu
LARGEST = 2**31 - 1  # sizes in BLAS
_FILES = (*_cuda.COMMON, "cuda/linear.cu")

RANGE = np.dtype(
    [(name, np.int64) for name in ("data", "columns", "first", "axes")]
    + [("shape", np.int64, AXES), ("strides", np.int64, AXES)]
)
COPY_JOB = np.dtype(
    [(name, RANGE) for name in ("from", "to", "label", "sample", "left")]
    + [(name, np.int64) for name in ("n_rows", "n_columns", "label_kind", "sample_size")]
    + [("ignore_index", np.int64), ("fill", np.uint64)]
)


def run(call: LinearCall, device: Device) -> tuple[Any, tuple[Any, Any, Any]]:
    """Compute `call`: the loss, and the gradients or None."""
    if call.inputs.dtype != FLOAT64 and _cuda.is_beyond_float32(call.loss, device):
        return _in_float64(call, device)
    loss, n_rows = call.loss, math.prod(call.loss.logits.shape[:-1])
    if loss.sample_weight is not None:
        loss = loss._replace(sample_weight=_cuda.cast(device, loss.sample_weight, _scalar(loss)))
        call = call._replace(loss=loss)
    grads = d_inputs, d_weight, d_bias = tuple(_outputs(call, device))
    value = device.empty((n_rows,), _scalar(loss))
    denominator = _cuda.denominator_of_mean(device, loss) if loss.reduction == "mean" else None
    share, unit = _share(loss, denominator)
    layer = _Layer(call, device, d_inputs, d_weight, d_bias, unit)
    for start in range(0, n_rows, layer.step):
        part = slice(start, min(start + layer.step, n_rows))
        logits, g = layer.forward(part)
        chunk = loss._replace(
            logits=logits,
            axis=1,
            grad_out=g if loss.return_grad else None,
            **{
                name: _rows_of(device, getattr(loss, name), loss.logits.ndim - 1, part)
                for name in ("labels", "probabilities", "sample_weight", "where")
            },
        )
        _cuda.row_losses(device, chunk, value[part], share)
        if loss.return_grad:
            layer.backward(part, g)
    layer.finish()
    if loss.reduction == "none":
        return value.reshape(loss.logits.shape[:-1]), grads
    return _cuda.sum_of_losses(device, loss, value, denominator), grads


def _in_float64(call: LinearCall, device: Device) -> tuple[Any, tuple[Any, Any, Any]]:
    """A call with options that float32 does not hold, on copies of all its arrays: nobody waits for that."""
    logits = SimpleNamespace(shape=call.loss.logits.shape, ndim=call.loss.logits.ndim, dtype=FLOAT64)
    own = call.inputs, call.weight, call.bias
    inputs, weight, bias = (None if x is None else _cuda.cast(device, x, FLOAT64) for x in own)
    wide = LinearCall(call.loss._replace(logits=logits), inputs, weight, bias, call.chunk_rows, (None, None, None))
    loss, wide_grads = run(wide, device)
    grads = tuple(_outputs(call, device))
    for x, out in zip(wide_grads, grads, strict=True):
        if out is not None:
            _cuda.convert(device, x, out)
    return _cuda.cast(device, loss, FLOAT32), grads


def _scalar(loss: Call) -> np.dtype[Any]:
    return FLOAT64 if loss.logits.dtype == FLOAT64 else FLOAT32


def _outputs(call: LinearCall, device: Device) -> Iterator[Any]:
    """The buffers of the three gradients, or None."""
    for array, buffer in zip((call.inputs, call.weight, call.bias), call.grad_out, strict=True):
        is_missing = call.loss.return_grad and array is not None and buffer is None
        yield device.empty(array.shape, array.dtype) if is_missing else buffer


def _share(loss: Call, denominator: Any) -> tuple[Any, float]:
    """What to divide the gradients of the logits by, and the unit that these then have, a power of two.

    Those of a mean over many rows would vanish in float16, below 6e-5 bit by bit. In this unit they are some 16 times
    those of a sum; and if one row has all the weight, at most 16384, of 65504.
    """
    if denominator is None or loss.logits.dtype != np.float16 or not loss.return_grad:
        return denominator, 1.0
    n_rows = max(math.prod(loss.logits.shape[:-1]), 1)
    unit = 2.0 ** -(4 + min(math.ceil(math.log2(n_rows)), 10))
    return denominator * unit, unit


def _chunk_rows(call: LinearCall, device: Device) -> int:
    """The rows of a chunk: what was asked for, or chunks of equal size below the cap."""
    *rows, n_classes = map(int, call.loss.logits.shape)
    n_rows = max(math.prod(rows), 1)
    if call.chunk_rows is not None:
        return min(call.chunk_rows, n_rows, LARGEST)
    scalar, dtype, probabilities = _scalar(call.loss), call.inputs.dtype, call.loss.probabilities
    per_class = scalar.itemsize
    if call.loss.return_grad and dtype != scalar:
        per_class += dtype.itemsize
    if probabilities is not None and probabilities.dtype != scalar:
        per_class += scalar.itemsize  # they are converted
    row_bytes = n_classes * per_class + int(call.inputs.shape[-1]) * dtype.itemsize
    limit = min(CHUNK_ROWS, max(device.memory_bytes // CHUNK_SHARE // row_bytes, 1))
    return int(-(-n_rows // -(-n_rows // limit)))


class _Layer:
    """The products with the weights, and the gradients that add up over the chunks, in units of `unit`."""

    def __init__(
        self, call: LinearCall, device: Device, d_inputs: Any, d_weight: Any, d_bias: Any, unit: float
    ) -> None:
        loss, dtype, scalar = call.loss, call.inputs.dtype, _scalar(call.loss)
        *rows, n_classes = map(int, loss.logits.shape)
        width, n_axes = int(call.inputs.shape[-1]), len(rows)
        self.device, self.unit, self.step = device, unit, _chunk_rows(call, device)
        self.inputs = _range(device, call.inputs, n_axes)
        self.d_inputs: Any = None if d_inputs is None else _range(device, d_inputs, n_axes)
        left = None if loss.where is None else _cuda.classes_left(loss.where, n_axes, device)
        ranges = {
            "label": loss.labels,
            "sample": loss.sample_weight,
            "left": left,
        }
        self.removed = _Removed(
            loss.ignore_index, **{name: None if x is None else _range(device, x, n_axes) for name, x in ranges.items()}
        )
        self.weight, self.bias = _readable(device, call.weight), call.bias
        self.x = _aligned(device, (self.step, width), dtype)
        self.logits = self.g = _aligned(device, (self.step, n_classes), scalar)
        if loss.return_grad and dtype != scalar:
            self.g = _aligned(device, (self.step, n_classes), dtype)
        is_one = math.prod(rows) <= self.step
        self.d_weight: Any = None if d_weight is None else _Sum(device, d_weight, d_weight.dtype if is_one else scalar)
        self.d_bias: Any = None if d_bias is None else _Sum(device, d_bias[None], d_bias.dtype if is_one else scalar)
        self.ones: Any = None if d_bias is None else _filled(device, self.step, dtype, 1.0)

    def forward(self, part: slice) -> tuple[Any, Any]:
        """Some rows' logits, and the memory of their gradient. The logits of removed rows are those of zeros."""
        n, device = part.stop - part.start, self.device
        x, logits = self.x[:n], self.logits[:n]
        _copy(device, self.inputs.at(part.start), _range(device, x, 1), x.shape, self.removed, part.start)
        if self.bias is not None:
            every_row = _range(device, self.bias[None], 1)._replace(shape=(n,), strides=(0,))
            _copy(device, every_row, _range(device, logits, 1), logits.shape)
        _multiply(device, x, self.weight.T, logits, 1.0, 0.0 if self.bias is None else 1.0)
        return logits, logits if self.g is self.logits else self.g[:n]

    def backward(self, part: slice, g: Any) -> None:
        """Add what some rows contribute to the gradients of the parameters, and write that of their inputs."""
        device, x = self.device, self.x[: len(g)]
        self.d_weight.add(g.T, x, self.unit)
        if self.d_bias is not None:
            self.d_bias.add(self.ones[None, : len(g)], g, self.unit)
        _multiply(device, g, self.weight, x, self.unit)  # in the place of the inputs, which were used for the last time
        # zeros once more: 0 times an infinite weight is not 0
        _copy(device, _range(device, x, 1), self.d_inputs.at(part.start), x.shape, self.removed, part.start)

    def finish(self) -> None:
        """Write what is left to write when the last rows are through."""
        for total in (self.d_weight, self.d_bias):
            if total is not None:
                total.finish()


class _Sum:
    """A matrix that products add up to: in the output itself where BLAS can write there what it adds up."""

    def __init__(self, device: Device, out: Any, dtype: Any) -> None:
        self.device, self.out, self.is_empty = device, out, True
        is_direct = out.dtype == dtype and _lies(out) is not None
        self.total = out if is_direct else _aligned(device, out.shape, dtype)

    def add(self, a: Any, b: Any, alpha: float) -> None:
        """Add a product; the first one need not find zeros."""
        _multiply(self.device, a, b, self.total, alpha, 0.0 if self.is_empty else 1.0)
        self.is_empty = False

    def finish(self) -> None:
        """Write the output."""
        out = _range(self.device, self.out, 1)
        if self.is_empty:
            _copy(self.device, None, out, self.out.shape)
        elif self.total is not self.out:
            _copy(self.device, _range(self.device, self.total, 1), out, self.out.shape)


# Products


def _lies(x: Any) -> Any:
    """Whether a matrix lies in memory row by row (else by columns), and in steps of how many entries.

    None if BLAS can neither read nor write it there.
    """
    size = x.dtype.itemsize
    for by_rows in (True, False):
        (n_lines, n), (step, within) = (x.shape, x.strides) if by_rows else (x.shape[::-1], x.strides[::-1])
        ld, rest = divmod(step, size) if n_lines > 1 else (max(n, 1), 0)
        if (within == size or n <= 1) and rest == 0 and max(n, 1) <= ld <= LARGEST:
            return by_rows, ld
    return None


def _multiply(device: Device, a: Any, b: Any, out: Any, alpha: float = 1.0, beta: float = 0.0) -> None:
    """Write alpha a @ b + beta out, of matrices as BLAS reads them."""
    (m, k), n = a.shape, b.shape[1]
    if not m * n * k:
        if m * n and not beta:
            _copy(device, None, _range(device, out, 1), out.shape)
        return
    by_rows, ld = _lies(out)
    if not by_rows:
        a, b, out, m, n = b.T, a.T, out.T, n, m
    # a matrix by rows is to BLAS its transpose: out' = b' a'
    (b_by_rows, ldb), (a_by_rows, lda) = _lies(b), _lies(a)
    device.gemm(
        Product(
            not b_by_rows,
            not a_by_rows,
            n,
            m,
            k,
            alpha,
            device.pointer(b),
            ldb,
            device.pointer(a),
            lda,
            beta,
            device.pointer(out),
            ld,
            a.dtype,
            out.dtype,
        )
    )


def _aligned(device: Device, shape: tuple[int, int], dtype: Any) -> Any:
    """A matrix whose rows begin where tensor cores like them to."""
    entries = ALIGNED_BYTES // np.dtype(dtype).itemsize
    return device.empty((shape[0], -(-shape[1] // entries) * entries), dtype)[:, : shape[1]]


def _readable(device: Device, x: Any) -> Any:
    """A matrix where BLAS reads it: itself, or a copy."""
    if _lies(x) is not None:
        return x
    copy = _aligned(device, x.shape, x.dtype)
    _copy(device, _range(device, x, 1), _range(device, copy, 1), x.shape)
    return copy


# Rows where they lie


class _Range(NamedTuple):
    """Rows of an array from `first` on, where all have one number, in C order; the axes that allow it are joined."""

    array: Any  # stays alive
    data: int
    columns: int  # bytes
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def at(self, start: int) -> _Range:
        return self._replace(first=self.first + start)


class _Removed(NamedTuple):
    """What tells rows that do not count: their label, a weight of 0, or that `where` leaves no class."""

    ignore_index: int
    label: _Range | None
    sample: _Range | None
    left: _Range | None


def _range(device: Device, x: Any, n_axes: int) -> _Range:
    """The rows of an array whose first axes are those of the rows; the axis of the columns follows, or there is one."""
    rows = _cuda.Rows(x.shape if x.ndim > n_axes else (*x.shape, 1), n_axes, {"x": x})
    return _Range(x, device.pointer(x), rows.classes["x"], 0, tuple(rows.shape), tuple(rows.strides["x"]))


def _rows_of(device: Device, x: Any, n_axes: int, part: slice) -> Any:
    """Some rows of an array, by their numbers: a view, or a copy where the axes of the rows do not join."""
    if x is None:
        return None
    rows, tail = _range(device, x, n_axes), tuple(x.shape[n_axes:])
    if len(rows.shape) == 1:
        return x.reshape((math.prod(x.shape[:n_axes]), *tail))[part]
    copy = device.empty((part.stop - part.start, *tail), x.dtype)
    _copy(device, rows.at(part.start), _range(device, copy, 1), (len(copy), math.prod(tail)))
    return copy


def _filled(device: Device, n: int, dtype: Any, number: float) -> Any:
    result = device.empty((n,), dtype)
    bits = int.from_bytes(np.asarray(number).astype(dtype).tobytes(), "little")
    _copy(device, None, _range(device, result[None], 1), (1, n), fill=bits)
    return result


def _copy(
    device: Device,
    source: _Range | None,
    target: _Range,
    shape: tuple[int, int],
    removed: _Removed | None = None,
    start: int = 0,
    fill: int = 0,
) -> None:
    """Copy rows in the type of the target: zeros for removed ones, whose numbers begin with `start`.

    Without a source: the number whose bits are `fill`.
    """
    if not math.prod(shape):
        return
    job = np.zeros((), COPY_JOB)
    job["n_rows"], job["n_columns"] = shape
    job["fill"] = fill
    ranges = {"from": source, "to": target}
    if removed is not None:
        job["ignore_index"] = removed.ignore_index
        for name in ("label", "sample", "left"):
            rows = getattr(removed, name)
            ranges[name] = None if rows is None else rows.at(start)
        if removed.label is not None:
            job["label_kind"] = number_kind(removed.label.array.dtype)
        if removed.sample is not None:
            job["sample_size"] = removed.sample.array.dtype.itemsize
    for name, rows in ranges.items():
        if rows is not None:
            job[name]["data"], job[name]["columns"], job[name]["first"] = rows.data, rows.columns, rows.first
            job[name]["axes"] = n = len(rows.shape)
            job[name]["shape"][:n], job[name]["strides"][:n] = rows.shape, rows.strides
    dtypes = [rows.array.dtype for rows in (source, target) if rows is not None]
    side = 16 // max(dtype.itemsize for dtype in dtypes)
    x = min(2 ** math.ceil(math.log2(-(-shape[1] // side))), device.sum_threads)
    y = device.sum_threads // x
    tiles = -(-shape[0] // y) * -(-shape[1] // (x * side * COPY_TURNS))
    grid = min(tiles, device.processors * 2048 // device.sum_threads)
    device.launch(device.load(_copier(dtypes[0], dtypes[-1]), "copy_rows"), grid, (x, y), 0, job)


def _copier(source: Any, target: Any) -> Module:
    """The kernel that copies from one type to another: numbers as they are, or between float32 and 16 bits."""
    how, storage = "SAME", "float32"
    if source != target:
        how, narrow = ("NARROW", target) if target.itemsize == 2 else ("WIDEN", source)
        storage = "float16" if narrow == np.float16 else "bfloat16"
    definitions = (("XCE_COPY", how), ("XCE_BYTES", str(target.itemsize)))
    return Module(storage, _FILES, definitions)


def modules() -> Iterable[tuple[Module, str]]:
    """Every kind of module with a kernel of it, for the tests that compile them."""
    for size in ("1", "2", "4", "8"):
        yield Module("float32", _FILES, (("XCE_COPY", "SAME"), ("XCE_BYTES", size))), "copy_rows"
    for storage in ("float16", "bfloat16"):
        for how, size in (("WIDEN", "4"), ("NARROW", "2")):
            yield Module(storage, _FILES, (("XCE_COPY", how), ("XCE_BYTES", size))), "copy_rows"

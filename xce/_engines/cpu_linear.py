"""Linear cross entropy of NumPy arrays: rows go through BLAS in chunks, and their logits become gradients in place.

    logits = x W' + b,   g = d loss / d logits,   dW += g' x,   db += sum g,   dx = g W

Memory beyond the outputs: a chunk, and slices of classes. BLAS reads and writes where it lies what has the dtype of the
computation; anything else is converted, inputs by the chunk, weights and their gradient by the slice. The mean is a sum
with weights of 1 / denominator, so that no chunk needs to know of the others. The first chunk's dW is written where it
belongs; later ones are added by slices, because NumPy has no product that adds, so fewer and larger chunks are faster.
A dW of 16 bits is rounded by each chunk; in a buffer of float32 it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from xce._arrays import is_label, widen
from xce._call import Call, LinearCall
from xce._engines import cpu
from xce._engines.numbers import is_beyond

# Tuning, measured on two cores of an AMD EPYC (Zen 4) with OpenBLAS, float32, width 512, 32000 classes: milliseconds of
# value and both gradients of 512 rows, over those of the three bare products.
CHUNK_BYTES = 128 << 20  # 16 MiB (128 rows): 1.46, 32 MiB (256): 1.17, 128 MiB (512): 1.05
SLICE_BYTES = 4 << 20  # chunks of 256 rows, with slices of 128 KiB: 1.13, 1 MiB: 1.08, 4 MiB: 1.05, 16 MiB: 1.09


def run(call: LinearCall) -> tuple[Any, tuple[Any, Any, Any]]:
    """Compute `call`: the loss, and the gradients or None."""
    grads = x_out, weight_out, bias_out = tuple(_outputs(call))
    with np.errstate(all="ignore"):  # infinities and NaN are answers here
        dtype, denominator = _precision(call.loss)
        return _loss(call, dtype, denominator, _Layer(call, dtype, weight_out, bias_out), x_out), grads


def _loss(call: LinearCall, dtype: np.dtype[Any], denominator: float, layer: _Layer, x_out: Any) -> Any:
    """The loss, as `layer` computes the logits; its gradients are written."""
    loss, rows, n_classes = call.loss, call.loss.logits.shape[:-1], call.weight.shape[0]
    n_rows, step = math.prod(rows), _chunk_rows(call, dtype)
    inputs = _Rows(call.inputs, rows)
    labels, probabilities, sample_weight, where, d_inputs = (
        None if a is None else _Rows(a, rows)
        for a in (loss.labels, loss.probabilities, loss.sample_weight, loss.where, x_out)
    )
    result = np.dtype("float64" if loss.logits.dtype == np.float64 else "float32")
    value = np.zeros(n_rows, result) if loss.reduction == "none" else None
    # "mean" is a sum with this weight, and so are its gradients
    share = 1 / denominator if denominator else 1.0

    total, chunk = 0.0, np.empty((min(step, n_rows), n_classes), dtype)
    for start in range(0, n_rows, step):
        part = slice(start, min(start + step, n_rows))
        of_rows = (None if a is None else a[part] for a in (labels, probabilities, sample_weight, where))
        which, y, q, weights, left = _counted(part, loss.ignore_index, *of_rows)
        x = _matrix(inputs[which], dtype)
        g = chunk[: len(x)]
        layer.forward(x, g)
        s = np.full(len(x), share) if weights is None else cpu._cast(weights, dtype) * share
        s = s.astype(dtype, copy=False)
        s[s == 0] = np.finfo(dtype).smallest_subnormal  # these rows count
        losses = cpu.run(
            loss._replace(
                logits=g,
                axis=1,
                labels=y,
                probabilities=q,
                sample_weight=s,
                reduction="none",
                where=left,
                grad_out=g if loss.return_grad else None,
            )
        )[0]
        total += float(losses.sum(dtype=np.float64))
        if value is not None:
            value[which] = losses
        if loss.return_grad:
            if not denominator:
                g *= 0
            layer.backward(x, g)  # before the inputs are overwritten
        if d_inputs is not None:
            if which is not part:
                d_inputs[part] = 0
            layer.d_inputs(g, d_inputs, which)
    layer.finish()
    if value is not None:
        return value.reshape(rows)
    return np.float64(total if denominator else math.nan).astype(result)


def _counted(
    part: slice, ignore_index: int, labels: Any, probabilities: Any, sample_weight: Any, where: Any
) -> tuple[slice | Any, Any, Any, Any, Any]:
    """The rows of a part that count, by their flat numbers; their targets, weights and classes."""
    kept = np.ones(part.stop - part.start, np.bool_)
    if labels is not None:
        labels = labels.copy()  # read once: another thread may change them
        kept = ~is_label(labels, ignore_index)
    if sample_weight is not None:
        kept &= widen(sample_weight) != 0
    if where is not None:
        kept &= cpu.classes_left(where, 1)
    if kept.all():
        return part, labels, probabilities, sample_weight, where
    own = (None if a is None else a[kept] for a in (labels, probabilities, sample_weight, where))
    return part.start + np.flatnonzero(kept), *own


def _outputs(call: LinearCall) -> Iterator[Any]:
    """The buffers of the three gradients, or None."""
    for array, buffer in zip((call.inputs, call.weight, call.bias), call.grad_out, strict=True):
        is_missing = call.loss.return_grad and array is not None and buffer is None
        yield cpu._like(array) if is_missing else buffer


def _precision(loss: Call) -> tuple[np.dtype[Any], float]:
    """The dtype to compute in, and the denominator of the whole call; float64 also for what float32 cannot hold."""
    dtype = np.dtype("float64" if loss.logits.dtype == np.float64 or cpu._is_beyond_float32(loss) else "float32")
    if loss.reduction != "mean":
        return dtype, 1.0
    kernels, _ = cpu._load(dtype)
    weight = None if loss.weight is None else np.ascontiguousarray(cpu._cast(loss.weight, dtype))
    denominator = cpu._denominator(kernels, loss, weight)
    return np.dtype("float64") if is_beyond(denominator) else dtype, denominator


def _chunk_rows(call: LinearCall, dtype: np.dtype[Any]) -> int:
    """The rows of a chunk: what was asked for, or chunks of equal size below the cap."""
    *rows, n_classes = map(int, call.loss.logits.shape)
    n_rows = math.prod(rows)
    if call.chunk_rows is not None:
        return min(call.chunk_rows, max(n_rows, 1))
    entries = n_classes + 2 * call.inputs.shape[-1]
    n_chunks = -(-n_rows // max(CHUNK_BYTES // (entries * dtype.itemsize), 1))
    return int(-(-n_rows // max(n_chunks, 1)) or 1)


class _Layer:
    """The products with the weights, and the gradients that add up over the chunks."""

    def __init__(self, call: LinearCall, dtype: np.dtype[Any], d_weight: Any, d_bias: Any) -> None:
        self.weight, self.dtype, self.d_weight, self.d_bias = call.weight, dtype, d_weight, d_bias
        self.bias = None if call.bias is None else cpu._cast(call.bias, dtype)
        n_classes, width = self.weight.shape
        self.all = [slice(0, n_classes)]
        step = max(SLICE_BYTES // (max(width, 1) * dtype.itemsize), 1)
        self.slices = [slice(i, min(i + step, n_classes)) for i in range(0, n_classes, step)]
        self.bias_sum = np.zeros(n_classes) if d_bias is not None else None
        self.is_first = True

    def weights(self) -> Iterator[tuple[slice, Any]]:
        """Slices of classes with their weights, as BLAS reads them."""
        for classes in self.all if _is_direct(self.weight, self.dtype) else self.slices:
            yield classes, _matrix(self.weight[classes], self.dtype)

    def forward(self, x: Any, logits: Any) -> None:
        """Write the logits of some rows."""
        for classes, weight in self.weights():
            np.matmul(x, weight.T, out=logits[:, classes])
        if self.bias is not None:
            logits += self.bias

    def backward(self, x: Any, g: Any) -> None:
        """Add what some rows contribute to the gradients of the parameters."""
        if not len(x):
            return
        is_direct = self.is_first and _is_direct(self.d_weight, self.dtype)
        for classes in self.all if is_direct else self.slices:
            into = self.d_weight[classes]
            product = np.matmul(g[:, classes].T, x, out=into if is_direct else None)
            if is_direct:
                continue
            if not self.is_first:
                product += cpu._cast(into, self.dtype)
            into[...] = _stored(product, into.dtype)
        if self.bias_sum is not None:
            self.bias_sum += np.matmul(np.ones(len(x), self.dtype), g)
        self.is_first = False

    def finish(self) -> None:
        """Write what is left to write when the last rows are through."""
        if self.is_first and self.d_weight is not None:
            self.d_weight[...] = 0
        if self.d_bias is not None:
            self.d_bias[...] = _stored(self.bias_sum, self.d_bias.dtype)

    def d_inputs(self, g: Any, out: _Rows, which: Any) -> None:
        """Write the gradient of some rows of the inputs."""
        into = out.view(which)
        is_direct = into is not None and _is_direct(into, self.dtype)
        result = into if is_direct else np.empty((len(g), self.weight.shape[1]), self.dtype)
        for classes, weight in self.weights():
            if classes.start == 0:
                np.matmul(g[:, classes], weight, out=result)
            else:
                result += np.matmul(g[:, classes], weight)
        if not is_direct:
            out[which] = _stored(result, out.array.dtype)


class _Rows:
    """An array whose leading axes are those of the rows, read and written by the flat numbers of its rows."""

    def __init__(self, array: Any, rows: tuple[int, ...]) -> None:
        self.array, self.rows = array, rows
        steps = [(stride, n) for stride, n in zip(array.strides, rows, strict=False) if n != 1]
        is_flat = all(outer == inner * n for (outer, _), (inner, n) in pairwise(steps))
        self.flat = array.reshape(math.prod(rows), *array.shape[len(rows) :]) if is_flat else None

    def view(self, which: Any) -> Any:
        """Rows where they lie, or None if they do not lie in even steps."""
        return self.flat[which] if self.flat is not None and isinstance(which, slice) else None

    def __getitem__(self, which: Any) -> Any:
        return self.array[self._place(which)] if self.flat is None else self.flat[which]

    def __setitem__(self, which: Any, values: Any) -> None:
        if self.flat is None:
            self.array[self._place(which)] = values
        else:
            self.flat[which] = values

    def _place(self, which: Any) -> Any:
        return np.unravel_index(np.arange(which.start, which.stop) if isinstance(which, slice) else which, self.rows)


def _is_direct(x: Any, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS reads and writes a matrix where it lies; NumPy's own loops are a hundred times slower."""

    def in_rows(x: Any) -> bool:
        outer, inner = x.strides
        return bool(inner == x.itemsize and outer >= x.shape[1] * inner)

    return x.dtype == dtype and x.flags.aligned and (in_rows(x) or in_rows(x.T))


def _matrix(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` as BLAS reads it."""
    x = cpu._cast(x, dtype)
    return x if _is_direct(x, dtype) else x.copy(order="C")


def _stored(x: Any, dtype: np.dtype[Any]) -> Any:
    """`x` in the dtype of an output."""
    if x.dtype == dtype:
        return x
    if dtype == np.float16 and x.dtype == np.float32:
        # NumPy takes 70 ns for what it rounds to a subnormal float16, to report the underflow: do that rounding here
        x = np.where(np.abs(x) < 2.0**-14, (x + 0.75) - 0.75, x)
    return cpu._narrow(x, None, np.empty(x.shape, dtype))

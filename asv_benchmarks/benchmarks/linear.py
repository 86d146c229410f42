"""Time and memory of the losses that begin with a linear layer, beside the bare matrix products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .common import DTYPES, LAYERS, Array, layer_arguments, layer_call, parse_shape, peak_growth

SHAPES = ["32x16x10", "512x512x32000", "2048x512x32000"]  # rows, width and classes, the smallest first


def products(inputs: Array, weight: Array) -> Callable[[], None]:
    """The three matrix products that no implementation can do without, into buffers that are reused."""
    logits = np.full((len(inputs), len(weight)), 1, inputs.dtype)
    d_inputs, d_weight = np.full_like(inputs, 1), np.full_like(weight, 1)

    def call() -> None:
        np.matmul(inputs, weight.T, out=logits)
        np.matmul(logits, weight, out=d_inputs)
        np.matmul(logits.T, inputs, out=d_weight)

    return call


class Layer:
    """One loss of one layer, its outputs reused."""

    params = (list(LAYERS), SHAPES, DTYPES, ["value", "grad"])
    param_names = ("loss", "shape", "dtype", "returns")
    timeout = 300

    def setup(self, loss: str, shape: str, dtype: str, returns: str) -> None:
        self.call = layer_call(loss, parse_shape(shape), dtype, returns)

    def time_layer(self, *_: str) -> None:
        self.call()


class LayerMemory:
    """Memory of one call beyond its arguments and outputs, which all exist before it."""

    params = (list(LAYERS), SHAPES, ["float32", "float16"], ["value", "grad"])
    param_names = Layer.param_names
    timeout = 300

    def setup(self, loss: str, shape: str, dtype: str, returns: str) -> None:
        layer_call(loss, (32, 16, 10), dtype, returns)()  # loads the code, which is not counted
        self.call = layer_call(loss, parse_shape(shape), dtype, returns)

    def track_extra_memory(self, *_: str) -> int:
        return peak_growth(self.call)

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]


class Products:
    """The floor of `Layer`."""

    params = (SHAPES,)
    param_names = ("shape",)

    def setup(self, shape: str) -> None:
        inputs, weight, _ = layer_arguments(parse_shape(shape))
        self.call = products(inputs, weight)

    def time_products(self, *_: str) -> None:
        self.call()

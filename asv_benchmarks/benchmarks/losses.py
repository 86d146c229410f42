"""Time and memory of every public loss."""

from __future__ import annotations

from .common import DTYPES, LOSSES, RETURNS, SHAPES, loss_call, make_logits, parse_shape, peak_growth


class Loss:
    """One loss on one array, its outputs reused."""

    params = (list(LOSSES), SHAPES, DTYPES, RETURNS)
    param_names = ("loss", "shape", "dtype", "returns")
    timeout = 120

    def setup(self, loss: str, shape: str, dtype: str, returns: str) -> None:
        self.call = loss_call(loss, make_logits(parse_shape(shape), dtype), returns)

    def time_loss(self, *_: str) -> None:
        self.call()


class Memory:
    """Memory of one call beyond its arguments and outputs, which all exist before it."""

    params = (list(LOSSES), ["32x10", "8192x1000", "256x128256"], ["float32", "float16"], RETURNS)
    param_names = Loss.param_names

    def setup(self, loss: str, shape: str, dtype: str, returns: str) -> None:
        loss_call(loss, make_logits((32, 10), dtype), returns)()  # loads the code, which is not counted
        self.call = loss_call(loss, make_logits(parse_shape(shape), dtype), returns)

    def track_extra_memory(self, *_: str) -> int:
        return peak_growth(self.call)

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]

    def peakmem_loss(self, *_: str) -> None:
        self.call()

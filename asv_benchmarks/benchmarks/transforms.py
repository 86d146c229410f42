"""Time of the public functions of logits that are not losses."""

from __future__ import annotations

from functools import partial

from .common import SHAPES, TRANSFORMS, make_logits, parse_shape, public


class Transform:
    """One function on one array; softmax and log_softmax write into a buffer that is reused."""

    params = (list(TRANSFORMS), SHAPES, ["float32", "float16"])
    param_names = ("function", "shape", "dtype")
    timeout = 120

    def setup(self, function: str, shape: str, dtype: str) -> None:
        logits = make_logits(parse_shape(shape), dtype)
        out = {"out": logits.copy()} if function.endswith("softmax") else {}
        self.call = partial(public(function), logits, *TRANSFORMS[function](logits), **out)

    def time_transform(self, *_: str) -> None:
        self.call()

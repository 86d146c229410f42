"""What engines share: which dtypes kernels read, which calls float32 is too narrow for, and the filling of buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xce._arrays import BFLOAT16
from xce._core import LIMITS_OF_FLOAT32
from xce._options import Numbers

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

# size in bytes, negative for a signed type
LABEL_KINDS = {
    np.dtype(f"{sign}int{8 * size}"): size * (1 if sign else -1) for sign in ("u", "") for size in (1, 2, 4, 8)
}
# the same of all numbers that the kernels of single elements read
NUMBER_KINDS = LABEL_KINDS | {np.dtype(bool): 17, np.dtype(np.float16): 18, FLOAT32: 20, FLOAT64: 24}
BFLOAT16_KIND = 19
_OF_ML_DTYPES = {"bfloat16": BFLOAT16_KIND, "int4": 21, "uint4": 22}  # the latter in a byte of their own
SWAPPED = 128  # is added for numbers whose bytes lie the other way round

FLOAT32_ABOVE, FLOAT32_BELOW, _STEEP_ABOVE = LIMITS_OF_FLOAT32
_PLAIN = Numbers()[1:]  # the options that are numbers, if nothing is asked for


def common_dtype(a: Any, b: Any) -> np.dtype[Any]:
    """The type that two arrays of logits are computed on in."""
    if a == b:
        return a  # type: ignore[no-any-return]
    return FLOAT64 if FLOAT64 in (a, b) else FLOAT32


def is_beyond(x: float) -> bool:
    """Whether float32 cannot hold a number, or its reciprocal, to full precision."""
    return 0 < abs(x) < np.inf and not FLOAT32_ABOVE < abs(x) < FLOAT32_BELOW


def number_kind(dtype: np.dtype[Any]) -> int:
    """A type of numbers, as the kernels know it."""
    kind = NUMBER_KINDS.get(dtype)
    if kind is None:
        own = dtype.newbyteorder("=")
        kind = NUMBER_KINDS.get(own) or (BFLOAT16_KIND if own == BFLOAT16 else _OF_ML_DTYPES.get(str(own)))
        if kind is None:
            raise TypeError(f"dtype {dtype} is unknown to the kernels: expected bool, integers or floats")
        kind += SWAPPED * (not dtype.isnative)
    return kind


def is_steep(call: Any) -> bool:
    """Whether a power of 1 - p multiplies its error by more than float32 takes.

    Up to a gamma of 10 the error of value and derivatives grows by 2.5 ulp a gamma, to 32 ulp. Beyond, 1 - p is in two
    parts and in float64: 16 ulp of the value and of the row's largest derivative (of their terms, with soft labels).
    """
    if call.op == "element":
        gammas = call.params[: {"sigmoid_focal_loss": 1, "asymmetric_loss": 2}.get(call.formula, 0)]
    else:
        gammas = (call.numbers.parameter,) if call.loss == "focal_loss" else ()
    return any(gamma > _STEEP_ABOVE for gamma in gammas)


def is_plain(call: Any) -> bool:
    """Whether a `Call` has default options and no weights."""
    return (
        call.numbers[1:] == _PLAIN
        and call.weight is call.sample_weight is None
        and not is_beyond(call.numbers.parameter)
        and not is_steep(call)
    )


def has_options_beyond(call: Any) -> bool:
    """Whether an option of a `Call` is beyond float32, or of its arithmetic."""
    return is_steep(call) or any(map(is_beyond, call.numbers))


def unbounded(call: Any) -> tuple[Any, ...]:
    """Return what the formula of single elements takes besides x that may be of any size, or None."""
    return call.pos_weight, call.target if call.formula == "soft_margin_loss" else None


def in_wider(
    call: Any,
    dtype: np.dtype[Any],
    run: Callable[[Any], Any],
    cast: Callable[[Any, np.dtype[Any]], Any],
    narrow: Callable[[Any, Any, Any], Any],
) -> Any:
    """A call with numbers that only a wider type holds; the results are rounded to what they would have been.

    `cast` returns an array in a floating type of the computation; ``narrow(x, logits, out)`` returns x (or None) in
    the type of the logits, in the buffer `out` if there is one.
    """
    logits = call.logits
    result = run(call._replace(logits=cast(logits, dtype), grad_out=None, hess_out=None))
    if call.op == "state":  # is for the host, which computes in float64
        return result
    if not isinstance(result, tuple):  # a map
        return narrow(result, logits, call.grad_out)
    loss, grad, hess = result
    own = FLOAT64 if logits.dtype == FLOAT64 else FLOAT32
    return cast(loss, own), narrow(grad, logits, call.grad_out), narrow(hess, logits, call.hess_out)


def fill(buffer: Any, x: Any) -> Any:
    """Write `x` into the caller's buffer, and return that; `x` itself if there is none."""
    if buffer is None:
        return x
    buffer[...] = x
    return buffer


def in_buffers(call: Any, result: Any) -> Any:
    """Return what a call without buffers has returned, in those of `call`."""
    if call.grad_out is None and call.hess_out is None:
        return result
    if not isinstance(result, tuple):  # a map
        return fill(call.grad_out, result)
    loss, grad, hess = result
    return loss, fill(call.grad_out, grad), fill(call.hess_out, hess)


def distinct(x: Any) -> Any:
    """Without the repetitions of axes whose stride is 0."""
    if not x.size or 0 not in x.strides:
        return x
    return x[..., *(slice(None) if stride else slice(0, 1) for stride in x.strides)]

"""What every benchmark shares: the tables of functions, shapes and dtypes, the arrays, and two meters."""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import xce

Array = np.ndarray[Any, Any]

SHAPES = ["32x10", "65536x10", "65536x100", "8192x1000", "512x32000", "256x128256"]  # the smallest first
DTYPES = ["float32", "float16", "bfloat16", "float64"]
RETURNS = ["value", "grad", "grad+hess"]


def class_labels(logits: Array) -> tuple[Array]:
    """One class index for each row, the last axis being that of the classes."""
    return (np.random.default_rng(1).integers(0, logits.shape[-1], logits.shape[:-1]),)


def no_target(_logits: Array) -> tuple[()]:
    """The function takes the logits alone."""
    return ()


def layer_arguments(shape: tuple[int, ...], dtype: str = "float32") -> tuple[Array, Array, Array]:
    """Inputs, weights and class labels of a linear layer; `shape` is (rows, width, classes)."""
    rows, width, classes = shape
    weight = np.random.default_rng(4).standard_normal((classes, width), np.float32) / np.float32(width**0.5)
    labels = np.random.default_rng(1).integers(0, classes, rows)
    return make_logits((rows, width), dtype), weight.astype(numpy_dtype(dtype), copy=False), labels


# name -> what makes the arrays of a loss that begins with a layer
LAYERS: dict[str, Callable[..., tuple[Array, ...]]] = {"linear_cross_entropy": layer_arguments}

# name -> what makes the arguments after the logits. Losses come by themselves: they return gradients, of class labels.
LOSSES: dict[str, Callable[[Array], tuple[Array, ...]]] = {
    name: class_labels
    for name in xce.__all__
    if inspect.isfunction(getattr(xce, name))
    and "return_grad" in inspect.signature(getattr(xce, name)).parameters
    and name not in LAYERS
}
TRANSFORMS: dict[str, Callable[[Array], tuple[Array, ...]]] = {
    "softmax": no_target,
    "log_softmax": no_target,
    "logsumexp": no_target,
    "logit_stats": class_labels,
}


def public(name: str) -> Callable[..., Any]:
    """`xce.<name>`; asv skips the benchmark at a commit that has no such function yet."""
    function: Callable[..., Any] | None = getattr(xce, name, None)
    if function is None:
        raise NotImplementedError(f"xce.{name} does not exist at this commit")
    return function


def parse_shape(shape: str) -> tuple[int, ...]:
    """`"8192x1000"` as `(8192, 1000)`."""
    return tuple(int(size) for size in shape.split("x"))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; `NotImplementedError` (asv: skip) for bfloat16 without ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise NotImplementedError("bfloat16 needs ml_dtypes") from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def make_logits(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Standard normal logits, the same ones in every run and in every dtype."""
    logits: Array = np.random.default_rng(0).standard_normal(shape, np.float32)
    return logits.astype(numpy_dtype(dtype), copy=False)


def loss_call(loss: str, logits: Array, returns: str) -> Callable[..., Any]:
    """A call of a public loss whose outputs are buffers made, and touched, here and reused by every call."""
    options: dict[str, Any] = {}
    if "grad" in returns:
        options |= {"return_grad": True, "grad_out": np.full_like(logits, 1)}
    if "hess" in returns:
        options |= {"return_hess": True, "hess_out": np.full_like(logits, 1)}
    return partial(public(loss), logits, *LOSSES[loss](logits), **options)


def layer_call(loss: str, shape: tuple[int, ...], dtype: str, returns: str) -> Callable[..., Any]:
    """A call of a loss that begins with a layer, into buffers made, and touched, here."""
    inputs, weight, labels = LAYERS[loss](shape, dtype)
    options: dict[str, Any] = {}
    if "grad" in returns:
        options = {"return_grad": True, "grad_out": (np.full_like(inputs, 1), np.full_like(weight, 1), None)}
    return partial(public(loss), inputs, weight, labels, **options)


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which this process grows, at its peak, while `call` runs. Linux; right to about 0.25 MiB."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept by malloc would hide what `call` takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size again
    except (OSError, AttributeError):
        raise NotImplementedError("needs Linux and glibc, to reset the memory peak") from None
    before = peak()
    call()
    return peak() - before


def import_seconds(repeat: int = 5) -> float:
    """Seconds that `import xce` adds to NumPy's own import; the best of several fresh interpreters."""
    code = "import numpy, time; t = time.perf_counter(); import xce; print(time.perf_counter() - t)"
    command = [sys.executable, "-P", "-c", code]  # -P: the installed package, wherever this is run from
    return min(float(subprocess.check_output(command)) for _ in range(repeat))

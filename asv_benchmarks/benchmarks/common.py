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


def of_classes(logits: Array) -> tuple[Array, Array]:
    """Logits, and the label of each row."""
    return logits, *class_labels(logits)


def log_probs(logits: Array) -> Array:
    """Their log-softmax."""
    result: Array = xce.log_softmax(logits)
    return result


def probs(logits: Array) -> Array:
    """One probability for each logit."""
    return (1 / (1 + np.exp(-logits.astype(np.float32)))).astype(logits.dtype)


def normal(logits: Array) -> Array:
    """Other numbers of the same kind."""
    return np.random.default_rng(1).standard_normal(logits.shape, np.float32).astype(logits.dtype)


def labels(logits: Array) -> Array:
    """0 or 1 for each logit, in its dtype, as most data come."""
    return (np.random.default_rng(1).random(logits.shape, np.float32) < 0.3).astype(logits.dtype)


def of_labels(logits: Array) -> tuple[Array, Array]:
    """Logits, and a label for each of them."""
    return logits, labels(logits)


# name -> what makes the first two arguments from logits. Losses come by themselves, and those not named here have the
# labels of classes: a loss of other things fails the test that runs every benchmark.
LOSSES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    name: of_classes
    for name in xce.__all__
    if inspect.isfunction(getattr(xce, name))
    and "return_grad" in inspect.signature(getattr(xce, name)).parameters
    and name not in LAYERS
} | {
    "nll_loss": lambda logits: (log_probs(logits), *class_labels(logits)),
    "distillation_loss": lambda logits: (logits, normal(logits)),
    "binary_cross_entropy": lambda logits: (probs(logits), labels(logits)),
    "binary_cross_entropy_with_logits": of_labels,
    "sigmoid_focal_loss": of_labels,
    "asymmetric_loss": of_labels,
    "soft_margin_loss": lambda logits: (logits, 2 * labels(logits) - 1),
    "multilabel_soft_margin_loss": of_labels,
    "kl_div": lambda logits: (log_probs(logits), np.exp(log_probs(normal(logits)))),
}
TRANSFORMS: dict[str, Callable[[Array], tuple[Array, ...]]] = {
    "softmax": no_target,
    "log_softmax": no_target,
    "logsumexp": no_target,
    "logit_stats": class_labels,
    "perplexity": class_labels,
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
    function, (x, target) = public(loss), LOSSES[loss](logits)
    options: dict[str, Any] = {}
    if "grad" in returns:
        options |= {"return_grad": True, "grad_out": np.full_like(x, 1)}
    if "hess" in returns:
        options |= {"return_hess": True, "hess_out": np.full_like(x, 1)}
    return partial(function, x, target, **options)


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

"""What computes on the views of tensors and JAX arrays: the kernels of NumPy for those on the CPU, of CuPy on a GPU."""

from __future__ import annotations

from typing import Any

from xce._dispatch import owner_of

__all__ = ["run", "run_linear", "scan_labels", "scan_values"]


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return owner_of(call.logits, "logits").run(call)


def run_linear(call: Any) -> Any:
    """Compute a `LinearCall`."""
    return owner_of(call.inputs, "inputs").run_linear(call)


def scan_labels(target: Any, n_classes: int, ignore_index: int) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1."""
    return owner_of(target, "target").scan_labels(target, n_classes, ignore_index)  # type: ignore[no-any-return]


def scan_values(values: Any, low: float, high: float | None) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1."""
    return owner_of(values, "values").scan_values(values, low, high)  # type: ignore[no-any-return]

"""What computes on the views of tensors and JAX arrays: the kernels of NumPy for those on the CPU, of CuPy on a GPU."""

from __future__ import annotations

from typing import Any

from xce._dispatch import owner_of

__all__ = ["classes_left", "run", "run_linear", "scan_labels", "scan_repetitions", "scan_values"]


def run(call: Any) -> Any:
    """Compute a `Call` or an `ElementCall`."""
    return owner_of(call.logits, "logits").run(call)


def run_linear(call: Any) -> Any:
    """Compute a `LinearCall`."""
    return owner_of(call.inputs, "inputs").run_linear(call)


def scan_labels(target: Any, n_classes: int, ignore_index: int, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

    Labels that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    return owner_of(target, "target").scan_labels(target, n_classes, ignore_index, weights)  # type: ignore[no-any-return]


def scan_values(values: Any, low: float, high: float | None, weights: tuple[Any, ...] = ()) -> int:
    """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

    Entries that one of the weights, arrays of the same shape, is 0 for are left out.
    """
    return owner_of(values, "values").scan_values(values, low, high, weights)  # type: ignore[no-any-return]


def scan_repetitions(indices: Any, n_classes: int, weights: tuple[Any, ...]) -> tuple[int, int]:
    """Return the flat number of the first row with a class twice, and the smallest such class; or -1 and -1.

    The places of a row are on the last axis. Rows that one of the weights, of the rows' shape, is 0 for are left out.
    """
    return owner_of(indices, "teacher_indices").scan_repetitions(indices, n_classes, weights)  # type: ignore[no-any-return]


def classes_left(where: Any, axis: int) -> Any:
    """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""
    return owner_of(where, "where").classes_left(where, axis)

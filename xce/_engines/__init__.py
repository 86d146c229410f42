"""What computes: the kernels of a CPU, those of a GPU, or the reference."""

from __future__ import annotations

from typing import Any, Protocol

from xce._arrays import Array


class Engine(Protocol):
    """What computes on arrays, in the kind that its library sees them as; a module of this package."""

    @property
    def HAS_KERNELS(self) -> bool:  # noqa: N802
        """Whether it is fast, and as exact as is promised; the reference is neither."""

    def scan_labels(self, target: Array, n_classes: int, ignore_index: int, weights: tuple[Array, ...] = ()) -> int:
        """Return the flat C-order index of the first label outside 0..n_classes-1 that is not ignored, or -1.

        Labels that one of the weights, arrays of the same shape, is 0 for are left out.
        """

    def scan_values(self, values: Array, low: float, high: float | None, weights: tuple[Array, ...] = ()) -> int:
        """Return the flat C-order index of the first entry outside low..high (None: infinite), or NaN; or -1.

        Entries that one of the weights, arrays of the same shape, is 0 for are left out.
        """

    def scan_repetitions(self, indices: Array, n_classes: int, weights: tuple[Array, ...]) -> tuple[int, int]:
        """Return the flat number of the first row with a class twice, and the smallest such class; or -1 and -1.

        The places of a row are on the last axis. Rows that one of the weights, of the rows' shape, is 0 for are left
        out.
        """

    def classes_left(self, where: Array, axis: int) -> Array:
        """Return an array of the rows' shape, 0 for rows that `where` leaves without a class."""

    def to_numpy(self, x: Array) -> Any:
        """Return the numbers of an array on the host."""

    def from_numpy(self, x: Any, like: Array) -> Array:
        """Return an array of the host where `like` is."""

    def run(self, call: Any) -> Any:
        """Compute a `Call` or an `ElementCall`: loss, gradient and Hessian diagonal, or what its op asks for."""

    def run_linear(self, call: Any) -> Any:
        """Compute a `LinearCall`: the loss, and the gradients or None."""

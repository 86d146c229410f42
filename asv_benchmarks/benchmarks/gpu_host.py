"""What a call costs Python where a GPU computes, on a device that does nothing: no GPU is needed."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

import xce
from xce._engines import cuda, scan
from xce._libraries import numpy as library

CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean and gradient": {"return_grad": True},
    "unchecked mean": {"validate": False},
    "unchecked mean and gradient": {"validate": False, "return_grad": True},
    "unchecked, of each row": {"validate": False, "reduction": "none"},
}


class Nothing:
    """A `Device` whose kernels do nothing."""

    memory_bytes, shared_bytes, has_clusters, processors, sum_blocks, sum_threads = (
        1 << 37,
        1 << 16,
        True,
        132,
        256,
        256,
    )

    def __init__(self) -> None:
        self.plans: dict[Any, Any] = {}
        self.all_is_well = np.full(1, np.iinfo(np.int64).max)  # where the first bad entry is

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def pointer(self, x: Any) -> int:
        return id(x)

    def to_numpy(self, x: Any) -> Any:
        return self.all_is_well

    def gemm(self, product: Any) -> None:
        pass

    def load(self, module: Any, name: str) -> None:
        pass

    def launch(self, *_: Any) -> None:
        pass


def engine() -> Any:
    """The engine of that device, for arrays of NumPy."""
    device, found = Nothing(), ModuleType("engine")
    found.__dict__.update(
        HAS_KERNELS=True,
        scan_labels=lambda x, n, ignored, weights=(): cuda.scan_labels(x, n, ignored, weights, device),
        scan_values=lambda x, low, high, weights=(): cuda.scan_values(x, low, high, weights, device),
        scan_repetitions=scan.scan_repetitions,
        run=lambda call: cuda.run(call, device),
    )
    return found


class OneCall:
    """`cross_entropy` of 4096 rows with 32,000 classes."""

    param_names = ("call",)
    params = (tuple(CALLS),)

    def setup(self, call: str) -> None:
        """Let the device compute on arrays of NumPy, and one call find out what there is to do."""
        of_nothing = engine()
        self.redirected = mock.patch.object(library, "engine", return_value=of_nothing)
        self.redirected.start()
        self.logits, self.labels = np.zeros((4096, 32000), np.float32), np.zeros(4096, int)
        self.time_one_call(call)

    def teardown(self, call: str) -> None:
        """Let the CPU compute on them again."""
        self.redirected.stop()

    def time_one_call(self, call: str) -> None:
        """The Python of a call."""
        xce.cross_entropy(self.logits, self.labels, **CALLS[call])


if __name__ == "__main__":
    from timeit import repeat

    for name in CALLS:
        one = OneCall()
        one.setup(name)
        print(f"{name}: {1e3 * min(repeat(lambda: one.time_one_call(name), number=1000, repeat=7)):.1f} us")  # noqa: B023
        one.teardown(name)

"""What the kernels of a GPU need of one: `cupy` has that of CuPy, the tests one that the CPU plays."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Module(NamedTuple):
    """One compilation: the text of the kernels with these definitions."""

    storage: str
    files: tuple[str, ...]
    definitions: tuple[tuple[str, str], ...] = ()


class Product(NamedTuple):
    """C = alpha A B + beta C as BLAS has it: columns lie side by side, from one to the next it is `ld` entries.

    C is m by n, A is m by k, B is k by n; a transposed one lies there as its transpose. With beta = 0, C is not read.
    """

    transpose_a: bool
    transpose_b: bool
    m: int
    n: int
    k: int
    alpha: float
    a: int  # addresses
    lda: int
    b: int
    ldb: int
    beta: float
    c: int
    ldc: int
    dtype: Any  # of A and B
    out_dtype: Any  # of C: that, or float32 for 16-bit A and B; sums are of float32 then, too


class Device(Protocol):
    """Memory, and kernels that run on it."""

    memory_bytes: int
    shared_bytes: int  # of a block at most
    has_clusters: bool
    processors: int
    sum_blocks: int  # that share a sum, and their threads: fixed, as they decide on its order
    sum_threads: int
    plans: dict[Any, Any]  # see `plans`

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def pointer(self, x: Any) -> int: ...
    def to_numpy(self, x: Any) -> Any: ...
    def gemm(self, product: Product) -> None: ...
    def load(self, module: Module, name: str) -> Any: ...  # a kernel, as `launch` takes it
    def launch(self, kernel: Any, grid: int, block: tuple[int, int], shared: int, job: Any) -> None: ...

"""Who runs in the race: xce, the peers, and the floors (reading, copying and writing memory).

A peer is one small class. `take` turns NumPy arrays into the peer's own, outside the timed region; `value`
and `value_and_grad` are what is timed: the mean over the rows, and its gradient. A peer that accepts buffers
for its outputs reuses them; PyTorch, JAX and SciPy accept none, and allocate: from 30 MB a gradient on, page
faults are half of their time and vary with the state of the allocator, so read their best, not their median.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from measure import Array, Call

import xce


class Peer(Protocol):
    """What the race needs of a contender."""

    name: str

    def take(self, x: Array, y: Array, /) -> tuple[Any, Any]: ...
    def value(self, x: Any, y: Any, /) -> Any: ...
    def value_and_grad(self, x: Any, y: Any, /) -> tuple[Any, Any]: ...


class Xce:
    """Its threads are set by the caller, for as long as the race runs."""

    name = "xce"

    def __init__(self) -> None:
        self.value: Callable[[Any, Any], Any] = xce.cross_entropy

    def take(self, x: Array, y: Array) -> tuple[Array, Array]:
        self.grad, self.hess = np.full_like(x, 1), np.full_like(x, 1)
        return x, y

    def value_and_grad(self, x: Array, y: Array) -> Any:
        return xce.cross_entropy(x, y, return_grad=True, grad_out=self.grad)

    def value_grad_and_hess(self, x: Array, y: Array) -> Any:
        buffers: Any = {"grad_out": self.grad, "hess_out": self.hess}
        return xce.cross_entropy(x, y, return_grad=True, return_hess=True, **buffers)


class TorchEager:
    name = "PyTorch eager"

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.value: Callable[[Any, Any], Any] = torch.nn.functional.cross_entropy

    def take(self, x: Array, y: Array) -> tuple[Any, Any]:
        labels = self.torch.from_numpy(y)
        if x.dtype.name == "bfloat16":
            return self.torch.from_numpy(x.view(np.uint16)).view(self.torch.bfloat16), labels
        return self.torch.from_numpy(x), labels

    def value_and_grad(self, x: Any, y: Any) -> tuple[Any, Any]:
        leaf = x.detach().requires_grad_()
        loss = self.value(leaf, y)
        return loss, self.torch.autograd.grad(loss, leaf)[0]


class XceTorch(TorchEager):
    """What a user of PyTorch calls instead, its autograd included."""

    name = "xce.torch"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        from xce.torch import cross_entropy

        self.value = cross_entropy


class TorchCompiled(TorchEager):
    name = "PyTorch compiled"

    def take(self, x: Array, y: Array) -> tuple[Any, Any]:
        self.torch.compiler.reset()  # else the ninth shape would quietly run eagerly
        self.value = self.torch.compile(self.torch.nn.functional.cross_entropy, dynamic=False)
        return super().take(x, y)


class JaxOptax:
    name = "JAX + optax (jit)"

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("PJRT_NPROC", str(threads))  # the size of XLA's thread pool, read at its start
        import jax
        import optax

        def loss(x: Any, y: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

        self.jax: Any = jax
        self._value, self._value_and_grad = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

    def take(self, x: Array, y: Array) -> tuple[Any, Any]:
        self.jax.config.update("jax_enable_x64", x.dtype == np.float64)
        return self.jax.numpy.asarray(x), self.jax.numpy.asarray(y.astype(np.int32))

    def value(self, x: Any, y: Any) -> Any:
        return self._value(x, y).block_until_ready()

    def value_and_grad(self, x: Any, y: Any) -> tuple[Any, Any]:
        loss, grad = self._value_and_grad(x, y)
        return loss.block_until_ready(), grad.block_until_ready()


class ScikitLearn:
    """The private loss of its linear models and boosting; a sample weight of 1/n makes the sum a mean."""

    name = "scikit-learn _loss"

    def __init__(self, threads: int) -> None:
        from sklearn._loss import HalfMultinomialLoss

        self.multinomial, self.threads = HalfMultinomialLoss, threads

    def take(self, x: Array, y: Array) -> tuple[Array, Array]:
        self.loss = self.multinomial(n_classes=x.shape[1])
        self.weight = np.full(len(x), 1 / len(x), x.dtype)
        self.rows, self.grad = np.full_like(self.weight, 1), np.full_like(x, 1)
        return x, y.astype(x.dtype)

    def value(self, x: Array, y: Array) -> Any:
        return self.loss.loss(y, x, self.weight, loss_out=self.rows, n_threads=self.threads).sum()

    def value_and_grad(self, x: Array, y: Array) -> tuple[Any, Array]:
        rows, grad = self.loss.loss_gradient(y, x, self.weight, self.rows, self.grad, n_threads=self.threads)
        return rows.sum(), grad


class Scipy:
    """It has one thread, whatever is asked for."""

    name = "SciPy log_softmax + gather"

    def __init__(self, _threads: int) -> None:
        from scipy.special import log_softmax

        self.log_softmax = log_softmax

    def take(self, x: Array, y: Array) -> tuple[Array, Array]:
        self.row = np.arange(len(x))
        return x, y

    def value(self, x: Array, y: Array) -> Any:
        return -self.log_softmax(x, axis=1)[self.row, y].mean()

    def value_and_grad(self, x: Array, y: Array) -> tuple[Any, Array]:
        u = self.log_softmax(x, axis=1)
        loss = -u[self.row, y].mean()
        grad = np.exp(u, out=u)
        grad[self.row, y] -= 1
        grad /= len(x)
        return loss, grad


PEERS: tuple[Callable[[int], Peer], ...] = (XceTorch, TorchEager, TorchCompiled, JaxOptax, ScikitLearn, Scipy)


# Floors. On the machine of the README's tables torch is the fastest (8192x1000: sum 0.24 ms and copy 1.29 ms, against
# 0.70 and 1.52 for NumPy in two threads). NumPy serves where torch is missing or slower: both race, and the
# faster one counts.


def read_floors(x: Array, threads: int) -> dict[str, Call]:
    """Ways to sum an array; of a 16-bit one the same bytes as integers, which need no conversion."""
    flat = x.reshape(-1)
    if x.itemsize == 2:
        flat = flat[: x.size // 4 * 4].view(np.int64)
    calls = {"read (np.sum in threads)": _in_threads(threads, np.sum, flat)}
    if torch := torch_of(threads):
        tensor = torch.from_numpy(flat)
        calls["read (torch.sum)"] = lambda: torch.sum(tensor)
    return calls


def copy_floors(x: Array, threads: int) -> dict[str, Call]:
    """Ways to copy an array into a buffer that is reused."""
    source, buffer = _bytes(x), np.full_like(_bytes(x), 1)
    calls = {"copy (np.copyto in threads)": _in_threads(threads, np.copyto, buffer, source)}
    if torch := torch_of(threads):
        tensor, into = torch.from_numpy(source), torch.from_numpy(buffer)
        calls["copy (torch copy_)"] = lambda: into.copy_(tensor)
    return calls


def write_floors(x: Array, threads: int) -> dict[str, Call]:
    """Ways to fill a buffer of the array's size."""
    buffer = np.full_like(_bytes(x), 1)
    calls = {"write (np.copyto in threads)": _in_threads(threads, lambda part: np.copyto(part, 0), buffer)}
    if torch := torch_of(threads):
        into = torch.from_numpy(buffer)
        calls["write (torch fill_)"] = lambda: into.fill_(0)
    return calls


def _bytes(x: Array) -> Array:
    """The array as a flat one of integers, which every library can copy."""
    return x.reshape(-1).view({2: np.int16, 4: np.int32, 8: np.int64}[x.itemsize])


def torch_of(threads: int) -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch


def _in_threads(threads: int, function: Callable[..., Any], *arrays: Array) -> Call:
    """`function` on equal chunks of flat arrays, the first chunk in the calling thread."""
    first, *others = zip(*(np.array_split(array, threads) for array in arrays), strict=True)
    pool = ThreadPoolExecutor(max(threads - 1, 1))

    def call() -> None:
        running = [pool.submit(function, *chunk) for chunk in others]
        function(*first)
        for chunk in running:
            chunk.result()

    return call

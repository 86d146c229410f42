"""Who runs on a GPU: xce, PyTorch, and the kernels of others for PyTorch, each a small class.

`calls` makes what is timed, a call for each set of arrays; it raises `NotImplementedError` for what a library has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from benchmarks.common import numpy_dtype
from gpu_machine import Inputs, Task

import xce

Call = Callable[[], tuple[Any, Any]]  # to a value and its gradient, or None


class Contender(Protocol):
    """Calls of one library, one for each set of arrays; `NotImplementedError` for what it has not."""

    name: str
    library: str

    def calls(self, task: Task, what: str, sets: Sequence[Inputs]) -> list[Call]: ...
    def answer(self, call: Call) -> tuple[Any, Any]: ...


class Xce:
    name = "xce"
    library = "cupy"

    def calls(self, task: Task, what: str, sets: Sequence[Inputs]) -> list[Call]:
        function, options = getattr(xce, task.loss), dict(task.options)
        options |= {} if task.is_of_elements else {"axis": task.axis}
        options |= {"validate": "checked" in what, "reduction": "none" if "none" in what else "mean"}

        def call(x: Any, y: Any, grad: Any) -> Call:
            if what.startswith("value"):
                return lambda: (function(x, y, **options), None)
            out = x if "in place" in what else grad
            return lambda: function(x, y, return_grad=True, grad_out=out, **options)

        return [call(*arrays) for arrays in sets]

    def answer(self, call: Call) -> tuple[Any, Any]:
        value, grad = call()
        return value.astype(np.float64).mean(), grad


class Torch:
    """Arrays are shared with CuPy, not copied."""

    name = "PyTorch eager"
    library = "torch"

    def __init__(self, xp: Any) -> None:
        import torch

        self.torch, self.xp = torch, xp

    def function(self, task: Task, reduction: str = "mean") -> Callable[[Any, Any], Any]:
        functional, options = self.torch.nn.functional, dict(task.options) | {"reduction": reduction}
        if task.is_of_elements:
            return lambda x, y: functional.binary_cross_entropy_with_logits(x, y, reduction=reduction)
        if "gamma" in options:

            def focal(x: Any, y: Any) -> Any:
                u = -functional.cross_entropy(x.float(), y, reduction="none")
                rows = -((-u.expm1()) ** options["gamma"]) * u
                return rows if reduction == "none" else rows.mean()

            return focal
        return lambda x, y: functional.cross_entropy(x, y, **options)

    def calls(self, task: Task, what: str, sets: Sequence[Inputs]) -> list[Call]:
        if what not in ("value", "gradient", "value, none", "gradient, none"):
            raise NotImplementedError
        function = self.function(task, "none" if "none" in what else "mean")
        return [self.call(function, what, self.tensor(s.x), self.tensor(s.y)) for s in sets]

    def call(self, function: Callable[[Any, Any], Any], what: str, x: Any, y: Any) -> Call:
        def value() -> tuple[Any, Any]:
            with self.torch.no_grad():
                return function(x, y), None

        def gradient() -> tuple[Any, Any]:
            leaf = x.detach().requires_grad_()
            loss = function(leaf, y)
            return loss.detach(), self.torch.autograd.grad(loss, leaf, self.torch.ones_like(loss))[0]

        return value if what.startswith("value") else gradient

    def tensor(self, x: Any) -> Any:
        """An array as a tensor; of 16 bits as integers, which DLPack knows in every version."""
        if x.dtype.itemsize != 2:
            return self.torch.from_dlpack(x)
        dtype = self.torch.float16 if x.dtype == np.float16 else self.torch.bfloat16
        return self.torch.from_dlpack(x.view(np.int16)).view(dtype)

    def array(self, x: Any) -> Any:
        x = x.detach().contiguous()
        if x.element_size() != 2:
            return self.xp.from_dlpack(x)
        dtype = np.dtype("float16") if x.dtype == self.torch.float16 else numpy_dtype("bfloat16")
        return self.xp.from_dlpack(x.view(self.torch.int16)).view(dtype)

    def answer(self, call: Call) -> tuple[Any, Any]:
        value, grad = call()
        return float(value.double().mean()), None if grad is None else self.array(grad)


class TorchCompiled(Torch):
    name = "torch.compile"

    def function(self, task: Task, reduction: str = "mean") -> Callable[[Any, Any], Any]:
        self.torch.compiler.reset()  # else the ninth shape would quietly run eagerly
        return self.torch.compile(super().function(task, reduction), dynamic=False)


class Liger(Torch):
    """It computes the gradient with the value, into the logits."""

    name = "Liger"

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        from liger_kernel.transformers import LigerCrossEntropyLoss

        self.loss = LigerCrossEntropyLoss

    def calls(self, task: Task, what: str, sets: Sequence[Inputs]) -> list[Call]:
        if task.loss != "cross_entropy" or task.axis != -1 or what != "gradient in place":
            raise NotImplementedError
        function = self.loss(**dict(task.options))
        return [self.call(function, "gradient", self.tensor(s.x), self.tensor(s.y)) for s in sets]


class Quack(Torch):
    name = "quack"

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        from quack.cross_entropy import cross_entropy

        self.loss = cross_entropy

    def function(self, task: Task, reduction: str = "mean") -> Callable[[Any, Any], Any]:
        if task.loss != "cross_entropy" or task.axis != -1 or task.options:
            raise NotImplementedError
        return partial(self.loss, reduction=reduction)

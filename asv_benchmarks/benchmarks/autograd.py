"""Time of small calls through the autograd of PyTorch, where what is around the kernels is most of it."""

from __future__ import annotations

from .common import class_labels, labels, make_logits, parse_shape


class Autograd:
    """One loss of `xce.torch`, without and with its backward pass."""

    params = (["cross_entropy", "binary_cross_entropy_with_logits"], ["32x10", "256x100"])
    param_names = ("loss", "shape")

    def setup(self, loss: str, shape: str) -> None:
        try:
            import torch

            import xce.torch
        except ImportError:
            raise NotImplementedError("needs PyTorch") from None
        logits = make_logits(parse_shape(shape))
        target = class_labels(logits)[0] if loss == "cross_entropy" else labels(logits)
        self.loss, self.target = getattr(xce.torch, loss), torch.from_numpy(target)
        self.x = torch.from_numpy(logits)
        self.leaf = self.x.clone().requires_grad_()

    def time_value(self, *_: str) -> None:
        self.loss(self.x, self.target)

    def time_value_and_grad(self, *_: str) -> None:
        self.leaf.grad = None
        self.loss(self.leaf, self.target).backward()

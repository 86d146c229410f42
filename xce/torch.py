"""The losses of `torch.nn.functional` and `torch.nn`, computed by xce: the same names, arguments and results.

``from xce.torch import CrossEntropyLoss`` is the whole migration. A call goes one of two ways:

- to the kernels of xce, if `_value_dtype` has an answer: tensors of one floating dtype on the CPU or, where CuPy is
  installed, on one CUDA device, and nothing but autograd that follows the computation (no compiler, no transform of
  `torch.func`, no mode, no subclass);
- to PyTorch itself otherwise, and when xce refuses the arguments: PyTorch may take them (negative weights, targets
  that broadcast), or it has its own error for them. Only a label out of range is `xce.LabelError`, which names it.

The gradient is computed along with the value, and only if autograd is going to ask for it; second derivatives are
PyTorch's. Numbers differ where PyTorch rounds more (here, 16-bit input is computed in float32 and rounded once), has 0
for the loss of a confident row, or has NaN for 0 times infinity. `torch.set_num_threads` counts.

On a CUDA device nothing waits for the GPU, and so nobody looks at the data: a label out of range makes the loss and the
gradient of its row NaN, and the mean with them (PyTorch stops the program, and the device is lost to it); weights and
probabilities are taken as they are. `torch.cuda.graph` captures a call like any other, after one call that is not
captured, which compiles the kernels.

With ``XCE_TORCH_FALLBACK=0`` in the environment when this module is imported, nothing goes to PyTorch unnoticed: a call
that the kernels cannot take is a `RuntimeError`, and what xce refuses is its own error. Second derivatives are still
PyTorch's.

Examples
--------
>>> import torch
>>> from xce.torch import CrossEntropyLoss
>>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
>>> loss = CrossEntropyLoss()(logits, torch.tensor([0, 2]))
>>> loss.backward()
>>> print(f"{loss.item():.6f}", logits.grad[1])
0.753109 tensor([ 0.1667,  0.1667, -0.3333])
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.nn._reduction import legacy_get_string
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import xce
from xce._arrays import dtype_name
from xce._checks import FLOATS
from xce._libraries import torch as library
from xce._options import Reduction

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "MultiLabelSoftMarginLoss",
    "NLLLoss",
    "SoftMarginLoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "soft_margin_loss",
]

_fallback = os.environ.get("XCE_TORCH_FALLBACK") or "1"
if _fallback not in ("0", "1"):
    raise ImportError(f"XCE_TORCH_FALLBACK={_fallback!r} is not allowed: expected 0 or 1")
_falls_back = _fallback == "1"

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_LABELS = {torch.int64, torch.uint8}
_OPTIONAL = {"weight", "pos_weight", "linear_bias"}

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by a transform of `torch.func`, which may be over

_Tensors = dict[str, Any]  # by the name of the argument; None where none is given


class _Loss(NamedTuple):
    """A loss, by xce and by PyTorch, and what tells it from the others."""

    ours: Callable[..., Any]
    theirs: Callable[..., Tensor]
    class_axis: int | None = None  # of an input with more than one axis; None: every element has a loss
    has_labels: bool = False  # the target may be class indices
    is_autocast: bool = True  # under autocast PyTorch computes it in float32
    by: tuple[str, ...] = ("input",)  # the arguments by which xce differentiates

    def axis(self, x: Tensor) -> int | None:
        """Return the class axis of an input."""
        return -1 if self.class_axis and x.ndim == 1 else self.class_axis


def _cross_entropy(logits: Any, **given: Any) -> Any:
    """Refuse what PyTorch refuses, and xce does not."""
    if given["ignore_index"] >= 0 and dtype_name(given["target"].dtype) in FLOATS:
        raise ValueError("probabilities with a class to ignore")
    return xce.cross_entropy(logits, **given)


def _kl_div(input: Tensor, target: Tensor, *, reduction: str, log_target: bool) -> Tensor:
    """PyTorch's, without the warning: `kl_div` has given it."""
    if reduction == "mean":
        return F.kl_div(input, target, reduction="none", log_target=log_target).mean()
    return F.kl_div(input, target, reduction=reduction, log_target=log_target)


_LOSSES = {
    "cross_entropy": _Loss(_cross_entropy, F.cross_entropy, class_axis=1, has_labels=True),
    "nll_loss": _Loss(xce.nll_loss, F.nll_loss, class_axis=1, has_labels=True),
    "binary_cross_entropy": _Loss(xce.binary_cross_entropy, F.binary_cross_entropy),
    "binary_cross_entropy_with_logits": _Loss(xce.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
    "kl_div": _Loss(xce.kl_div, _kl_div),
    "soft_margin_loss": _Loss(xce.soft_margin_loss, F.soft_margin_loss),
    "multilabel_soft_margin_loss": _Loss(
        xce.multilabel_soft_margin_loss, F.multilabel_soft_margin_loss, class_axis=-1, is_autocast=False
    ),
}


# Who computes


def _compute(
    name: str,
    tensors: _Tensors,
    reduction: str,
    size_average: bool | None = None,
    reduce: bool | None = None,
    **options: Any,
) -> Tensor:
    """Return a loss, computed by xce if it can be."""
    loss = _LOSSES[name]
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    options["reduction"] = reduction
    dtype = _value_dtype(loss, tensors)
    if dtype is not None:
        try:
            return _by_xce(loss, tensors, options, dtype)
        except xce.LabelError:
            raise
        except (TypeError, ValueError):
            if not _falls_back:
                raise
    else:
        _to_pytorch(name)
    return loss.theirs(**tensors, **options)


def _to_pytorch(name: str) -> None:
    """Refuse to let PyTorch compute, where nobody would notice and somebody wants to."""
    if not _falls_back:
        raise RuntimeError(
            f"the kernels of xce cannot take this call of {name}, and XCE_TORCH_FALLBACK=0 keeps it from PyTorch"
        )


def _value_dtype(loss: _Loss, tensors: _Tensors) -> torch.dtype | None:
    """Return the dtype of the loss if the kernels of xce can take the call, or None."""
    if _is_followed():
        return None
    first, target, dtypes, device = tensors["input"], tensors["target"], set(), None
    is_grad_enabled = torch.is_grad_enabled()
    for name, x in tensors.items():
        if x is None and name in _OPTIONAL:
            continue
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return None
        if device is None:
            device = x.device
        elif x.device != device:  # PyTorch refuses it, or takes a number on the CPU
            return None
        if is_grad_enabled and x.requires_grad and (name not in loss.by or _is_wrapped(x)):
            return None
        dtype = x.dtype
        if dtype in _FLOATS:
            if x is target and loss.has_labels and x.ndim != first.ndim:
                return None  # labels among floats: xce takes them, PyTorch refuses
            dtypes.add(dtype)
        elif not (x is target and loss.has_labels and dtype in _LABELS):
            return None
    if device is None or not (_has_cupy() if library.is_on_cuda(first) else first.is_cpu):
        return None
    if (
        _is_any_autocast_enabled()
        and loss.is_autocast
        and torch.is_autocast_enabled(device.type)
        and torch.float64 not in dtypes
    ):
        return torch.float32
    return dtypes.pop() if len(dtypes) == 1 else None  # of several, PyTorch promotes or refuses


@cache
def _has_cupy() -> bool:
    try:
        for name in ("xce._engines.cupy", "ml_dtypes"):
            import_module(name)
    except ImportError:
        return False
    return True


def _is_followed() -> bool:
    """Whether more than autograd follows the operations: a compiler, tracer, transform, mode or dual numbers."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._is_torch_function_mode_enabled() and _has_modes())
        or forward_ad._current_level >= 0
    )


def _has_modes() -> bool:
    """Whether there are modes other than that of `torch.set_default_device`, which is about new tensors only."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _by_xce(loss: _Loss, tensors: _Tensors, options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return a loss, computed by xce."""
    by = []
    if torch.is_grad_enabled():
        by = [name for name in loss.by if tensors[name] is not None and tensors[name].requires_grad]
    if not by:
        return _cast(_run(loss, tensors, options), dtype)
    values: list[Tensor] = []
    call = _Call(loss, options, dtype, tuple(tensors), by)
    gradients = _apply_gradients(call, values, *tensors.values())
    value: Tensor = _apply_value(call, values, gradients, *[tensors[name] for name in by])
    return value


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``, which takes its time even where nothing is to do."""
    return x if x.dtype is dtype else x.to(dtype)


def _run(loss: _Loss, tensors: _Tensors, options: dict[str, Any], *, return_grad: bool = False) -> Any:
    """Return what the function of xce returns."""
    x = tensors["input"]  # which has another name there
    is_on_cuda = library.is_on_cuda(x)
    if loss.class_axis is not None:
        options = options | {"axis": loss.axis(x)}
    tensors = {name: x.detach() if x is not None and x.requires_grad else x for name, x in tensors.items()}
    arrays = tensors if is_on_cuda else _arrays(tensors)
    result = loss.ours(
        arrays.pop("input"),
        **arrays,
        **options,
        return_grad=return_grad,
        n_threads=torch.get_num_threads(),
        validate=not is_on_cuda,  # looking at the data would make the CPU wait for the GPU
    )
    return result if arrays is tensors else _wrapped(result)


def _arrays(tensors: _Tensors) -> _Tensors:
    """Return tensors as arrays of NumPy, from which the way to the kernels is shortest, or themselves."""
    try:
        return {name: x if x is None else x.numpy() for name, x in tensors.items()}
    except (RuntimeError, TypeError):  # of bfloat16, or nothing that xce takes
        return tensors


def _wrapped(result: Any) -> Any:
    """Return arrays of NumPy, in tuples or alone, as tensors."""
    if type(result) is tuple:
        return tuple(map(_wrapped, result))
    return None if result is None else library.wrap(result)


# Autograd, in two nodes. `_Value` keeps the gradients and nothing else: the logits may be overwritten then, as with
# PyTorch. `_Gradients` keeps the tensors, and comes into play only if the gradients are differentiated in turn.


class _Call(NamedTuple):
    """A call without its tensors."""

    loss: _Loss
    options: dict[str, Any]
    dtype: torch.dtype  # of the value
    names: tuple[str, ...]  # of the tensors
    by: list[str]  # the names of those to differentiate by


class _Gradients(torch.autograd.Function):
    """The gradients, whose derivatives are taken from PyTorch; the value is added to a list."""

    @staticmethod
    def forward(ctx: Any, call: _Call, values: list[Tensor], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        named: _Tensors = dict(zip(call.names, tensors, strict=True))
        for name in call.loss.by:
            x = named[name]
            if x is not None and x.dtype == torch.float16:  # where small gradients underflow before any loss scale
                named[name] = x.float()
        value, gradients = _run(call.loss, named, call.options, return_grad=True)
        values.append(value)
        if not isinstance(gradients, tuple):
            return (gradients,)
        return tuple(g for name, g in zip(call.loss.by, gradients, strict=True) if name in call.by)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors: _Tensors = dict(zip(call.names, ctx.saved_tensors, strict=True))
        with torch.enable_grad():
            # views, so that no way leads from one to another: weights may be a function of the input, or be the input
            by = [tensors[name].view_as(tensors[name]) for name in call.by]
            tensors.update(zip(call.by, by, strict=True))
            cast = {
                name: x.to(call.dtype) if x is not None and x.dtype in _FLOATS else x for name, x in tensors.items()
            }
            value = call.loss.theirs(**cast, **call.options).sum()
            gradients = torch.autograd.grad(value, by, create_graph=True)
        pairs = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad and v is not None]
        products: Sequence[Tensor] = [torch.zeros_like(x) for x in by]
        if pairs:  # there is none if the loss is linear
            outputs, weights = zip(*pairs, strict=True)
            products = torch.autograd.grad(
                outputs, by, weights, create_graph=torch.is_grad_enabled(), materialize_grads=True
            )
        found = dict(zip(call.by, products, strict=True))
        return None, None, *(found.get(name) for name in call.names)


class _Value(torch.autograd.Function):
    """The value, given the gradients: its backward pass is a product at most."""

    @staticmethod
    def forward(ctx: Any, call: _Call, values: list[Tensor], gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.axis = call.loss.axis(inputs[0])
        ctx.save_for_backward(*gradients)
        return _cast(values.pop(), call.dtype)

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        if vector.ndim and ctx.axis is not None:
            vector = vector.unsqueeze(ctx.axis)
        return None, None, None, *(_product(vector, gradient) for gradient in ctx.saved_tensors)


# `Function.apply` without its ways for `torch.func`, which take as long as the rest of it: nothing of that is followed
_apply_gradients: Callable[..., Any] = super(torch.autograd.Function, _Gradients).apply
_apply_value: Callable[..., Any] = super(torch.autograd.Function, _Value).apply


def _product(vector: Tensor, gradient: Tensor) -> Tensor:
    """Return ``vector * gradient``, in the memory of the gradient if nobody is going to read it again."""
    if (
        torch.is_grad_enabled()
        or torch._C._autograd._get_current_graph_task_keep_graph()
        or torch._C._functorch.is_legacy_batchedtensor(vector)  # torch.autograd.grad(is_grads_batched=True)
        or _is_followed()
    ):
        return vector * gradient
    gradient = gradient.detach()
    if vector.ndim == 0:  # mostly 1: the loss is the root of the graph
        if library.is_on_cuda(vector):
            product: Tensor = library.scaled(gradient, vector.detach())
            return product
        if vector.item() == 1:
            return gradient
    return gradient.mul_(vector)


# Functions


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, computed by `xce.cross_entropy`."""
    return _compute(
        "cross_entropy",
        {"input": input, "target": target, "weight": weight},
        reduction,
        size_average,
        reduce,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.nll_loss`, computed by `xce.nll_loss`."""
    tensors = {"input": input, "target": target, "weight": weight}
    return _compute("nll_loss", tensors, reduction, size_average, reduce, ignore_index=ignore_index)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy`, computed by `xce.binary_cross_entropy`."""
    tensors = {"input": input, "target": target, "weight": weight}
    return _compute("binary_cross_entropy", tensors, reduction, size_average, reduce)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`, computed by `xce.binary_cross_entropy_with_logits`."""
    tensors = {"input": input, "target": target, "weight": weight, "pos_weight": pos_weight}
    return _compute("binary_cross_entropy_with_logits", tensors, reduction, size_average, reduce)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`torch.nn.functional.kl_div`, computed by `xce.kl_div`."""
    if reduction == "mean" and size_average is None and reduce is None:
        warnings.warn(
            "reduction='mean' divides by the number of elements; reduction='batchmean' divides by the size of the "
            "batch, which is the mean of the Kullback-Leibler divergences",
            stacklevel=2,
        )
    tensors = {"input": input, "target": target}
    return _compute("kl_div", tensors, reduction, size_average, reduce, log_target=log_target)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.soft_margin_loss`, computed by `xce.soft_margin_loss`."""
    return _compute("soft_margin_loss", {"input": input, "target": target}, reduction, size_average, reduce)


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.multilabel_soft_margin_loss`, computed by `xce.multilabel_soft_margin_loss`."""
    tensors = {"input": input, "target": target, "weight": weight}
    return _compute("multilabel_soft_margin_loss", tensors, reduction, size_average, reduce)


# Modules


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `xce.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(nn.NLLLoss):
    """`torch.nn.NLLLoss`, computed by `xce.nll_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class BCELoss(nn.BCELoss):
    """`torch.nn.BCELoss`, computed by `xce.binary_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss`, computed by `xce.binary_cross_entropy_with_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss`, computed by `xce.kl_div`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class SoftMarginLoss(nn.SoftMarginLoss):
    """`torch.nn.SoftMarginLoss`, computed by `xce.soft_margin_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return soft_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """`torch.nn.MultiLabelSoftMarginLoss`, computed by `xce.multilabel_soft_margin_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return multilabel_soft_margin_loss(input, target, self.weight, reduction=self.reduction)


# The linear layer and its loss in one, which is new in PyTorch


if hasattr(F, "linear_cross_entropy"):
    __all__ += ["LinearCrossEntropyLoss", "linear_cross_entropy"]

    def _linear_cross_entropy(
        inputs: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None,
        reduction: Reduction,
        ignore_index: int | None,
        return_grad: bool,
        **options: Any,
    ) -> Any:
        """Refuse what PyTorch refuses, and xce does not; and gradients of parameters by row."""
        if inputs.ndim > 2 or (dtype_name(target.dtype) in FLOATS and ignore_index is not None):
            raise ValueError("more axes, or probabilities with a class to ignore")
        if return_grad and reduction == "none":
            raise ValueError("a loss for each row, of parameters that all rows share")
        if return_grad and inputs.dtype == torch.bfloat16:  # sums over chunks of rows are rounded once
            parameters = linear_weight, linear_bias
            sums = (None if x is None else torch.empty(x.shape, device=x.device) for x in parameters)
            options["grad_out"] = (None, *sums)
        if ignore_index is not None:
            options["ignore_index"] = ignore_index
        return xce.linear_cross_entropy(
            inputs,
            linear_weight,
            target,
            linear_bias=linear_bias,
            reduction=reduction,
            return_grad=return_grad,
            **options,
        )

    _LOSSES["linear_cross_entropy"] = _Loss(
        _linear_cross_entropy,
        F.linear_cross_entropy,
        has_labels=True,
        by=("input", "linear_weight", "linear_bias"),
    )

    def linear_cross_entropy(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: nn.LinearCrossEntropyOptions | None = None,
    ) -> Tensor:
        """`torch.nn.functional.linear_cross_entropy`, computed by `xce.linear_cross_entropy`.

        `options`, which are about the chunks of PyTorch's own algorithm, are a reason to use that.
        """
        tensors = {
            "input": input,
            "linear_weight": linear_weight,
            "target": target,
            "linear_bias": linear_bias,
            "weight": weight,
        }
        others: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        if options is not None:
            _to_pytorch("linear_cross_entropy")
            theirs: Callable[..., Tensor] = F.linear_cross_entropy
            return theirs(**tensors, **others, options=options)
        return _compute("linear_cross_entropy", tensors, **others)

    class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
        """`torch.nn.LinearCrossEntropyLoss`, computed by `xce.linear_cross_entropy`."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            """Return the loss."""
            shape = self.num_classes, *self.out_features
            bias = self.linear.bias
            return linear_cross_entropy(
                input,
                self.linear.weight.reshape(*shape, self.linear.in_features),
                target,
                linear_bias=None if bias is None else bias.reshape(shape),
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                options=self.options,
            )

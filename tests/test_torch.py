"""`xce.torch` against PyTorch: its own tables of inputs, autograd of every kind, and what a user does with a loss."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import module_from_spec
from typing import Any, NamedTuple

import pytest

import xce

torch = pytest.importorskip("torch")
# the tables of PyTorch need it, PyTorch itself does not
pytest.importorskip("expecttest")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch.testing import assert_close  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

import xce.torch  # noqa: E402
from xce.torch import _LOSSES  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that the tables import
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:reduction='mean' divides"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored"),
]

FUNCTIONS = sorted(_LOSSES)
LOSSES = sorted({*FUNCTIONS} - {"linear_cross_entropy"})  # of an input and a target alone
MODULES = sorted(name for name in xce.torch.__all__ if name[0].isupper())
HALF = {torch.float16, torch.bfloat16}


class Arguments(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, function: Callable[..., Tensor]) -> Tensor:
        return function(*self.args, **self.kwargs)

    def map(self, f: Callable[[Tensor], Tensor]) -> Arguments:
        """The same arguments with leaves of their own: `f` of every tensor, which requires grad if that did."""

        def one(x: Any) -> Any:
            return f(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

        return Arguments(*tree_map(one, tuple(self)))

    def leaves(self) -> list[Tensor]:
        return [x for x in tree_leaves(tuple(self)) if isinstance(x, Tensor) and x.requires_grad]


def evaluate(function: Callable[..., Tensor], arguments: Arguments, seed: int = 0) -> tuple[Tensor, ...]:
    """The value, and the gradients by all that requires grad, of leaves of their own."""
    arguments = arguments.map(torch.clone)
    value = arguments.call(function)
    leaves = arguments.leaves()
    if not leaves:
        return (value,)
    vector = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return value, *torch.autograd.grad(value, leaves, vector)


def check(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], arguments: Arguments, *, is_exact: bool = False
) -> None:
    """Compare with PyTorch; exact results of 16-bit numbers with what PyTorch makes of them in float32."""
    found = evaluate(ours, arguments)
    expected = evaluate(theirs, arguments.map(lambda x: x.float() if is_exact and x.dtype in HALF else x))
    if is_exact:
        expected = tuple(x.to(found[0].dtype) for x in expected)
    assert_close(found, expected, equal_nan=True)


@pytest.fixture
def by_xce(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of all calls of xce that returned."""
    calls = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            calls.append(kwargs)
            return result

        return call

    for name, loss in _LOSSES.items():
        monkeypatch.setitem(_LOSSES, name, loss._replace(ours=spy(loss.ours)))
    return calls


# The tables of PyTorch

OPERATORS = {
    op.name.rpartition(".")[2]: op for op in op_db if op.name.startswith("nn.functional.") and not op.variant_test_name
}


def samples(name: str, dtype: Any) -> Iterator[Arguments]:
    for sample in OPERATORS[name].sample_inputs("cpu", dtype, requires_grad=True):
        yield Arguments((sample.input, *sample.args), sample.kwargs)


def tame(name: str, arguments: Arguments) -> tuple[Arguments, bool]:
    """The arguments as users have them, with constant targets and weights in their range; and whether xce has them."""
    bound = inspect.signature(getattr(F, name)).bind(*arguments.args, **arguments.kwargs)
    given = bound.arguments
    for key, x in given.items():
        if key in ("weight", "pos_weight") and x is not None:
            given[key] = x.detach().abs()
        if key == "target" and x.is_floating_point():
            is_free = name == "soft_margin_loss" or given.get("log_target", False)
            given[key] = x.detach() if is_free else x.detach().abs().clamp(max=1)
    is_ours = True
    if name == "multilabel_soft_margin_loss":
        is_ours = given.get("weight", torch.ones(1)).ndim == 1
    if name == "linear_cross_entropy":
        is_ours = given["linear_weight"].ndim == 2 and given.get("reduction") != "none"
    return Arguments(bound.args, bound.kwargs), is_ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_agree_on_the_table_of_pytorch(name: str, dtype: Any, by_xce: list[Any]) -> None:
    ours, theirs = getattr(xce.torch, name), getattr(F, name)
    n_samples = 0
    for sample in samples(name, dtype):
        by_xce.clear()
        evaluate(ours, sample)
        check(ours, theirs, sample, is_exact=bool(by_xce))
        by_xce.clear()
        tamed, is_ours = tame(name, sample)
        check(ours, theirs, tamed, is_exact=is_ours)
        assert len(by_xce) == is_ours
        if dtype == torch.float32:
            check(ours, theirs, tamed.map(noncontiguous), is_exact=is_ours)
        n_samples += 1
    assert n_samples > 3


def noncontiguous(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.ndim == 2 else x.repeat_interleave(2, -1)[..., ::2] if x.ndim else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_agree_on_the_table_of_pytorch(name: str, dtype: Any) -> None:
    (info,) = (info for info in module_db if info.module_cls is getattr(nn, name))
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert inputs
    for item in inputs:
        made, given = item.constructor_input, item.forward_input
        ours, theirs = (getattr(library, name)(*made.args, **made.kwargs) for library in (xce.torch, nn))
        ours.load_state_dict(theirs.state_dict())
        check(ours, theirs, Arguments(given.args, given.kwargs))


def error_of(function: Callable[[], Any]) -> type[Exception]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.type


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_what_the_table_of_pytorch_says(name: str) -> None:
    if OPERATORS[name].error_inputs_func is None:
        return
    for item in OPERATORS[name].error_inputs("cpu"):
        sample = item.sample_input
        with pytest.raises(item.error_type, match=item.error_regex):
            getattr(xce.torch, name)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.filterwarnings("ignore:Possible nested set")  # in the table's own patterns
@pytest.mark.parametrize("name", MODULES)
def test_modules_refuse_what_the_table_of_pytorch_says(name: str) -> None:
    (info,) = (info for info in module_db if info.module_cls is getattr(nn, name))
    if info.module_error_inputs_func is None:
        return
    for item in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        made, given = item.module_error_input.constructor_input, item.module_error_input.forward_input
        with pytest.raises(item.error_type, match=item.error_regex):  # noqa: PT012
            module = getattr(xce.torch, name)(*made.args, **made.kwargs)
            assert item.error_on is ModuleErrorEnum.FORWARD_ERROR
            module(*given.args, **given.kwargs)


X = torch.zeros(2, 3)
LABELS = torch.tensor([0, 2])
MISTAKES = {
    "a label too large": ("cross_entropy", (X, torch.tensor([0, 3])), {}),
    "a negative label": ("nll_loss", (X, torch.tensor([0, -1])), {}),
    "labels of int32": ("cross_entropy", (X, LABELS.int()), {}),
    "labels of bool": ("cross_entropy", (X, LABELS.bool()), {}),
    "labels of the shape of the logits": ("cross_entropy", (X, X.long()), {}),
    "labels as a column": ("cross_entropy", (X, LABELS[:, None]), {}),
    "too few labels": ("cross_entropy", (X, LABELS[:1]), {}),
    "floats for labels": ("nll_loss", (X, X), {}),
    "integer logits": ("cross_entropy", (X.long(), LABELS), {}),
    "logits without an axis": ("cross_entropy", (X[0, 0], LABELS[0]), {}),
    "an array of NumPy": ("cross_entropy", (X.numpy(), LABELS), {}),
    "no logits": ("cross_entropy", (None, LABELS), {}),
    "no target": ("cross_entropy", (X, None), {}),
    "another dtype of the weights": ("cross_entropy", (X, LABELS, torch.ones(3).double()), {}),
    "too few weights": ("cross_entropy", (X, LABELS, torch.ones(2)), {}),
    "a label to ignore among probabilities": ("cross_entropy", (X, X), {"ignore_index": 1}),
    "label smoothing of 2": ("cross_entropy", (X, LABELS), {"label_smoothing": 2.0}),
    "an unknown reduction": ("cross_entropy", (X, LABELS), {"reduction": "avg"}),
    "a reduction of kl_div": ("cross_entropy", (X, LABELS), {"reduction": "batchmean"}),
    "an unknown reduction of many labels": ("multilabel_soft_margin_loss", (X, X), {"reduction": "avg"}),
    "probabilities above 1": ("binary_cross_entropy", (X + 2, X), {}),
    "probabilities that are NaN": ("binary_cross_entropy", (X * torch.nan, X), {}),
    "binary targets of 2": ("binary_cross_entropy", (X + 0.5, X + 2), {}),
    "binary targets of another shape": ("binary_cross_entropy", (X, X[0]), {}),
    "binary targets of another shape, with logits": ("binary_cross_entropy_with_logits", (X, X[0]), {}),
    "binary targets of integers": ("binary_cross_entropy", (X, X.long()), {}),
    "binary targets of integers, with logits": ("binary_cross_entropy_with_logits", (X, X.long()), {}),
    "targets of integers": ("kl_div", (X, X.long()), {}),
    "targets that do not broadcast": ("soft_margin_loss", (X, X[0, :2]), {}),
}


@pytest.mark.parametrize(("name", "args", "options"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_the_errors_of_pytorch(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    expected = error_of(lambda: getattr(F, name)(*args, **options))
    found = error_of(lambda: getattr(xce.torch, name)(*args, **options))
    assert found is expected or (issubclass(found, expected) and found is xce.LabelError)


def test_a_bad_label_is_named() -> None:
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3 is out of range: labels of 3 classes are 0\.\.2"):
        xce.torch.cross_entropy(X, torch.tensor([0, 3]))


ACCEPTED = {
    "negative class weights": ("cross_entropy", (X, LABELS, torch.tensor([1.0, -2.0, 3.0])), {}),
    "infinite class weights": ("cross_entropy", (X, LABELS, torch.tensor([1.0, torch.inf, 3.0])), {}),
    "negative probabilities": ("cross_entropy", (X, X - 1), {}),
    "probabilities of another dtype": ("cross_entropy", (X, X.double() + 0.5), {}),
    "a target that broadcasts": ("kl_div", (X, X[0] + 0.5), {}),
    "a target of 2": ("binary_cross_entropy_with_logits", (X, X + 2), {}),
    "a weight that broadcasts": ("binary_cross_entropy", (X + 0.5, X, torch.tensor([[2.0], [3.0]])), {}),
    "margins of integers": ("soft_margin_loss", (X, X.long() + 1), {}),
    "labels of integers": ("multilabel_soft_margin_loss", (X, X.long() + 1), {}),
    "weights of elements": ("multilabel_soft_margin_loss", (X, X + 1, torch.arange(6.0).view(2, 3)), {}),
    "labels of 8 bits": ("cross_entropy", (X, LABELS.byte()), {}),
    "an old name of a reduction": ("cross_entropy", (X, LABELS), {"reduction": "elementwise_mean"}),
    "a class to ignore": ("cross_entropy", (X, LABELS), {"ignore_index": 2}),
    "all ignored": ("cross_entropy", (X, LABELS * 0 - 100), {}),
    "all ignored, summed": ("nll_loss", (X, LABELS * 0 - 100), {"reduction": "sum"}),
    "one row": ("cross_entropy", (X[0], LABELS[0]), {}),
    "one row of probabilities": ("cross_entropy", (X[0], X[0] + 0.5), {}),
    "no row": ("cross_entropy", (X[:0], LABELS[:0]), {}),
    "no row, summed": ("cross_entropy", (X[:0], LABELS[:0]), {"reduction": "sum"}),
    "no row, by row": ("cross_entropy", (X[:0], LABELS[:0]), {"reduction": "none"}),
    "no element": ("binary_cross_entropy_with_logits", (X[:0], X[:0]), {}),
    "no element, divergence": ("kl_div", (X[:0], X[:0]), {"reduction": "sum"}),
    "no element, of two distributions": ("kl_div", (X[:, :0], X[:, :0]), {"reduction": "batchmean"}),
    "one element": ("binary_cross_entropy_with_logits", (X[0, 0], X[0, 0]), {}),
    "one element of 16 bits and its weight": (
        "binary_cross_entropy_with_logits",
        (X[0, 0].bfloat16(), X[0, 0].bfloat16(), X[0, 0].bfloat16() + 2),
        {},
    ),
    "one element, divergence": ("kl_div", (X[0, 0], X[0, 0] + 0.5), {"reduction": "batchmean"}),
    "one element, margin": ("soft_margin_loss", (X[0, 0], X[0, 0] + 1), {"reduction": "none"}),
    "one row of labels": ("multilabel_soft_margin_loss", (X[0], X[0] + 1), {"reduction": "none"}),
    "complex logits": ("soft_margin_loss", (X + 0j, X + 1), {}),
    "logits seen negative": ("cross_entropy", ((X + 1j).conj().imag, LABELS), {}),
    "logits that share memory": ("cross_entropy", (X[:1, :1].expand(2, 3), LABELS), {}),
}


@pytest.mark.parametrize(("name", "args", "options"), ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.filterwarnings("ignore:reduction='elementwise_mean'", "ignore:Casting complex")
def test_what_pytorch_accepts(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    arguments = Arguments((args[0].detach().requires_grad_(not args[0].is_complex()), *args[1:]), options)
    check(getattr(xce.torch, name), getattr(F, name), arguments)


def test_edges_are_those_of_xce() -> None:
    """Where PyTorch has NaN, or 0 for what is not 0."""
    x = torch.tensor([[20.0, 0.0, 0.0], [0.0, -torch.inf, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    assert torch.equal(F.cross_entropy(x, target, reduction="none").isnan(), torch.tensor([False, True]))
    value = xce.torch.cross_entropy(x, target, reduction="none")
    assert_close(value, torch.tensor([4.1223e-9, 0.6931472]), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert_close(grad[0, 0], torch.tensor(-4.1223e-9), rtol=1e-4, atol=0)
    assert_close(grad[1], torch.zeros(3))


# Autograd


def example(name: str, dtype: Any = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An input that requires grad, and a target, for any of the losses."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    target: Tensor = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    if _LOSSES[name].has_labels:
        return x.to(dtype).requires_grad_(), torch.tensor([0, 2, -100, 1])
    if name == "binary_cross_entropy":
        x = x.sigmoid()
    return x.to(dtype).requires_grad_(), target.to(dtype)


REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_gradients(name: str, reduction: str) -> None:
    x, target = example(name)

    def f(x: Tensor) -> Tensor:
        return getattr(xce.torch, name)(x, target, reduction=reduction)

    assert torch.autograd.gradcheck(f, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x, check_batched_grad=True)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_labels", [True, False])
def test_gradients_of_gradients_with_options(has_labels: bool, label_smoothing: float, is_weighted: bool) -> None:
    x, target = example("cross_entropy")
    if not has_labels:
        target = torch.rand(4, 3, dtype=torch.float64)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if is_weighted else None

    def f(x: Tensor) -> Tensor:
        return xce.torch.cross_entropy(x, target, weight, label_smoothing=label_smoothing)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_classes_and_positions() -> None:
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 4, 2))
    for f in (xce.torch.cross_entropy, xce.torch.nll_loss):
        assert torch.autograd.gradgradcheck(lambda x, f=f: f(x, labels, reduction="none"), x)
        check(f, getattr(F, f.__name__), Arguments((x, labels), {"reduction": "none"}))


@pytest.mark.parametrize("name", LOSSES)
def test_third_derivatives(name: str) -> None:
    results = []
    for library in (xce.torch, F):
        x, target = example(name)
        result = getattr(library, name)(x, target, reduction="sum")
        for _ in range(3):
            result = (result.sin() + x**3).sum()  # so that each of them depends on x
            (result,) = torch.autograd.grad(result, x, create_graph=True)
        results.append(result)
    assert_close(*results)


@pytest.mark.parametrize("name", LOSSES)
def test_hessian_vectorized(name: str) -> None:
    x, target = example(name)
    found, expected = (
        torch.autograd.functional.hessian(lambda x, f=f: f(x, target), x, vectorize=True)
        for f in (getattr(xce.torch, name), getattr(F, name))
    )
    assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=str)
def test_second_derivatives_of_16_bits(name: str, dtype: Any) -> None:
    x, target = example(name, dtype)
    results = []
    for f, (y, t) in (
        (getattr(xce.torch, name), (x, target)),
        (getattr(F, name), (x.float(), target.float() if target.is_floating_point() else target)),
    ):
        (grad,) = torch.autograd.grad(f(y, t, reduction="sum"), x, create_graph=True)
        (second,) = torch.autograd.grad((grad * x).sin().sum(), x)
        assert second.dtype == dtype
        results.append(second)
    assert_close(*results, rtol=2**-5, atol=2**-5)  # PyTorch computes in 16 bits here


def test_gradients_by_targets_and_weights() -> None:
    x, weight = torch.randn(4, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64).requires_grad_()
    target = torch.rand(4, 3, dtype=torch.float64).requires_grad_()
    losses = xce.torch
    assert torch.autograd.gradcheck(losses.cross_entropy, (x.requires_grad_(), target, weight))
    assert torch.autograd.gradcheck(losses.binary_cross_entropy_with_logits, (x, target))
    assert torch.autograd.gradcheck(losses.kl_div, (x, target))
    found = torch.autograd.grad(losses.cross_entropy(x, target), (x, target))
    assert_close(found, torch.autograd.grad(F.cross_entropy(x, target), (x, target)))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_computed_only_if_autograd_needs_it(name: str, by_xce: list[dict[str, Any]]) -> None:
    f = getattr(xce.torch, name)
    x, target = example(name)
    f(x, target)
    with torch.no_grad():
        f(x, target)
    with torch.inference_mode():
        f(x, target)
    f(x.detach(), target)
    assert [call["return_grad"] for call in by_xce] == [True, False, False, False]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(name: str, reduction: str) -> None:
    x, target = example(name)
    value = getattr(xce.torch, name)(x, target, reduction=reduction).sum()
    (expected,) = torch.autograd.grad(getattr(F, name)(x, target, reduction=reduction).sum(), x)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        assert_close(x.grad, times * expected)
    x.grad.zero_()  # is not what is kept
    value.backward()
    assert_close(x.grad, expected)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        value.backward()


def test_the_gradient_is_not_kept_after_the_backward_pass() -> None:
    """Neither copied nor kept: with 1 at the root of the graph, it is the gradient that the forward pass found."""
    x, target = example("cross_entropy")
    value = xce.torch.cross_entropy(x, target)
    (kept,) = value.grad_fn.saved_tensors
    address = kept.data_ptr()
    del kept
    value.backward()
    assert x.grad.data_ptr() == address
    assert not x.grad.requires_grad


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_may_be_changed(factor: float) -> None:
    x, target = example("cross_entropy")
    value = factor * xce.torch.cross_entropy(x, target)
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    expected = first.clone()
    first.zero_()
    assert_close(torch.autograd.grad(value, x)[0], expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_input_may_be_overwritten(name: str) -> None:
    """As with PyTorch's cross entropy, the backward pass does not read it; second derivatives do, and complain."""
    x, target = example(name)
    (expected,) = torch.autograd.grad(getattr(F, name)(x, target), x)
    for create_graph in (False, True):
        y = x * 1
        value = getattr(xce.torch, name)(y, target)
        with torch.no_grad():
            y.zero_()
        (grad,) = torch.autograd.grad(value, x, create_graph=create_graph)
        assert_close(grad, expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(grad.sum(), x)


def test_the_value_may_be_changed_in_place() -> None:
    for reduction in REDUCTIONS:
        x, target = example("cross_entropy")
        value = xce.torch.cross_entropy(x, target, reduction=reduction)
        value /= 4
        value += x.pow(2).sum()
        expected = F.cross_entropy(x, target, reduction=reduction) / 4 + x.pow(2).sum()
        assert_close(torch.autograd.grad(value.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_a_checkpoint() -> None:
    x, target = example("cross_entropy")
    value = torch.utils.checkpoint.checkpoint(xce.torch.cross_entropy, x * 2, target, use_reentrant=False)
    assert_close(torch.autograd.grad(value, x), torch.autograd.grad(F.cross_entropy(x * 2, target), x))


def test_a_loss_scale_keeps_small_gradients() -> None:
    """In float16, 1e-9 is 0 and 1e-9 times 2^15 is not."""
    x = torch.zeros(20_000, 3).half().requires_grad_()
    target = torch.zeros(20_000, dtype=torch.int64)
    value = xce.torch.cross_entropy(x, target, reduction="sum").float() / 1e6
    (grad,) = torch.autograd.grad(value * 2.0**15, x)
    assert_close(grad[0].float(), torch.tensor([-2.0, 1.0, 1.0]) / 3e6 * 2**15, rtol=2**-10, atol=0)
    mean = xce.torch.cross_entropy(x, target)
    (grad,) = torch.autograd.grad(mean, x, torch.tensor(2.0**15).half())
    assert_close(grad[0].float(), torch.tensor([-2.0, 1.0, 1.0]) / 6e4 * 2**15, rtol=2**-10, atol=0)


# Those who follow what is computed


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # no batching rule for some losses
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch uses it in forward mode
@pytest.mark.parametrize("name", LOSSES)
def test_transforms(name: str) -> None:
    x, target = example(name)
    x = x.detach()
    inputs, targets = torch.stack([x, 0.5 * x]), torch.stack([target, target])
    results = []
    for library in (xce.torch, F):
        f = partial(getattr(library, name), reduction="sum")
        grad = torch.func.grad(f)
        results.append(
            [
                grad(x, target),
                torch.func.vmap(f)(inputs, targets),
                torch.func.vmap(grad)(inputs, targets),
                torch.func.jacrev(grad)(x, target),
                torch.func.jvp(lambda x, f=f: f(x, target), (x,), (x.cos(),)),
            ]
        )
    assert_close(*results)


def test_a_tensor_that_a_transform_left_over() -> None:
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(X)
    found, expected = (f(left[0], LABELS) for f in (xce.torch.cross_entropy, F.cross_entropy))
    assert_close(found, expected)
    assert found.requires_grad is expected.requires_grad is False


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name: str) -> None:
    x, target = example(name)
    results = []
    for library in (xce.torch, F):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach().cos())
            results.append(tuple(torch.autograd.forward_ad.unpack_dual(getattr(library, name)(dual, target))))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compile() -> None:
    """All losses in one graph, for the time that compilation takes."""

    def losses(library: Any, inputs: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return tuple(getattr(library, name)(*arguments, reduction="sum") for name, arguments in inputs.items())

    inputs = {name: example(name, torch.float32) for name in LOSSES}
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    leaves = [x for x, _ in inputs.values()]
    found, expected = compiled(xce.torch, inputs), losses(F, inputs)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(sum(found), leaves), torch.autograd.grad(sum(expected), leaves))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tracers() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, target = example("cross_entropy")
    other = torch.randn_like(x)
    traced = make_fx(lambda x, y: xce.torch.cross_entropy(x, y))(x.detach(), target)
    assert_close(traced(other, target), F.cross_entropy(other, target))
    traced = torch.jit.trace(xce.torch.cross_entropy, (x.detach(), target))
    assert_close(traced(other, target), F.cross_entropy(other, target))
    exported = torch.export.export(xce.torch.CrossEntropyLoss(), (x.detach(), target)).module()
    assert_close(exported(other, target), F.cross_entropy(other, target))


def test_subclasses_and_modes() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Own(Tensor):
        pass

    x, target = example("cross_entropy")
    expected = F.cross_entropy(x, target)
    own = xce.torch.cross_entropy(x.detach().as_subclass(Own), target)
    assert type(own) is Own
    assert_close(own.as_subclass(Tensor), expected.detach())

    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        assert_close(xce.torch.cross_entropy(x, target), expected)
    assert F.cross_entropy in seen
    with FlopCounterMode(display=False):
        assert_close(xce.torch.cross_entropy(x, target), expected)


def test_other_devices() -> None:
    x = torch.zeros(2, 3, device="meta", requires_grad=True)
    value = xce.torch.cross_entropy(x, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert value.device.type == "meta"


@pytest.mark.parametrize("name", LOSSES)
def test_a_default_device(name: str, by_xce: list[Any]) -> None:
    x, target = example(name)
    with torch.device("meta"):  # of tensors that are new
        value = getattr(xce.torch, name)(x, target)
        value.backward()
    assert_close(value, getattr(F, name)(x, target))
    assert by_xce


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name: str, dtype: Any) -> None:
    for target_dtype in {dtype, torch.float32} if dtype in HALF else {dtype}:
        x, target = example(name, dtype)
        if not _LOSSES[name].has_labels:
            target = target.to(target_dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = (getattr(library, name)(x, target) for library in (xce.torch, F))
        in_half = {"rtol": 2**-6, "atol": 2**-9}  # PyTorch rounds every intermediate result
        assert_close(found, expected, **(in_half if found.dtype in HALF else {}))
        found, expected = (torch.autograd.grad(value, x)[0] for value in (found, expected))
        assert found.dtype == dtype
        assert_close(found, expected, **(in_half if dtype in HALF else {}))


# The linear layer and its loss in one


def layer(dtype: Any = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Inputs, weights and a bias, and labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 4), (3, 4), (3,)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return leaves, torch.tensor([0, 2, -100, 1, 1])


def of_layer(library: Any, target: Tensor, **options: Any) -> Callable[..., Tensor]:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        value: Tensor = library.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)
        return value

    return f


needs_linear = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has none")


@needs_linear
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_a_layer(reduction: str) -> None:
    leaves, target = layer()
    f = of_layer(xce.torch, target, reduction=reduction, label_smoothing=0.1)
    for inputs in (leaves, leaves[:2]):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@needs_linear
def test_a_layer_of_which_a_part_requires_grad(by_xce: list[dict[str, Any]]) -> None:
    for required in ([0], [1], [2], [0, 2], [1, 2]):
        leaves, target = layer()
        leaves = [x if i in required else x.detach() for i, x in enumerate(leaves)]
        found, expected = (
            torch.autograd.grad(of_layer(library, target)(*leaves), [leaves[i] for i in required], create_graph=True)
            for library in (xce.torch, F)
        )
        assert_close(found, expected)
        found, expected = (
            torch.autograd.grad(sum(g.sin().sum() for g in grads), [leaves[i] for i in required])
            for grads in (found, expected)
        )
        assert_close(found, expected)
    assert len(by_xce) == 5


@needs_linear
def test_weights_that_depend_on_the_input() -> None:
    (x, *_), target = layer()
    for weight in (lambda x: x, lambda x: x[1:].sin()):
        f = partial(lambda x, weight: xce.torch.linear_cross_entropy(x, weight(x), target), weight=weight)
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


@needs_linear
def test_backward_twice_through_a_layer() -> None:
    leaves, target = layer()
    value = of_layer(xce.torch, target)(*leaves)
    expected = torch.autograd.grad(of_layer(F, target)(*leaves), leaves)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        assert_close([x.grad for x in leaves], [times * g for g in expected])


@needs_linear
def test_autocast_of_a_layer() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        leaves, target = layer(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = (of_layer(library, target)(*leaves) for library in (xce.torch, F))
        assert_close(found, expected, rtol=2**-6, atol=2**-6)  # PyTorch multiplies in bfloat16
        for a, b in zip(*(torch.autograd.grad(value, leaves) for value in (found, expected)), strict=True):
            assert_close(a, b, rtol=2**-6, atol=2**-6)


@needs_linear
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_that_is_followed() -> None:
    leaves, target = layer()
    leaves = [x.detach() for x in leaves]
    found, expected = (
        (
            torch.func.grad(of_layer(library, target), argnums=(0, 1, 2))(*leaves),
            torch.func.vmap(of_layer(library, target), in_dims=(None, 0))(leaves[0], torch.stack([leaves[1]] * 2)),
            torch.compile(of_layer(library, target), backend="eager", fullgraph=True)(*leaves),
        )
        for library in (xce.torch, F)
    )
    assert_close(found, expected)


@needs_linear
def test_chunks_of_pytorch() -> None:
    """Who says how PyTorch is to compute gets PyTorch."""
    leaves, target = layer()
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    found = of_layer(xce.torch, target, options=options)(*leaves)
    assert type(found.grad_fn) is type(of_layer(F, target, options=options)(*leaves).grad_fn)


@needs_linear
def test_training_a_layer() -> None:
    x, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    curves = []
    for library in (xce.torch, nn):
        torch.manual_seed(1)
        criterion = library.LinearCrossEntropyLoss(10, 3, bias=True)
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = criterion(x, labels)
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
        copied = pickle.loads(pickle.dumps(criterion))
        assert_close(copied(x, labels), criterion(x, labels))
    assert curves[0][-1] < curves[0][0]
    assert_close(*curves, rtol=1e-5, atol=0)


# Modules


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("Linear")])
def test_modules_are_those_of_pytorch(name: str) -> None:
    ours, theirs = getattr(xce.torch, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert getattr(ours, "__constants__", []) == getattr(theirs, "__constants__", [])
    options: dict[str, Any] = {"reduction": "sum"}
    if "weight" in inspect.signature(theirs).parameters:
        options["weight"] = torch.tensor([1.0, 2.0, 3.0])
    module, other = ours(**options), theirs(**options)
    assert repr(module) == repr(other)
    assert_close(dict(module.state_dict()), dict(other.state_dict()))
    module.load_state_dict(other.state_dict())
    function = next(f for f in FUNCTIONS if f.replace("_", "") in (alias(name), f"{alias(name)}loss"))
    x, target = example(function, torch.float32)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is ours
        assert_close(copied(x, target), other(x, target))


def alias(name: str) -> str:
    return name.lower().replace("bce", "binarycrossentropy").removesuffix("loss")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_pytorch(name: str) -> None:
    ours, theirs = inspect.signature(getattr(xce.torch, name)), inspect.signature(getattr(F, name))
    assert [p.replace(annotation=p.empty) for p in ours.parameters.values()] == [
        p.replace(annotation=p.empty) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("default::UserWarning")
def test_deprecated_arguments(name: str) -> None:
    x, target = example(name)
    for options in ({"size_average": True}, {"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="please use reduction="):
            found = getattr(xce.torch, name)(x, target, **options)
        assert_close(found, getattr(F, name)(x, target, **options))


def test_nothing_goes_to_pytorch_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    bad, weight = torch.tensor([0, 2, 1, 3]), -torch.ones(3)
    expected = F.cross_entropy(x, y, weight)
    assert_close(xce.torch.cross_entropy(x, y, weight), expected)  # a class weight below 0, which PyTorch takes
    monkeypatch.setattr(xce.torch, "_falls_back", False)
    xce.torch.cross_entropy(x, y).backward()
    with pytest.raises(ValueError, match=r"weight\[0\] = -1"):
        xce.torch.cross_entropy(x, y, weight)
    with pytest.raises(xce.LabelError):
        xce.torch.cross_entropy(x, bad)
    for name, call in {
        "cross_entropy": lambda: xce.torch.cross_entropy(x.to("meta"), y.to("meta")),
        "kl_div": lambda: torch.func.grad(lambda u: xce.torch.kl_div(u, x.detach().exp()))(x.detach()),
        "soft_margin_loss": lambda: xce.torch.SoftMarginLoss()(x, x.detach().double()),
    }.items():
        with pytest.raises(RuntimeError, match=f"cannot take this call of {name}, and XCE_TORCH_FALLBACK=0 keeps"):
            call()


def test_whether_that_is_forbidden_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = xce.torch.__spec__
    for value, expected in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("XCE_TORCH_FALLBACK", value)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module._falls_back is expected
    monkeypatch.setenv("XCE_TORCH_FALLBACK", "false")
    with pytest.raises(ImportError, match=r"^XCE_TORCH_FALLBACK='false' is not allowed: expected 0 or 1$"):
        spec.loader.exec_module(module_from_spec(spec))


def test_kl_div_warns_as_pytorch_does() -> None:
    x, target = example("kl_div")
    for t in (target, target[0]):  # by xce, by PyTorch
        with pytest.warns(UserWarning, match="batchmean") as caught:
            xce.torch.kl_div(x, t)
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(xce.torch.kl_div(x, target, reduction="batchmean"), F.kl_div(x, target, reduction="batchmean"))


def test_training() -> None:
    """A classifier learns the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator)
    labels = (x @ torch.randn(10, 5, generator=generator)).argmax(1)
    curves = []
    for library in (xce.torch, nn):
        torch.manual_seed(1)
        model, criterion = nn.Linear(10, 5), library.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        curve = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = criterion(model(x), labels)
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < curves[0][0] / 2
    assert_close(*curves, rtol=1e-5, atol=0)


def test_threads_are_those_of_pytorch(by_xce: list[dict[str, Any]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        xce.torch.cross_entropy(X, LABELS)
    finally:
        torch.set_num_threads(before)
    assert by_xce[0]["n_threads"] == 1


def test_example() -> None:
    assert doctest.testmod(xce.torch) == (0, 6)


def test_everything_public_has_a_docstring() -> None:
    for name in xce.torch.__all__:
        assert (inspect.getdoc(getattr(xce.torch, name)) or "").split("\n\n")[0].endswith(".")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batched_gradients(reduction: str) -> None:
    x, y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (6,))
    vectors = torch.eye(6, dtype=torch.float64) if reduction == "none" else torch.arange(3, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(f(x, y, reduction=reduction), x, vectors, is_grads_batched=True)[0]
        for f in (xce.torch.cross_entropy, torch.nn.functional.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)

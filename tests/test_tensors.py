"""CUDA tensors of PyTorch, GPU arrays of JAX, and several devices.

Without a GPU: CPU tensors that are said to be on one take the whole way there and back (`cupy_standin`). With one: the
tests marked `gpu`, of what only a GPU can show.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import problem
from checks import misaligned

import xce

Array = np.ndarray[Any, Any]

FLAGS = {"return_grad": True, "return_hess": True}
STREAM = 4711
# the GPU's kernels against the CPU's: both are right to some units in the last place, in different orders of addition
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def close(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), **TOLERANCE)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU that is not there: what was computed on it."""
    standin = pytest.importorskip("cupy_standin")
    if standin.emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler, to run the kernels of CUDA")
    with standin.installed(monkeypatch) as state:
        yield state
        assert (state.device, state.streams, state.allocator) == (0, {0: [0], 1: [0]}, standin.own_memory)


class TorchStream:
    cuda_stream = STREAM

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.cuda_stream


@pytest.fixture
def torch(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PyTorch, whose CPU tensors are on the GPU."""
    torch = pytest.importorskip("torch")
    import cupy_standin as standin

    import xce.torch
    from xce._libraries import torch as backend
    from xce._libraries import torch_cuda as _torch_cuda

    monkeypatch.setattr(backend, "is_on_cuda", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 0 if x.is_sparse else standin.device_of(x.data_ptr()))
    monkeypatch.setattr(_torch_cuda, "_current_stream", lambda device: TorchStream())
    monkeypatch.setattr(_torch_cuda, "_torch_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(standin, "own_memory", None)  # all memory is PyTorch's
    monkeypatch.setattr(gpu, "allocator", None)
    xce.torch._has_cupy.cache_clear()
    yield torch
    xce.torch._has_cupy.cache_clear()


def numpy_of(x: Any) -> Array:
    """The numbers of a tensor."""
    return np.asarray(x.detach().float() if "16" in str(x.dtype) else x.detach())


# PyTorch

CALLS: dict[str, Callable[..., Any]] = {
    "index": lambda x, y, q: (xce.cross_entropy, (x, y), {"label_smoothing": 0.1}),
    "int32": lambda x, y, q: (xce.focal_loss, (x, y), {"reduction": "none"}),
    "probabilities": lambda x, y, q: (xce.cross_entropy, (x, q), {"temperature": 2.0}),
    "elements": lambda x, y, q: (xce.binary_cross_entropy_with_logits, (x, q), {"pos_weight": q}),
    "batchmean": lambda x, y, q: (xce.kl_div, (x, q), {"reduction": "batchmean"}),
    "teacher": lambda x, y, q: (xce.distillation_loss, (x, q), {"divergence": "js"}),
}


def arguments(rng: np.random.Generator, dtype: str = "float32") -> tuple[Array, Array, Array]:
    q = rng.random((5, 7))
    x = rng.standard_normal((5, 7)).astype(dtype)
    return x, np.array([0, 6, -100, 3, 1]), (q / q.sum(axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("name", CALLS)
def test_losses_of_tensors(torch: Any, gpu: Any, name: str, rng: np.random.Generator) -> None:
    arrays = arguments(rng)
    function, args, options = CALLS[name](*arrays)
    expected = function(*args, **options, **FLAGS)
    function, args, options = CALLS[name](*map(torch.from_numpy, arrays))
    results = function(*args, **options, **FLAGS)
    assert len(results) == 3
    for result, value in zip(results, expected, strict=True):
        assert type(result) is torch.Tensor
        close(numpy_of(result), value)
    assert gpu.runs
    assert set(gpu.runs) == {(0, STREAM)}


def test_options_of_tensors(torch: Any, rng: np.random.Generator) -> None:
    features = {"weight": True, "where": True, "ignore": True, "softcap": 5.0, "z_loss": 0.01}
    x, y, options = problem(features, "index", (2, 5, 3), 1, np.float32)
    options["sample_weight"] = rng.random((2, 3)) > 0.3  # is converted before anything is computed
    expected = xce.cross_entropy(x, y, **options, **FLAGS)
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    results = xce.cross_entropy(torch.from_numpy(x), torch.from_numpy(y), **tensors, **FLAGS)
    for result, value in zip(results, expected, strict=True):
        close(numpy_of(result), value)


def test_maps_and_statistics_of_tensors(torch: Any, rng: np.random.Generator) -> None:
    x, y, _ = arguments(rng)
    t = torch.from_numpy(x)
    for function in (xce.softmax, xce.log_softmax, xce.logsumexp):
        close(numpy_of(function(t)), function(x))
    close(numpy_of(xce.logsumexp(t, axis=0, keepdims=True)), xce.logsumexp(x, axis=0, keepdims=True))
    for found, expected in zip(xce.logit_stats(t, torch.from_numpy(y)), xce.logit_stats(x, y), strict=True):
        close(numpy_of(found), expected)
    assert xce.cross_entropy(t[0], 3) == pytest.approx(xce.cross_entropy(x[0], 3), rel=1e-6)


def test_a_sparse_teacher_of_tensors(torch: Any, rng: np.random.Generator) -> None:
    x, logits = rng.standard_normal((4, 9)).astype("f4"), rng.standard_normal((4, 2)).astype("f4")
    indices = np.array([[0, 8], [3, 1], [2, 7], [8, 4]])
    expected = xce.distillation_loss(x, logits, teacher_indices=indices, return_grad=True)
    t = [torch.from_numpy(a) for a in (x, logits, indices)]
    for out in (None, torch.empty(4, 9), t[0]):
        value, grad = xce.distillation_loss(t[0], t[1], teacher_indices=t[2], return_grad=True, grad_out=out)
        close(numpy_of(value), expected[0])
        close(numpy_of(grad), expected[1])
        assert out is None or grad is out


def test_tensors_are_viewed_where_they_lie(torch: Any) -> None:
    from xce._libraries import torch as backend

    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int64):
        x = torch.ones(3, 8, dtype=dtype)[:, 2::2]
        array = backend.view(x, "x")
        assert type(array).__module__ == "cupy"
        assert array.data.ptr == x.data_ptr()
        assert array.shape == (3, 3)
        assert array.strides == tuple(x.element_size() * stride for stride in x.stride())


def test_buffers_of_tensors(torch: Any, rng: np.random.Generator) -> None:
    x, y, _ = arguments(rng)
    expected = xce.cross_entropy(x, y, return_grad=True)[1]
    t, labels = torch.from_numpy(x.copy()), torch.from_numpy(y)
    for out in (torch.empty(5, 7), torch.empty(7, 5).T, t):
        _, grad = xce.cross_entropy(t, labels, return_grad=True, grad_out=out)
        assert grad is out
        close(numpy_of(out), expected)
    out = torch.empty(5, 7)
    assert xce.softmax(t, out=out) is out
    assert xce.softmax(t, None, out=out) is out
    xce.softmax(t, out=out)
    close(numpy_of(out), xce.softmax(numpy_of(t)))
    with pytest.raises(ValueError, match="hess_out shares memory with grad_out"):
        xce.cross_entropy(t, labels, grad_out=out, hess_out=out, **FLAGS)
    with pytest.raises(ValueError, match="grad_out has dtype float64: expected float32, the dtype of logits"):
        xce.cross_entropy(t, labels, return_grad=True, grad_out=out.double())


def test_results_are_tensors_of_their_own(torch: Any, rng: np.random.Generator) -> None:
    x, y, _ = arguments(rng)
    value, grad = xce.cross_entropy(torch.from_numpy(x), torch.from_numpy(y), return_grad=True)
    assert value.shape == ()
    assert grad.is_contiguous()
    assert grad.untyped_storage().nbytes() == grad.nbytes
    grad.resize_(10, 7)  # is an error for memory that PyTorch has not allocated


@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_bfloat16_tensors(torch: Any, mode: str, rng: np.random.Generator) -> None:
    x, y, q = (torch.from_numpy(a) for a in arguments(rng))
    x, target = x.bfloat16(), y if mode == "index" else q.bfloat16()
    expected = xce.cross_entropy(numpy_of(x), numpy_of(target), **FLAGS)
    out = torch.empty_like(x)
    value, grad, hess = xce.cross_entropy(x, target, grad_out=out, **FLAGS)
    assert (value.dtype, grad.dtype, hess.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert grad is out
    close(numpy_of(value), expected[0])
    for found, exact in ((grad, expected[1]), (hess, expected[2])):
        np.testing.assert_allclose(numpy_of(found), exact, rtol=2**-8, atol=1e-6)  # rounded once


def test_a_bfloat16_number_beside_another_type(torch: Any) -> None:
    """Its bits, shifted, are a scalar of NumPy, whose memory is no array's: this was a segmentation fault."""
    x, y, w = torch.tensor(-0.25), torch.tensor(1.0), torch.tensor(0.5)
    value = xce.binary_cross_entropy_with_logits(x, y.bfloat16(), pos_weight=w.bfloat16(), weight=w.bfloat16())
    assert value == xce.binary_cross_entropy_with_logits(x, y, pos_weight=w, weight=w)
    assert xce.kl_div(x, w.bfloat16()) == xce.kl_div(x, w)


def test_empty_tensors(torch: Any) -> None:
    value, grad = xce.cross_entropy(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), return_grad=True)
    assert torch.isnan(value)
    assert grad.shape == (0, 3)
    assert torch.isneginf(xce.logsumexp(torch.empty(2, 0))).tolist() == [True, True]
    assert xce.logsumexp(torch.empty(2, 0), axis=None, keepdims=True).tolist() == [[-np.inf]]


def test_errors_of_tensors(torch: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 3])
    good = torch.tensor([0, 1])
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3 is out of range: labels of 3 classes"):
        xce.cross_entropy(x, y)
    with pytest.raises(ValueError, match=r"weight\[2\] = -1 is not allowed"):
        xce.cross_entropy(x, good, weight=torch.tensor([1.0, 1.0, -1.0]))
    value = xce.cross_entropy(x, y, reduction="none", validate=False)
    assert torch.isnan(value).tolist() == [False, True]
    with pytest.raises(TypeError, match=r"logits requires grad: detach it, or use xce\.torch"):
        xce.cross_entropy(x.clone().requires_grad_(), good)
    with pytest.raises(TypeError, match=r"logits is a torch\.Tensor on device .*torch\.sparse_coo: expected dense"):
        xce.cross_entropy(x.to_sparse(), good)
    with pytest.raises(TypeError, match=r"logits has the negative bit.*pass logits\.resolve_neg"):
        xce.cross_entropy(torch.complex(x, x).conj().imag, good)
    with pytest.raises(TypeError, match="logits has dtype complex64"):
        xce.cross_entropy(torch.complex(x, x), good)
    with pytest.raises(TypeError, match=r"logits is a torch\.Tensor but target is a numpy\.ndarray"):
        xce.cross_entropy(x, np.array([0, 1]))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="bfloat16 on a GPU needs ml_dtypes"):
        xce.softmax(x.bfloat16())


def test_cupy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from cupy_standin import without_cupy

    import xce.torch
    from xce._libraries import torch as backend

    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    without_cupy(monkeypatch)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(backend, "is_on_cuda", lambda x: True)
    with pytest.raises(ImportError, match=r"CuPy, which is missing: pip install 'xce\[cuda13\]'"):
        xce.cross_entropy(x, y)
    xce.torch._has_cupy.cache_clear()
    assert xce.torch.cross_entropy(x, y) == torch.nn.functional.cross_entropy(x, y)  # by PyTorch
    xce.torch._has_cupy.cache_clear()


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from xce._libraries import torch as backend

    class Elsewhere:
        is_cuda = True

    assert backend.is_on_cuda(Elsewhere())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not backend.is_on_cuda(Elsewhere())


# xce.torch


def leaves(torch: Any, rng: np.random.Generator, dtype: Any) -> tuple[Any, Any, Any]:
    x, y, q = arguments(rng)
    return torch.from_numpy(x).to(dtype).requires_grad_(), torch.from_numpy(y), torch.from_numpy(q).to(dtype)


AUTOGRAD: dict[str, Callable[..., tuple[Any, ...]]] = {
    "cross_entropy": lambda x, y, q: (x, y, q[0]),
    "nll_loss": lambda x, y, q: (x.log_softmax(1), y, q[0]),
    "binary_cross_entropy": lambda x, y, q: (x.sigmoid(), q),
    "binary_cross_entropy_with_logits": lambda x, y, q: (x, q),
    "kl_div": lambda x, y, q: (x.log_softmax(1), q),
    "soft_margin_loss": lambda x, y, q: (x, q.sign()),
    "multilabel_soft_margin_loss": lambda x, y, q: (x, q.round()),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", AUTOGRAD)
def test_autograd(torch: Any, gpu: Any, name: str, dtype: str, rng: np.random.Generator) -> None:
    import xce.torch

    assert set(AUTOGRAD) == set(xce.torch._LOSSES) - {"linear_cross_entropy"}
    for reduction in ("sum", "none"):
        found, exact = leaves(torch, rng, getattr(torch, dtype)), []
        for function, x in (
            (getattr(xce.torch, name), found[0]),
            (getattr(torch.nn.functional, name), found[0].detach().float().requires_grad_()),
        ):
            args = AUTOGRAD[name](x, found[1], found[2] if function is getattr(xce.torch, name) else found[2].float())
            value = function(*args, reduction=reduction)
            value.backward(torch.full_like(value, 0.5))
            exact.append((numpy_of(value), numpy_of(x.grad)))
        # results of 16 bits, and PyTorch's own steps before the loss, are rounded to that
        tolerance = TOLERANCE if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
        for a, b in zip(*exact, strict=True):
            np.testing.assert_allclose(a, b, **tolerance)
    assert set(gpu.runs) == {(0, STREAM)}


def test_nobody_looks_at_the_data(torch: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import xce.torch
    from xce._engines import cupy as backend

    def scan(*_: Any) -> int:
        raise AssertionError("the CPU would wait")

    for name in ("scan_labels", "scan_values"):
        monkeypatch.setattr(backend, name, scan)
    monkeypatch.setattr(torch.Tensor, "item", scan)
    x = torch.zeros(3, 4, requires_grad=True)
    weight = torch.ones(4)
    value = xce.torch.cross_entropy(x, torch.tensor([0, 4, 2]), weight, reduction="none")
    value.sum().backward()
    assert torch.isnan(value).tolist() == [False, True, False]
    assert torch.isnan(x.grad).any(1).tolist() == [False, True, False]
    assert torch.isnan(xce.torch.CrossEntropyLoss()(x, torch.tensor([0, -1, 2])))
    xce.torch.BCELoss()(torch.full((3,), 2.0), torch.ones(3))
    xce.torch.CrossEntropyLoss()(x, torch.tensor([0, 1, 2])).backward()  # the loss as the root: nobody asks for its 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_gradients_times_a_number(torch: Any, gpu: Any, dtype: str) -> None:
    from xce._libraries import torch as backend

    for n in (0, 1, 7, 8, 9, 1000, 5000):  # more than the threads of the device
        x = torch.randn(n, dtype=getattr(torch, dtype))
        for factor in (1.0, 0.3, float("nan")):
            own = x.clone()
            assert backend.scaled(own, torch.tensor(factor, dtype=x.dtype)) is own
            torch.testing.assert_close(own, x * torch.tensor(factor, dtype=x.dtype), rtol=0, atol=0, equal_nan=True)
    gpu.runs.clear()
    shifted = torch.ones(9)[1:]  # PyTorch's work
    assert backend.scaled(shifted, torch.tensor(2.0)).tolist() == [2.0] * 8
    assert not gpu.runs


def test_second_derivatives(torch: Any, rng: np.random.Generator) -> None:
    import xce.torch

    x, y, _ = leaves(torch, rng, torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: xce.torch.cross_entropy(x, y, label_smoothing=0.1), x)


def test_autocast(torch: Any, gpu: Any) -> None:
    import xce.torch

    x, y = torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):  # the type of the device of the tensors
        assert xce.torch.cross_entropy(x, y).dtype == torch.float32
    assert xce.torch.cross_entropy(x, y).dtype == torch.bfloat16
    assert gpu.runs


def test_training(torch: Any, gpu: Any) -> None:
    import xce.torch

    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    results = []
    for loss in (xce.torch.CrossEntropyLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss(label_smoothing=0.1)):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        results.append(numpy_of(model.weight))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)  # three steps of rounding
    assert gpu.runs


# Linear layers


def layer(rng: np.random.Generator) -> dict[str, Array]:
    x, w, b = (rng.standard_normal(shape).astype("f4") for shape in ((6, 5), (9, 5), (9,)))
    return {"inputs": x, "linear_weight": w, "linear_bias": b, "target": np.array([0, 8, 3, -100, 1, 7])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_tensors(torch: Any, gpu: Any, dtype: str, rng: np.random.Generator) -> None:
    arrays = layer(rng)
    t = {name: torch.from_numpy(a) for name, a in arrays.items()}
    t = {name: a.to(getattr(torch, dtype)) if a.is_floating_point() else a for name, a in t.items()}
    exact = {name: numpy_of(a) for name, a in t.items()}
    expected, gradients = xce.linear_cross_entropy(**exact, chunk_rows=4, return_grad=True)
    out = torch.empty_like(t["inputs"]), torch.empty(9, 5), None  # sums may be of float32
    found, results = xce.linear_cross_entropy(**t, chunk_rows=4, return_grad=True, grad_out=out)
    # logits are of the type of the inputs
    tolerance = TOLERANCE if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(found, expected, **tolerance)
    for result, gradient in zip(results, gradients, strict=True):
        assert type(result) is torch.Tensor
        np.testing.assert_allclose(numpy_of(result), gradient, **tolerance)
    assert [a.data_ptr() for a in results[:2]] == [a.data_ptr() for a in out[:2]]
    assert set(gpu.runs) == {(0, STREAM)}


def test_autograd_of_a_layer(torch: Any, gpu: Any, rng: np.random.Generator) -> None:
    import xce.torch

    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("needs linear_cross_entropy of PyTorch")
    results = []
    for function in (xce.torch.linear_cross_entropy, torch.nn.functional.linear_cross_entropy):
        t = {name: torch.from_numpy(a) for name, a in layer(np.random.default_rng(1)).items()}
        t["input"] = t.pop("inputs")
        wanted = [t[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
        value = function(t["input"], t["linear_weight"], t["target"], linear_bias=t["linear_bias"], ignore_index=-100)
        (0.5 * value).backward()
        results.append([numpy_of(value), *(numpy_of(a.grad) for a in wanted)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)
    assert set(gpu.runs) == {(0, STREAM)}


def test_a_layer_on_another_device(gpu: Any, rng: np.random.Generator) -> None:
    from cupy_standin import asarray

    arrays = layer(rng)
    expected = xce.linear_cross_entropy(**arrays)
    close(xce.linear_cross_entropy(**{name: asarray(a, 1) for name, a in arrays.items()}), expected)
    assert {device for device, _ in gpu.runs} == {1}


# JAX


@pytest.fixture
def jax(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """JAX, whose CPU arrays are on the GPU."""
    jax = pytest.importorskip("jax")
    from xce._libraries import jax as backend

    is_on_cpu = backend.is_on_cpu
    monkeypatch.setattr(backend, "is_on_cpu", lambda x: is_on_cpu(x) and False)
    monkeypatch.setattr(backend, "_CUDA", 1)
    with jax.default_device(jax.devices("cpu")[0]):
        yield jax


@pytest.mark.parametrize("name", CALLS)
def test_losses_of_jax(jax: Any, gpu: Any, name: str, rng: np.random.Generator) -> None:
    x, y, q = arguments(rng)
    arrays = x, y.astype("i4"), q
    function, args, options = CALLS[name](*arrays)
    expected = function(*args, **options, **FLAGS)
    function, args, options = CALLS[name](*map(jax.numpy.asarray, arrays))
    results = function(*args, **options, **FLAGS)
    for result, value in zip(results, expected, strict=True):
        assert isinstance(result, jax.Array)
        close(result, value)
    assert gpu.runs
    assert gpu.synchronized == [0]


def test_maps_and_statistics_of_jax(jax: Any, gpu: Any, rng: np.random.Generator) -> None:
    x, y, _ = arguments(rng)
    a = jax.numpy.asarray(x)
    close(xce.log_softmax(a), xce.log_softmax(x))
    close(xce.logsumexp(a, axis=0, keepdims=True), xce.logsumexp(x, axis=0, keepdims=True))
    for found, expected in zip(xce.logit_stats(a, jax.numpy.asarray(y)), xce.logit_stats(x, y), strict=True):
        close(found, expected)


def test_bfloat16_arrays_of_jax(jax: Any, gpu: Any) -> None:
    x = jax.numpy.asarray([[1.0, 2.0, 0.5]], jax.numpy.bfloat16)
    value, grad = xce.cross_entropy(x, jax.numpy.asarray([1]), return_grad=True)
    assert (value.dtype, grad.dtype) == (np.float32, jax.numpy.bfloat16)
    np.testing.assert_allclose(value, xce.cross_entropy(np.asarray(x, "f4"), np.array([1])), rtol=1e-6)


def test_arrays_of_jax_that_are_refused(jax: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = jax.numpy.zeros((2, 3)), jax.numpy.asarray([0, 1])
    for name in ("grad_out", "hess_out"):
        with pytest.raises(ValueError, match=f"{name} is read-only"):
            xce.cross_entropy(x, y, **FLAGS, **{name: jax.numpy.zeros((2, 3))})
    with pytest.raises(ValueError, match="out is read-only"):
        xce.softmax(x, out=x)
    with pytest.raises(TypeError, match="x is being traced"):
        jax.jit(xce.softmax)(x)
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3"):
        xce.cross_entropy(x, jax.numpy.asarray([0, 3]))
    from xce._engines import cupy
    from xce._libraries import jax as backend

    def refuse(x: Any) -> Any:
        raise NotImplementedError("not yet")

    monkeypatch.setattr(cupy.cupy, "from_dlpack", refuse)
    with pytest.raises(TypeError, match="x has dtype float32, which CuPy does not take from JAX: not yet"):
        xce.softmax(x)
    monkeypatch.setattr(backend, "_CUDA", 2)
    with pytest.raises(TypeError, match=r"logits is on .*: expected arrays on the CPU or on one CUDA device"):
        xce.cross_entropy(x, y)


# Devices


def test_the_device_of_the_arrays_of_cupy(gpu: Any, rng: np.random.Generator) -> None:
    from cupy_standin import asarray

    x, y, q = arguments(rng)
    options = {"sample_weight": np.arange(5)}  # converted
    expected = xce.cross_entropy(x, y, **options, return_grad=True)
    for device in (0, 1):
        gpu.runs.clear()
        on_device = {name: asarray(a, device) for name, a in options.items()}
        value, grad = xce.cross_entropy(asarray(x, device), asarray(y, device), **on_device, return_grad=True)
        close(value, expected[0])
        close(grad, expected[1])
        assert (value.device.id, grad.device.id) == (device, device)
        assert set(gpu.runs) == {(device, 0)}
        close(xce.softmax(asarray(x, device)), xce.softmax(x))
        close(
            xce.distillation_loss(asarray(x, device), asarray(q, device), sample_weight=on_device["sample_weight"]),
            xce.distillation_loss(x, q, **options),
        )
        close(
            xce.binary_cross_entropy_with_logits(asarray(x, device), asarray(q, device)),
            xce.binary_cross_entropy_with_logits(x, q),
        )
        assert {device for device, _ in gpu.runs} == {device}


def misplaced(cupy: Any, a: Array) -> Any:
    """An array of CuPy at an odd address."""
    memory = cupy.asarray(np.zeros(a.nbytes + 1, np.uint8))
    memory[1:].view(a.dtype)[...] = a.ravel()
    return memory[1:].view(a.dtype).reshape(a.shape)


@pytest.mark.parametrize("name", ["logits", "target", "weight", "sample_weight", "where", "grad_out"])
def test_arrays_at_odd_addresses_are_refused(gpu: Any, name: str, rng: np.random.Generator) -> None:
    """No GPU reads them: it would be an error from which its context does not recover."""
    import cupy

    x, y, _ = arguments(rng)
    options: dict[str, Any] = {
        "logits": x, "target": y, "weight": np.ones(7, "f4"), "sample_weight": np.ones(5), "where": x < 9,
        "grad_out": np.zeros_like(x),
    }  # fmt: skip
    options = {k: (misplaced if k == name else lambda cupy, a: cupy.asarray(a))(cupy, a) for k, a in options.items()}
    if name == "where":  # entries of one byte lie anywhere
        xce.cross_entropy(**options, return_grad=True)
        return
    with pytest.raises(ValueError, match=rf"^{name} does not lie at multiples of [48] bytes, .* copy it"):
        xce.cross_entropy(**options, return_grad=True)
    assert not gpu.runs


def test_tensors_at_odd_addresses_are_refused(torch: Any, gpu: Any, rng: np.random.Generator) -> None:
    x, y, _ = map(torch.from_numpy, arguments(rng))
    odd = torch.from_numpy(misaligned(x.numpy()))
    for args, options in (((odd, y), {}), ((x, y), {"grad_out": odd})):
        with pytest.raises(ValueError, match=r"(logits|grad_out) does not lie at a multiple of 4 bytes, .* clone it"):
            xce.cross_entropy(*args, **options, return_grad=True)
    assert not gpu.runs


def test_states_of_another_device(gpu: Any, rng: np.random.Generator) -> None:
    from cupy_standin import asarray

    x, y, _ = arguments(rng)
    s = np.arange(5.0)
    whole, pieces = xce.LossState(), xce.LossState(7)
    whole.update(asarray(x, 1), asarray(y, 1), sample_weight=asarray(s, 1))
    for start, stop in ((0, 3), (3, 7)):
        pieces.update(asarray(x[:, start:stop], 1), asarray(y, 1), start, sample_weight=asarray(s, 1))
    expected = xce.cross_entropy(x, y, sample_weight=s)
    assert whole.result() == pytest.approx(expected, rel=1e-6)
    assert pieces.result() == pytest.approx(expected, rel=1e-6)
    assert {device for device, _ in gpu.runs} == {1}


def test_metrics_of_another_device(gpu: Any, rng: np.random.Generator) -> None:
    from cupy_standin import asarray

    from xce import metrics

    x, y, _ = arguments(rng)
    s = np.arange(5.0)
    for name, options in (
        ("brier_score", {}),
        ("top_k_accuracy", {}),
        ("top_k_accuracy", {"k": 2}),
        ("perplexity", {}),
    ):
        metric = getattr(metrics, name)
        found = metric(asarray(x, 1), asarray(y, 1), **options)
        assert float(found) == pytest.approx(float(metric(x, y, **options)), rel=1e-6)
        found = metric(asarray(x, 1), asarray(y, 1), sample_weight=asarray(s, 1), **options)
        assert float(found) == pytest.approx(float(metric(x, y, sample_weight=s, **options)), rel=1e-6)
    assert {device for device, _ in gpu.runs} == {1}


def test_the_device_of_tensors(torch: Any, gpu: Any, rng: np.random.Generator) -> None:
    import cupy_standin as standin

    x, y, _ = arguments(rng)
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    standin.places += [(t.data_ptr(), t.data_ptr() + t.nbytes, 1) for t in tensors]
    close(numpy_of(xce.cross_entropy(*tensors)), xce.cross_entropy(x, y))
    assert set(gpu.runs) == {(1, STREAM)}


def test_arrays_of_cupy_on_two_devices(gpu: Any) -> None:
    from cupy_standin import asarray

    x, y = np.zeros((2, 3)), np.array([0, 1])
    with pytest.raises(ValueError, match="logits is on <CUDA Device 1> but target is on <CUDA Device 0>: expected"):
        xce.cross_entropy(asarray(x, 1), asarray(y, 0))
    with pytest.raises(ValueError, match="logits is on <CUDA Device 0> but weight is on <CUDA Device 1>"):
        xce.cross_entropy(asarray(x), asarray(y), weight=asarray(np.ones(3), 1))
    with pytest.raises(ValueError, match="x is on <CUDA Device 0> but out is on <CUDA Device 1>"):
        xce.softmax(asarray(x), out=asarray(x, 1))
    with pytest.raises(ValueError, match="inputs is on <CUDA Device 0> but linear_weight is on <CUDA Device 1>"):
        xce.linear_cross_entropy(asarray(x), asarray(np.ones((4, 3)), 1), asarray(y))


def test_tensors_on_two_devices(torch: Any) -> None:
    class Elsewhere(torch.Tensor):  # type: ignore[misc, name-defined]
        device = torch.device("cuda", 1)

    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="logits is on cpu but target is on cuda:1: expected all arrays of a call on"):
        xce.cross_entropy(x, y.as_subclass(Elsewhere))
    with pytest.raises(ValueError, match="logits is on cpu but pos_weight is on cuda:1"):
        xce.binary_cross_entropy_with_logits(x, x, pos_weight=torch.ones(3).as_subclass(Elsewhere))


def test_arrays_on_two_devices() -> None:
    strict = pytest.importorskip("array_api_strict")
    x, y = strict.zeros((2, 3)), strict.asarray([0, 1])
    with pytest.raises(ValueError, match=r"logits is on .*CPU_DEVICE.* but target is on .*device1.*: expected all"):
        xce.cross_entropy(x, strict.asarray([0, 1], device=strict.Device("device1")))
    xce.cross_entropy(x, y)


def test_arrays_of_jax_on_two_devices() -> None:
    pytest.importorskip("jax")
    code = (
        "import jax, numpy, xce\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
        "one, two = jax.devices()\n"
        "x, y = numpy.zeros((2, 3), 'f4'), numpy.array([0, 1])\n"
        "try:\n"
        "    xce.cross_entropy(jax.device_put(x, one), jax.device_put(y, two))\n"
        "except ValueError as error:\n"
        "    assert 'logits is on cpu:0 but target is on cpu:1: expected all arrays' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('two devices')\n"
        "rows = NamedSharding(Mesh([one, two], 'n'), PartitionSpec('n'))\n"
        "xce.cross_entropy(jax.device_put(x, rows), jax.device_put(y, one))  # brought together\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# On a GPU


@pytest.fixture
def cuda() -> Any:
    """PyTorch with a CUDA device, and CuPy."""
    torch = pytest.importorskip("torch", reason="needs PyTorch, for a CUDA device")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and PyTorch built for it")
    pytest.importorskip("cupy", reason="needs CuPy, for a CUDA device")
    return torch


def moved(x: Any, device: str = "cuda") -> Any:
    """Tensors among the arguments, on a device."""
    return x.to(device) if hasattr(x, "to") else x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_cuda_is_as_the_cpu(cuda: Any, name: str, dtype: str, rng: np.random.Generator) -> None:
    x, y, q = (cuda.from_numpy(a) for a in arguments(rng))
    x, q = x.to(getattr(cuda, dtype)), q.to(getattr(cuda, dtype))
    function, args, options = CALLS[name](x, y, q)
    expected = function(*args, **options, **FLAGS)
    on_cuda = {key: moved(value) for key, value in options.items()}
    results = function(*map(moved, args), **on_cuda, **FLAGS)
    # entries of 16 bits are the same number, rounded: to neighbours, where it lies between the two
    rtol = {"float16": 2**-10, "bfloat16": 2**-7}.get(dtype, TOLERANCE["rtol"])
    for result, value in zip(results, expected, strict=True):
        assert (result.device.type, result.dtype) == ("cuda", value.dtype)
        np.testing.assert_allclose(numpy_of(result.cpu()), numpy_of(value), rtol=rtol, atol=1e-6)


@pytest.mark.gpu
def test_cuda_tensors_are_not_copied(cuda: Any) -> None:
    from xce._libraries import torch as backend

    for dtype in (cuda.float32, cuda.bfloat16, cuda.int64, cuda.bool):
        x = cuda.ones(3, 8, dtype=dtype, device="cuda")[:, 2::2]
        assert backend.view(x, "x").data.ptr == x.data_ptr()
    x, y = cuda.randn(4, 5, device="cuda"), cuda.tensor([0, 1, 2, 4], device="cuda")
    expected = xce.cross_entropy(x, y, return_grad=True)[1]
    _, grad = xce.cross_entropy(x, y, return_grad=True, grad_out=x)
    assert grad.data_ptr() == x.data_ptr()
    cuda.testing.assert_close(x, expected, rtol=0, atol=0)
    narrow = x.bfloat16()
    assert xce.softmax(narrow, out=narrow).data_ptr() == narrow.data_ptr()
    before = cuda.cuda.memory_allocated()
    result = xce.softmax(cuda.zeros(1 << 10, 1 << 10, device="cuda"))
    assert cuda.cuda.memory_allocated() - before == result.nbytes  # in memory of PyTorch, and no other is kept


@pytest.mark.gpu
def test_cuda_streams(cuda: Any) -> None:
    """A kernel on another stream than PyTorch's would read the logits before they are there."""
    y = cuda.randint(1000, (4096,), device="cuda")
    x = cuda.randn(4096, 1000, device="cuda")
    expected = xce.cross_entropy(x, y, reduction="none")
    stream = cuda.cuda.Stream()
    stream.wait_stream(cuda.cuda.current_stream())
    for _ in range(3):
        with cuda.cuda.stream(stream):
            late = cuda.full_like(x, cuda.nan)
            cuda.cuda._sleep(50_000_000)  # cycles of a clock
            late.copy_(x)
            value, grad = xce.cross_entropy(late, y, reduction="none", return_grad=True, validate=False)
            late.fill_(cuda.nan)
            total = grad.sum(1)
        stream.synchronize()
        cuda.testing.assert_close(value, expected, rtol=0, atol=0)
        cuda.testing.assert_close(total, cuda.zeros_like(total), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graphs(cuda: Any) -> None:
    import xce.torch

    x = cuda.randn(64, 1000, device="cuda")
    y = cuda.randint(1000, (64,), device="cuda")
    keep = cuda.rand(64, device="cuda") > 0.5  # is converted: that memory, too, must be the graph's

    def step() -> tuple[Any, ...]:
        value, grad = xce.cross_entropy(x, y, sample_weight=keep, return_grad=True, validate=False)
        leaf = x.detach().requires_grad_()  # a new one, since PyTorch warns of a leaf that two streams use
        loss = xce.torch.cross_entropy(leaf, y, label_smoothing=0.1)
        return value, grad, loss, *cuda.autograd.grad(loss, leaf)

    step()  # compiles
    graph = cuda.cuda.CUDAGraph()
    with cuda.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        cuda.manual_seed(seed)
        x.copy_(cuda.randn_like(x))
        y.copy_(cuda.randint_like(y, 1000))
        others = [cuda.full((1 << 16,), cuda.nan, device="cuda") for _ in range(16)]  # whose memory is not the graph's
        graph.replay()
        assert all(bool(cuda.isnan(other).all()) for other in others)
        for found, expected in zip(captured, step(), strict=True):
            cuda.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_cuda_never_waits(cuda: Any) -> None:
    import xce.torch

    x = cuda.randn(8, 10, device="cuda", requires_grad=True)
    y = cuda.randint(10, (8,), device="cuda")
    weight = cuda.rand(10, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything yet
        cuda.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loss = xce.torch.cross_entropy(x, y, weight, label_smoothing=0.1)
            loss.backward()
            (2 * xce.torch.CrossEntropyLoss(reduction="none")(x, y)).sum().backward()
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cuda.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_bad_label_on_cuda(cuda: Any) -> None:
    import xce.torch

    x = cuda.randn(4, 10, device="cuda", requires_grad=True)
    y = cuda.tensor([0, 10, -7, 9], device="cuda")
    value = xce.torch.cross_entropy(x, y, reduction="none")
    value.sum().backward()
    assert cuda.isnan(value).tolist() == [False, True, True, False]
    assert cuda.isnan(x.grad).any(1).tolist() == [False, True, True, False]
    assert cuda.isnan(xce.torch.cross_entropy(x, y))
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 10 is out of range"):
        xce.cross_entropy(x.detach(), y)
    assert not cuda.isnan(xce.torch.cross_entropy(x, y.clamp(0, 9)))  # the device is as it was


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUTOGRAD)
def test_autograd_on_cuda(cuda: Any, name: str, rng: np.random.Generator) -> None:
    import xce.torch

    results = []
    for function in (getattr(xce.torch, name), getattr(cuda.nn.functional, name)):
        x, y, q = (t.detach().cuda() for t in leaves(cuda, np.random.default_rng(1), cuda.float32))
        value = function(*AUTOGRAD[name](x.requires_grad_(), y, q), reduction="sum")
        (3 * value).backward()
        results.append((value.detach(), x.grad))
    cuda.testing.assert_close(*results, rtol=1e-4, atol=1e-5)  # the tolerance of sums on both sides


@pytest.mark.gpu
def test_second_derivatives_on_cuda(cuda: Any, rng: np.random.Generator) -> None:
    import xce.torch

    x, y, _ = (t.detach().cuda() for t in leaves(cuda, rng, cuda.float64))
    assert cuda.autograd.gradgradcheck(lambda x: xce.torch.cross_entropy(x, y), x.requires_grad_())


@pytest.mark.gpu
def test_autocast_on_cuda(cuda: Any) -> None:
    import xce.torch

    x, y = cuda.randn(2, 3, dtype=cuda.bfloat16, device="cuda"), cuda.tensor([0, 1], device="cuda")
    with cuda.autocast("cuda", cuda.bfloat16):
        assert xce.torch.cross_entropy(x, y).dtype == cuda.float32
    assert xce.torch.cross_entropy(x, y).dtype == cuda.bfloat16


@pytest.mark.gpu
def test_cuda_with_the_cpu(cuda: Any) -> None:
    x, y = cuda.zeros(2, 3, device="cuda"), cuda.tensor([0, 1])
    with pytest.raises(ValueError, match="logits is on cuda:0 but target is on cpu: expected all arrays of a"):
        xce.cross_entropy(x, y)
    if cuda.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with pytest.raises(ValueError, match="logits is on cuda:0 but target is on cuda:1"):
        xce.cross_entropy(x, y.to("cuda:1"))
    value = xce.cross_entropy(x.to("cuda:1"), y.to("cuda:1"))
    assert (value.device.index, cuda.cuda.current_device()) == (1, 0)


@pytest.mark.gpu
def test_the_state_of_cupy_is_left_alone(cuda: Any) -> None:
    import cupy

    allocator, stream = cupy.cuda.get_allocator(), cupy.cuda.get_current_stream()
    with cuda.cuda.stream(cuda.cuda.Stream()):
        xce.softmax(cuda.zeros(2, 3, device="cuda"))
    assert cupy.cuda.get_allocator() == allocator
    assert cupy.cuda.get_current_stream() == stream


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_on_cuda(dtype: str, rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax", reason="needs JAX, for a CUDA device")
    pytest.importorskip("cupy", reason="needs CuPy, for a CUDA device")
    try:
        (device, *_) = jax.devices("cuda")
    except RuntimeError:
        pytest.skip("needs a CUDA device, and JAX built for it")
    x, y, _ = arguments(rng)
    a, labels = (jax.device_put(jax.numpy.asarray(v), device) for v in (x.astype(jax.numpy.dtype(dtype)), y))
    expected = xce.cross_entropy(np.asarray(a), y, return_grad=True)
    for _ in range(3):
        value, grad = xce.cross_entropy(a * 1, labels, return_grad=True)
        assert value.devices() == grad.devices() == {device}
        assert (value.dtype, grad.dtype) == (np.float32, a.dtype)
        close(value, expected[0])
        np.testing.assert_allclose(np.asarray(grad, "f4"), np.asarray(expected[1], "f4"), rtol=2**-7, atol=1e-6)
    with pytest.raises(ValueError, match="grad_out is read-only"):
        xce.cross_entropy(a, labels, return_grad=True, grad_out=a)

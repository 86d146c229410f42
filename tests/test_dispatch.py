"""Every array library: the numbers of NumPy in the caller's own kind of array; nothing imported in vain."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import Case, oracle, problem
from checks import every_target

import xce
from xce import _arrays, _libraries


class Library(NamedTuple):
    array: type  # what the results are
    make: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]


def torch_library() -> Library:
    torch = pytest.importorskip("torch")
    return Library(torch.Tensor, torch.from_numpy, lambda x: x.numpy())


def jax_library() -> Library:
    jax = pytest.importorskip("jax")
    return Library(jax.Array, jax.numpy.asarray, np.asarray)


def strict_library() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library(type(strict.asarray(0)), strict.asarray, np.asarray)


@pytest.fixture(params=[torch_library, jax_library, strict_library], ids=["torch", "jax", "strict"])
def library(request: pytest.FixtureRequest) -> Library:
    result: Library = request.param()
    return result


def name_of(library: Library) -> str:
    package = library.array.__module__.partition(".")[0]
    return {"jaxlib": "jax", "array_api_strict": "strict"}.get(package, package)


FEATURES = {"weight": True, "sample_weight": True, "where": True, "ignore": True, "label_smoothing": 0.1}
FEATURES |= {"temperature": 0.7, "softcap": 5.0, "z_loss": 0.01}


@pytest.mark.parametrize("mode", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses(library: Library, mode: str, reduction: str) -> None:
    x, y, options = problem(FEATURES | {"reduction": reduction}, mode, (2, 5, 3), 1, np.float32)
    flags = {"return_grad": True, "return_hess": True}
    expected = xce.cross_entropy(x, y, **options, **flags)
    arrays = {k: library.make(v) for k, v in options.items() if isinstance(v, np.ndarray)}
    results = xce.cross_entropy(library.make(x), library.make(y), **options | arrays, **flags)
    assert len(results) == 3
    for result, value in zip(results, expected, strict=True):
        assert isinstance(result, library.array)
        assert tuple(result.shape) == value.shape
        assert library.numpy(result).dtype == np.float32
        np.testing.assert_allclose(library.numpy(result), value, rtol=1e-5, atol=1e-6)


def test_operations(library: Library, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 3)).astype("f4"), np.array([0, 2, -100, 1], "i4")
    results = {
        function: (function(library.make(x), *args), function(x, *map(library.numpy, args)))
        for function, args in (
            (xce.softmax, ()),
            (xce.log_softmax, ()),
            (xce.logsumexp, ()),
            (xce.logit_stats, (library.make(y),)),
        )
    }
    for result, expected in results.values():
        results_of_one = result if isinstance(result, tuple) else (result,)
        for a, b in zip(results_of_one, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert isinstance(a, library.array)
            np.testing.assert_allclose(library.numpy(a), b, rtol=1e-5, atol=1e-6)
    where, b = library.make(x > -1), library.make(np.array([1.0, -2.0, 3.0]))
    for function in (xce.softmax, xce.log_softmax, xce.logsumexp):
        for axis in (None, 0, (1, 0)):
            result = function(library.make(x), axis, where=where)
            assert isinstance(result, library.array)
            np.testing.assert_allclose(library.numpy(result), function(x, axis, where=x > -1), rtol=1e-5, atol=1e-6)
    for result, value in zip(
        xce.logsumexp(library.make(x), b=b, return_sign=True),
        xce.logsumexp(x, b=library.numpy(b), return_sign=True),
        strict=True,
    ):
        assert isinstance(result, library.array)
        np.testing.assert_allclose(library.numpy(result), value, rtol=1e-5)
    kept = xce.logsumexp(library.make(x), axis=0, keepdims=True)
    assert isinstance(kept, library.array)
    assert tuple(kept.shape) == (1, 3)


def test_errors(library: Library) -> None:
    x, y = library.make(np.zeros((2, 3), "f4")), library.make(np.array([0, 3], "i4"))
    good = library.make(np.array([0, 1], "i4"))
    with pytest.raises(xce.LabelError, match=r"target\[1\] = 3 is out of range: labels of 3 classes"):
        xce.cross_entropy(x, y)
    with pytest.raises(ValueError, match=r"target of dtype int32 has shape \(2,\): expected \(3,\)"):
        xce.cross_entropy(x, y, axis=0)
    with pytest.raises(TypeError, match=r"logits has dtype .*int32: expected float16, bfloat16"):
        xce.cross_entropy(y, y)
    with pytest.raises(ValueError, match=r"weight\[2\] = -1 is not allowed"):
        xce.cross_entropy(x, good, weight=library.make(np.array([1, 1, -1], "f4")))
    convert = {"torch": "torch.as_tensor", "jax": "jax.numpy.asarray"}.get(name_of(library), "array_api_strict.asarray")
    if name_of(library) != "jax":  # the companions of arrays of JAX have a test of their own
        with pytest.raises(TypeError, match=rf"logits is an? .* but target is a numpy.ndarray: .* {convert}\(target\)"):
            xce.cross_entropy(x, np.array([0, 1]))
    if name_of(library) != "strict":
        with pytest.raises(TypeError, match=rf"target is a list: expected an array .* {convert}\(target\)"):
            xce.cross_entropy(x, [0, 1])
        with pytest.raises(TypeError, match=r"weight is a tuple: expected .*asarray|as_tensor\(weight\)"):
            xce.cross_entropy(x, good, weight=(1.0, 1.0, 1.0))
    with pytest.raises(TypeError, match=r"logits is a numpy\.ndarray but weight is an? "):
        xce.cross_entropy(np.zeros((2, 3), "f4"), np.array([0, 1]), weight=x[0, :])
    with pytest.raises(TypeError, match=r"target has dtype .*bool"):
        xce.cross_entropy(x, library.make(np.array([True, False])))


def test_one_label_may_be_an_integer(library: Library) -> None:
    x = np.array([1.0, 2.0, 0.5], "f4")
    result = xce.cross_entropy(library.make(x), 2)
    np.testing.assert_allclose(library.numpy(result), xce.cross_entropy(x, 2), rtol=1e-6)
    with pytest.raises(xce.LabelError, match="target = 3 is out of range"):
        xce.cross_entropy(library.make(x), 3)


# Buffers


def test_buffers_of_mutable_libraries(library: Library, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 3)).astype("f4"), np.array([0, 2, 1, 1], "i4")
    buffer, logits = library.make(np.full((4, 3), 7, "f4")), library.make(x.copy())
    if "jax" in library.array.__module__:
        with pytest.raises(ValueError, match="grad_out is read-only"):
            xce.cross_entropy(logits, library.make(y), return_grad=True, grad_out=buffer)
        return
    expected = xce.cross_entropy(x, y, return_grad=True)[1]
    for out in (buffer, logits):
        _, grad = xce.cross_entropy(logits, library.make(y), return_grad=True, grad_out=out)
        assert grad is out
        np.testing.assert_allclose(library.numpy(out), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"grad_out has shape .*: expected .*, the shape of logits"):
        xce.cross_entropy(logits, library.make(y), return_grad=True, grad_out=buffer[:2, :])
    with pytest.raises(ValueError, match="hess_out shares memory with grad_out"):
        xce.cross_entropy(logits, library.make(y), return_grad=True, grad_out=buffer, return_hess=True, hess_out=buffer)


class Own(np.ndarray[Any, Any]):
    pass


@pytest.mark.parametrize("library", ["numpy", "subclass", "torch", "array_api_strict"])
@every_target
def test_what_is_returned_is_the_buffer(case: Case, mode: str, library: str) -> None:
    """The caller's own object, which he may compare, or keep elsewhere."""
    make = (lambda a: a.view(Own)) if library == "subclass" else pytest.importorskip(library).asarray
    for shape in ((4, 3),) if case.has_classes else ((4, 3), ()):
        x, target, options = problem({}, mode, shape, case=case)
        expected = case.function(x, target, **options, return_grad=True, return_hess=True)
        x, target, grad, hess = map(make, (x, target, np.zeros(shape), np.zeros(shape)))
        options = {name: make(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
        buffers = {"return_grad": True, "grad_out": grad}, {"return_hess": True, "hess_out": hess}
        assert case.function(x, target, **options, **buffers[0])[1] is grad
        assert case.function(x, target, **options, **buffers[1])[1] is hess
        grad[...], hess[...] = 7, 7
        _, *found = case.function(x, target, **options, **buffers[0], **buffers[1])
        assert found[0] is grad
        assert found[1] is hess
        for result, value in zip(found, expected[1:], strict=True):
            np.testing.assert_allclose(np.asarray(result), value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("library", ["numpy", "subclass", "torch", "array_api_strict"])
def test_what_maps_and_layers_return_is_the_buffer(library: str) -> None:
    make = (lambda a: a.view(Own)) if library == "subclass" else pytest.importorskip(library).asarray
    x, w, y = make(np.ones((4, 3))), make(np.eye(3)), make(np.array([0, 1, 2, 0]))
    for function in (xce.softmax, xce.log_softmax):
        for axis in (-1, None, (0, 1)):
            out = make(np.zeros((4, 3)))
            assert function(x, axis, out=out) is out
            np.testing.assert_array_equal(np.asarray(out), np.asarray(function(x, axis)))
    buffers = make(np.zeros((4, 3))), make(np.zeros((3, 3))), make(np.zeros(3))
    options = {"linear_bias": make(np.zeros(3)), "return_grad": True}
    expected = xce.linear_cross_entropy(x, w, y, **options)[1]
    found = xce.linear_cross_entropy(x, w, y, **options, grad_out=buffers)[1]
    for result, buffer, value in zip(found, buffers, expected, strict=True):
        assert result is buffer
        np.testing.assert_allclose(np.asarray(result), np.asarray(value), rtol=1e-12, atol=1e-15)
    found = xce.linear_cross_entropy(x, w, y, return_grad=True, grad_out=(None, buffers[1], None))[1]
    assert found[1] is buffers[1]
    assert found[0] is not None
    assert found[2] is None


# PyTorch


def test_tensors_are_read_and_written_in_place() -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 0])
    grad = torch.empty(4, 5).T  # any strides
    value, result = xce.cross_entropy(x, y, return_grad=True, grad_out=grad)
    assert result is grad
    expected = torch.nn.functional.cross_entropy(x.requires_grad_(), y)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("mode", ["index", "probabilities"])
def test_bfloat16_tensors(mode: str) -> None:
    torch = pytest.importorskip("torch")
    x, y, options = problem({"weight": True}, mode, dtype=np.float32)
    narrow = torch.from_numpy(x).bfloat16()
    target = torch.from_numpy(y) if mode == "index" else torch.from_numpy(y).bfloat16()
    weight = torch.from_numpy(options["weight"]).bfloat16()
    value, grad = xce.cross_entropy(narrow, target, weight=weight, return_grad=True)
    expected = xce.cross_entropy(
        narrow.float().numpy(), target.numpy() if mode == "index" else target.float().numpy(),
        weight=weight.float().numpy(), return_grad=True,
    )  # fmt: skip
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    np.testing.assert_allclose(value.numpy(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad.float().numpy(), expected[1], rtol=2**-8)
    assert xce.softmax(narrow).dtype == torch.bfloat16
    out = torch.empty_like(narrow)
    assert xce.log_softmax(narrow, out=out) is out
    assert xce.cross_entropy(narrow, target, return_grad=True, grad_out=out)[1] is out
    with pytest.raises(ValueError, match=r"grad_out has dtype float32: expected bfloat16, the dtype of logits"):
        xce.cross_entropy(narrow, target, return_grad=True, grad_out=torch.empty(narrow.shape))
    with pytest.raises(ValueError, match=r"weight\[1\] = -2 is not allowed"):
        xce.cross_entropy(narrow, target, weight=torch.tensor([1, -2, 1, 1, 1, 1, 1]).bfloat16())


def test_tensors_that_are_refused() -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"logits requires grad: detach it, or use xce\.torch"):
        xce.cross_entropy(x.clone().requires_grad_(), y)
    with pytest.raises(TypeError, match="logits requires grad"):
        xce.cross_entropy(torch.nn.Parameter(x), y)
    with pytest.raises(TypeError, match=r"logits is a torch\.Tensor on device cpu, .* torch\.sparse_coo"):
        xce.cross_entropy(x.to_sparse(), y)
    with pytest.raises(TypeError, match=r"logits is a torch\.Tensor on device meta"):
        xce.cross_entropy(x.to("meta"), y)
    with pytest.raises(TypeError, match="logits has dtype complex64"):
        xce.cross_entropy(x.to(torch.complex64), y)


# ml_dtypes


def test_bfloat16_arrays_of_numpy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, y, _ = problem({}, dtype=ml_dtypes.bfloat16)
    value, grad = xce.cross_entropy(x, y, return_grad=True)
    expected = oracle(xce.cross_entropy, x, y, return_grad=True)
    assert value.dtype == np.float32
    assert grad.dtype == x.dtype
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad.astype("f4"), expected[1].astype("f4"), rtol=2**-8)


# JAX


def test_tracers_are_refused() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"x is being traced .* jax\.pure_callback"):
        jax.jit(xce.softmax)(jax.numpy.zeros(3))
    with pytest.raises(TypeError, match="logits is being traced"):
        jax.grad(lambda x: xce.cross_entropy(x, 0))(jax.numpy.zeros(3))


def test_arrays_of_numpy_beside_those_of_jax(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    x, y = rng.standard_normal((4, 3)).astype("f4"), np.array([0, 2, 1, 1])
    numbers = {"weight": np.array([1.0, 2.0, 0.5]), "sample_weight": np.array([1.0, 0.5, 2.0, 0.0], "f4")}
    numbers["where"] = np.array([[True, True, True]])
    here, flags = jax.numpy.asarray(x), {"return_grad": True, "return_hess": True}
    probabilities = np.full((4, 3), 1 / 3)
    for function, args, options in (
        (xce.cross_entropy, (y,), numbers),
        (xce.cross_entropy, (probabilities,), numbers),
        (xce.distillation_loss, (x[::-1],), {"sample_weight": numbers["sample_weight"]}),
        (xce.binary_cross_entropy_with_logits, (x > 0,), {"pos_weight": numbers["weight"]}),
    ):
        results = function(here, *args, **options, **flags)
        for result, expected in zip(results, function(x, *args, **options, **flags), strict=True):
            assert isinstance(result, jax.Array)
            np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-6)
    assert isinstance(xce.softmax(here, where=numbers["where"]), jax.Array)
    assert float(xce.logsumexp(here, b=numbers["weight"])[0]) == xce.logsumexp(x, b=numbers["weight"])[0]
    assert isinstance(xce.linear_cross_entropy(here, rng.standard_normal((5, 3)).astype("f4"), y), jax.Array)
    with pytest.raises(ValueError, match="grad_out is read-only: arrays of JAX cannot be written"):
        xce.cross_entropy(here, y, return_grad=True, grad_out=np.empty_like(x))
    with pytest.raises(TypeError, match=r"logits is a numpy\.ndarray but target is a jaxlib"):
        xce.cross_entropy(x, jax.numpy.asarray(y))


def test_bfloat16_arrays() -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray([[1.0, 2.0, 0.5]], jax.numpy.bfloat16)
    value, grad = xce.cross_entropy(x, jax.numpy.asarray([1]), return_grad=True)
    assert value.dtype == np.float32
    assert grad.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(value, xce.cross_entropy(np.asarray(x, "f4"), np.array([1])), rtol=1e-6)


# What is imported


def test_no_library_is_imported_for_numpy() -> None:
    code = (
        "import sys, numpy, xce; x = numpy.zeros((2, 3)); y = numpy.zeros(2, int)\n"
        "xce.cross_entropy(x, y, return_grad=True, label_smoothing=0.1); xce.softmax(x)\n"
        "found = {'cupy', 'torch', 'jax', 'dask', 'matplotlib', 'scipy', 'ml_dtypes'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_of_a_type_is_found_once() -> None:
    x = np.zeros(3)
    assert _libraries.library_of(x, "x") is _libraries._known[np.ndarray]


def test_type_names_are_those_of_users() -> None:
    assert _arrays.described(np.zeros(1)) == "a numpy.ndarray"
    assert _arrays.described(1.0) == "a float"
    assert _arrays.described(1) == "an int"
    assert _arrays.described(None) == "None"


def test_types_that_come_and_go_are_not_kept() -> None:
    """A subclass lives as long as its owner wants, not as long as the process."""
    y = np.array([0, 1, 2])
    expected, types = xce.cross_entropy(np.ones((3, 4)), y), weakref.WeakSet()
    for _ in range(20):
        kind = type("Own", (np.ndarray,), {})
        types.add(kind)
        for _ in range(2):
            assert xce.cross_entropy(np.ones((3, 4)).view(kind), y) == expected
    del kind
    gc.collect()
    assert not types


def test_what_a_library_has_besides_arrays() -> None:
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    struct, x, y = jax.ShapeDtypeStruct((3,), np.int32), np.ones((3, 4)), np.array([0, 1, 2])
    for bad, like, library in ((struct, jax.numpy.asarray, "jax"), (torch.nn.Linear(2, 2), torch.from_numpy, "torch")):
        for args, name in (((bad, like(y)), "logits"), ((like(x), bad), "target")):
            with pytest.raises(TypeError, match=rf"{name} is a {library}\.\w+: expected an array of NumPy"):
                xce.cross_entropy(*args)
        with pytest.raises(TypeError, match=rf"sample_weight is a {library}\.\w+: expected an array of NumPy"):
            xce.cross_entropy(like(x), like(y), sample_weight=bad)
    with pytest.raises(TypeError, match="target has dtype key<fry>: expected numbers"):
        xce.cross_entropy(jax.numpy.asarray(x), jax.random.key(0))


def test_tensors_without_numbers() -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, y = torch.ones(3, 4), torch.tensor([0, 1, 2])
    negative = (x + 1j * x).conj().imag
    assert negative.is_neg()
    with pytest.raises(TypeError, match=r"logits has the negative bit.*: pass logits\.resolve_neg\(\)"):
        xce.cross_entropy(negative, y)
    assert float(xce.cross_entropy(negative.resolve_neg(), y)) == float(xce.cross_entropy(-x, y))
    with pytest.raises(TypeError, match=r"x holds no numbers, as where it is being traced or transformed .*: expected"):
        torch.func.vmap(xce.softmax)(x)
    with FakeTensorMode():
        fake = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"target holds no numbers, as where it is being traced"):
        xce.cross_entropy(x, fake)
    with pytest.raises(TypeError, match=r"logits is a torch\.Tensor on device meta, .*: expected dense tensors"):
        xce.cross_entropy(x.to("meta"), y)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 1.0), ("axis", 1), ("ignore_index", 1), ("label_smoothing", 0.5), ("softcap", 1.0),
     ("z_loss", 0.5), ("n_threads", 1), ("validate", True), ("return_grad", True)],
)  # fmt: skip
def test_options_without_numbers(name: str, value: Any) -> None:
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    x, y = np.ones((3, 4)), np.array([0, 1, 2])
    message = f"{name} is a .* that holds no number, as where it is being traced .*: expected a concrete number"
    logits, labels = jax.numpy.asarray(x), jax.numpy.asarray(y)
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda option: xce.cross_entropy(logits, labels, **{name: option}))(value)
    with pytest.raises(TypeError, match=message):
        xce.cross_entropy(torch.from_numpy(x), torch.from_numpy(y), **{name: torch.asarray(value, device="meta")})
    with pytest.raises(TypeError, match=message):
        xce.cross_entropy(x, y, **{name: jax.ShapeDtypeStruct((), np.asarray(value).dtype)})

"""Which backend owns an array: the type decides, and nothing is imported that the caller has not imported.

A backend is a module of `xce._backends` with

    place(x)            the context of device and stream of the caller's array; None: it needs none, or is entered
    view(x, name)       the caller's array as the array that is checked and computed on, sharing its memory
    run(call)           the computation
    run_linear(call)    that of a `LinearCall`
    wrap(result)        a result in the caller's own kind of array
    scan_labels, scan_values, scan_repetitions, classes_left    see `xce._backends._scan`
    to_numpy(x)         the numbers of such an array on the host
    from_numpy(x, like) an array of the host as such an array, where `like` is; libraries without kernels need none
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy
from numpy import generic, ndarray

# Top-level package of an array's type (or of one of its bases) -> module in xce._backends.
_BACKENDS = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy"}

# How a library makes an array of its own of something else.
_CONVERSIONS = {
    "numpy": "numpy.asarray",
    "torch": "torch.as_tensor",
    "jax": "jax.numpy.asarray",
    "cupy": "cupy.asarray",
}

# A method by which a type that is refused is recognised -> what its owner should do; the first match counts.
_REFUSED = {
    "filled": "masks are not read: fill it first, {name}.filled(value)",
    "to_numpy": "convert it first, {name}.to_numpy()",
    "toarray": "sparse arrays are not supported: convert it first, {name}.toarray()",
    "todense": "sparse arrays are not supported: convert it first, {name}.todense()",
    "compute": "lazy arrays are not supported: compute it first, {name}.compute()",
}

F = TypeVar("F", bound=Callable[..., Any])

_owners: dict[type, ModuleType] = {}  # of the libraries' own types
_owners_of_others: WeakKeyDictionary[type, ModuleType] = WeakKeyDictionary()  # of subclasses, which come and go


def owner_of(x: Any, name: str, library: str = "numpy") -> ModuleType:
    """Return the backend that owns `x`; the argument's name and the caller's library are for the error message."""
    return _owners.get(type(x)) or _find(x, name, library)


def view(owner: ModuleType, first: Any, x: Any, name: str, first_name: str) -> Any:
    """Return `x` as `owner` computes on it; it must be of the library and on the device of the call's `first` array.

    Arrays of NumPy may accompany those of JAX on the CPU, which are computed on as such.
    """
    if type(x) is not type(first):
        library, own = _library(type(first)), _library(type(x))
        if library == "jax" and own == "numpy" and owner.is_on_cpu(first):
            return owner_of(x, name, "numpy").view(x, name)
        if _is_of_another(x, name, owner, library):
            convert = _CONVERSIONS.get(library, f"{library}.asarray")
            raise TypeError(
                f"{first_name} is {described(first)} but {name} is {described(x)}: expected all "
                f"arrays of a call from one library: convert it first, {convert}({name})"
            )
    if type(first) is not ndarray:
        here, there = _device(first), _device(x)
        if not (here is None or there is None or here == there):
            raise ValueError(
                f"{first_name} is on {here} but {name} is on {there}: expected all arrays of a call on one device"
            )
    return owner.view(x, name)


def view_buffer(owner: ModuleType, first: Any, x: Any, name: str, first_name: str) -> Any:
    """Return an array that is to be written to, or None if there is none."""
    if x is None:
        return None
    if isinstance(x, generic):
        raise TypeError(f"{name} is {described(x)}: expected an array, which can be written to")
    if _library(type(first)) == "jax":
        raise ValueError(
            f"{name} is read-only: arrays of JAX cannot be written; leave it out, and use what is returned"
        )
    return view(owner, first, x, name, first_name)


def namespace(x: Any) -> Any:
    """Return the array-API namespace of `x`: NumPy itself for its arrays, as array_api_compat's takes 0.1 s to load."""
    if type(x) is ndarray or isinstance(x, generic):
        return numpy
    from array_api_compat import array_namespace

    return array_namespace(x)


def device_of(x: Any) -> Any:
    """Return the device of an array, as the functions of its namespace take it."""
    if type(x) is ndarray or isinstance(x, generic):
        return "cpu"
    from array_api_compat import device

    return device(x)


def _device(x: Any) -> Any:
    """The device of an array, or None where that is not for the library to say."""
    device = getattr(x, "device", None)
    return None if hasattr(device, "device_set") else device  # the sharding of an array of JAX over several


def placed(position: int) -> Callable[[F], F]:
    """Let a function of an owner and other arguments run on the device, and its stream, of the one at `position`."""

    def decorate(function: F) -> F:
        @wraps(function)
        def placed(owner: ModuleType, *args: Any, **options: Any) -> Any:
            x = args[position - 1]
            place = None if type(x) is ndarray else owner.place(x)
            if place is None:
                return function(owner, *args, **options)
            with place:
                return function(owner, *args, **options)

        return placed  # type: ignore[return-value]

    return decorate


def _is_of_another(x: Any, name: str, owner: ModuleType, library: str) -> bool:
    own = _library(type(x))
    if own != library and own in _BACKENDS.values():  # whose backend need not be imported to say so
        return True
    return owner_of(x, name, library) is not owner or own != library  # the latter: two generic libraries


def described(x: Any) -> str:
    """Return what `x` is, as users know its type: ``a numpy.ndarray``, ``an int``, ``None``."""
    if x is None:
        return "None"
    kind = type(x)
    package = kind.__module__.partition(".")[0]
    name = kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def _library(kind: type) -> str:
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((_BACKENDS[package] for package in packages if package in _BACKENDS), packages[0])


def _find(x: Any, name: str, library: str) -> ModuleType:
    kind = type(x)
    if (known := _owners_of_others.get(kind)) is not None:
        return known
    hint = next((f": {text}" for method, text in _REFUSED.items() if hasattr(x, method)), None)
    backend = _library(kind)
    if hint is None and backend in _BACKENDS.values():
        if not (hasattr(x, "__array__") or hasattr(x, "__dlpack__")):  # what a library has besides arrays
            hint = ""
    elif hint is None:
        from array_api_compat import is_array_api_obj

        backend = "generic"
        if not is_array_api_obj(x):
            can_be_converted = isinstance(x, list | tuple) or hasattr(x, "__array__")
            hint = (
                f": convert it first, {_CONVERSIONS.get(library, 'numpy.asarray')}({{name}})"
                if can_be_converted
                else ""
            )
    if hint is not None:
        raise TypeError(
            f"{name} is {described(x)}: expected an array of NumPy, PyTorch, JAX, CuPy or another array-API library"
            + hint.format(name=name)
        )
    is_own = kind.__module__.partition(".")[0] in _BACKENDS
    owners: MutableMapping[type, ModuleType] = _owners if is_own else _owners_of_others
    owner = owners[kind] = import_module(f"xce._backends.{backend}")
    return owner

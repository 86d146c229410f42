"""Which backend owns an array: the type decides, and nothing is imported that the caller has not imported.

A backend is a module of `xce._backends` with

    place(x)            the context of device and stream of the caller's array; None: it needs none, or is entered
    view(x, name)       the caller's array as the array that is checked and computed on, sharing its memory
    run(call)           the computation
    run_linear(call)    that of a `LinearCall`
    wrap(result)        a result in the caller's own kind of array
    scan_labels, scan_values    see `xce._backends._scan`
    to_numpy(x)         the numbers of such an array on the host
    from_numpy(x, like) an array of the host as such an array, where `like` is; libraries without kernels need none
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from numpy import ndarray

# Top-level package of an array's type (or of one of its bases) -> module in xce._backends.
_BACKENDS = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy"}

# A method by which a type that is refused is recognised -> what its owner should do; the first match counts.
_REFUSED = {
    "filled": "a masked array has no mask here: fill it first, {name}.filled(value)",
    "to_numpy": "convert it first, {name}.to_numpy()",
    "toarray": "sparse arrays are not supported: convert it first, {name}.toarray()",
    "todense": "sparse arrays are not supported: convert it first, {name}.todense()",
    "compute": "lazy arrays are not supported: compute it first, {name}.compute()",
}

F = TypeVar("F", bound=Callable[..., Any])

_owners: dict[type, ModuleType] = {}


def owner_of(x: Any, name: str) -> ModuleType:
    """Return the backend that owns `x`; `name` is the argument, for the error message."""
    return _owners.get(type(x)) or _find(x, name)


def view(owner: ModuleType, first: Any, x: Any, name: str, first_name: str) -> Any:
    """Return `x` as `owner` computes on it; it must be of the library and on the device of the call's `first` array."""
    if type(x) is not type(first) and _is_of_another(x, name, owner, _library(type(first))):
        raise TypeError(
            f"{first_name} is a {type_name(first)} but {name} is a {type_name(x)}: all arrays of a "
            "call must come from one library"
        )
    if type(first) is not ndarray:
        here, there = _device(first), _device(x)
        if not (here is None or there is None or here == there):
            raise ValueError(
                f"{first_name} is on {here} but {name} is on {there}: all arrays of a call must be on one device"
            )
    return owner.view(x, name)


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


def _is_of_another(x: Any, name: str, owner: ModuleType, library: str | None) -> bool:
    own = _library(type(x))
    if own != library and own in _BACKENDS.values():  # whose backend need not be imported to say so
        return True
    return owner_of(x, name) is not owner or own != library  # the latter: two generic libraries


def type_name(x: Any) -> str:
    """Return the type of `x` as users know it: ``numpy.ndarray``."""
    kind = type(x)
    package = kind.__module__.partition(".")[0]
    return kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"


def _library(kind: type) -> str | None:
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((_BACKENDS[package] for package in packages if package in _BACKENDS), packages[0])


def _find(x: Any, name: str) -> ModuleType:
    hint = next((text for method, text in _REFUSED.items() if hasattr(x, method)), None)
    backend = _library(type(x))
    if hint is None and backend not in _BACKENDS.values():
        from array_api_compat import is_array_api_obj

        backend = "generic"
        if not is_array_api_obj(x):
            hint = "convert it first, numpy.asarray({name})"
    if hint is not None:
        raise TypeError(
            f"{name} is a {type_name(x)}; allowed are arrays of NumPy, PyTorch, JAX, CuPy and other "
            f"array-API libraries: {hint.format(name=name)}"
        )
    owner = _owners[type(x)] = import_module(f"xce._backends.{backend}")
    return owner

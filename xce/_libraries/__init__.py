"""Whose an array is: its type decides. No library of arrays is imported that the caller has not imported.

A library is a module of this package, and a line of the table below.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from numpy import generic, ndarray

from xce._arrays import Array, described
from xce._engines import Engine

# Top-level package of an array's type (or of one of its bases) -> module of this package.
_LIBRARIES = {"numpy": "numpy", "torch": "torch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy"}

# A method by which a type that is refused is recognised -> what the caller should do; the first match counts.
_REFUSED = {
    "filled": "masks are not read: fill it first, {name}.filled(value)",
    "to_numpy": "convert it first, {name}.to_numpy()",
    "toarray": "sparse arrays are not supported: convert it first, {name}.toarray()",
    "todense": "sparse arrays are not supported: convert it first, {name}.todense()",
    "compute": "lazy arrays are not supported: compute it first, {name}.compute()",
}


class Library(Protocol):
    """How the arrays of a library are seen, and how results are given back."""

    @property
    def CONVERSION(self) -> str:  # noqa: N802
        """The function that makes an array of this library of another one."""

    @property
    def IS_WRITABLE(self) -> bool:  # noqa: N802
        """Whether its arrays can be written to."""

    def engine(self, x: Any) -> Engine:
        """Return what computes on an array."""

    def place(self, x: Any) -> AbstractContextManager[Any] | None:
        """Return the context of an array's device and stream; None if it needs none, or is entered."""

    def device(self, x: Any) -> Any:
        """Return an array's device, or None where that is not for the library to say."""

    def takes_numpy(self, x: Any) -> bool:
        """Return whether arrays of NumPy may accompany an array."""

    def view(self, x: Any, name: str) -> Array:
        """Return the caller's array as its engine computes on it, sharing its memory."""

    def wrap(self, result: Any) -> Any:
        """Return a result of the engine in the caller's own kind of array."""


if TYPE_CHECKING:  # whether they are libraries
    from xce._libraries import cupy, jax, numpy, other, torch

    _: tuple[Library, ...] = (numpy, torch, jax, cupy, other)

_known: dict[type, Library] = {}  # of the libraries' own types
_known_others: WeakKeyDictionary[type, Library] = WeakKeyDictionary()  # of subclasses, which come and go
_NOWHERE = nullcontext()


class Arrays(NamedTuple):
    """The arrays of one call: whose they are, and what computes on them."""

    library: Library
    engine: Engine
    first: Array  # which decides
    name: str  # of that argument

    def place(self) -> AbstractContextManager[Any]:
        """Return the context in which to see the arrays, and to compute on them."""
        return self.library.place(self.first) or _NOWHERE

    def view_first(self) -> Array:
        """Return the first array as it is computed on."""
        return self.library.view(self.first, self.name)

    def view(self, x: Any, name: str) -> Array:
        """Return another array as it is computed on; it must be of the same library and on the same device.

        Arrays of NumPy may accompany those of JAX on the CPU, which are computed on as such.
        """
        library, first = self.library, self.first
        if type(x) is not type(first):
            package = _package(type(x))
            is_another = package != _package(type(first))
            if is_another and package == "numpy" and library.takes_numpy(first):
                return library_of(x, name).view(x, name)
            if not is_another or package not in _LIBRARIES.values():  # whose module need not be imported to say so
                library_of(x, name, library)
            if is_another:
                raise TypeError(
                    f"{self.name} is {described(first)} but {name} is {described(x)}: expected all "
                    f"arrays of a call from one library: convert it first, {_conversion(library, first)}({name})"
                )
        if type(first) is not ndarray:
            here, there = library.device(first), library.device(x)
            if not (here is None or there is None or here == there):
                raise ValueError(
                    f"{self.name} is on {here} but {name} is on {there}: expected all arrays of a call on one device"
                )
        return library.view(x, name)

    def view_buffer(self, x: Any, name: str) -> Array:
        """Return an array that is to be written to."""
        if isinstance(x, generic):
            raise TypeError(f"{name} is {described(x)}: expected an array, which can be written to")
        if not self.library.IS_WRITABLE:
            raise ValueError(
                f"{name} is read-only: arrays of JAX cannot be written; leave it out, and use what is returned"
            )
        return self.view(x, name)

    def wrap(self, result: Any) -> Any:
        """Return an array, or a tuple of them, as the caller's kind."""
        wrap = self.library.wrap
        return tuple(map(wrap, result)) if type(result) is tuple else wrap(result)


def arrays_of(x: Any, name: str) -> Arrays:
    """Return whose a call's first array is; `name` is that of the argument, for error messages."""
    library = library_of(x, name)
    return Arrays(library, library.engine(x), x, name)


def library_of(x: Any, name: str, of: Library | None = None) -> Library:
    """Return whose an array is; for error messages, the argument's name and the library that it should be of."""
    return _known.get(type(x)) or _find(x, name, of)


def _conversion(library: Library | None, x: Any) -> str:
    if library is None:
        return "numpy.asarray"
    return library.CONVERSION or f"{_package(type(x))}.asarray"


def _package(kind: type) -> str:
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((_LIBRARIES[package] for package in packages if package in _LIBRARIES), packages[0])


def _find(x: Any, name: str, of: Library | None) -> Library:
    kind = type(x)
    if (known := _known_others.get(kind)) is not None:
        return known
    hint = next((f": {text}" for method, text in _REFUSED.items() if hasattr(x, method)), None)
    module = _package(kind)
    if hint is None and module in _LIBRARIES.values():
        if not (hasattr(x, "__array__") or hasattr(x, "__dlpack__")):  # what a library has besides arrays
            hint = ""
    elif hint is None:
        from array_api_compat import is_array_api_obj

        module = "other"
        if not is_array_api_obj(x):
            can_be_converted = isinstance(x, list | tuple) or hasattr(x, "__array__")
            hint = f": convert it first, {_conversion(of, x)}({{name}})" if can_be_converted else ""
    if hint is not None:
        raise TypeError(
            f"{name} is {described(x)}: expected an array of NumPy, PyTorch, JAX, CuPy or another array-API library"
            + hint.format(name=name)
        )
    is_own = kind.__module__.partition(".")[0] in _LIBRARIES
    known_by: MutableMapping[type, Library] = _known if is_own else _known_others
    library = known_by[kind] = _module(module)
    return library


def _module(name: str) -> Library:
    return import_module(f"xce._libraries.{name}")

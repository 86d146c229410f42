"""Documentation that functions share: written out once, complete in every ``help``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

_SECTION = re.compile(r"^(\w[\w ]+)\n-{3,}\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\w[\w, ]*) : .*(?:\n(?: .*|$))*", re.MULTILINE)


def documented_like(source: Callable[..., object]) -> Callable[[F], F]:
    """Complete a function's docstring by what it has in common with that of `source`.

    Parameters that the function does not describe, and the sections Returns and Raises if they are missing, are
    those of `source`. The last paragraph of its Notes, which is on gradients, goes to whatever returns them.
    """

    def complete(function: F) -> F:
        if function.__doc__ is None or source.__doc__ is None:  # python -OO
            return function
        own, shared = _sections(function.__doc__), _sections(source.__doc__)
        described = _entries(shared["Parameters"]) | _entries(own.get("Parameters", ""))
        wanted = list(inspect.signature(function).parameters)
        entries: list[str] = []
        for name in wanted:
            entry = next(text for names, text in described.items() if name in names.split(", "))
            if entry not in entries:  # one entry may describe several
                entries.append(entry)
        own["Parameters"] = "\n".join(entries)
        for name in ("Returns", "Raises"):
            own.setdefault(name, shared[name])
        if "return_grad" in wanted:
            paragraphs = [own["Notes"]] if "Notes" in own else []
            own["Notes"] = "\n\n".join([*paragraphs, shared["Notes"].rpartition("\n\n")[2]])
        order = ["", "Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
        function.__doc__ = "\n\n".join(
            f"{name}\n{'-' * len(name)}\n{own[name]}" if name else own[name] for name in order if name in own
        )
        return function

    return complete


def _sections(doc: str) -> dict[str, str]:
    """The text before the first heading, under "", and that under each heading."""
    parts = _SECTION.split(inspect.cleandoc(doc))
    return {"": parts[0].strip()} | {
        heading: text.strip("\n") for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _entries(section: str) -> dict[str, str]:
    """The entries of a section Parameters, by their names."""
    return {match[1]: match[0].rstrip() for match in _ENTRY.finditer(section)}

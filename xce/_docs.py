"""Documentation that functions share: written out once, complete in every ``help``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

__all__ = ["complete"]

_SECTION = re.compile(r"^(\w[\w ]+)\n-{3,}\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\w[\w, ]*) : .*(?:\n(?: .*|$))*", re.MULTILINE)


def complete(function: Callable[..., object], described: dict[str, str], source: Callable[..., object] | None) -> None:
    """Complete a function's docstring by parameters that are described elsewhere, and by that of `source`.

    Of `source` are other parameters that the function does not describe, and the sections Returns and Raises if they
    are missing. The last paragraph of its Notes, which is on gradients, goes to whatever returns them.
    """
    if function.__doc__ is None:  # python -OO
        return
    own, shared = _sections(function), {} if source is None else _sections(source)
    described = _entries(shared.get("Parameters", "")) | described | _entries(own.get("Parameters", ""))
    wanted = inspect.signature(function).parameters
    entries: dict[str, None] = {}  # one may describe several; the last is the function's own
    for name in wanted:
        entries[[text for names, text in described.items() if name in names.split(", ")][-1]] = None
    own["Parameters"] = "\n".join(entries)
    for heading in ("Returns", "Raises"):
        if heading in shared:
            own.setdefault(heading, shared[heading])
    if "return_grad" in wanted and "Notes" in shared:
        paragraphs = [own["Notes"]] if "Notes" in own else []
        own["Notes"] = "\n\n".join([*paragraphs, shared["Notes"].rpartition("\n\n")[2]])
    order = ["", "Parameters", "Returns", "Raises", "Notes", "References", "Examples"]
    function.__doc__ = "\n\n".join(
        f"{heading}\n{'-' * len(heading)}\n{own[heading]}" if heading else own[heading]
        for heading in order
        if heading in own
    )


def _sections(function: Callable[..., object]) -> dict[str, str]:
    """The text before the first heading, under "", and that under each heading."""
    parts = _SECTION.split(inspect.cleandoc(function.__doc__ or ""))
    return {"": parts[0].strip()} | {
        heading: text.strip("\n") for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _entries(section: str) -> dict[str, str]:
    """The entries of a section Parameters, by their names."""
    return {match[1]: match[0].rstrip() for match in _ENTRY.finditer(section)}

"""Where the package lies: beside its compiled modules, never as bare sources."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def compiled_path(package: str, path: list[str]) -> list[str]:
    """The path to import submodules from.

    Python started in the root of a checkout finds the sources of ``xce`` first, which have no compiled modules. The
    installed package is then taken instead, so that tests and commands run from there use what was built.
    """
    if importlib.util.find_spec(f"{package}._cpu.runtime") is not None:
        return path
    root = Path(path[0]).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = importlib.machinery.PathFinder.find_spec(package, elsewhere)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(
            f"{root / package} holds the sources of xce, which are not compiled. Install them: pip install {root}"
        )
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]  # what was looked at in the sources
    return list(spec.submodule_search_locations)

"""Imports of optional packages, with one clear line when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

import click

__all__ = ["require"]


def require(module: str) -> ModuleType:
    """Import a module that comes with the extra ``demo``.

    Parameters
    ----------
    module : str
        Dotted name, for example ``"scipy.optimize"``.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    click.ClickException
        When the package is not installed; the message says what to install.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks a dependency of its own is another problem: show its traceback.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        name = {"sklearn": "scikit-learn"}.get(package, package)
        raise click.ClickException(f"this command needs {name}, which comes with: pip install 'xce[demo]'") from None

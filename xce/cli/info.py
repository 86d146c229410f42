"""``xce info``: what is installed, and what it found on this machine."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from typing import Any

import click
from rich.table import Table
from rich.text import Text

import xce

from ._console import console_output
from ._errors import EXIT_CODES

__all__ = ["collect", "info"]

# Distributions that xce can work with; only their metadata is read, because importing torch takes seconds.
_PEERS = (
    "array-api-compat",
    "ml_dtypes",
    "cupy",
    "cupy-cuda11x",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "jax",
    "dask",
    "scipy",
    "scikit-learn",
    "xgboost",
    "lightgbm",
    "catboost",
    "matplotlib",
    "click",
    "rich",
)


def collect() -> dict[str, Any]:
    """Gather the facts that a bug report needs.

    Returns
    -------
    dict
        What ``xce.show_config(mode="dicts")`` returns, and ``"packages"``: the versions of optional packages.
    """
    facts = dict(xce.show_config(mode="dicts") or {})
    packages = dict(facts.get("packages") or {})
    for name in _PEERS:
        try:
            packages.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["packages"] = packages
    return facts


@click.command(epilog=EXIT_CODES, short_help="Show versions, kernels, threads and GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show versions, CPU kernels, threads and GPUs; paste it into a bug report."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2, default=str))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _flatten(facts):
        table.add_row(Text(key), Text(value))
    with console_output() as console:
        console.print(table)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _flatten(item, f"{name}[{number}].")
                else:
                    yield f"{name}[{number}]", _text(item)
        else:
            yield name, _text(value)


def _text(value: object) -> str:
    if value is None or value == [] or value == {} or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)

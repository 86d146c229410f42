"""Tables on standard output, written at once: errors of writing are then raised here, and nowhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click
from rich.console import Console

from ._errors import give_up

__all__ = ["console_output", "note"]

_LEAST_WIDTH = 80  # in less, tables would leave out digits; and COLUMNS=0 is no width


@contextlib.contextmanager
def console_output() -> Iterator[Console]:
    """Collect what is printed to a console, and write it to standard output at the end.

    Yields
    ------
    rich.console.Console
        As wide and as colourful as standard output. Written by itself, a closed pipe would end the process.

    Raises
    ------
    OSError
        When standard output cannot be written.
    """
    console = Console()
    if console.width < _LEAST_WIDTH:
        console = Console(width=_LEAST_WIDTH)
    with console.capture() as text:
        yield console
    click.echo(text.get(), nl=False, color=True)  # the console knows whether colours are wanted


def note(text: str) -> None:
    """Say something on standard error, if anybody can read it there.

    Parameters
    ----------
    text : str
        What results do not depend on.
    """
    try:
        click.echo(text, err=True)
    except OSError:
        give_up(sys.stderr)

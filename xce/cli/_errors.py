"""How a command ends when something goes wrong: one line on standard error, and one of a few exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, TextIO

import click

__all__ = [
    "EXIT_CODES",
    "CommandGroup",
    "OneLineError",
    "OutputError",
    "UnwrittenFileError",
    "give_up",
    "one_line",
    "one_line_errors",
]

EXIT_CODES = """\b
Exit codes:
  0    success
  1    an input that cannot be used, a missing package, or too little memory
  2    wrong usage
  3    the results were printed, but a file could not be written
  4    standard output could not be written
  130  interrupted (Ctrl-C)
"""


class OneLineError(click.ClickException):
    """Anything that the user can do something about."""

    def format_message(self) -> str:
        """Return the message; the name of a file in it may hold a line break."""
        return self.message.replace("\n", "\\n")

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message; where that is not possible, the exit code still tells what happened."""
        try:
            super().show(file)
        except OSError:
            give_up(sys.stderr)


class _WrongUsageError(OneLineError):
    exit_code = 2


class UnwrittenFileError(OneLineError):
    """A file that could not be written, after all results were printed."""

    exit_code = 3


class OutputError(OneLineError):
    """Standard output that could not be written."""

    exit_code = 4


class _InterruptedError(OneLineError):
    exit_code = 130  # what a shell reports for a process that Ctrl-C ended


def one_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn whatever a user can cause into an exception that click shows as one line.

    Raises
    ------
    click.ClickException
        With the line, and the exit code.
    """
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    try:
        yield
    except click.UsageError as error:
        hint = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
        raise _WrongUsageError(error.format_message().removesuffix(".") + hint) from None
    except KeyboardInterrupt:
        raise _InterruptedError("interrupted") from None
    except MemoryError as error:
        raise OneLineError(f"too little memory: {one_line(error)}") from None
    except ImportError as error:
        if error.name is not None:  # an installation that is broken: its traceback says where
            raise
        raise OneLineError(one_line(error)) from None
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OneLineError(f"too little memory: {one_line(error)}") from None
        if error.filename is not None:
            raise OneLineError(f"{error.filename}: {one_line(error)}") from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OneLineError(f"no further file can be opened: {one_line(error)}") from None
        give_up(sys.stdout)
        raise OutputError(f"standard output could not be written: {one_line(error)}") from None


class CommandGroup(click.Group):
    """A group of commands that end in one line, whatever a user does."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the arguments; ``--help`` prints here."""
        with one_line_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with one_line_errors():
            return super().invoke(ctx)


def give_up(stream: TextIO) -> None:
    """Let what is still buffered go nowhere: Python would try once more when it exits, and complain.

    Parameters
    ----------
    stream : text file
        Standard output or standard error, which could not be written.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

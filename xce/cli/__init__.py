"""The command ``xce``: a demonstration, the scoring of saved logits, and the facts of an installation.

Everything the commands need beyond the library itself comes with the extra ``demo``. This module must
therefore import without it: click and rich are loaded by `command_group`, anything heavier by the command
that needs it.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

__all__ = ["command_group", "main"]


def command_group() -> click.Group:
    """Build the click group of all commands.

    Returns
    -------
    click.Group
        The command ``xce`` with its subcommands ``demo``, ``score`` and ``info``.

    Raises
    ------
    ModuleNotFoundError
        When click or rich is not installed.
    """
    import click

    from ._errors import EXIT_CODES, CommandGroup
    from .demo import demo
    from .info import info
    from .score import score

    @click.group(
        cls=CommandGroup,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=EXIT_CODES,
    )
    @click.version_option(package_name="xce", prog_name="xce")
    @click.pass_context
    def group(ctx: click.Context) -> None:
        """Cross-entropy losses for arrays: try them, score saved logits, inspect the installation."""
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())

    for command in (demo, score, info):
        group.add_command(command)
    return group


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, and exit.

    Parameters
    ----------
    args : sequence of str, optional
        Arguments after the command's name; ``sys.argv[1:]`` when omitted.

    Raises
    ------
    SystemExit
        Always: with one of the exit codes that ``xce --help`` lists.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may hold what a terminal cannot show
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command_group().main(args=None if args is None else list(args), prog_name="xce")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in {"click", "rich"}:
            raise
        sys.exit(f"Error: the command xce needs {package}, which comes with: pip install 'xce[demo]'")
    except OSError as error:  # a module that cannot be read
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:  # while modules are imported
        print("Error: interrupted", file=sys.stderr)
        sys.exit(130)

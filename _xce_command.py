"""The command ``xce`` from its first moment: an interrupt while it is imported ends it as one that comes later does.

It lies beside the package, whose own import is what takes the time.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Import the commands, and run one."""
    # a process that was told to ignore interrupts ignores them
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, _end)  # an exception might become another on its way out of a module
    from xce.cli import main as run

    with contextlib.suppress(ModuleNotFoundError):  # which `run` reports
        from xce.cli import demo, info, score  # noqa: F401
    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"Error: interrupted\n")
    os._exit(130)

"""How many threads a call gets, and what the package runs on."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from xce import _cpu
from xce._call import thread_count
from xce._cpu import runtime

# Waking a second thread costs 3 to 18 us, and a logit some 0.4 ns: with fewer logits a thread it does not pay.
LOGITS_PER_THREAD = 32768
SERIAL_BELOW = 2 * LOGITS_PER_THREAD

_cap: int | None = None
_context_cap: ContextVar[int | None] = ContextVar("xce.num_threads", default=None)


def team(asked: int | None, n_logits: int) -> int:
    """The threads for one call: the least of everything that limits them."""
    if n_logits < SERIAL_BELOW:
        return 1
    limit = min(n_logits // LOGITS_PER_THREAD, get_num_threads())
    return limit if asked is None else min(asked, limit)


def get_num_threads() -> int:
    """Return the greatest number of threads that a call made here and now would use.

    It is the least of the cap of `set_num_threads`, what OpenMP allows (``OMP_NUM_THREADS``, threadpoolctl), the CPUs
    that the process may run on, and the CPU quota of its control group.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import xce
    >>> with xce.num_threads(1):
    ...     xce.get_num_threads()
    1
    """
    limit: int = min(runtime.max_threads(), hardware_limit())
    for cap in (_cap, _context_cap.get()):
        if cap is not None and cap < limit:
            limit = cap
    return limit


def set_num_threads(n: int | None) -> None:
    """Cap the number of threads of all later calls in this process.

    Parameters
    ----------
    n : int or None
        The cap, at least 1; None removes it. It starts as the environment variable ``XCE_NUM_THREADS``.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or less than 1.

    Examples
    --------
    >>> import xce
    >>> xce.set_num_threads(1)
    >>> xce.get_num_threads()
    1
    >>> xce.set_num_threads(None)
    """
    global _cap
    _cap = thread_count("n", n)


@contextlib.contextmanager
def num_threads(n: int | None) -> Iterator[None]:
    """Cap the number of threads within a ``with`` block, for the calls of this thread (or asyncio task).

    Parameters
    ----------
    n : int or None
        The cap, at least 1, beside that of `set_num_threads`; None: no other.

    Examples
    --------
    >>> import xce
    >>> with xce.num_threads(1):
    ...     xce.get_num_threads()
    1
    """
    token = _context_cap.set(thread_count("n", n))
    try:
        yield
    finally:
        _context_cap.reset(token)


@functools.cache
def hardware_limit() -> int:
    """The CPUs this process may use: its affinity mask and the quota of its control group."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        n = os.cpu_count() or 1
    return max(1, min(n, _group_quota()))


def _group_quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            fields = (root / quota).read_text().split()
            if period is not None:
                fields.append((root / period).read_text())
            if float(fields[0]) > 0:  # "max" raises: no limit
                return math.ceil(float(fields[0]) / float(fields[1]))
    return sys.maxsize


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, Any] | None:
    """Show what the package runs on: versions, instruction set, threads, OpenMP, GPU.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Print it, or return it.

    Returns
    -------
    dict or None
        With "dicts": nested dictionaries of strings, numbers and lists.

    Raises
    ------
    ValueError
        `mode` is none of the two.

    Examples
    --------
    >>> import xce
    >>> sorted(xce.show_config(mode="dicts"))
    ['cpu', 'gpu', 'numpy', 'openmp', 'python', 'threads', 'xce']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode={mode!r} is unknown: it must be one of 'stdout', 'dicts'")
    cupy = next((d for d in metadata.distributions() if (d.name or "").startswith("cupy")), None)
    config: dict[str, Any] = {
        "xce": metadata.version("xce"),
        "python": sys.version.split()[0],
        "numpy": metadata.version("numpy"),
        "cpu": {"level": _cpu.level(), "available": list(_cpu.available_levels())},
        "threads": {
            "used": get_num_threads(),
            "cap": _cap,
            "openmp": runtime.max_threads(),
            "hardware": hardware_limit(),
        },
        "openmp": runtime.openmp_version() or None,
        "gpu": None if cupy is None else f"{cupy.name} {cupy.version}",
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        print(f"{key:8}", ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value)
    return None


if os.environ.get("XCE_NUM_THREADS"):
    try:
        _cap = thread_count("XCE_NUM_THREADS", int(os.environ["XCE_NUM_THREADS"]))
    except ValueError as error:
        raise ValueError(
            f"XCE_NUM_THREADS={os.environ['XCE_NUM_THREADS']!r} must be an integer of at least 1"
        ) from error

"""How many threads a call gets, and what the package runs on."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from xce import _cpu
from xce._checks import thread_count
from xce._cpu import runtime

# Waking a second thread costs 3 to 18 us, and a logit some 0.4 ns: with fewer logits a thread it does not pay.
LOGITS_PER_THREAD = 32768
SERIAL_BELOW = 2 * LOGITS_PER_THREAD


def _cap_of_environment() -> tuple[int | None, str]:
    """What ``XCE_NUM_THREADS`` asks for, and what is wrong with it."""
    text = os.environ.get("XCE_NUM_THREADS", "")
    if not text:
        return None, ""
    try:
        return thread_count("XCE_NUM_THREADS", int(text)), ""
    except ValueError:
        return None, f"XCE_NUM_THREADS={text!r} is not allowed: expected an integer of at least 1"


_cap, _refusal = _cap_of_environment()
_context_cap: ContextVar[int | None] = ContextVar("xce.num_threads", default=None)
_is_serial_untold = runtime.openmp_version() == 0  # one thread for every call, and nobody has been told yet


def team(asked: int | None, n_logits: int) -> int:
    """The threads for one call: the least of everything that limits them."""
    if n_logits < SERIAL_BELOW:
        return 1
    if _is_serial_untold:
        _tell_of_one_thread(asked, n_logits)
    limit = min(n_logits // LOGITS_PER_THREAD, get_num_threads())
    return runtime.startable(limit if asked is None else min(asked, limit))


def _tell_of_one_thread(asked: int | None, n_logits: int) -> None:
    """Warn, once in a process, where a call would have got several threads if xce had been built with OpenMP."""
    global _is_serial_untold
    possible = _capped(min(n_logits // LOGITS_PER_THREAD, hardware_limit()))
    if (possible if asked is None else min(asked, possible)) == 1:
        return
    _is_serial_untold = False
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "xce":
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"xce computes on one thread of the {hardware_limit()} that this process may use: it was built without OpenMP. "
        "Build it again with GCC, or with Clang and its libomp; or say xce.set_num_threads(1) if one thread will do",
        RuntimeWarning,
        stacklevel=level,
    )


def check_environment() -> None:
    """Refuse a wrong ``XCE_NUM_THREADS``: not while xce is imported, so that a command can say it in one line."""
    if _refusal:
        raise ImportError(_refusal)


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
    check_environment()
    return _capped(min(runtime.max_threads(), hardware_limit()))


def _capped(limit: int) -> int:
    for cap in (_cap, _context_cap.get()):
        if cap is not None and cap < limit:
            limit = cap
    return limit


def set_num_threads(n: int | None) -> None:
    """Cap the number of threads of all later calls in this process.

    Parameters
    ----------
    n : int or None
        The cap, at least 1; None removes it. It starts as the environment variable ``XCE_NUM_THREADS``, which the first
        call refuses with an ImportError if it is no such integer.

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
    global _cap, _refusal
    _cap, _refusal = thread_count("n", n), ""


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
    """Show what the package runs on: versions, instruction set, threads, OpenMP, GPU, and what is missing for speed.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        Print it, or return it.

    Returns
    -------
    dict or None
        With "dicts": nested dictionaries of strings, numbers and lists. "missing" lists what this build lacks and this
        machine could use.

    Raises
    ------
    ValueError
        `mode` is none of the two.

    Examples
    --------
    >>> import xce
    >>> sorted(xce.show_config(mode="dicts"))
    ['cpu', 'gpu', 'missing', 'numpy', 'openmp', 'python', 'threads', 'xce']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode={mode!r} is unknown: expected 'stdout' or 'dicts'")
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
        "missing": _missing(),
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        for line in value or ["none"] if isinstance(value, list) else [value]:
            print(f"{key:8}", line)
    return None


def _missing() -> list[str]:
    missing = []
    if not runtime.openmp_version():
        missing.append("OpenMP: every call runs on one thread (GCC brings it along, Clang needs libomp)")
    if level := _cpu.level_not_built():
        missing.append(
            f"the kernels of x86-64-{level}, which this CPU could run: they were not built (-Dlevels of meson)"
        )
    return missing

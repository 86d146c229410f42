"""The cost of importing the package."""

from __future__ import annotations

from .common import import_seconds


class Import:
    """`import xce` in a fresh interpreter that has imported NumPy."""

    timeout = 120

    def track_import_time(self) -> float:
        return import_seconds()

    track_import_time.unit = "seconds"  # type: ignore[attr-defined]

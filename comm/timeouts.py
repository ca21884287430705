"""How torch wants to be told how long to wait. Reads no clock."""

from __future__ import annotations

from datetime import timedelta

Timeout = timedelta

FOR_EVER = timedelta(days=3650)


def timeout(seconds: float) -> Timeout:
    """Return a time as torch counts it: whole milliseconds, of which it takes none for a default of its own."""
    return timedelta(milliseconds=max(2, round(seconds * 1000)))

"""Sizes and times as text for people. Times are in UTC, because people in any time zone may read a log or an error."""

from __future__ import annotations

import time
from typing import Final

MAX_SHOWN_TIME: Final = 253402300799.0
"""The last second of the year 9999, in seconds since 1970. `registry.cli` and `registry.browse` show this time instead
of any later time, because Python's `datetime` cannot represent later years."""


def size_text(size_bytes: int) -> str:
    """Returns a number of bytes as text, such as `1.5 GiB`."""
    size, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size == int(size) else f"{size:.1f} {units[0]}"


def utc_text(unix_seconds: float) -> str:
    """Returns a time as text, such as `2026-01-31 09:30:00 UTC`. Rounds the time down to a whole second."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_seconds))


def date_text(unix_seconds: float) -> str:
    """Returns the day of a time as text, such as `2026-01-31`."""
    return time.strftime("%Y-%m-%d", time.gmtime(unix_seconds))

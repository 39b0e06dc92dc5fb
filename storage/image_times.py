"""Parses times in the documents of images (`parse_time`)."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_time(value: object) -> datetime | None:
    """Parses a time (RFC 3339), and returns it in UTC. A time without an offset counts as UTC. Returns None for other
    values, and for times in the year 1, which builders write instead of a missing time."""
    if not isinstance(value, str) or len(value) > 64:
        return None
    try:
        time = datetime.fromisoformat(value)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if time.year > 1 else None

"""Sizes as text for people."""

from __future__ import annotations


def size_text(size_bytes: int) -> str:
    """Returns a number of bytes as text for people, such as `1.5 GiB`."""
    size, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size == int(size) else f"{size:.1f} {units[0]}"

"""Times and sizes as people write them in settings."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, ByteSize, Field
from pydantic.fields import FieldInfo

KIB, MIB = 1 << 10, 1 << 20

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PIECE = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_DURATION = re.compile(rf"(?:{_PIECE}\s*)+", re.IGNORECASE)


def parse_duration(value: object) -> object:
    """Seconds from what people write: `90s`, `5m`, `1h30m`, `7d`, or a plain number of seconds. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 5m, 1h30m or 7d")
    text = value.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 5m, 1h30m or 7d")
    return sum(float(count) * _UNITS[unit.lower()] for count, unit in re.findall(_PIECE, text, re.IGNORECASE))


def format_duration(seconds: float) -> str:
    """`5400.0` as `1h30m`; what `parse_duration` reads back."""
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    rest, parts = int(seconds), []
    if rest >= 172800 and rest % 86400 == 0:  # `24h`, `36h`, but `7d`
        return f"{rest // 86400}d"
    for unit, length in (("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_size(count: int) -> str:
    """`8388608` as `8MiB`; what `ByteSize` reads back. A size that is no whole KiB is written in bytes."""
    for unit, length in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if count and count % length == 0:
            return f"{count // length}{unit}"
    return str(int(count))


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
"""Seconds."""


def is_size(field: FieldInfo) -> bool:
    """Whether a setting is a size."""
    return field.annotation is ByteSize


def is_duration(field: FieldInfo) -> bool:
    """Whether a setting is a time."""
    return any(isinstance(mark, BeforeValidator) and mark.func is parse_duration for mark in field.metadata)

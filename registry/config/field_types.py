"""The types that settings are made of: groups, durations, sizes, comma-separated lists, addresses."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from pydantic.fields import FieldInfo

KIB, MIB = 1 << 10, 1 << 20

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PIECE = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_DURATION = re.compile(rf"(?:{_PIECE}\s*)+", re.IGNORECASE)


class SettingsGroup(BaseModel):
    """Base of the groups of settings, such as `[gc]`. Unknown names are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split_commas(value: object) -> object:
    """Splits a list that a flag or a variable gives as text with commas. Returns any other value unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def split_http_url(value: str, example: str, *, query: bool = True, fragment: bool = True) -> SplitResult:
    """Splits an http or https URL with a host. `query`, `fragment`: whether it may have them. Raises ValueError with
    `example` in its message."""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or (parts.query and not query) or (parts.fragment and not fragment):
        raise ValueError(f"{value!r} is not an address like {example}")
    return parts


def parse_duration(value: object) -> object:
    """Returns the seconds of a duration such as `90s`, `5m`, `1h30m` or `7d`; a plain number is seconds. Raises
    ValueError."""
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
    """Writes seconds as a duration that `parse_duration` reads: `5400.0` as `1h30m`."""
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    rest, parts = int(seconds), []
    if rest >= 172800 and rest % 86400 == 0:  # from two days on: `24h`, `36h`, but `7d`
        return f"{rest // 86400}d"
    for unit, length in (("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_size(count: int) -> str:
    """Writes bytes as a size that `ByteSize` reads: `8388608` as `8MiB`. A size that is not a multiple of 1 KiB is
    written in bytes."""
    for unit, length in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if count and count % length == 0:
            return f"{count // length}{unit}"
    return str(int(count))


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
"""A duration in seconds."""


def is_size(field: FieldInfo) -> bool:
    """Returns whether a setting is a size in bytes."""
    return field.annotation is ByteSize


def is_duration(field: FieldInfo) -> bool:
    """Returns whether a setting is a duration."""
    return any(isinstance(mark, BeforeValidator) and mark.func is parse_duration for mark in field.metadata)

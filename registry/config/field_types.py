"""Types and validators for settings: groups, durations, sizes, comma-separated lists and URLs."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from pydantic.fields import FieldInfo

KIB, MIB = 1 << 10, 1 << 20

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_COUNT_AND_UNIT = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_DURATION = re.compile(rf"(?:{_COUNT_AND_UNIT}\s*)+", re.IGNORECASE)


class SettingsGroup(BaseModel):
    """Base class of the groups of settings, such as `[gc]`. Unknown names are errors, and the values cannot be
    changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split_commas(value: object) -> object:
    """Returns the list in a text with commas, as flags and variables contain it. Returns any other value unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def split_http_url(value: str, example: str, *, query: bool = True, fragment: bool = True) -> SplitResult:
    """Returns the parts of an http or https URL with a host. Raises ValueError for any other value; the message
    contains `example`, a valid URL. `query` and `fragment` say whether the URL may have these parts."""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or (parts.query and not query) or (parts.fragment and not fragment):
        raise ValueError(f"{value!r} is not an address like {example}")
    return parts


def parse_duration(value: object) -> object:
    """Returns the number of seconds in a duration such as `90s`, `5m`, `1h30m` or `7d`. A number without a unit is in
    seconds. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 5m, 1h30m or 7d")
    text = value.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 5m, 1h30m or 7d")
    return sum(
        float(count) * _UNIT_SECONDS[unit.lower()] for count, unit in re.findall(_COUNT_AND_UNIT, text, re.IGNORECASE)
    )


def format_duration(seconds: float) -> str:
    """Returns the text of a duration, which `parse_duration` reads again: `1h30m` for `5400.0`."""
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    remaining, parts = int(seconds), []
    if remaining >= 172800 and remaining % 86400 == 0:  # whole days only from two days on: `24h`, but `2d`
        return f"{remaining // 86400}d"
    for unit, unit_seconds in (("h", 3600), ("m", 60), ("s", 1)):
        count, remaining = divmod(remaining, unit_seconds)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_size(size_bytes: int) -> str:
    """Returns the text of a size, which pydantic's `ByteSize` reads again: `8MiB` for `8388608`. A size that is not a
    multiple of 1 KiB is written as the number of bytes."""
    for unit, unit_bytes in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return str(int(size_bytes))


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
"""A duration in seconds. Settings may also give it as text, such as `5m`."""


def is_size(field: FieldInfo) -> bool:
    """Returns whether a setting is a size in bytes."""
    return field.annotation is ByteSize


def is_duration(field: FieldInfo) -> bool:
    """Returns whether a setting is a duration."""
    return any(isinstance(item, BeforeValidator) and item.func is parse_duration for item in field.metadata)

"""The settings: one typed model, each setting with its help.

`Settings(...)` takes what it is given and defaults for the rest; it reads no environment and no file, so a test that
makes one depends on nothing else. `registry.cli.loading` builds it from flags, variables and a file, in that order.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "ENTREPOT_"
NESTED = "__"

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


def _public_url(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{value!r} is not an address like https://registry.example.com")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{value!r} must end after the host and port: clients ask for /v2/ at the root")
    return f"{parts.scheme}://{parts.netloc}"


def _directory(value: object) -> object:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{value!r} is not a directory's path")
    return value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
"""Seconds."""


def default_workers() -> int:
    """One for each core this process may use, at most four."""
    return max(1, min(len(os.sched_getaffinity(0)), 4))


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Collection(_Group):
    """Removal of content that nothing refers to any more. It runs while the registry serves."""

    grace: Duration = Field(
        default=86400.0,
        description="How long content stays after the last reference to it is gone, or after it was pushed",
    )
    interval: Duration = Field(default=3600.0, gt=0, description="Time between two collections")


class Uploads(_Group):
    """Upload sessions."""

    expire: Duration = Field(
        default=604800.0, gt=0, description="An upload nobody has continued for this long is dropped with its bytes"
    )


class Limits(_Group):
    """What a client may send."""

    manifest: ByteSize = Field(
        default=ByteSize(8 * MIB),
        ge=4 * MIB,
        le=64 * MIB,
        description="Largest manifest taken; a larger one gets 413",
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, env_ignore_empty=True, extra="forbid", frozen=True
    )

    data: Annotated[Path, BeforeValidator(_directory)] = Field(
        default=Path("data"),
        description="Directory that holds everything; a relative path starts at the working directory",
    )
    listen: str = Field(
        default="127.0.0.1:5000",
        description="Address to listen on, HOST:PORT; port 0 picks a free one. No accounts yet",
    )
    workers: int = Field(default_factory=default_workers, ge=1, le=64, description="Server processes")
    public_url: Annotated[str | None, AfterValidator(_public_url)] = Field(
        default=None, description="The registry's address as clients see it, where a proxy stands before it"
    )
    read_only: bool = Field(default=False, description="Refuse every push and delete")
    delete: bool = Field(default=True, description="Allow clients to delete tags, manifests and blobs")
    shutdown_grace: Duration = Field(
        default=30.0, description="How long running requests may go on after SIGTERM before they are cut"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity that is logged"
    )
    gc: Collection = Collection()
    uploads: Uploads = Uploads()
    limits: Limits = Limits()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives: the environment and the file are read, and named, by `registry.cli.loading`."""
        return (init_settings,)


def is_duration(field: FieldInfo) -> bool:
    """Whether a setting is a time."""
    return any(isinstance(mark, BeforeValidator) and mark.func is parse_duration for mark in field.metadata)

"""The settings of what is fetched before anybody asks for it: `[warm]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from registry.config.units import Duration
from registry.config.upstream import Group, listed
from storage.errors import RegistryError
from storage.names import parse_reference

ALL = "all"
_PLATFORM = re.compile(rf"{ALL}|[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")


def _reference(value: str) -> str:
    try:
        parse_reference(value)
    except RegistryError as error:
        raise ValueError(error.message) from None
    return value


def _platform(value: str) -> str:
    if not _PLATFORM.fullmatch(value):
        raise ValueError(f"{value!r} is not a platform like linux/amd64 or linux/arm/v7, and not {ALL}")
    return value


class Warm(Group):
    """Images of upstreams that are fetched before anybody asks for them, and kept up to date."""

    references: Annotated[list[Annotated[str, AfterValidator(_reference)]], NoDecode, BeforeValidator(listed)] = Field(
        default=[], description="Which, such as `ubuntu:24.04` or `ghcr.io/org/app:1`"
    )
    file: Path | None = Field(
        default=None, description="File of more of them, one a line, `#` begins a comment; read anew each time"
    )
    platforms: Annotated[list[Annotated[str, AfterValidator(_platform)]], NoDecode, BeforeValidator(listed)] = Field(
        default=[], description="For which platforms, such as `linux/arm64`, or `all`; without it this machine's"
    )
    interval: Duration = Field(default=21600.0, gt=0, description="Time between two rounds")

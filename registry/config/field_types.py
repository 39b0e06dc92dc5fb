"""Types, parsers and formatters that the models of the settings share: groups, durations, sizes, comma-separated lists,
URLs and host names."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from types import UnionType
from typing import Annotated, Final, Union, get_args, get_origin
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

KIB, MIB = 1 << 10, 1 << 20
AT_RESTART: Final[JsonDict] = {"takes_effect": "restart"}
"""The `json_schema_extra` of a setting or group whose change takes effect at `entrepot restart`, but not at
`entrepot reload`. `entrepot restart` replaces the program of the running server."""
AT_START: Final[JsonDict] = {"takes_effect": "start"}
"""The `json_schema_extra` of a setting or group whose change takes effect only when the server is stopped and then
started again, not at `entrepot reload` or `entrepot restart`."""

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_COUNT_AND_UNIT = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_DURATION = re.compile(rf"(?:{_COUNT_AND_UNIT}\s*)+", re.IGNORECASE)

MAX_HOST_LENGTH = 253
"""Longest host name, in characters. Its binary form has 255 bytes, the limit of RFC 1035, section 2.3.4."""
_HOST_CHARACTERS = re.compile(r"[a-z0-9._-]+|[0-9a-f.]*:[0-9a-f:.]*(%[a-z0-9._-]+)?")
"""Matches the characters of a host name, or of an IPv6 address with or without a zone. It allows no other characters,
such as a backslash, because programs disagree on where the host of a URL with such a character ends."""


class SettingsGroup(BaseModel):
    """Base class of the groups of settings, such as `[gc]`. An unknown name in a group is an error. A group is
    immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split_commas(value: object) -> object:
    """Splits a text with commas, such as the value of a flag or an environment variable, into a list. Returns a value
    of another type unchanged; pydantic checks the value afterwards."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _normalized_network(value: str) -> str:
    """Returns a network in its normal form. For an IP address, returns the network that contains only this address.
    Raises ValueError in these cases:

    - The text is neither a network nor an IP address.
    - The network's address has bits set after the prefix.
    - The network contains every address. The settings list the networks to trust, so this would trust every address."""
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{value!r} is not a network like 10.0.0.0/8, nor an address") from None
    if ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f"{value!r} has bits set after its prefix; write {network}, or an address without /")
    if network.prefixlen == 0:
        raise ValueError(f"{value!r} covers every address; list only the networks that you trust")
    return str(network)


NetworkList = Annotated[
    list[Annotated[str, AfterValidator(_normalized_network)]], NoDecode, BeforeValidator(split_commas)
]
"""The type of a setting that is a list of networks and IP addresses. Sources of settings may write it as a list or as
text with commas."""


def split_http_url(value: str, example: str, *, allow_query: bool = True, allow_fragment: bool = True) -> SplitResult:
    """Returns the parts of an http or https URL with a host. Raises ValueError for any other value, and for a URL with
    a query or fragment that is not allowed. The error message contains `example`, an example of a valid URL."""
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    if not is_valid or (parts.query and not allow_query) or (parts.fragment and not allow_fragment):
        raise ValueError(f"{value!r} is not an address like {example}")
    return parts


def normalized_host(host: str) -> str:
    """Returns a host name in the form in which host names are compared: in lower case, without a dot at the end, and
    encoded for the DNS if it is not ASCII. The encoding is IDNA 2008, which the library httpx2 also uses for its
    requests. Returns an IPv6 address in lower case. Raises ValueError if the name is empty or too long, has a character
    that `_HOST_CHARACTERS` does not match, or cannot be encoded."""
    host = host.lower()
    if len(host) <= MAX_HOST_LENGTH and not host.isascii():
        import idna  # imported here because most host names do not need its large tables

        host = idna.encode(host).decode()
    host = host.rstrip(".")
    if len(host) > MAX_HOST_LENGTH or not _HOST_CHARACTERS.fullmatch(host):
        raise ValueError("not a host's name")
    return host


def parse_duration(value: object) -> object:
    """Returns the number of seconds in a duration such as `90s`, `5m`, `1h30m` or `7d`. A number without a unit is a
    number of seconds. Raises ValueError for any other text, and for a value of another type."""
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
    """Returns a duration as text that `parse_duration` accepts: `1h30m` for `5400.0`. If the number of seconds is not
    whole, the text is a rounded number of milliseconds: `1500ms` for `1.5`."""
    if seconds != int(seconds):
        return f"{round(seconds * 1000)}ms"
    remaining, parts = int(seconds), []
    if remaining >= 172800 and remaining % 86400 == 0:  # days only for 2 days or more: one day is written as `24h`
        return f"{remaining // 86400}d"
    for unit, unit_seconds in (("h", 3600), ("m", 60), ("s", 1)):
        count, remaining = divmod(remaining, unit_seconds)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_byte_size(size_bytes: int) -> str:
    """Returns a size as text that pydantic's `ByteSize` accepts: `8MiB` for `8388608`. Writes a size that is not a
    multiple of 1 KiB as a number of bytes."""
    for unit, unit_bytes in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return str(int(size_bytes))


MAX_DURATION_SECONDS: Final = 1_000_000 * 86400.0
"""The longest duration, about 2,700 years. Python's `datetime` cannot represent times that are much further away."""
Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, le=MAX_DURATION_SECONDS, allow_inf_nan=False)]
"""The type of a setting that is a duration. Its value is in seconds. Sources of settings may write it as a number of
seconds or as text such as `5m`."""


def is_size(field: FieldInfo) -> bool:
    """Returns whether the value of a setting is a size in bytes."""
    return field.annotation is ByteSize or ByteSize in get_args(field.annotation)


def is_duration(field: FieldInfo) -> bool:
    """Returns whether the type of a setting is `Duration` or `Duration | None`."""
    metadata = field.metadata
    if get_origin(field.annotation) in (Union, UnionType):
        # pydantic copies the validators of `Duration`, an `Annotated[float, …]`, to `field.metadata`, but not the
        # validators of a member of a union.
        metadata = [item for member in get_args(field.annotation) for item in get_args(member)[1:]]
    return any(isinstance(item, BeforeValidator) and item.func is parse_duration for item in metadata)

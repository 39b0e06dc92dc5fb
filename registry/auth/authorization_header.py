"""Parses the Authorization header strictly (RFC 9110, 11.6.2; RFC 7617 for Basic, RFC 6750 for Bearer)."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from storage.errors import Unauthorized

MAX_HEADER_BYTES: Final = 32 * 1024
"""The longest header value that is parsed."""
REFUSED: Final = "the credentials are not valid"
"""The error text for all wrong credentials. It is always the same, so that it reveals nothing."""

_BEARER_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Basic:
    """A user name and a secret, such as a password. Each may be empty, and the secret may contain a colon."""

    user: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bearer:
    """The text of a bearer token, not verified yet."""

    token: str = field(repr=False)


def parse_authorization(values: Sequence[bytes]) -> Basic | Bearer | None:
    """Returns the credential in the Authorization header of a request. `values` holds the value of each such header.
    Returns None if there is none. Raises Unauthorized if there are several, or if the header is too long, malformed or
    of another scheme than Basic and Bearer."""
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_HEADER_BYTES:
        raise Unauthorized(REFUSED)
    scheme, _, rest = values[0].strip().partition(b" ")
    rest = rest.strip(b" ")
    if scheme.lower() == b"bearer" and _BEARER_TOKEN.fullmatch(rest):
        return Bearer(rest.decode("ascii"))
    if scheme.lower() == b"basic":
        return _basic(rest)
    raise Unauthorized(REFUSED)


def _basic(encoded: bytes) -> Basic:
    """Parses the base64 part of a Basic header. Raises Unauthorized."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # the base class of UnicodeDecodeError and binascii.Error
        raise Unauthorized(REFUSED) from None
    user, colon, secret = text.partition(":")
    if not colon or _CONTROL_CHARACTER.search(text):
        raise Unauthorized(REFUSED)
    return Basic(user, secret)

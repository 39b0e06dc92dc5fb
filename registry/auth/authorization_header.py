"""Parses the Authorization header strictly (RFC 9110, 11.6.2; RFC 7617 for Basic, RFC 6750 for Bearer)."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from storage.errors import Unauthorized

LONGEST_HEADER: Final = 32 * 1024
"""Bytes of the header's value."""
REFUSED: Final = "the credentials are not valid"
"""The error text for all wrong credentials, whatever is wrong with them."""

_BEARER: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Basic:
    """A user name and a secret. Either may be empty, and the secret may hold ':'."""

    user: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bearer:
    """A bearer token."""

    token: str = field(repr=False)


def parse_authorization(values: Sequence[bytes]) -> Basic | Bearer | None:
    """Returns the credential in the Authorization headers of a request, or None if there is no header. Raises
    Unauthorized if there are several, or if the header is too long, malformed or of another scheme."""
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > LONGEST_HEADER:
        raise Unauthorized(REFUSED)
    scheme, _, rest = values[0].strip().partition(b" ")
    rest = rest.strip(b" ")
    if scheme.lower() == b"bearer" and _BEARER.fullmatch(rest):
        return Bearer(rest.decode("ascii"))
    if scheme.lower() == b"basic":
        return _basic(rest)
    raise Unauthorized(REFUSED)


def _basic(encoded: bytes) -> Basic:
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # UnicodeDecodeError and binascii.Error are such
        raise Unauthorized(REFUSED) from None
    user, colon, secret = text.partition(":")
    if not colon or _CONTROL.search(text):
        raise Unauthorized(REFUSED)
    return Basic(user, secret)

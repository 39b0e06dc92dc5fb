"""Parses the Authorization header of a request (RFC 9110, 11.6.2). Accepts the schemes Basic (RFC 7617) and Bearer (RFC
6750), and refuses every malformed header."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from storage.errors import Unauthorized

MAX_HEADER_BYTES: Final = 32 * 1024
"""Largest length of the header's value. A longer value is refused."""
INVALID_CREDENTIALS: Final = "the credentials are not valid"
"""The error message for every wrong credential. It does not reveal what is wrong."""

_BEARER_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
"""Matches a bearer token (`b64token` in RFC 6750, 2.1)."""
_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f]")
"""Matches a character that is not allowed in the user name and password of Basic (RFC 7617, 2)."""


@dataclass(frozen=True, slots=True)
class Basic:
    """The credential of the scheme Basic: a user name and a secret, such as a password. Both may be empty. The secret
    may contain a colon."""

    user: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bearer:
    """The credential of the scheme Bearer: the text of a token, which is not verified yet."""

    token: str = field(repr=False)


def parse_authorization(values: Sequence[bytes]) -> Basic | Bearer | None:
    """Returns the credential in the Authorization header of a request. `values`: the values of all Authorization
    headers of the request. Returns None if `values` is empty. Raises Unauthorized if `values` has more than one value,
    or if the value is too long, is malformed, or has a scheme other than Basic and Bearer."""
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_HEADER_BYTES:
        raise Unauthorized(INVALID_CREDENTIALS)
    scheme, _, credential_text = values[0].strip().partition(b" ")
    credential_text = credential_text.strip(b" ")
    if scheme.lower() == b"bearer" and _BEARER_TOKEN.fullmatch(credential_text):
        return Bearer(credential_text.decode("ascii"))
    if scheme.lower() == b"basic":
        return _parse_basic(credential_text)
    raise Unauthorized(INVALID_CREDENTIALS)


def _parse_basic(encoded: bytes) -> Basic:
    """Returns the credential in a Basic header. `encoded`: the part after the scheme, in base64. Raises Unauthorized if
    `encoded` is malformed."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # the base class of UnicodeDecodeError and binascii.Error
        raise Unauthorized(INVALID_CREDENTIALS) from None
    user, colon, secret = text.partition(":")
    if not colon or _CONTROL_CHARACTER.search(text):
        raise Unauthorized(INVALID_CREDENTIALS)
    return Basic(user, secret)

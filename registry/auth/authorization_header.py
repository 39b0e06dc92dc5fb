"""Parses the Authorization header of a request (RFC 9110, 11.6.2), with the schemes Basic (RFC 7617) and Bearer (RFC
6750). Refuses every header that is malformed."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from storage.errors import Unauthorized

MAX_HEADER_BYTES: Final = 32 * 1024
"""The longest value of the header that is parsed."""
REFUSED: Final = "the credentials are not valid"
"""The error text for all wrong credentials. The text is always the same, so that it does not reveal what is wrong."""

_BEARER_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~+/-]+=*")
"""The text of a bearer token (`b64token` in RFC 6750, 2.1)."""
_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f]")
"""A character that a user name and a password in Basic must not contain (RFC 7617, 2)."""


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
    """Returns the credential in the Authorization header of a request; None if the request has no such header. `values`
    are the values of all its Authorization headers. Raises Unauthorized if there are several, or if the value is too
    long or malformed, or has another scheme than Basic and Bearer."""
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_HEADER_BYTES:
        raise Unauthorized(REFUSED)
    scheme, _, credential_text = values[0].strip().partition(b" ")
    credential_text = credential_text.strip(b" ")
    if scheme.lower() == b"bearer" and _BEARER_TOKEN.fullmatch(credential_text):
        return Bearer(credential_text.decode("ascii"))
    if scheme.lower() == b"basic":
        return _basic(credential_text)
    raise Unauthorized(REFUSED)


def _basic(encoded: bytes) -> Basic:
    """Returns the credential in a Basic header. `encoded` is the part after the scheme, in base64. Raises Unauthorized
    if it is malformed."""
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8")
    except ValueError:  # the base class of UnicodeDecodeError and binascii.Error
        raise Unauthorized(REFUSED) from None
    user, colon, secret = text.partition(":")
    if not colon or _CONTROL_CHARACTER.search(text):
        raise Unauthorized(REFUSED)
    return Basic(user, secret)

"""Places in lists that show only a part of what there is.

A page may end at something that its reader may not see: when it has cost enough, or at an entry that is left out. The
place to go on from is then sealed: encrypted and authenticated with a key of the store, of one length whatever it is.
Every process of the store can read it. A place that can be seen stays as it is.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from registry.http.errors import RequestInvalid

_PREFIX: Final = "~"
"""A sealed place begins with it. No name does."""
_NONCE_BYTES: Final = 12
_PLAIN_BYTES: Final = 482
"""Bytes that are encrypted: more than any place has."""
SEALED_LENGTH: Final = len(_PREFIX) + (_NONCE_BYTES + _PLAIN_BYTES + 16) * 4 // 3
"""Characters of a sealed place. The tag has 16 bytes, and base64 needs no padding."""


class CursorKind(StrEnum):
    """A kind of list. A place in one of them is none in another."""

    REPOSITORIES = "repositories"
    GRANTS = "grants"


Secrets = Callable[[], Awaitable[Sequence[bytes]]]


def process_secrets() -> Secrets:
    """For a registry without a store of accounts: a secret that this process alone has."""
    secret = os.urandom(32)

    async def secrets() -> Sequence[bytes]:
        return (secret,)

    return secrets


class SealedCursors:
    """`secrets` gives those of the store: the first one seals, each of them is tried to read."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def seal(self, listing: CursorKind, place: str) -> str:
        """Raises StorageFull, StorageFailed."""
        text = place.encode("utf-8", "surrogatepass")
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + _cipher((await self._secrets())[0]).encrypt(
            nonce, text.ljust(_PLAIN_BYTES, b"\0"), listing.encode()
        )
        return _PREFIX + base64.urlsafe_b64encode(sealed).decode("ascii")

    async def read(self, listing: CursorKind, given: str | None) -> str | None:
        """The place that somebody gives to go on from. Raises RequestInvalid for one of another kind of list, and for
        one that another store has sealed, or a key that is gone."""
        if given is None or not given.startswith(_PREFIX) or len(given) != SEALED_LENGTH:
            return given
        try:
            sealed = base64.b64decode(given[len(_PREFIX) :], altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        for secret in await self._secrets():
            try:
                found = _cipher(secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], listing.encode())
            except (InvalidTag, ValueError):
                continue
            return found.rstrip(b"\0").decode("utf-8", "surrogatepass")
        raise RequestInvalid(
            "this registry does not know that place in the list; begin the list again, without a place"
        )


def _cipher(secret: bytes) -> AESGCM:
    return AESGCM(blake2b(secret, digest_size=32, person=b"place in a list").digest())

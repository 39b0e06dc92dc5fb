"""Cursors of lists that show only a part of the store.

A page may end at an entry that its reader must not see: when the page has cost enough, or at an entry that was left
out. The cursor to continue from is then sealed: encrypted and authenticated with a key of the store, always of the same
length. Every process of the store can read it. A cursor that its reader may see is passed as it is.
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

from registry.request import RequestInvalid

_PREFIX: Final = "~"
"""The first character of a sealed cursor. No name begins with it."""
_NONCE_BYTES: Final = 12
_PLAIN_BYTES: Final = 482
"""Bytes that are encrypted; every cursor is shorter and is padded to this."""
SEALED_LENGTH: Final = len(_PREFIX) + (_NONCE_BYTES + _PLAIN_BYTES + 16) * 4 // 3
"""Characters of a sealed cursor. The authentication tag has 16 bytes; base64 needs no padding at this length."""


class CursorKind(StrEnum):
    """A kind of list. A cursor of one kind is refused by the others."""

    REPOSITORIES = "repositories"
    GRANTS = "grants"


Secrets = Callable[[], Awaitable[Sequence[bytes]]]


def process_secrets() -> Secrets:
    """Returns a secret of this process alone, for a registry without a store of accounts."""
    secret = os.urandom(32)

    async def secrets() -> Sequence[bytes]:
        return (secret,)

    return secrets


class SealedCursors:
    """Seals and reads cursors. `secrets` returns the store's: the first one seals, all are tried when reading."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def seal(self, listing: CursorKind, place: str) -> str:
        """Returns the sealed cursor for `place`. Raises StorageFull, StorageFailed."""
        text = place.encode("utf-8", "surrogatepass")
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + _cipher((await self._secrets())[0]).encrypt(
            nonce, text.ljust(_PLAIN_BYTES, b"\0"), listing.encode()
        )
        return _PREFIX + base64.urlsafe_b64encode(sealed).decode("ascii")

    async def read(self, listing: CursorKind, given: str | None) -> str | None:
        """Returns the place that a client's cursor stands for. Raises RequestInvalid for a sealed cursor of another
        kind of list, of another store, or of a key that was removed."""
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

"""Encrypted cursors for lists that show a client only the entries that it may see.

A cursor is the position from which the client fetches the next page. A page can end at an entry that the client must
not see, because the server bounds the work for one page. The cursor then contains the hidden entry's name, so it is
*sealed*: encrypted and authenticated with a key of the store, and padded to one length. Every worker can open it. A
cursor that names a visible entry is sent in plain text.
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
"""The first character of a sealed cursor. No repository name, account or pattern begins with this character."""
_NONCE_BYTES: Final = 12
"""Length of the nonce of AES-GCM (NIST SP 800-38D, 8.2.2)."""
_TAG_BYTES: Final = 16
"""Length of the authentication tag of AES-GCM."""
_PLAIN_BYTES: Final = 482
"""Length to which a cursor is padded before it is encrypted, so that the length reveals nothing. Every cursor is
shorter. With this length, base64 needs no padding."""
SEALED_LENGTH: Final = len(_PREFIX) + (_NONCE_BYTES + _PLAIN_BYTES + _TAG_BYTES) * 4 // 3
"""Length of a sealed cursor in characters."""


class CursorKind(StrEnum):
    """The list that a cursor belongs to. A sealed cursor of one list is refused by the other."""

    REPOSITORIES = "repositories"
    GRANTS = "grants"


Secrets = Callable[[], Awaitable[Sequence[bytes]]]
"""Returns the secrets from which the encryption keys are derived, the newest first."""


def process_secrets() -> Secrets:
    """Returns a source of one random secret that only this process knows, for a registry without a store of
    accounts."""
    secret = os.urandom(32)

    async def secrets() -> Sequence[bytes]:
        return (secret,)

    return secrets


class SealedCursors:
    """Seals and opens cursors. The first of the `secrets` seals; opening a cursor tries all of them."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def seal(self, kind: CursorKind, cursor: str) -> str:
        """Returns the sealed form of a plain `cursor`. The first call for a store creates its key, so this raises
        StorageFull, StorageFailed."""
        text = cursor.encode("utf-8", "surrogatepass")
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + _cipher((await self._secrets())[0]).encrypt(
            nonce, text.ljust(_PLAIN_BYTES, b"\0"), kind.encode()
        )
        return _PREFIX + base64.urlsafe_b64encode(sealed).decode("ascii")

    async def read(self, kind: CursorKind, received: str | None) -> str | None:
        """Returns the plain form of a cursor that a client sent. Returns None if the client sent none, and the cursor
        unchanged if it is not sealed. Raises RequestInvalid for a sealed cursor of another kind of list, of another
        store, or of a key that was removed."""
        if received is None or not received.startswith(_PREFIX) or len(received) != SEALED_LENGTH:
            return received
        try:
            sealed = base64.b64decode(received[len(_PREFIX) :], altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        for secret in await self._secrets():
            try:
                opened = _cipher(secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], kind.encode())
            except (InvalidTag, ValueError):
                continue
            return opened.rstrip(b"\0").decode("utf-8", "surrogatepass")
        raise RequestInvalid(
            "this registry does not know that place in the list; begin the list again, without a place"
        )


def _cipher(secret: bytes) -> AESGCM:
    """Returns the cipher with a key that is derived from `secret` for cursors alone."""
    return AESGCM(blake2b(secret, digest_size=32, person=b"place in a list").digest())

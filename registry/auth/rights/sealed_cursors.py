"""Encrypted cursors for lists that show a client only the entries that it may see.

A cursor names the entry after which the next page of a list starts: a repository by its name, or a grant by its subject
and pattern. The server limits its work for one page, so a page can end at an entry that the client must not see. The
server then *seals* the cursor, so that the client does not learn the entry: it encrypts and authenticates the cursor,
and pads it so that all sealed cursors are equally long. The encryption key is derived from a *signing key*: a key in
the store that signs the registry's bearer tokens. All workers share the store, so each can decrypt the cursor. If the
client may see the entry, the server may send a plain cursor instead.
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
"""The first character of a sealed cursor. No plain cursor begins with it, because neither the name of a repository nor
the subject of a grant does."""
_NONCE_BYTES: Final = 12
"""The length of the nonce of AES-GCM (NIST SP 800-38D, 8.2.2)."""
_TAG_BYTES: Final = 16
"""The length of the authentication tag of AES-GCM."""
_PLAIN_BYTES: Final = 482
"""The length to which a cursor is padded before it is encrypted, so that the sealed cursor does not reveal the length
of a name. Every plain cursor is shorter. With this length, base64 adds no padding."""
SEALED_LENGTH: Final = len(_PREFIX) + (_NONCE_BYTES + _PLAIN_BYTES + _TAG_BYTES) * 4 // 3
"""The length of a sealed cursor in characters."""


class CursorKind(StrEnum):
    """The list to which a cursor belongs. `SealedCursors.read` accepts a sealed cursor only for its own list."""

    REPOSITORIES = "repositories"
    GRANTS = "grants"


Secrets = Callable[[], Awaitable[Sequence[bytes]]]
"""A function that returns the secrets from which the encryption keys are derived, the newest first. If the secrets are
the signing keys of a store, and the store has no key yet, the function creates one, and may raise StorageFull or
StorageFailed."""


def process_secrets() -> Secrets:
    """Returns a function that always returns the same random secret, which only this process knows. This is for a
    registry without a store of accounts, because such a registry has no signing keys."""
    secret = os.urandom(32)

    async def secrets() -> Sequence[bytes]:
        return (secret,)

    return secrets


class SealedCursors:
    """Seals cursors with the newest of the `secrets`, and reads cursors that were sealed with any of the `secrets`."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def seal(self, kind: CursorKind, cursor: str) -> str:
        """Returns the sealed form of a plain `cursor`. Raises the errors of `Secrets`."""
        newest, *_ = await self._secrets()
        nonce = os.urandom(_NONCE_BYTES)
        padded = cursor.encode("utf-8", "surrogatepass").ljust(_PLAIN_BYTES, b"\0")
        sealed = nonce + _cipher(newest).encrypt(nonce, padded, associated_data=kind.encode())
        return _PREFIX + base64.urlsafe_b64encode(sealed).decode("ascii")

    async def read(self, kind: CursorKind, received: str | None) -> str | None:
        """Returns the plain form of the cursor that a client sent for a list of this kind. If the client sent a plain
        cursor or none (None), returns `received` unchanged. Raises RequestInvalid for a sealed cursor that none of the
        secrets decrypts, or that belongs to a list of another kind. Raises the errors of `Secrets`."""
        if received is None or not received.startswith(_PREFIX) or len(received) != SEALED_LENGTH:
            return received
        try:
            sealed = base64.b64decode(received[len(_PREFIX) :], altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        for secret in await self._secrets():
            try:
                nonce, encrypted = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
                padded = _cipher(secret).decrypt(nonce, encrypted, associated_data=kind.encode())
            except (InvalidTag, ValueError):
                continue
            return padded.rstrip(b"\0").decode("utf-8", "surrogatepass")
        raise RequestInvalid(
            "the cursor is not one of this registry; request the list from its start, without a cursor"
        )


def _cipher(secret: bytes) -> AESGCM:
    """Returns the cipher for cursors. Its key is derived from `secret` and from a text that is used for no other
    key."""
    return AESGCM(blake2b(secret, digest_size=32, person=b"place in a list").digest())

"""Encrypted cursors for lists that show a client only the entries that it may see.

A cursor names the entry after which the next page of a list starts: a repository by its name, or a grant by its subject
and pattern. The server limits its work for one page, so this entry can be one that the client may not see. The server
then *seals* the cursor: it pads, encrypts and authenticates the cursor. All sealed cursors are equally long. If the
client may see the entry, the server may send a plain cursor.

The encryption key is derived from a *signing key*: a key in the store that signs the registry's bearer tokens. All
workers share the store, so each worker can decrypt the cursors of the others.
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
"""The first character of a sealed cursor. No plain cursor begins with it, because no repository name and no subject of
a grant begins with it."""
_NONCE_BYTES: Final = 12
"""The length of the nonce of AES-GCM (NIST SP 800-38D, 8.2.2)."""
_TAG_BYTES: Final = 16
"""The length of the authentication tag of AES-GCM."""
_PLAIN_BYTES: Final = 482
"""The length in bytes to which a cursor is padded before encryption, so that a sealed cursor does not reveal the length
of a name. Must not be shorter than any plain cursor. Must make the sealed bytes a multiple of 3, so that base64 adds no
padding."""
SEALED_LENGTH: Final = len(_PREFIX) + (_NONCE_BYTES + _PLAIN_BYTES + _TAG_BYTES) * 4 // 3
"""The length of a sealed cursor in characters."""


class CursorKind(StrEnum):
    """The list to which a cursor belongs. `SealedCursors.read` refuses a sealed cursor of another list."""

    REPOSITORIES = "repositories"
    GRANTS = "grants"


SecretsReader = Callable[[], Awaitable[Sequence[bytes]]]
"""A function that returns at least one secret, the newest first. The encryption keys are derived from the secrets. A
function that reads the signing keys of a store may raise StorageFull or StorageFailed, because it creates a key if the
store has none."""


def process_secrets_reader() -> SecretsReader:
    """Returns a reader of the secret of this process: a function that always returns the same random secret, which only
    this process knows. This function is for a registry without a store of accounts, which has no signing keys."""
    secret = os.urandom(32)

    async def secrets() -> Sequence[bytes]:
        return (secret,)

    return secrets


class SealedCursors:
    """Seals cursors with the newest secret that `read_secrets` returns, and reads cursors that were sealed with any of
    the secrets."""

    def __init__(self, read_secrets: SecretsReader) -> None:
        self._read_secrets = read_secrets

    async def seal(self, kind: CursorKind, cursor: str) -> str:
        """Returns the sealed form of a plain `cursor`. Raises the errors of `read_secrets`."""
        newest, *_ = await self._read_secrets()
        nonce = os.urandom(_NONCE_BYTES)
        padded = cursor.encode("utf-8", "surrogatepass").ljust(_PLAIN_BYTES, b"\0")
        sealed = nonce + _cipher(newest).encrypt(nonce, padded, associated_data=kind.encode())
        return _PREFIX + base64.urlsafe_b64encode(sealed).decode("ascii")

    async def read(self, kind: CursorKind, received: str | None) -> str | None:
        """Returns the plain form of the cursor that a client sent for a list of this kind. Returns a plain cursor
        unchanged, and None if the client sent no cursor. Raises RequestInvalid for a sealed cursor that none of the
        secrets decrypts, or that belongs to a list of another kind. Raises the errors of `read_secrets`."""
        if received is None or not received.startswith(_PREFIX) or len(received) != SEALED_LENGTH:
            return received
        try:
            sealed = base64.b64decode(received[len(_PREFIX) :], altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        for secret in await self._read_secrets():
            try:
                nonce, encrypted = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
                padded = _cipher(secret).decrypt(nonce, encrypted, associated_data=kind.encode())
            except (InvalidTag, ValueError):
                continue
            return padded.rstrip(b"\0").decode("utf-8", "surrogatepass")
        raise RequestInvalid(
            "this registry has not issued the cursor for this list; request the list from its start, without a cursor"
        )


def _cipher(secret: bytes) -> AESGCM:
    """Returns the cipher for cursors. Its key is derived from `secret` and from a text that is used for no other
    key."""
    return AESGCM(blake2b(secret, digest_size=32, person=b"place in a list").digest())

"""A bounded cache whose keys are secrets. It stores keyed hashes of the secrets, so a secret stays in memory only
during its request.

The hash is BLAKE2b under a random key of this process. So nobody can search the cache for a secret, nor recognise one
in a core dump.
"""

from __future__ import annotations

import hashlib
import os
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_ENTRIES = 4096
"""Default for the number of entries."""


class SecretCache(Generic[T]):
    """Values by `key_of` secrets. Evicts the oldest when there are more than `entries`."""

    def __init__(self, entries: int = MOST_ENTRIES) -> None:
        self._key = os.urandom(32)
        self._entries = entries
        self._held: dict[bytes, T] = {}

    def key_of(self, *secrets: str) -> bytes:
        """Returns the key for a list of secrets. Different lists have different keys."""
        if len(secrets) == 1:
            return hashlib.blake2b(secrets[0].encode("utf-8", "surrogatepass"), digest_size=32, key=self._key).digest()
        parts = [secret.encode("utf-8", "surrogatepass") for secret in secrets]
        text = b"".join(b"%d:%b" % (len(part), part) for part in parts)
        return hashlib.blake2b(text, digest_size=32, key=self._key, person=b"list").digest()

    def get(self, key: bytes) -> T | None:
        """Returns the value, or None."""
        return self._held.get(key)

    def put(self, key: bytes, value: T) -> None:
        """Stores a value in place of an older one under that key."""
        self.drop(key)
        self._held[key] = value
        if len(self._held) > self._entries:
            self.drop(next(iter(self._held)))

    def drop(self, key: bytes) -> None:
        """Removes an entry, if it exists."""
        self._held.pop(key, None)

    def __len__(self) -> int:
        return len(self._held)

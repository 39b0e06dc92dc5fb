"""A bounded cache whose keys are made from secrets.

A cache key is a keyed hash of the secrets (BLAKE2b). The hash key is random and belongs to this process, so a core dump
contains no secret, and nobody can test guesses against it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Generic, TypeVar

T = TypeVar("T")

DEFAULT_MAX_ENTRIES = 4096
"""The number of entries above which the oldest is evicted, unless another number is given."""


class SecretCache(Generic[T]):
    """Values by the keys that `key_of` makes from secrets. Above `max_entries` entries, evicts the oldest."""

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        self._hash_key = os.urandom(32)
        self._max_entries = max_entries
        self._values: dict[bytes, T] = {}

    def key_of(self, *secrets: str) -> bytes:
        """Returns the cache key for a list of secrets. `("ab", "c")` and `("a", "bc")` have different keys."""
        if len(secrets) == 1:
            return self._hash(secrets[0].encode("utf-8", "surrogatepass"))
        parts = [secret.encode("utf-8", "surrogatepass") for secret in secrets]
        text = b"".join(b"%d:%b" % (len(part), part) for part in parts)
        return self._hash(text, b"list")

    def get(self, key: bytes) -> T | None:
        """Returns the value under `key`, or None."""
        return self._values.get(key)

    def put(self, key: bytes, value: T) -> None:
        """Stores a value under `key`, in place of an older one."""
        self.remove(key)
        self._values[key] = value
        if len(self._values) > self._max_entries:
            self.remove(next(iter(self._values)))

    def remove(self, key: bytes) -> None:
        """Removes an entry, if it exists."""
        self._values.pop(key, None)

    def _hash(self, text: bytes, person: bytes = b"") -> bytes:
        """Returns the keyed hash. `person` is BLAKE2's personalization: equal texts with another one hash
        differently."""
        return hashlib.blake2b(text, digest_size=32, key=self._hash_key, person=person).digest()

    def __len__(self) -> int:
        return len(self._values)

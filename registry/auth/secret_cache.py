"""`SecretCache`: a bounded cache whose keys are hashes of secrets.

A cache key is a keyed hash (BLAKE2b) of one or more secrets, so the cache contains no secret. Each cache has a random
key for the hash. Without the random key, nobody can test a guess of a secret against the cache keys.
"""

from __future__ import annotations

import hashlib
import os
from typing import Generic, TypeVar

T = TypeVar("T")

DEFAULT_MAX_ENTRIES = 4096
"""The default for the largest number of entries in a cache."""


class SecretCache(Generic[T]):
    """A cache of values by cache key. `key_of` computes the cache key from secrets. If a new entry does not
    fit in `max_entries` entries, the cache evicts its oldest entry."""

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        self._hash_key = os.urandom(32)
        """The random key of the hash."""
        self._max_entries = max_entries
        self._values: dict[bytes, T] = {}

    def key_of(self, *secrets: str) -> bytes:
        """Returns the cache key for one or more secrets. `("ab", "c")` and `("a", "bc")` have different keys."""
        if len(secrets) == 1:
            return self._hash(secrets[0].encode("utf-8", "surrogatepass"))
        parts = [secret.encode("utf-8", "surrogatepass") for secret in secrets]
        joined = b"".join(b"%d:%b" % (len(part), part) for part in parts)
        # With the personalization, this hash differs from the hash of a single secret with the same bytes.
        return self._hash(joined, personalization=b"list")

    def get(self, key: bytes) -> T | None:
        """Returns the value under the cache key `key`; None if there is no value."""
        return self._values.get(key)

    def put(self, key: bytes, value: T) -> None:
        """Stores a value under the cache key `key`. Replaces the value that is stored there, if there is one."""
        self.remove(key)
        self._values[key] = value
        if len(self._values) > self._max_entries:
            self.remove(next(iter(self._values)))

    def remove(self, key: bytes) -> None:
        """Removes the entry under the cache key `key`, if there is one."""
        self._values.pop(key, None)

    def _hash(self, data: bytes, personalization: bytes = b"") -> bytes:
        """Returns the keyed hash of `data`. `personalization` is a parameter of BLAKE2: the same data has different
        hashes with different personalizations."""
        return hashlib.blake2b(data, digest_size=32, key=self._hash_key, person=personalization).digest()

    def __len__(self) -> int:
        return len(self._values)

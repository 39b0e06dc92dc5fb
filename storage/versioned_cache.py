"""`VersionedCache`: a cache for values that are computed from data that may change. A change of the data evicts all
values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

MAX_VALUE_DIVISOR: Final = 16
"""A cache does not store a value that takes, with its key, more than the capacity divided by this number. Such a value
would evict many other values."""
MAX_REMEMBERED_KEYS: Final = 4096
"""Largest number of keys that `should_cache` remembers. When this number is reached, `should_cache` forgets the older
half of the keys."""
SETTLED_MISSES: Final = 256
"""The data is *settled* after more than this number of calls of `should_cache` for the same version of the data. If the
data is settled, a cached value will probably be used before the data changes."""
MIN_FREE_DIVISOR: Final = 4
"""A cache *has room* if at least its capacity divided by this number is free."""
V = TypeVar("V")


class VersionedCache(Generic[V]):
    """A cache of values that are computed from data with a version.

    `version`: a function that returns the current version of the data. When the version has changed, the cache evicts
    all values, so `get` never returns a stale value. `capacity`: largest total size in bytes of the cached values and
    their keys. When a new value does not fit, the cache evicts the values that were stored first."""

    def __init__(self, version: Callable[[], object], capacity: int) -> None:
        self.version = version
        self.last_version: object = None
        """Version of the data from which the cached values were computed. `get` updates this attribute. If `get`
        returns None, the caller first reads `last_version`, then computes the value, and passes both to `put`."""
        self._capacity = capacity
        self._free_bytes = capacity
        self._entries: dict[Hashable, tuple[V, int]] = {}
        """Maps each key to a tuple: the value, and the size in bytes of the value and the key together. The oldest
        entry comes first."""
        self._recent_hashes: set[int] = set()
        """Hashes of the keys in the latest calls of `should_cache`. Hashes are kept because the keys can be long."""
        self._older_hashes: set[int] = set()
        """Hashes of the keys in earlier calls of `should_cache`."""
        self._misses = 0
        """Number of calls of `should_cache` since the cache last evicted all values."""

    def get(self, key: Hashable) -> V | None:
        """Returns the value of `key`. Returns None if the cache has no value of `key` for the current version of the
        data."""
        version = self.version()
        if version != self.last_version:
            self._clear(version)
            return None
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def should_cache(self, key: Hashable) -> bool:
        """Returns whether the caller should cache the value of `key`. Call this method after `get` has returned None.
        Returns True in two cases:

        - This method remembers an earlier call with the key. Most keys are requested only once, so
          their values would evict other values and save nothing.
        - The data is settled (`SETTLED_MISSES`) and the cache has room (`MIN_FREE_DIVISOR`)."""
        self._misses += 1
        if self._misses > SETTLED_MISSES and self._free_bytes * MIN_FREE_DIVISOR >= self._capacity:
            return True
        key_hash = hash(key)
        if key_hash in self._recent_hashes or key_hash in self._older_hashes:
            return True
        if len(self._recent_hashes) >= MAX_REMEMBERED_KEYS // 2:
            # Forgets half of the keys in one step, which is faster than to forget the oldest key at each call.
            self._older_hashes, self._recent_hashes = self._recent_hashes, set()
        self._recent_hashes.add(key_hash)
        return False

    def put(self, key: Hashable, value: V, size: int, version: object) -> None:
        """Caches `value`. Does nothing if the value with its key is too large (`MAX_VALUE_DIVISOR`), or if the cache
        already has a value for the key.

        - `size`: approximate size in bytes of everything in the cache entry except the texts in the key. `put` adds the
          size of these texts (`_key_bytes`).
        - `version`: the version that the data had before the value was computed. If the data has another version now,
          `get` never returns the value."""
        if version != self.last_version:
            if version != self.version():
                return
            self._clear(version)
        size += _key_bytes(key)
        if size > self._capacity // MAX_VALUE_DIVISOR or key in self._entries:
            return
        while size > self._free_bytes:
            self._free_bytes += self._entries.pop(next(iter(self._entries)))[1]
        self._entries[key] = value, size
        self._free_bytes -= size

    def _clear(self, version: object) -> None:
        """Evicts all values and sets `last_version` to `version`."""
        self._entries.clear()
        self.last_version, self._free_bytes, self._misses = version, self._capacity, 0


def _key_bytes(key: Hashable) -> int:
    """Returns how many bytes of memory the texts in a key take. The texts can be long, because clients may choose them.
    If the key is a tuple, counts all items. If the key is a text or bytes, counts the key. Otherwise returns 0."""
    if isinstance(key, tuple):
        return sum(map(sys.getsizeof, key))
    return sys.getsizeof(key) if isinstance(key, str | bytes) else 0

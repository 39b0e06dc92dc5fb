"""A cache that drops all values as soon as the data that they were computed from changes (`VersionedCache`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

LARGEST_SHARE: Final = 16
"""A value is cached only if it takes at most 1/16 of the capacity, so that no single value evicts most others."""
ASKED_KEYS: Final = 4096
"""Number of recently requested keys that `should_cache` remembers at most. It always remembers at least half as
many."""
V = TypeVar("V")


class VersionedCache(Generic[V]):
    """A cache of values that are computed from data with a version.

    `version` is a function that returns the current version of the data. When the version changes, all values are
    dropped, so the cache never returns a stale value. `capacity` bounds the total size of the values in bytes; the
    oldest values are evicted first."""

    def __init__(self, version: Callable[[], object], capacity: int) -> None:
        self.version = version
        self.last_version: object = None
        """Version of the data at the last call of `get`: pass it to `put` with a value that was computed after it."""
        self._capacity = capacity
        self._free_bytes = capacity
        self._entries: dict[Hashable, tuple[V, int]] = {}
        """Value and size of each key."""
        self._asked: set[int] = set()
        """Hashes of the keys that were requested last."""
        self._asked_before: set[int] = set()
        """Hashes of the keys that were requested before those in `_asked`."""

    def get(self, key: Hashable) -> V | None:
        """Returns the value of `key`, or None if no value is cached for the current version of the data."""
        version = self.version()
        if version != self.last_version:
            self._clear(version)
            return None
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def should_cache(self, key: Hashable) -> bool:
        """Returns whether a value for `key` is worth caching, which is the case from the second recent request for the
        key on. A client that reads the whole store requests most keys only once; caching these would cost more than it
        saves, and would evict other values."""
        key_hash = hash(key)
        if key_hash in self._asked or key_hash in self._asked_before:
            return True
        if len(self._asked) >= ASKED_KEYS // 2:
            # Forgets half of the keys at once, because finding the oldest key of a dict with many deletions is slow.
            self._asked_before, self._asked = self._asked, set()
        self._asked.add(key_hash)
        return False

    def put(self, key: Hashable, value: V, size: int, since: object) -> None:
        """Caches `value`. `size`: its approximate size in bytes. `since`: the version of the data, read before the
        value was computed. Does nothing if the data has changed since then, if the value is too large, or if the key
        has a value."""
        if since != self.last_version:
            if since != self.version():
                return
            self._clear(since)
        if size > self._capacity // LARGEST_SHARE or key in self._entries:
            return
        while size > self._free_bytes:
            self._free_bytes += self._entries.pop(next(iter(self._entries)))[1]
        self._entries[key] = value, size
        self._free_bytes -= size

    def _clear(self, version: object) -> None:
        """Drops all values, because the data has the new version `version`."""
        self._entries.clear()
        self.last_version, self._free_bytes = version, self._capacity

"""`SizedCache`: a cache for content that an upstream sends, such as tokens and search results. The cache limits both
the number of values and their bytes, because an upstream may send very large values."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ENTRY_BYTES = 256
"""Memory that the cache counts for each entry in addition to its key and value, so that small entries are not free."""


class SizedCache(Generic[K, V]):
    """A cache of at most `max_entries` entries (a key and its value), which take at most `max_bytes` together. When a
    new entry makes the cache exceed a limit, the oldest entries are removed. An entry that alone takes more than
    `max_bytes` is not stored."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: dict[K, tuple[V, int]] = {}
        """By key: the value, and the bytes of the entry. The oldest entry comes first."""
        self.size_bytes = 0
        """The bytes of all entries together, with `ENTRY_BYTES` for each."""

    def get(self, key: K) -> V | None:
        """Returns the value under `key`; None if there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """Stores `value` under `key`, and removes the earlier value under `key`. `size_bytes`: the memory that the key
        and the value take."""
        self.remove(key)
        entry_bytes = size_bytes + ENTRY_BYTES
        if entry_bytes > self._max_bytes:
            return
        self._entries[key] = value, entry_bytes
        self.size_bytes += entry_bytes
        while self.size_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self.remove(next(iter(self._entries)))

    def remove(self, key: K) -> None:
        """Removes the value under `key`, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry[1]

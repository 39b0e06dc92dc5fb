"""`SizedCache`: a cache for content that an upstream chooses, such as tokens and search results. It is limited by bytes
as well as by the number of its values, because the upstream also chooses how large each value is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ENTRY_BYTES = 256
"""Memory that is counted for each entry in addition to its key and value, so that small entries are not free."""


class SizedCache(Generic[K, V]):
    """A cache with at most `max_entries` values, of at most `max_bytes` together. When a new value makes the cache
    exceed a limit, the values that were put first are removed. A single value of more than `max_bytes` is not
    stored."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: dict[K, tuple[V, int]] = {}
        """By key: the value and its size in bytes. The value that was put first comes first."""
        self.size_bytes = 0
        """The bytes of all entries together."""

    def get(self, key: K) -> V | None:
        """Returns the value under `key`; None if there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def put(self, key: K, value: V, size_bytes: int) -> None:
        """Stores a value, in place of an earlier one under `key`. `size_bytes`: the memory that key and value take."""
        self.remove(key)
        size_bytes += ENTRY_BYTES
        if size_bytes > self._max_bytes:
            return
        self._entries[key] = value, size_bytes
        self.size_bytes += size_bytes
        while self.size_bytes > self._max_bytes or len(self._entries) > self._max_entries:
            self.remove(next(iter(self._entries)))

    def remove(self, key: K) -> None:
        """Removes the value under `key`, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= entry[1]

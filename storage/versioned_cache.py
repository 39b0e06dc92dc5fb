"""A cache whose values become invalid when a version changes (`VersionedCache`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

LARGEST_SHARE: Final = 16
"""A value that takes more than one part in so many of the capacity is not cached."""
ASKED_KEYS: Final = 4096
"""Most keys that are remembered as asked for; at least half as many are."""
A = TypeVar("A")


class VersionedCache(Generic[A]):
    """`version` returns the version of the data behind the values. When it changes, all values are dropped, so the
    cache never returns a stale one. Values together weigh at most `room`; the oldest are evicted first."""

    def __init__(self, version: Callable[[], object], room: int) -> None:
        self.version = version
        self.of: object = None
        """Version at the last `get`."""
        self._room = room
        self._left = room
        self._kept: dict[Hashable, tuple[A, int]] = {}
        self._asked: set[int] = set()
        self._asked_before: set[int] = set()

    def get(self, key: Hashable) -> A | None:
        """Returns the value of `key` if it is cached and still valid."""
        version = self.version()
        if version != self.of:
            self._forget(version)
            return None
        found = self._kept.get(key)
        return None if found is None else found[0]

    def wanted(self, key: Hashable) -> bool:
        """Returns whether a value for `key` is worth caching: the key was asked for before, not long ago. A scan of the
        whole store asks for most keys once; caching them would cost more than it saves, and evict others."""
        mark = hash(key)
        if mark in self._asked or mark in self._asked_before:
            return True
        if (
            len(self._asked) >= ASKED_KEYS // 2
        ):  # half at a time: finding the oldest key of a dict with many deletions is slow
            self._asked_before, self._asked = self._asked, set()
        self._asked.add(mark)
        return False

    def keep(self, key: Hashable, answer: A, weight: int, since: object) -> None:
        """Caches a value. `since`: the version taken before the lookup. `weight`: approximate size in bytes."""
        if since != self.of:
            if since != self.version():
                return
            self._forget(since)
        if weight > self._room // LARGEST_SHARE or key in self._kept:
            return
        while weight > self._left:
            self._left += self._kept.pop(next(iter(self._kept)))[1]
        self._kept[key] = answer, weight
        self._left -= weight

    def _forget(self, version: object) -> None:
        self._kept.clear()
        self.of, self._left = version, self._room

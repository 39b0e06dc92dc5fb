"""Answers that are kept until what they were made of changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

LARGEST_SHARE: Final = 16
"""An answer that needs more than this part of the room is not kept."""
ASKED_KEYS: Final = 4096
"""The most questions of which it is known that they were asked; at least half as many."""
A = TypeVar("A")


class VersionedCache(Generic[A]):
    """`version` gives a mark of what answers are made of; under another one all of them are forgotten, so none is ever
    given that a change has made stale. Answers together weigh at most `room`; then the oldest go first."""

    def __init__(self, version: Callable[[], object], room: int) -> None:
        self.version = version
        self.of: object = None
        """The mark that the last answer was asked for under."""
        self._room = room
        self._left = room
        self._kept: dict[Hashable, tuple[A, int]] = {}
        self._asked: set[int] = set()
        self._asked_before: set[int] = set()

    def get(self, key: Hashable) -> A | None:
        """What was kept under `key` and is still the answer."""
        version = self.version()
        if version != self.of:
            self._forget(version)
            return None
        found = self._kept.get(key)
        return None if found is None else found[0]

    def wanted(self, key: Hashable) -> bool:
        """Whether an answer to `key` is worth keeping: it was asked for before, not long ago. Questions that go all
        over a store are mostly asked once; keeping their answers costs more than it saves, and drives out others."""
        mark = hash(key)
        if mark in self._asked or mark in self._asked_before:
            return True
        if (
            len(self._asked) >= ASKED_KEYS // 2
        ):  # half at a time: finding the oldest of a dict that others went from is slow
            self._asked_before, self._asked = self._asked, set()
        self._asked.add(mark)
        return False

    def keep(self, key: Hashable, answer: A, weight: int, since: object) -> None:
        """`since` is a mark that was taken before the answer was looked up. `weight` is about its size in bytes."""
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

"""Answers that are kept until what they were made of changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

SHARE: Final = 16
"""An answer that needs more than this part of the room is not kept."""
A = TypeVar("A")


class Remembered(Generic[A]):
    """`version` gives a mark of what answers are made of; under another one all of them are forgotten, so none is ever
    given that a change has made stale. Answers together weigh at most `room`; then the oldest go first."""

    def __init__(self, version: Callable[[], object], room: int) -> None:
        self.version = version
        self._room = room
        self._left = room
        self._of: object = None
        self._kept: dict[Hashable, tuple[A, int]] = {}

    def get(self, key: Hashable) -> A | None:
        """What was kept under `key` and is still the answer."""
        version = self.version()
        if version != self._of:
            self._forget(version)
            return None
        found = self._kept.get(key)
        return None if found is None else found[0]

    def keep(self, key: Hashable, answer: A, weight: int, since: object) -> None:
        """`since` is a mark that was taken before the answer was looked up. `weight` is about its size in bytes."""
        if since != self._of:
            if since != self.version():
                return
            self._forget(since)
        if weight > self._room // SHARE or key in self._kept:
            return
        while weight > self._left:
            self._left += self._kept.pop(next(iter(self._kept)))[1]
        self._kept[key] = answer, weight
        self._left -= weight

    def _forget(self, version: object) -> None:
        self._kept.clear()
        self._of, self._left = version, self._room

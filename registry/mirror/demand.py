"""Who wants a blob that is on its way in: its readers, where they wait, and the pulls it was begun for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

LINGER: Final = 60.0
"""Seconds for which a blob that nobody asked for is fetched on, after the last sign of the pull it belongs to."""


class Pull:
    """An image that is being pulled. `clock` runs on, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._readers = 0
        self._last = clock()

    def enter(self) -> None:
        self._readers += 1

    def leave(self) -> None:
        self._readers -= 1
        self._last = self._clock()

    def touch(self) -> None:
        self._last = self._clock()

    def active(self) -> bool:
        return self._readers > 0 or self._clock() - self._last < LINGER


class Demand:
    """`asked`: a client wants it, or did, of whichever process: it is fetched to its end, whoever leaves. Without that
    it was begun ahead of its readers, for the sake of `pulls`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.pulls: set[Pull] = set()
        self._offsets: Counter[int] = Counter()

    def ask(self) -> None:
        self.asked.set()

    def alive(self) -> bool:
        """Whether it is to be fetched on."""
        return self.asked.is_set() or any(pull.active() for pull in self.pulls)

    @property
    def offsets(self) -> list[int]:
        """Where readers wait."""
        return list(self._offsets)

    @contextmanager
    def waiting(self, at: int) -> Iterator[None]:
        self._offsets[at] += 1
        try:
            yield
        finally:
            self._offsets[at] -= 1
            if not self._offsets[at]:
                del self._offsets[at]

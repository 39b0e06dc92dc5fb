"""Connections that hold a blob up once all its bytes have been asked for: much slower than the others.

What is left of their pieces comes sooner over others. Where all are slow it does not, so they are compared with each
other and with those that ended lately, never with a rate that somebody has in mind; and once some were cut, only with
what was seen since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Final, Generic, TypeVar

K = TypeVar("K")

WINDOW: Final = 2.0
"""Seconds over which a connection's rate is measured, from its first byte on."""
RECENT: Final = 30.0
"""Seconds for which an ended piece is compared with."""
KEPT: Final = 16
SLOWER: Final = 4.0
"""How many times slower than the others."""
WORTH: Final = 2.0
"""Seconds that must be won, beyond what the others would take."""


class Stragglers(Generic[K]):
    """Connections are known by any key. Times are in seconds of any clock that runs on."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._marks: dict[K, tuple[float, int]] = {}
        self._rates: dict[K, float] = {}

    def note_piece(self, now: float, length: int, seconds: float) -> None:
        """A piece came in `seconds` from its first byte on."""
        self._ended.append((now, length / max(seconds, 0.001)))

    def observe(self, now: float, running: Mapping[K, int]) -> None:
        """`running`: how many bytes each connection has brought of its piece."""
        for gone in self._marks.keys() - running.keys():
            del self._marks[gone]
            self._rates.pop(gone, None)
        for key, received in running.items():
            since, had = self._marks.setdefault(key, (now, received))
            if now - since >= WINDOW:
                self._rates[key] = (received - had) / (now - since)
                self._marks[key] = (now, received)

    def find(self, now: float, left: Mapping[K, int]) -> list[K]:
        """Those that should be cut, of those that `left` names with the bytes they have still to bring."""
        ended = [rate for at, rate in self._ended if now - at <= RECENT]
        found = []
        for key, count in left.items():
            rate = self._rates.get(key)
            others = [*ended, *(other for one, other in self._rates.items() if one != key)]
            if rate is None or not others:
                continue
            usual = median(others)
            if rate * SLOWER < usual and count > rate * (count / usual + WORTH):
                found.append(key)
        if found:
            self._ended.clear()
            for key in found:
                del self._rates[key]
        return found

"""Which bytes of a blob are asked for next (`Plan`), how many at once, and over how many connections (`Pace`).

Pieces never overlap and are asked for with both ends: a response that is broken off wastes what its sender has sent
already. They are handed out from the blob's start on, so that readers can follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MIB: Final = 1 << 20
SMALLEST: Final = MIB
LARGEST: Final = 64 * MIB
FIRST: Final = 2 * MIB
WINDOW: Final = 0.1
"""Seconds over which a rate is measured."""
GAIN: Final = 1.25
"""What twice the connections must bring, to be kept."""
LOOKS: Final = 2
"""Windows in a row in which they may fail to: many an upstream sends in bursts."""
FAST: Final = 64 * MIB
"""Bytes a second: a connection that brings more is not what holds a blob up."""
PATIENCE: Final = 2.0
LONGEST_PATIENCE: Final = 16.0
BEGINNING: Final = 1.0
"""Seconds in which new connections should bring their first bytes."""


class Piece:
    """What one request is for: bytes `start` to `stop`. Those before `at` have come; who fetches moves it."""

    __slots__ = ("at", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = self.at = start
        self.stop = stop


class Plan:
    """The bytes nobody has asked for yet."""

    def __init__(self, gaps: Iterable[tuple[int, int]]) -> None:
        self._gaps = sorted(gap for gap in gaps if gap[0] < gap[1])

    @property
    def remaining(self) -> int:
        return sum(stop - start for start, stop in self._gaps)

    def take(self, length: int, wanted: Iterable[int] = ()) -> Piece | None:
        """The next piece, of about `length` bytes: at one of the offsets `wanted` if it is to be had there, else the
        first; None: no byte is left."""
        if not self._gaps:
            return None
        at = min((at for at in wanted if self._place(at) is not None), default=self._gaps[0][0])
        place = self._place(at)
        assert place is not None
        start, stop = self._gaps[place]
        end = at + length if stop - at - length > SMALLEST // 2 else stop  # no crumbs
        self._gaps[place : place + 1] = [gap for gap in ((start, at), (end, stop)) if gap[0] < gap[1]]
        return Piece(at, end)

    def give_back(self, piece: Piece) -> None:
        """What of it has not come is to be asked for again."""
        if piece.at >= piece.stop:
            return
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._gaps, (piece.at, piece.stop)]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self._gaps = merged

    def _place(self, at: int) -> int | None:
        for place, (start, stop) in enumerate(self._gaps):
            if start <= at < stop:
                return place
        return None


class Pace:
    """Learns from what comes: connections are doubled while that brings more, and given up where it does not."""

    def __init__(self, most: int, now: float) -> None:
        """`most` connections at the most; `now` in seconds of any clock that runs on."""
        self.width = 1
        self.length = FIRST
        self._most = most
        self._mark = (now, 0)
        self._grown = now
        self._narrower = 1
        self._before: float | None = None  # the rate with `_narrower` connections
        self._disappointed = 0
        self._resting = False
        self._rest_until = 0.0
        self._calm = 0.0
        self._patience = PATIENCE

    def next_length(self, remaining: int) -> int:
        """Bytes for the next piece; fewer near the end, so that all connections end together."""
        if self.width == 1:
            return self.length
        return min(self.length, max(SMALLEST, self.length // 4, remaining // (2 * self.width)))

    def note_piece(self, length: int, seconds: float, latency: float) -> None:
        """A piece came in `seconds` from its first byte on, which took `latency` to come."""
        goal = min(2.0, max(0.75, 8 * latency))
        wish = length / max(seconds, 0.001) * goal
        wish = min(max(wish, self.length / 2), self.length * 2)
        self.length = int(min(max(wish, SMALLEST), LARGEST))

    def observe(self, now: float, received: int, running: int, waiting: bool) -> None:
        """`received` bytes in all so far, `running` connections now. `waiting`: a new one has brought nothing yet."""
        since, had = self._mark
        if waiting and now - self._grown < BEGINNING:
            self._mark = (now, received)
            return
        if now - since < WINDOW:
            return
        rate = (received - had) / (now - since)
        self._mark = (now, received)
        if rate > FAST * max(running, 1):
            self.width = min(self.width, max(running, 1))
            self._rest(now, rate)
        elif self._resting:
            if now >= self._rest_until or rate < self._calm / 2:
                self._grow(now, rate)
        elif self._before is not None and rate < GAIN * self._before:
            self._disappointed += 1
            if self._disappointed < LOOKS:
                return
            if running <= self._narrower:  # others had the connections, so nothing was learnt
                self.deny(now, running)
                return
            self.width = self._narrower
            self._rest(now, self._before)
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
        elif self.width < self._most:
            if self._before is not None:
                self._patience = PATIENCE
            self._grow(now, rate)
        else:
            self._rest(now, rate)

    def deny(self, now: float, have: int) -> None:
        """No more than `have` connections can be had now: others use them."""
        self.width = max(1, min(self.width, have))
        self._rest(now, 0.0)
        self._rest_until = now + 2 * WINDOW

    def fail(self, now: float) -> None:
        """A connection broke: fewer may hold."""
        self.width = max(1, self.width // 2)
        self._rest(now, 0.0)

    def _grow(self, now: float, rate: float) -> None:
        if self.width >= self._most:
            self._rest(now, rate)
            return
        self._narrower, self._before = self.width, rate
        self.width = min(2 * self.width, self._most)
        self._disappointed = 0
        self._resting = False
        self._grown = now

    def _rest(self, now: float, rate: float) -> None:
        self._resting = True
        self._calm = rate
        self._rest_until = now + self._patience

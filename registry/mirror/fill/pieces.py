"""Which bytes of a blob are asked for next (`PiecePlan`), how many at once, and over how many connections
(`AdaptiveConcurrency`).

Pieces never overlap and are asked for with both ends: a response that is broken off wastes what its sender has sent
already. They are handed out from the blob's start on, so that readers can follow.

Connections that hold a blob up once all its bytes have been asked for: much slower than the others.

What is left of their pieces comes sooner over others. Where all are slow it does not, so they are compared with each
other and with those that ended lately, never with a rate that somebody has in mind; and once some were cut, only with
what was seen since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Final, Generic, TypeVar

MIB: Final = 1 << 20
SMALLEST_PIECE: Final = MIB
LARGEST_PIECE: Final = 64 * MIB
FIRST_PIECE: Final = 2 * MIB
RATE_WINDOW_SECONDS: Final = 0.1
"""Seconds over which a rate is measured."""
MIN_SPEEDUP: Final = 1.25
"""What twice the connections must bring, to be kept."""
WINDOWS_WITHOUT_SPEEDUP: Final = 2
"""Windows in a row in which they may fail to: many an upstream sends in bursts."""
FAST_CONNECTION_RATE: Final = 64 * MIB
"""Bytes a second: a connection that brings more is not what holds a blob up."""
REST_SECONDS: Final = 2.0
LONGEST_REST_SECONDS: Final = 16.0
FIRST_BYTES_SECONDS: Final = 1.0
"""Seconds in which new connections should bring their first bytes."""


class Piece:
    """What one request is for: bytes `start` to `stop`. Those before `at` have come; who fetches moves it."""

    __slots__ = ("at", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = self.at = start
        self.stop = stop


class PiecePlan:
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
        end = at + length if stop - at - length > SMALLEST_PIECE // 2 else stop  # no crumbs
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


class AdaptiveConcurrency:
    """Learns from what comes: connections are doubled while that brings more, and given up where it does not."""

    def __init__(self, most: int, now: float) -> None:
        """`most` connections at the most; `now` in seconds of any clock that runs on."""
        self.width = 1
        self.length = FIRST_PIECE
        self._most = most
        self._mark = (now, 0)
        self._grown = now
        self._previous_width = 1
        self._previous_rate: float | None = None  # the rate with `_previous_width` connections
        self._windows_without_speedup = 0
        self._resting = False
        self._rest_until = 0.0
        self._rate_at_rest = 0.0
        self._rest_seconds = REST_SECONDS

    def next_length(self, remaining: int) -> int:
        """Bytes for the next piece; fewer near the end, so that all connections end together."""
        if self.width == 1:
            return self.length
        return min(self.length, max(SMALLEST_PIECE, self.length // 4, remaining // (2 * self.width)))

    def note_piece(self, length: int, seconds: float, latency: float) -> None:
        """A piece came in `seconds` from its first byte on, which took `latency` to come."""
        goal = min(2.0, max(0.75, 8 * latency))
        wish = length / max(seconds, 0.001) * goal
        wish = min(max(wish, self.length / 2), self.length * 2)
        self.length = int(min(max(wish, SMALLEST_PIECE), LARGEST_PIECE))

    def observe(self, now: float, received: int, running: int, waiting: bool) -> None:
        """`received` bytes in all so far, `running` connections now. `waiting`: a new one has brought nothing yet."""
        since, had = self._mark
        if waiting and now - self._grown < FIRST_BYTES_SECONDS:
            self._mark = (now, received)
            return
        if now - since < RATE_WINDOW_SECONDS:
            return
        rate = (received - had) / (now - since)
        self._mark = (now, received)
        if rate > FAST_CONNECTION_RATE * max(running, 1):
            self.width = min(self.width, max(running, 1))
            self._rest(now, rate)
        elif self._resting:
            if now >= self._rest_until or rate < self._rate_at_rest / 2:
                self._grow(now, rate)
        elif self._previous_rate is not None and rate < MIN_SPEEDUP * self._previous_rate:
            self._windows_without_speedup += 1
            if self._windows_without_speedup < WINDOWS_WITHOUT_SPEEDUP:
                return
            if running <= self._previous_width:  # others had the connections, so nothing was learnt
                self.note_unavailable(now, running)
                return
            self.width = self._previous_width
            self._rest(now, self._previous_rate)
            self._rest_seconds = min(2 * self._rest_seconds, LONGEST_REST_SECONDS)
        elif self.width < self._most:
            if self._previous_rate is not None:
                self._rest_seconds = REST_SECONDS
            self._grow(now, rate)
        else:
            self._rest(now, rate)

    def note_unavailable(self, now: float, have: int) -> None:
        """No more than `have` connections can be had now: others use them."""
        self.width = max(1, min(self.width, have))
        self._rest(now, 0.0)
        self._rest_until = now + 2 * RATE_WINDOW_SECONDS

    def fail(self, now: float) -> None:
        """A connection broke: fewer may hold."""
        self.width = max(1, self.width // 2)
        self._rest(now, 0.0)

    def _grow(self, now: float, rate: float) -> None:
        if self.width >= self._most:
            self._rest(now, rate)
            return
        self._previous_width, self._previous_rate = self.width, rate
        self.width = min(2 * self.width, self._most)
        self._windows_without_speedup = 0
        self._resting = False
        self._grown = now

    def _rest(self, now: float, rate: float) -> None:
        self._resting = True
        self._rate_at_rest = rate
        self._rest_until = now + self._rest_seconds


K = TypeVar("K")

STRAGGLER_WINDOW_SECONDS: Final = 2.0
"""Seconds over which a connection's rate is measured, from its first byte on."""
RECENT_SECONDS: Final = 30.0
"""Seconds for which an ended piece is compared with."""
RATES_KEPT: Final = 16
SLOWNESS_FACTOR: Final = 4.0
"""How many times slower than the others."""
MIN_SAVED_SECONDS: Final = 2.0
"""Seconds that must be won, beyond what the others would take."""


class StragglerDetector(Generic[K]):
    """Connections are known by any key. Times are in seconds of any clock that runs on."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque(maxlen=RATES_KEPT)
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
            if now - since >= STRAGGLER_WINDOW_SECONDS:
                self._rates[key] = (received - had) / (now - since)
                self._marks[key] = (now, received)

    def find(self, now: float, left: Mapping[K, int]) -> list[K]:
        """Those that should be cut, of those that `left` names with the bytes they have still to bring."""
        ended = [rate for at, rate in self._ended if now - at <= RECENT_SECONDS]
        found = []
        for key, count in left.items():
            rate = self._rates.get(key)
            others = [*ended, *(other for one, other in self._rates.items() if one != key)]
            if rate is None or not others:
                continue
            usual = median(others)
            if rate * SLOWNESS_FACTOR < usual and count > rate * (count / usual + MIN_SAVED_SECONDS):
                found.append(key)
        if found:
            self._ended.clear()
            for key in found:
                del self._rates[key]
        return found

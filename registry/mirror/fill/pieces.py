"""Splits a blob into pieces (`PiecePlan`), chooses their length and the number of connections (`AdaptiveConcurrency`),
and finds slow connections (`StragglerDetector`).

Pieces never overlap. Each request names both ends of its range: if an open range is cut, the bytes that the sender has
already sent are wasted. Pieces are assigned from the start of the blob, so that readers can follow.

Stragglers are searched once all bytes were requested; the rest of their pieces arrives sooner over other connections.
If all connections are slow, cutting does not help. So rates are compared with each other and with pieces that ended a
short time ago, never with a fixed rate; after a cut, only with rates measured since.
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
"""Time over which the total rate is measured."""
MIN_SPEEDUP: Final = 1.25
"""Factor by which the rate must grow when connections are doubled; otherwise the doubling is undone."""
WINDOWS_WITHOUT_SPEEDUP: Final = 2
"""Windows in a row without that growth until the doubling is undone. Many upstreams send in bursts."""
FAST_CONNECTION_RATE: Final = 64 * MIB
"""Bytes per second. Connections that are faster than this are not the bottleneck."""
REST_SECONDS: Final = 2.0
LONGEST_REST_SECONDS: Final = 16.0
FIRST_BYTES_SECONDS: Final = 1.0
"""Time in which new connections should deliver their first bytes."""


class Piece:
    """The range of one request, bytes `start` to `stop`. Bytes before `at` are stored; the reading thread moves
    `at`."""

    __slots__ = ("at", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = self.at = start
        self.stop = stop


class PiecePlan:
    """The bytes that no connection has requested yet."""

    def __init__(self, gaps: Iterable[tuple[int, int]]) -> None:
        self._gaps = sorted(gap for gap in gaps if gap[0] < gap[1])

    @property
    def remaining(self) -> int:
        return sum(stop - start for start, stop in self._gaps)

    def take(self, length: int, wanted: Iterable[int] = ()) -> Piece | None:
        """Returns the next piece, of about `length` bytes: at the first of the offsets `wanted` that is still free,
        else at the first free byte; None: no byte is left."""
        if not self._gaps:
            return None
        at = min((at for at in wanted if self._place(at) is not None), default=self._gaps[0][0])
        place = self._place(at)
        assert place is not None
        start, stop = self._gaps[place]
        end = at + length if stop - at - length > SMALLEST_PIECE // 2 else stop  # leaves no tiny rest
        self._gaps[place : place + 1] = [gap for gap in ((start, at), (end, stop)) if gap[0] < gap[1]]
        return Piece(at, end)

    def give_back(self, piece: Piece) -> None:
        """Frees the part of the piece that was not stored."""
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
    """Adapts the number of connections (`width`) and the piece length (`length`) to the measured rate. Doubles the
    connections while that makes the download faster, and undoes a doubling that does not."""

    def __init__(self, most: int, now: float) -> None:
        """`most`: limit of connections. `now`: seconds of any monotonic clock."""
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
        """Returns the bytes of the next piece; fewer near the end, so that all connections end together."""
        if self.width == 1:
            return self.length
        return min(self.length, max(SMALLEST_PIECE, self.length // 4, remaining // (2 * self.width)))

    def note_piece(self, length: int, seconds: float, latency: float) -> None:
        """Records a piece whose bytes took `seconds` to arrive after the first one, which took `latency` seconds."""
        goal = min(2.0, max(0.75, 8 * latency))
        wish = length / max(seconds, 0.001) * goal
        wish = min(max(wish, self.length / 2), self.length * 2)
        self.length = int(min(max(wish, SMALLEST_PIECE), LARGEST_PIECE))

    def observe(self, now: float, received: int, running: int, waiting: bool) -> None:
        """Records the state at `now`: `received` bytes in total, `running` connections. `waiting`: a new connection has
        delivered nothing yet."""
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
            if running <= self._previous_width:  # other fills held the connections, so the measurement says nothing
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
        """Records that no more than `have` connections are available now, since other fills use them."""
        self.width = max(1, min(self.width, have))
        self._rest(now, 0.0)
        self._rest_until = now + 2 * RATE_WINDOW_SECONDS

    def fail(self, now: float) -> None:
        """Halves the connections after one broke."""
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
"""Time over which a connection's rate is measured, from its first byte on."""
RECENT_SECONDS: Final = 30.0
"""Time for which an ended piece is used for comparison."""
RATES_KEPT: Final = 16
SLOWNESS_FACTOR: Final = 4.0
"""How many times slower than the others a straggler is."""
MIN_SAVED_SECONDS: Final = 2.0
"""Smallest gain in time for which a connection is cut."""


class StragglerDetector(Generic[K]):
    """Finds connections that are much slower than the others. Keys identify connections. Times are seconds of any
    monotonic clock."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, float]] = deque(maxlen=RATES_KEPT)
        self._marks: dict[K, tuple[float, int]] = {}
        self._rates: dict[K, float] = {}

    def note_piece(self, now: float, length: int, seconds: float) -> None:
        """Records a piece whose bytes took `seconds` to arrive after the first one."""
        self._ended.append((now, length / max(seconds, 0.001)))

    def observe(self, now: float, running: Mapping[K, int]) -> None:
        """Records how many bytes of its piece each running connection has delivered."""
        for gone in self._marks.keys() - running.keys():
            del self._marks[gone]
            self._rates.pop(gone, None)
        for key, received in running.items():
            since, had = self._marks.setdefault(key, (now, received))
            if now - since >= STRAGGLER_WINDOW_SECONDS:
                self._rates[key] = (received - had) / (now - since)
                self._marks[key] = (now, received)

    def find(self, now: float, left: Mapping[K, int]) -> list[K]:
        """Returns the connections to cut, of those in `left`, which has the bytes each has still to deliver."""
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

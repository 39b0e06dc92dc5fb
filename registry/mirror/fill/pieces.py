"""Splits the download of a blob into pieces (`PiecePlan`), chooses the piece length and the number of connections
(`AdaptiveConcurrency`), and finds slow connections (`StragglerDetector`).

A *piece* is the byte range of one request. Pieces that are requested at the same time never overlap. A *reader* is a
client that receives the blob while the download runs. Pieces are requested in ascending order, but a piece that begins
at a byte for which a reader waits comes first. Each request names both ends of its range, so that the upstream sends
no byte after the end of the piece.

A *straggler* is a connection that is much slower than the others. When all bytes have been requested, the requests of
stragglers are cancelled, and the missing bytes of their pieces are requested again over other connections. The rate of
a connection is compared with the rates of the other connections and of pieces that ended a short time ago. After the
whole download has become slower, every connection is slow compared with the pieces that ended before. These ended
pieces must not cause one cancellation after another. Therefore each cancellation discards their rates.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Final, Generic, TypeVar

MIB: Final = 1 << 20
"""Number of bytes in a mebibyte."""
SMALLEST_PIECE_BYTES: Final = MIB
"""Smallest length of a piece in bytes. Only a piece at the end of a range of missing bytes may be smaller."""
LARGEST_PIECE_BYTES: Final = 64 * MIB
"""Largest length of a piece in bytes. Only a piece at the end of a range of missing bytes may be slightly larger."""
FIRST_PIECE_BYTES: Final = 2 * MIB
"""Length of a piece in bytes until the first piece has arrived."""
RATE_WINDOW_SECONDS: Final = 0.1
"""Length of a *window*: a period over which the total rate of the download is measured."""
MIN_SPEEDUP: Final = 1.25
"""Factor by which the rate must grow after a doubling of the number of connections. If the rate grows less, the
doubling is undone."""
WINDOWS_WITHOUT_SPEEDUP: Final = 2
"""Number of windows in a row with too little growth after which the doubling is undone. One window is not enough,
because many upstreams send in bursts."""
FAST_CONNECTION_RATE: Final = 64 * MIB
"""Rate of a connection in bytes per second. While the connections are faster on average, no connections are added."""
GROWTH_PAUSE_SECONDS: Final = 2.0
"""First pause until the number of connections may be doubled again. After each doubling that is undone, the next pause
is twice as long."""
LONGEST_GROWTH_PAUSE_SECONDS: Final = 16.0
"""Longest pause until the number of connections may be doubled again."""
FIRST_BYTES_SECONDS: Final = 1.0
"""After a doubling, the rate is not measured until each new connection has received its first byte. After this time,
the rate is measured in any case."""


class Piece:
    """The byte range of one request. `start`: offset of its first byte. `stop`: offset of the byte after its last one.
    `next_offset`: offset of the first byte that is not stored yet; the thread that reads the response increases it."""

    __slots__ = ("next_offset", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = self.next_offset = start
        self.stop = stop


class PiecePlan:
    """The byte ranges of a blob that are missing and that no connection is requesting. Not thread-safe. The methods
    use binary search, because thousands of clients can read different ranges of one blob."""

    def __init__(self, gaps: Iterable[tuple[int, int]]) -> None:
        """`gaps`: the missing byte ranges, each as the offsets of its first byte and of the byte after its last one."""
        sorted_gaps = sorted(gap for gap in gaps if gap[0] < gap[1])
        self._starts = [start for start, _ in sorted_gaps]
        """The offset of the first byte of each range in the plan, in ascending order."""
        self._stops = [stop for _, stop in sorted_gaps]
        """For each range in the plan, the offset of the byte after its last one."""
        self.remaining = sum(stop - start for start, stop in sorted_gaps)
        """Number of missing bytes that no connection is requesting."""

    def take(self, length: int, reader_offsets: Sequence[int] = ()) -> Piece | None:
        """Removes the next piece from the plan and returns it. Returns None if the plan is empty. The piece has about
        `length` bytes. `reader_offsets`: the offsets of the bytes that readers wait for, in ascending order. The piece
        begins at the lowest of these offsets that is in the plan; if none of them is, the piece begins at the first
        byte of the plan."""
        if not self._starts:
            return None
        index, piece_start = self._find_start(reader_offsets)
        start, stop = self._starts[index], self._stops[index]
        # Takes the whole rest of the range if at most `SMALLEST_PIECE_BYTES // 2` bytes would be left.
        piece_stop = piece_start + length if stop - piece_start - length > SMALLEST_PIECE_BYTES // 2 else stop
        remaining_gaps = [gap for gap in ((start, piece_start), (piece_stop, stop)) if gap[0] < gap[1]]
        self._starts[index : index + 1] = [gap_start for gap_start, _ in remaining_gaps]
        self._stops[index : index + 1] = [gap_stop for _, gap_stop in remaining_gaps]
        self.remaining -= piece_stop - piece_start
        return Piece(piece_start, piece_stop)

    def give_back(self, piece: Piece) -> None:
        """Adds to the plan those bytes of `piece` that are not stored yet."""
        start, stop = piece.next_offset, piece.stop
        if start >= stop:
            return
        self.remaining += stop - start
        # The ranges from `first_index` up to, but without, `end_index` are merged with the piece.
        first_index = end_index = bisect_left(self._starts, start)
        if first_index > 0 and self._stops[first_index - 1] == start:
            first_index -= 1
            start = self._starts[first_index]
        if end_index < len(self._starts) and self._starts[end_index] == stop:
            stop = self._stops[end_index]
            end_index += 1
        self._starts[first_index:end_index], self._stops[first_index:end_index] = [start], [stop]

    def _find_start(self, reader_offsets: Sequence[int]) -> tuple[int, int]:
        """Returns where the next piece begins: the index of its range in the plan, and the offset. Skips the offsets
        that are not in the plan, because running requests cover them."""
        position = 0
        while position < len(reader_offsets):
            offset = reader_offsets[position]
            index = bisect_right(self._starts, offset) - 1
            if index >= 0 and offset < self._stops[index]:
                return index, offset
            if index + 1 == len(self._starts):
                break
            position = bisect_left(reader_offsets, self._starts[index + 1], position)
        return 0, self._starts[0]


class AdaptiveConcurrency:
    """Adapts the number of connections of one download (`connections`) and the piece length in bytes (`piece_length`)
    to the measured rate. Doubles the number of connections until a doubling does not make the download faster. Undoes
    this last doubling, and tries again after a pause. Times are seconds of any monotonic clock; rates are bytes per
    second."""

    def __init__(self, max_connections: int, now: float) -> None:
        self.connections = 1
        self.piece_length = FIRST_PIECE_BYTES
        self._max_connections = max_connections
        self._window_start = (now, 0)
        """Start of the present window, and the number of bytes received until then."""
        self._doubled_at = now
        """Time of the last doubling."""
        self._previous_connections = 1
        """Number of connections before the last doubling."""
        self._previous_rate: float | None = None
        """The rate with `_previous_connections`; None before the first doubling."""
        self._windows_without_speedup = 0
        """Number of windows in a row, since the last doubling, in which the rate was less than `MIN_SPEEDUP` times
        `_previous_rate`."""
        self._is_paused = False
        """Whether the doubling of the number of connections is paused. The pause ends at `_paused_until` at the
        latest."""
        self._paused_until = 0.0
        self._expected_rate = 0.0
        """The rate that is expected during the present pause; 0 if the pause must not end early."""
        self._pause_seconds = GROWTH_PAUSE_SECONDS
        """Length of the next pause."""

    def next_piece_length(self, remaining: int) -> int:
        """Returns the length in bytes of the next piece. `remaining`: number of bytes that have not been requested yet.
        The last pieces of a download are shorter, so that all connections end at about the same time."""
        if self.connections == 1:
            return self.piece_length
        shortened_length = max(SMALLEST_PIECE_BYTES, self.piece_length // 4, remaining // (2 * self.connections))
        return min(self.piece_length, shortened_length)

    def note_piece(self, length: int, seconds: float, latency: float) -> None:
        """Adapts the piece length after a piece of `length` bytes has arrived. `latency`: seconds from the request to
        the first byte. `seconds`: from the first byte to the last one."""
        # Aims at pieces that take eight times the latency to arrive, but at least 0.75 s and at most 2 s.
        target_seconds = min(2.0, max(0.75, 8 * latency))
        target_length = length / max(seconds, 0.001) * target_seconds
        target_length = min(max(target_length, self.piece_length / 2), self.piece_length * 2)
        self.piece_length = int(min(max(target_length, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES))

    def observe(self, now: float, received: int, open_connections: int, awaits_first_byte: bool) -> None:
        """Adapts the number of connections to the progress until `now`. `received`: number of bytes received so far.
        `open_connections`: the present number of connections. `awaits_first_byte`: whether a new connection still
        waits for its first byte. Call this method often."""
        window_started_at, received_before = self._window_start
        if awaits_first_byte and now - self._doubled_at < FIRST_BYTES_SECONDS:
            self._window_start = (now, received)
            return
        if now - window_started_at < RATE_WINDOW_SECONDS:
            return
        rate = (received - received_before) / (now - window_started_at)
        self._window_start = (now, received)
        if rate > FAST_CONNECTION_RATE * max(open_connections, 1):  # the connections are fast enough
            self.connections = min(self.connections, max(open_connections, 1))
            self._pause_growth(now, rate)
        elif self._is_paused:
            if now >= self._paused_until or rate < self._expected_rate / 2:
                self._double(now, rate)
        elif self._previous_rate is not None and rate < MIN_SPEEDUP * self._previous_rate:
            self._windows_without_speedup += 1
            if self._windows_without_speedup < WINDOWS_WITHOUT_SPEEDUP:
                return
            # No connection was added after the doubling, because the upstream's limit allows no further connection.
            if open_connections <= self._previous_connections:
                self.reduce_connections(now, open_connections)
                return
            self.connections = self._previous_connections
            self._pause_growth(now, self._previous_rate)
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_GROWTH_PAUSE_SECONDS)
        elif self.connections < self._max_connections:
            if self._previous_rate is not None:  # the last doubling has made the download faster
                self._pause_seconds = GROWTH_PAUSE_SECONDS
            self._double(now, rate)
        else:
            self._pause_growth(now, rate)

    def reduce_connections(self, now: float, available: int) -> None:
        """Reduces the number of connections to `available`, the number that this download may have now. All downloads
        share the connections that the upstream's limit allows."""
        self.connections = max(1, min(self.connections, available))
        self._pause_growth(now, 0.0)
        self._paused_until = now + 2 * RATE_WINDOW_SECONDS

    def note_broken_connection(self, now: float) -> None:
        """Halves the number of connections after a connection has broken."""
        self.connections = max(1, self.connections // 2)
        self._pause_growth(now, 0.0)

    def _double(self, now: float, rate: float) -> None:
        """Doubles the number of connections up to the maximum. `rate`: the present rate."""
        if self.connections >= self._max_connections:
            self._pause_growth(now, rate)
            return
        self._previous_connections, self._previous_rate = self.connections, rate
        self.connections = min(2 * self.connections, self._max_connections)
        self._windows_without_speedup = 0
        self._is_paused = False
        self._doubled_at = now

    def _pause_growth(self, now: float, rate: float) -> None:
        """Starts a pause in which the number of connections is not doubled. `rate`: the rate that is expected during
        the pause. The pause ends early if the measured rate falls below half of `rate`. If `rate` is 0, the pause does
        not end early."""
        self._is_paused = True
        self._expected_rate = rate
        self._paused_until = now + self._pause_seconds


K = TypeVar("K")

STRAGGLER_WINDOW_SECONDS: Final = 2.0
"""Length of a *connection window*: a period over which the rate of one connection is measured. The first window
of a connection starts with the first byte of its response."""
RECENT_SECONDS: Final = 30.0
"""Time after the end of a piece for which its rate is used for comparison."""
MAX_ENDED_RATES: Final = 16
"""Largest number of ended pieces whose rates are used for comparison."""
SLOWNESS_FACTOR: Final = 4.0
"""A straggler is more than this many times slower than the median of the rates that it is compared with."""
MIN_SAVED_SECONDS: Final = 2.0
"""A straggler's request is cancelled only if the cancellation saves more than this time, by estimate."""


class StragglerDetector(Generic[K]):
    """Finds connections that are much slower than the others. A key of type `K` identifies a connection. Times are
    seconds of any monotonic clock; rates are bytes per second."""

    def __init__(self) -> None:
        self._ended_rates: deque[tuple[float, float]] = deque(maxlen=MAX_ENDED_RATES)
        """For each ended piece: the time when it ended, and its rate."""
        self._window_starts: dict[K, tuple[float, int]] = {}
        """For each running connection: the start of its connection window, and the bytes received until then."""
        self._rates: dict[K, float] = {}
        """For each running connection: its rate in its last complete connection window."""

    def note_piece(self, now: float, length: int, seconds: float) -> None:
        """Records the end of a piece. `length`: number of its bytes that have arrived. `seconds`: time from its first
        byte to its last one."""
        self._ended_rates.append((now, length / max(seconds, 0.001)))

    def observe(self, now: float, received_by_connection: Mapping[K, int]) -> None:
        """Records for each running connection how many bytes of its piece it has received. Call it often."""
        for ended in self._window_starts.keys() - received_by_connection.keys():
            del self._window_starts[ended]
            self._rates.pop(ended, None)
        for key, received in received_by_connection.items():
            window_started_at, received_before = self._window_starts.setdefault(key, (now, received))
            if now - window_started_at >= STRAGGLER_WINDOW_SECONDS:
                self._rates[key] = (received - received_before) / (now - window_started_at)
                self._window_starts[key] = (now, received)

    def find(self, now: float, missing_by_connection: Mapping[K, int]) -> list[K]:
        """Returns the keys of the stragglers, whose requests should be cancelled. If there are stragglers,
        forgets their rates and the rates of all ended pieces. `missing_by_connection`: for each running connection, the
        number of bytes of its piece that have not arrived."""
        ended_rates = [rate for ended_at, rate in self._ended_rates if now - ended_at <= RECENT_SECONDS]
        stragglers = []
        for key, missing in missing_by_connection.items():
            rate = self._rates.get(key)
            other_rates = [*ended_rates, *(other for other_key, other in self._rates.items() if other_key != key)]
            if rate is None or not other_rates:
                continue
            usual_rate = median(other_rates)
            # The second condition: to fetch the missing bytes at the usual rate saves more than `MIN_SAVED_SECONDS`.
            if rate * SLOWNESS_FACTOR < usual_rate and missing > rate * (missing / usual_rate + MIN_SAVED_SECONDS):
                stragglers.append(key)
        if stragglers:
            self._ended_rates.clear()
            for key in stragglers:
                del self._rates[key]
        return stragglers

"""Limits how many connections one worker process has open, because each connection takes a file descriptor.

The worker keeps a reserve of descriptors for other files and for connections to upstream registries. When no descriptor
is left for a new connection, the worker *evicts* connections: it closes them to make room. It evicts only *silent*
connections: those without a request, and those whose request makes no progress (`SilentConnectionKind`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, Protocol

from registry.server.kernel import count_open_files, file_limit
from registry.server.server_log import log

FILES_PER_REQUEST = 3
"""Descriptors that a request takes in addition to the connection's own: two for the file that is sent, and one for a
duplicate of the connection's socket."""
MAX_CONNECTIONS = 16384
"""Largest number of connections of one worker, whatever the limit on open files. Each connection takes memory."""
FAIR_SHARE = 16
"""If a client address has more silent connections than this, the worker evicts the oldest of them before the
connections of other addresses."""
STALLED_SECONDS = 10.0
"""A request in progress is stalled if no byte was sent or received for this many seconds."""
MAX_EXAMINED = 2000
"""Largest number of connections that one search examines. Examining a connection takes up to ten microseconds."""
MAX_EVICTIONS = 100
"""Largest number of connections that one call evicts. Closing one connection takes up to 80 microseconds."""
_MIN_RESERVE = 32
"""Smallest number of descriptors in the reserve."""
_MAX_FILES_TO_COUNT = 8192
"""If the process may have more open files than this, `update_budget` does nothing: counting the files could take too
long, and the reserve is large enough for other files."""
_MIN_BUDGET = 8
"""Smallest number of descriptors for connections and their requests. These descriptors may come from the reserve."""
_LOW_CAPACITY = 256
"""If `ConnectionLimit.capacity` is smaller than this, `warn_if_low` logs a warning."""
_MIN_SELECTED = 32
"""One search selects at least this many silent connections, or all if it finds fewer."""
_ACCEPTS_PER_PAUSE = 32
"""How many new connections a *full* worker, which has no room for more, accepts between two pauses. During a pause,
other workers can accept connections."""
_PAUSE_SECONDS = 0.01
_NOTHING_FOUND_SECONDS = 0.25
"""Shortest time between a search that found no silent connection and the next search."""
_BUSY_SECONDS = 0.1
"""If a full worker has no silent connections, it accepts no new connection for this long."""
_LOG_INTERVAL_SECONDS = 60.0
"""Shortest time between two log lines with the same text."""

SilentConnectionKind = Literal["lingering", "new", "idle", "stalled"]
"""The kinds of silent connections:

- `lingering`: the last response was sent, and the server waits for the client to close the connection.
- `new`: the client has not sent a complete request yet.
- `idle`: the connection is between two requests.
- `stalled`: a request is in progress, but no byte was sent or received for `STALLED_SECONDS`.
"""


@dataclass(slots=True)
class EvictionCandidate:
    """Describes a silent connection, which can be evicted."""

    kind: SilentConnectionKind
    since: float
    """Time in seconds of the event loop's clock at which the connection became silent. For the kind `new`, this is the
    time at which the connection was opened."""
    address: str | None
    """The client's IPv4 address, or the /64 network of its IPv6 address. None for a trusted proxy, whose connections
    serve many clients."""


class EvictableConnection(Protocol):
    """A connection that `ConnectionLimit` can examine and close."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Describes why the connection is silent. Returns None if the connection is not silent, or is closing already.
        `now` is in seconds of the event loop's clock."""
        ...

    def evict(self) -> None:
        """Closes the connection immediately, which frees its descriptor."""
        ...


_SelectedConnection = tuple[EvictableConnection, EvictionCandidate]
"""A silent connection, and the result of its method `eviction_candidate`."""


class ConnectionLimit:
    """The connection limit of one worker. Create this object after the application has started, because the constructor
    counts the open files."""

    def __init__(
        self,
        connections: Collection[EvictableConnection],
        pending: Collection[EvictableConnection],
        requests: Sized,
        clock: Callable[[], float],
        *,
        max_open_files: int | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """The worker adds to `connections`, `pending` and `requests`, and removes from them.

        - `connections`: accepted connections that are ready for requests.
        - `pending`: accepted connections that are not ready for requests yet, such as during the TLS handshake.
        - `requests`: the requests in progress.
        - `clock`: the event loop's clock, in seconds.
        - `max_open_files`: how many descriptors the process may have open. None means the system's limit.
        """
        self._connections = connections
        self._pending = pending
        self._requests = requests
        self._clock = clock
        self._max_open_files = file_limit() if max_open_files is None else max_open_files
        self._max_connections = max_connections
        self._reserve = max(_MIN_RESERVE, self._max_open_files // 8)
        self._files_at_start = count_open_files()
        self._budget = self._max_open_files  # descriptors for connections and their requests
        self._selected: list[_SelectedConnection] = []  # by the last search, in reverse order of eviction
        self._evicted: set[EvictableConnection] = set()  # may still be in the worker's collections
        self._search_offset = 0
        self._no_search_until = -_NOTHING_FOUND_SECONDS
        self._accepts_left = 0  # new connections to accept before the next pause
        self._unlogged_evictions = 0  # since the last log line
        self._evictions_logged_at = -_LOG_INTERVAL_SECONDS
        self._busy_logged_at = -_LOG_INTERVAL_SECONDS
        self._set_budget(self._files_at_start)

    @property
    def capacity(self) -> int:
        """How many connections the worker may have if no request is in progress."""
        return min(self._budget, self._max_connections)

    def warn_if_low(self) -> None:
        """Logs a warning if the capacity is so low that a busy registry could reach it."""
        if self.capacity < _LOW_CAPACITY:
            log.warning(
                "a limit of %d open files leaves room for only %d connections in this process: see docs/en/network.md",
                self._max_open_files,
                self.capacity,
            )

    def make_room_for_connection(self) -> float:
        """Makes room for a connection that the worker is about to accept. Returns 0.0 if the worker may accept the
        connection now. Otherwise returns for how many seconds the worker must accept no connection.

        If there is no room, the first call evicts nothing and returns a short pause, in which another worker can accept
        the connection. The next `_ACCEPTS_PER_PAUSE` calls evict silent connections.
        """
        if self._remaining_connections() > 0:
            return 0.0
        if not self._accepts_left:
            self._accepts_left = _ACCEPTS_PER_PAUSE
            return _PAUSE_SECONDS
        missing = 1 - self._remaining_connections()
        if self.evict_connections(missing):
            self._accepts_left -= 1
            return 0.0
        self._log_busy()
        return _BUSY_SECONDS

    def make_room_for_request(self) -> None:
        """Evicts silent connections if too few descriptors are left for the requests in progress. Call it when a
        request starts."""
        remaining = self._remaining_connections()
        if remaining < 0:
            self.evict_connections(-remaining)

    def evict_connections(self, max_count: int) -> bool:
        """Evicts up to `max_count` silent connections, but at most `MAX_EVICTIONS`. Returns whether it evicted any."""
        now, count = self._clock(), 0
        max_count = min(max_count, MAX_EVICTIONS)
        while count < max_count and (connection := self._next_to_evict(now)) is not None:
            connection.evict()
            self._evicted.add(connection)
            count += 1
        if count:
            self._log_evictions(count, now)
        return count > 0

    def update_budget(self) -> None:
        """Counts the open files of the process, and computes how many descriptors are left for connections and their
        requests. Evicts silent connections if the connections and requests use more descriptors than are left. Does
        nothing if the process may have more than `_MAX_FILES_TO_COUNT` open files. Call it once a second."""
        if self._max_open_files <= _MAX_FILES_TO_COUNT:
            own_files = len(self._connections) + len(self._pending) + FILES_PER_REQUEST * len(self._requests)
            self._set_budget(max(self._files_at_start, count_open_files() - own_files))
            if (remaining := self._remaining_connections()) < 0:
                self.evict_connections(-remaining)

    def _set_budget(self, other_files: int) -> None:
        self._budget = max(self._max_open_files - other_files - self._reserve, _MIN_BUDGET)

    def _remaining_connections(self) -> int:
        """Returns how many more connections the worker may have now. The number is negative if the worker has too
        many."""
        count = len(self._connections) + len(self._pending)
        if self._evicted:
            self._evicted = {
                connection
                for connection in self._evicted
                if connection in self._connections or connection in self._pending
            }
            count -= len(self._evicted)
        return min(self._budget - count - FILES_PER_REQUEST * len(self._requests), self._max_connections - count)

    def _next_to_evict(self, now: float) -> EvictableConnection | None:
        """Returns the silent connection to evict next; None if no silent connection was found. Skips connections that
        were active after a search selected them."""
        for must_search in (False, True):
            if must_search:
                if now < self._no_search_until:
                    return None
                self._selected = self._search(now)
            while self._selected:
                connection, selected_candidate = self._selected.pop()
                current_candidate = connection.eviction_candidate(now)
                if current_candidate is not None and (current_candidate.kind, current_candidate.since) == (
                    selected_candidate.kind,
                    selected_candidate.since,
                ):
                    return connection
        self._no_search_until = now + _NOTHING_FOUND_SECONDS
        return None

    def _search(self, now: float) -> list[_SelectedConnection]:
        """Examines up to `MAX_EXAMINED` connections, from the position where the previous search ended. Selects silent
        connections of one kind, and returns them in reverse order of eviction.

        The number of selected connections is an eighth of the examined connections of this kind, but at least
        `_MIN_SELECTED`. If there are fewer connections of this kind, selects all of them.

        The kind is the first of these that the search finds:

        - lingering;
        - new or idle, whichever is more frequent, so that a client that opens many connections of one kind does not
          cause evictions of the other kind;
        - stalled.
        """
        by_kind: dict[SilentConnectionKind, list[_SelectedConnection]] = {
            "lingering": [],
            "new": [],
            "idle": [],
            "stalled": [],
        }
        count = len(self._connections) + len(self._pending)
        start = self._search_offset if self._search_offset < count else 0
        self._search_offset = start + MAX_EXAMINED
        for connection in tuple(islice(chain(self._connections, self._pending), start, self._search_offset)):
            candidate = connection.eviction_candidate(now)
            if candidate is not None:
                by_kind[candidate.kind].append((connection, candidate))
        if len(by_kind["new"]) >= len(by_kind["idle"]):
            silent = by_kind["lingering"] or by_kind["new"] or by_kind["stalled"]
        else:
            silent = by_kind["lingering"] or by_kind["idle"]
        return _sorted_for_eviction(silent)[-max(_MIN_SELECTED, len(silent) // 8) :]

    def _limit_text(self) -> str:
        """Returns a text that says how many connections the worker may have, and why."""
        if self._max_connections < self._budget:
            return f"this process may have at most {self._max_connections} connections"
        return (
            f"with at most {self._max_open_files} open files there is room for {self._budget} connections in this "
            "process"
        )

    def _log_evictions(self, count: int, now: float) -> None:
        self._unlogged_evictions += count
        if now - self._evictions_logged_at >= _LOG_INTERVAL_SECONDS:
            log.warning(
                "closed %d silent connections to make room for others: %s; docs/en/network.md says how to raise this "
                "limit",
                self._unlogged_evictions,
                self._limit_text(),
            )
            self._evictions_logged_at, self._unlogged_evictions = now, 0

    def _log_busy(self) -> None:
        now = self._clock()
        if now - self._busy_logged_at >= _LOG_INTERVAL_SECONDS:
            log.warning(
                "new connections have to wait: all %d open connections have requests in progress, and %s; "
                "docs/en/network.md says how to raise this limit",
                len(self._connections),
                self._limit_text(),
            )
            self._busy_logged_at = now


def _sorted_for_eviction(silent: list[_SelectedConnection]) -> list[_SelectedConnection]:
    """Returns the connections in reverse order of eviction: the last one in the list is evicted first.

    First, addresses with more than `FAIR_SHARE` silent connections lose their oldest ones. After that, the connections
    that have been silent for longest are evicted first.
    """
    silent.sort(key=lambda selected: -selected[1].since)  # newest first
    counts: Counter[str] = Counter()
    # The key is the id of a connection. The newest `FAIR_SHARE` connections of an address have the value 0. The older
    # connections of the address have the values 1, 2, 3, …, and the oldest connection has the largest value.
    excess: dict[int, int] = {}
    for connection, candidate in silent:
        if candidate.address is not None:
            excess[id(connection)] = max(0, counts[candidate.address] + 1 - FAIR_SHARE)
            counts[candidate.address] += 1
    return sorted(silent, key=lambda selected: (excess.get(id(selected[0]), 0), -selected[1].since))

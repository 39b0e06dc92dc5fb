"""Limits how many connections one worker process has open, because each takes a file descriptor.

A connection takes one descriptor. A request in progress takes up to three more descriptors: two for the file that it
sends (the second one is for read-ahead), and one for a duplicate of the connection's socket. The worker keeps a reserve
of descriptors for other files and for connections to upstream registries.

When no descriptor is left for a new connection, the worker *evicts* silent connections: it closes them. `EvictionKind`
lists the four kinds of silent connections. The worker never evicts a connection that is not silent.
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
"""Largest number of descriptors that a request in progress takes, in addition to its connection's descriptor."""
MAX_CONNECTIONS = 16384
"""Upper bound of a worker's connections, even if the limit of descriptors allows more, because each takes memory."""
FAIR_SHARE = 16
"""How many silent connections a client address may have. If it has more, its oldest ones are evicted before the
connections of other addresses."""
STALLED_SECONDS = 10.0
"""A connection with a request in progress is stalled if no byte was sent or received on it for this long."""
MAX_EXAMINED = 2000
"""Largest number of connections that one search for silent connections examines. Examining one takes up to ten
microseconds."""
MAX_EVICTIONS = 100
"""Largest number of connections that one call evicts. Closing one takes up to 80 microseconds, in which the worker
serves no other connection. Later calls evict the others."""
_MIN_RESERVE = 32
"""Smallest number of descriptors in the reserve. The reserve is an eighth of all descriptors if that is more."""
_MAX_FILES_TO_COUNT = 8192
"""A process counts its open files once a second if its limit of open files is at most this. With a higher limit,
counting could take too long. Then no count is needed either, because the reserve is so large that other files do not
use it up."""
_MIN_BUDGET = 8
"""Smallest number of descriptors for connections and their requests, even if that uses up the reserve."""
_LOW_CAPACITY = 256
"""A worker that can have fewer connections than this logs a warning at its start."""
_MIN_SELECTED = 32
"""Smallest number of silent connections that one search selects for eviction, if it finds so many."""
_ACCEPTS_PER_PAUSE = 32
"""How many new connections a full worker accepts, by evicting silent ones, between two pauses of `_PAUSE_SECONDS`. In a
pause it accepts none, so that other workers can accept them."""
_PAUSE_SECONDS = 0.01
_NOTHING_FOUND_SECONDS = 0.25
"""Pause between a search that found no silent connection and the next search."""
_BUSY_SECONDS = 0.1
"""How long a worker that is full and has no silent connection waits before it tries again to accept a connection."""
_LOG_INTERVAL_SECONDS = 60.0
"""Shortest time between two log lines with the same text."""

EvictionKind = Literal["lingering", "new", "idle", "stalled"]
"""Why a connection is silent:

- `lingering`: its last response was sent, and the server only waits for the client to close the connection.
- `new`: the client has not sent a complete request yet.
- `idle`: it is between two requests.
- `stalled`: it has a request in progress, but no byte was sent or received for `STALLED_SECONDS`.
"""


@dataclass(slots=True)
class EvictionCandidate:
    """Describes a connection that can be evicted."""

    kind: EvictionKind
    since: float
    """When the connection became silent; for the kind `new`, when it was opened. In seconds of the event loop's
    clock."""
    address: str | None
    """The client's IPv4 address, or the /64 network of its IPv6 address; None for a trusted proxy, whose connections
    serve many clients."""


class EvictableConnection(Protocol):
    """The methods of a connection that `ConnectionLimit` calls. The connection is open or pending (see
    `ConnectionLimit`)."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Describes the connection as a candidate for eviction; None if it is not silent or is closing already. `now`
        is in seconds of the event loop's clock."""
        ...

    def evict(self) -> None:
        """Closes the connection immediately, so that its descriptor can be used for another connection."""
        ...


_Selected = tuple[EvictableConnection, EvictionCandidate]
"""A silent connection, and the data that it reported to the search."""


class ConnectionLimit:
    """The connection limit of one worker. Create it after the application has started: the descriptors that are in
    use at that moment are never counted as free for connections."""

    def __init__(
        self,
        connections: Collection[EvictableConnection],
        pending: Collection[EvictableConnection],
        requests: Sized,
        clock: Callable[[], float],
        *,
        limit: int | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """The worker keeps the three collections up to date: its open connections, its pending ones (accepted, but not
        ready for requests, usually because the TLS handshake is in progress), and its requests in progress. `clock` is
        the event loop's, in seconds. `limit` is how many descriptors the process may have open; None: the limit that
        the system sets. `max_connections` is the upper bound of the connections, even if `limit` allows more."""
        self._connections = connections
        self._pending = pending
        self._requests = requests
        self._clock = clock
        self._limit = file_limit() if limit is None else limit
        self._max_connections = max_connections
        self._reserve = max(_MIN_RESERVE, self._limit // 8)
        self._files_at_start = count_open_files()
        self._budget = self._limit  # descriptors for connections and their requests
        self._selected: list[_Selected] = []  # found by the last search and not yet evicted; the last is evicted first
        self._evicted: set[EvictableConnection] = set()  # evicted, but perhaps still in the worker's collections
        self._search_offset = 0  # position in the collections where the next search begins
        self._no_search_until = -_NOTHING_FOUND_SECONDS
        self._accepts_left = 0  # new connections to accept before the next pause
        self._unlogged_evictions = 0  # since the last log line
        self._evictions_logged_at = -_LOG_INTERVAL_SECONDS
        self._busy_logged_at = -_LOG_INTERVAL_SECONDS
        self._set_budget(self._files_at_start)

    @property
    def capacity(self) -> int:
        """How many connections the worker may have while no request is in progress."""
        return min(self._budget, self._max_connections)

    def warn_if_low(self) -> None:
        """Logs a warning if the capacity is so small that a busy registry could reach it."""
        if self.capacity < _LOW_CAPACITY:
            log.warning(
                "at most %d open files leave room for %d connections in this process: see docs/en/network.md",
                self._limit,
                self.capacity,
            )

    def make_room_for_connection(self) -> float:
        """Makes room for a connection that the worker is about to accept. Returns 0.0 if the worker may accept it now.
        Otherwise returns the number of seconds in which the worker must accept no connection. Call it before each
        connection is accepted.

        If no descriptor is free, the first call returns a short time, in which another worker can accept the
        connection. The next calls evict silent connections to free descriptors, up to `_ACCEPTS_PER_PAUSE` times.
        """
        if self._free_descriptors() > 0:
            return 0.0
        if not self._accepts_left:
            self._accepts_left = _ACCEPTS_PER_PAUSE
            return _PAUSE_SECONDS
        missing = 1 - self._free_descriptors()  # free descriptors are negative if too many are in use
        if self.evict_connections(missing):
            self._accepts_left -= 1
            return 0.0
        self._log_busy()
        return _BUSY_SECONDS

    def make_room_for_request(self) -> None:
        """Evicts silent connections if requests in progress could need their descriptors. Call it when a request
        starts."""
        free = self._free_descriptors()
        if free < 0:
            self.evict_connections(-free)

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

    def adapt_to_open_files(self) -> None:
        """Adapts the number of descriptors for connections to how many files are open for other purposes, such as
        downloads from upstream registries. Evicts silent connections if too many descriptors are in use then. Does
        nothing if more than `_MAX_FILES_TO_COUNT` files may be open. Call it once a second."""
        if self._limit <= _MAX_FILES_TO_COUNT:
            own_files = len(self._connections) + len(self._pending) + FILES_PER_REQUEST * len(self._requests)
            self._set_budget(max(self._files_at_start, count_open_files() - own_files))
            if (free := self._free_descriptors()) < 0:
                self.evict_connections(-free)

    def _set_budget(self, other_files: int) -> None:
        self._budget = max(self._limit - other_files - self._reserve, _MIN_BUDGET)

    def _free_descriptors(self) -> int:
        """Returns how many descriptors are left for new connections; negative if too many are in use. If the
        worker has `max_connections` connections, none is left."""
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
        """Returns the silent connection to evict next; None if there is none. Takes the connection from those that the
        last search selected, and skips connections that were active since that search. If no selected connection is
        left, searches again."""
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

    def _search(self, now: float) -> list[_Selected]:
        """Examines up to `MAX_EXAMINED` connections, from the position where the previous search ended. Selects
        connections of one kind: `_MIN_SELECTED` of those found, or an eighth of them if that is more. Returns them in
        reverse order of eviction. The list is empty if no silent connection was found.

        Selects lingering connections if there are any. If not, selects new or idle connections: the kind of which there
        are more. So a client that opens many connections of one kind does not cause evictions of the other kind.
        Selects stalled connections only if there are no others.
        """
        by_kind: dict[EvictionKind, list[_Selected]] = {"lingering": [], "new": [], "idle": [], "stalled": []}
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
        """Says which limit the number of connections has."""
        if self._max_connections < self._budget:
            return f"this process may have at most {self._max_connections} connections"
        return f"with at most {self._limit} open files there is room for {self._budget} connections in this process"

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


def _sorted_for_eviction(silent: list[_Selected]) -> list[_Selected]:
    """Returns the connections in reverse order of eviction: the one to evict first is the last.

    If addresses have more than `FAIR_SHARE` silent connections, their oldest ones are evicted first, until each address
    has only this share. After that, the connection that has been silent for longest is evicted first.
    """
    silent.sort(key=lambda selected: -selected[1].since)  # newest first
    counts: Counter[str] = Counter()
    # Maps the id of each connection to a number. It is 0 for the newest `FAIR_SHARE` connections of an address. Its
    # older connections have the numbers 1, 2, 3, …; the oldest connection has the highest number.
    excess: dict[int, int] = {}
    for connection, candidate in silent:
        if candidate.address is not None:
            excess[id(connection)] = max(0, counts[candidate.address] + 1 - FAIR_SHARE)
            counts[candidate.address] += 1
    return sorted(silent, key=lambda selected: (excess.get(id(selected[0]), 0), -selected[1].since))

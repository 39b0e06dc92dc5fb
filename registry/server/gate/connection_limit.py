"""Limits how many connections one worker process has open, because each takes a file descriptor.

The worker keeps a reserve of descriptors for other files and for connections to upstream registries. When no descriptor
is left for a new connection, the worker *evicts* silent connections (`EvictionKind`): it closes them. It never evicts
others.
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
"""Descriptors that a request takes besides that of its connection. Two are for the file that it sends, and one is for a
duplicate of the connection's socket."""
MAX_CONNECTIONS = 16384
"""Upper bound of a worker's connections, because each takes memory."""
FAIR_SHARE = 16
"""How many silent connections a client address may have before its oldest ones are evicted first."""
STALLED_SECONDS = 10.0
"""A request in progress is stalled if no byte was sent or received for this long."""
MAX_EXAMINED = 2000
"""Largest number of connections that one search examines. Examining one takes up to ten microseconds."""
MAX_EVICTIONS = 100
"""Largest number of connections that one call evicts. Closing one takes up to 80 microseconds."""
_MIN_RESERVE = 32
"""Smallest number of descriptors in the reserve."""
_MAX_FILES_TO_COUNT = 8192
"""A process counts its open files only if its limit is at most this. With a higher limit, counting could take too long,
and the reserve is large enough for other files."""
_MIN_BUDGET = 8
"""Smallest number of descriptors for connections and their requests, even if that uses up the reserve."""
_LOW_CAPACITY = 256
"""Below this capacity, a worker logs a warning."""
_MIN_SELECTED = 32
"""Smallest number of connections that one search selects, if it finds so many."""
_ACCEPTS_PER_PAUSE = 32
"""How many new connections a full worker accepts between two pauses. In a pause, other workers can accept them."""
_PAUSE_SECONDS = 0.01
_NOTHING_FOUND_SECONDS = 0.25
"""Pause after a search that found no silent connection."""
_BUSY_SECONDS = 0.1
"""How long a full worker without silent connections accepts no new connection."""
_LOG_INTERVAL_SECONDS = 60.0
"""Shortest time between two log lines with the same text."""

EvictionKind = Literal["lingering", "new", "idle", "stalled"]
"""Why a connection is silent:

- `lingering`: its last response was sent, and the server waits for the client to close it.
- `new`: the client has not sent a complete request yet.
- `idle`: it is between two requests.
- `stalled`: its request is in progress, but no byte was sent or received for `STALLED_SECONDS`.
"""


@dataclass(slots=True)
class EvictionCandidate:
    """A connection that can be evicted."""

    kind: EvictionKind
    since: float
    """When the connection became silent; for the kind `new`, when it was opened. In seconds of the event loop's
    clock."""
    address: str | None
    """The client's IPv4 address, or the /64 network of its IPv6 address. None: a trusted proxy, whose connections serve
    many clients."""


class EvictableConnection(Protocol):
    """A connection as `ConnectionLimit` uses it."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Describes why the connection is silent; None: it is not silent, or is closing already. `now` is in seconds of
        the event loop's clock."""
        ...

    def evict(self) -> None:
        """Closes the connection immediately, which frees its descriptor."""
        ...


_Selected = tuple[EvictableConnection, EvictionCandidate]
"""A silent connection, and what it reported."""


class ConnectionLimit:
    """The connection limit of one worker. Create it after the application has started, because it counts the files that
    are open then."""

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
        """The worker keeps the three collections up to date. `pending`: accepted connections that are not ready for
        requests yet, such as during the TLS handshake. `clock`: the event loop's, in seconds. `limit`: how many
        descriptors the process may have open; None: the limit of the system."""
        self._connections = connections
        self._pending = pending
        self._requests = requests
        self._clock = clock
        self._limit = file_limit() if limit is None else limit
        self._max_connections = max_connections
        self._reserve = max(_MIN_RESERVE, self._limit // 8)
        self._files_at_start = count_open_files()
        self._budget = self._limit  # descriptors for connections and their requests
        self._selected: list[_Selected] = []  # found by the last search; the last one is evicted first
        self._evicted: set[EvictableConnection] = set()  # perhaps still in the worker's collections
        self._search_offset = 0
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
        """Logs a warning if a busy registry could reach the capacity."""
        if self.capacity < _LOW_CAPACITY:
            log.warning(
                "at most %d open files leave room for %d connections in this process: see docs/en/network.md",
                self._limit,
                self.capacity,
            )

    def make_room_for_connection(self) -> float:
        """Makes room for a connection that the worker is about to accept. Returns 0.0 if the worker may accept the
        connection now. Otherwise returns for how many seconds it must accept none.

        If no descriptor is free, the first call returns a short pause, so that another worker can accept the
        connection. The next `_ACCEPTS_PER_PAUSE` calls evict silent connections.
        """
        if self._free_descriptors() > 0:
            return 0.0
        if not self._accepts_left:
            self._accepts_left = _ACCEPTS_PER_PAUSE
            return _PAUSE_SECONDS
        missing = 1 - self._free_descriptors()
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

    def update_budget(self) -> None:
        """Sets how many descriptors connections may use, from the number of files that are open for other purposes. If
        connections use more, evicts silent ones. Call it once a second."""
        if self._limit <= _MAX_FILES_TO_COUNT:
            own_files = len(self._connections) + len(self._pending) + FILES_PER_REQUEST * len(self._requests)
            self._set_budget(max(self._files_at_start, count_open_files() - own_files))
            if (free := self._free_descriptors()) < 0:
                self.evict_connections(-free)

    def _set_budget(self, other_files: int) -> None:
        self._budget = max(self._limit - other_files - self._reserve, _MIN_BUDGET)

    def _free_descriptors(self) -> int:
        """Returns how many descriptors are left for new connections; negative if too many are in use."""
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
        """Returns the silent connection to evict next. Skips connections that were active since the last search."""
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
        """Selects silent connections of one kind: `_MIN_SELECTED`, or an eighth of those found if that is more. Returns
        them in reverse order of eviction; an empty list if none was found. Examines up to `MAX_EXAMINED` connections,
        from the position where the previous search ended.

        Selects lingering connections if there are any, and stalled ones only if there are no others. Of new and idle
        connections, selects the more frequent kind. So a client that opens many connections of one kind does not cause
        evictions of the other kind.
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
        """Says which limit the connections have."""
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

    Addresses with more than `FAIR_SHARE` silent connections lose their oldest ones first. After that, the connection
    that has been silent for longest is evicted first.
    """
    silent.sort(key=lambda selected: -selected[1].since)  # newest first
    counts: Counter[str] = Counter()
    # How far a connection is beyond the share of its address, by the connection's id. This is 0 for the newest
    # `FAIR_SHARE` connections of the address, and 1, 2, 3, … for its older ones; the oldest one has the most.
    excess: dict[int, int] = {}
    for connection, candidate in silent:
        if candidate.address is not None:
            excess[id(connection)] = max(0, counts[candidate.address] + 1 - FAIR_SHARE)
            counts[candidate.address] += 1
    return sorted(silent, key=lambda selected: (excess.get(id(selected[0]), 0), -selected[1].since))

"""Limits the connections of a worker, so that file descriptors are left for files and for upstreams.

Each connection takes a descriptor, and a request in progress up to three more: the file it sends, a copy of its socket,
and the file again to read it ahead. Connections may use the descriptors of the process less a reserve. When these are
used up, the worker closes silent connections to accept new ones: those that have not sent a complete request, and those
that are idle between requests. It closes a connection with a request in progress only if the client has neither sent
nor taken a byte for a while, and no other connection is silent.
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
"""Descriptors that a request in progress may take beside its connection's."""
MAX_CONNECTIONS = 16384
"""The most connections of a worker, however many descriptors there are: each takes memory too."""
FAIR_SHARE = 16
"""Silent connections that an address may have before its own are closed first."""
STALLED_SECONDS = 10.0
"""A connection with a request in progress counts as stalled after this time without a byte in either direction."""
MAX_EXAMINED = 2000
"""Connections that are examined to choose some to close."""
_LEAST_MARGIN = 32
"""The smallest reserve of descriptors."""
_MEASURED = 8192
"""With at most so many descriptors, those that are open are counted once a second. With more, the reserve suffices."""
_LEAST_BUDGET = 8
_LOW = 256
"""A capacity below this is worth a warning."""
_BATCH = 32
"""Connections that are chosen at once, and closed before another worker gets a chance again."""
_NONE_SECONDS = 0.25
"""For how long the result is cached that no connection was silent."""
_STAND_BACK_SECONDS = 0.01
"""How long a full worker leaves new connections to the others before it closes silent ones."""
_BUSY_SECONDS = 0.1
"""How long a worker accepts nothing when it is full and no connection is silent."""
_QUIET_SECONDS = 60.0
"""The shortest time between two log lines about the same thing."""

EvictionKind = Literal["lingering", "new", "idle", "stalled"]


@dataclass(slots=True)
class EvictionCandidate:
    """Why and since when a connection may be closed to make room for another one."""

    kind: EvictionKind
    since: float
    """When it fell silent."""
    address: str | None
    """The client's; None for a trusted proxy, which has the connections of many clients."""


class EvictableConnection(Protocol):
    """A connection, or one that is still in its TLS handshake."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Returns None if the connection is not silent, or ends already."""
        ...

    def drop(self) -> None:
        """Closes the connection at once."""
        ...


class ConnectionLimit:
    """The limit of one worker. To be made once the application has started: files open by then count as used."""

    def __init__(
        self,
        connections: Collection[EvictableConnection],
        handshakes: Collection[EvictableConnection],
        requests: Sized,
        clock: Callable[[], float],
        *,
        limit: int | None = None,
    ) -> None:
        """The collections are the worker's own; `requests` are those in progress. `limit` is the number of descriptors;
        None: the process's own limit."""
        self._connections = connections
        self._handshakes = handshakes
        self._requests = requests
        self._clock = clock
        self._limit = file_limit() if limit is None else limit
        self._margin = max(_LEAST_MARGIN, self._limit // 8)
        self._fixed = count_open_files()
        self._budget = self._limit
        self._victims: list[tuple[EvictableConnection, EvictionCandidate]] = []
        self._leaving: set[EvictableConnection] = set()  # closed, but perhaps still in the collections
        self._place = 0  # where the next choice starts to examine
        self._no_candidate_until = -_NONE_SECONDS
        self._credit = 0
        self._closed = 0
        self._logged_at = -_QUIET_SECONDS
        self._logged_busy_at = -_QUIET_SECONDS
        self._set_budget(self._fixed)

    @property
    def capacity(self) -> int:
        """The most connections while none has a request in progress."""
        return min(self._budget, MAX_CONNECTIONS)

    def warn_if_low(self) -> None:
        """Logs a warning if a busy registry could reach the limit."""
        if self.capacity < _LOW:
            log.warning(
                "at most %d open files leave room for %d connections in this process: see docs/network.md",
                self._limit,
                self.capacity,
            )

    def accept_delay(self) -> float:
        """Returns how many seconds to accept no connection; 0.0: there is room for one. Closes silent connections to
        make room. To be called before a connection is accepted."""
        if self._free() > 0:
            return 0.0
        if not self._credit:
            self._credit = _BATCH
            return _STAND_BACK_SECONDS  # another worker may have room
        if self.shed(1 - self._free()):
            self._credit -= 1
            return 0.0
        self._log_busy()
        return _BUSY_SECONDS

    def on_request(self) -> None:
        """Closes silent connections if the files of a request that starts now need their descriptors."""
        free = self._free()
        if free < 0:
            self.shed(-free)

    def shed(self, count: int) -> bool:
        """Closes up to `count` silent connections. Returns whether it closed any."""
        now, done = self._clock(), 0
        while done < count and (victim := self._next(now)) is not None:
            victim.drop()
            self._leaving.add(victim)
            done += 1
        if done:
            self._log_closed(done, now)
        return done > 0

    def measure(self) -> None:
        """Counts what else is open, such as files being filled and connections to upstreams. To be called once a
        second."""
        if self._limit <= _MEASURED:
            own = len(self._connections) + len(self._handshakes) + FILES_PER_REQUEST * len(self._requests)
            self._set_budget(max(self._fixed, count_open_files() - own))
            if (free := self._free()) < 0:
                self.shed(-free)

    def _set_budget(self, others: int) -> None:
        self._budget = max(self._limit - others - self._margin, _LEAST_BUDGET)

    def _free(self) -> int:
        count = len(self._connections) + len(self._handshakes)
        if self._leaving:
            self._leaving = {each for each in self._leaving if each in self._connections or each in self._handshakes}
            count -= len(self._leaving)
        return min(self._budget - count - FILES_PER_REQUEST * len(self._requests), MAX_CONNECTIONS - count)

    def _next(self, now: float) -> EvictableConnection | None:
        """Returns the silent connection to close next; None if there is none."""
        for fresh in (False, True):
            if fresh:
                if now < self._no_candidate_until:
                    return None
                self._victims = self._choose(now)
            while self._victims:
                connection, before = self._victims.pop()
                found = connection.eviction_candidate(now)
                if found is not None and (found.kind, found.since) == (before.kind, before.since):
                    return connection
        self._no_candidate_until = now + _NONE_SECONDS
        return None

    def _choose(self, now: float) -> list[tuple[EvictableConnection, EvictionCandidate]]:
        """Returns some connections to close, the last of them first. Examining one takes up to ten microseconds, so the
        choice serves for several closings, and examines at most `MAX_EXAMINED`, others each time."""
        found: dict[EvictionKind, list[tuple[EvictableConnection, EvictionCandidate]]] = {
            "lingering": [],
            "new": [],
            "idle": [],
            "stalled": [],
        }
        count = len(self._connections) + len(self._handshakes)
        start = self._place if self._place < count else 0
        self._place = start + MAX_EXAMINED
        for each in tuple(islice(chain(self._connections, self._handshakes), start, self._place)):
            candidate = each.eviction_candidate(now)
            if candidate is not None:
                found[candidate.kind].append((each, candidate))
        if len(found["new"]) >= len(found["idle"]):
            chosen = found["lingering"] or found["new"] or found["stalled"]
        else:
            chosen = found["lingering"] or found["idle"]
        return _ordered(chosen)[-max(_BATCH, len(chosen) // 8) :]

    def _log_closed(self, count: int, now: float) -> None:
        self._closed += count
        if now - self._logged_at >= _QUIET_SECONDS:
            log.warning(
                "closed %d silent connections to make room for others: with at most %d open files there is room for %d "
                "connections in this process; docs/network.md says how to raise that",
                self._closed,
                self._limit,
                self.capacity,
            )
            self._logged_at, self._closed = now, 0

    def _log_busy(self) -> None:
        now = self._clock()
        if now - self._logged_busy_at >= _QUIET_SECONDS:
            log.warning(
                "new connections have to wait: all %d have requests in progress, and this process may have at most %d "
                "open files; docs/network.md says how to raise that",
                len(self._connections),
                self._limit,
            )
            self._logged_busy_at = now


def _ordered(
    silent: list[tuple[EvictableConnection, EvictionCandidate]],
) -> list[tuple[EvictableConnection, EvictionCandidate]]:
    """Returns them with those to close first at the end: those that fell silent first, and before them the older ones
    of an address that has more than its share."""
    silent.sort(key=lambda each: -each[1].since)
    seen: Counter[str] = Counter()
    excess: dict[int, int] = {}
    for connection, candidate in silent:
        if candidate.address is not None:
            excess[id(connection)] = max(0, seen[candidate.address] + 1 - FAIR_SHARE)
            seen[candidate.address] += 1
    return sorted(silent, key=lambda each: (excess.get(id(each[0]), 0), -each[1].since))

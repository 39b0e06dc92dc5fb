"""How many connections a worker keeps, so that file descriptors are left for files and upstreams.

Every connection takes a descriptor, and a request in progress up to three more: the file it sends, a copy of its
socket, and the file again for reading ahead. What is beyond the limit less a reserve is not given to connections. When
it is used up, the worker closes silent connections to take new ones: those that have not sent a complete request, or
that are kept open between requests. A connection with a request in progress is closed only if its client has neither
sent nor taken a byte for a while, and no other is silent.
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
MAX_CONNECTIONS = 16384
"""The most connections of a worker, however many descriptors there are: each takes memory, too."""
FAIR_SHARE = 16
"""Silent connections that an address may have before it loses its own first."""
STALLED_SECONDS = 10.0
"""Without a byte either way, after which a connection with a request in progress counts as stalled."""
_LEAST_MARGIN = 32
_MEASURED = 8192
"""Up to this limit the open descriptors are counted once a second. With more of them the reserve is large enough."""
_LEAST_BUDGET = 8
_LOW = 256
MAX_EXAMINED = 2000
"""Connections that one choice looks at."""
_BATCH = 32
_NONE_SECONDS = 0.25
"""For how long it is remembered that none was silent."""
_STAND_BACK_SECONDS = 0.01
_BUSY_SECONDS = 0.1
_QUIET_SECONDS = 60.0

EvictionKind = Literal["lingering", "new", "idle", "stalled"]


@dataclass(slots=True)
class EvictionCandidate:
    """A connection that may be closed for another one. `since` is when it fell silent; `address` is None where the
    peer is a trusted proxy, which has all its clients' connections."""

    kind: EvictionKind
    since: float
    address: str | None


class EvictableConnection(Protocol):
    """What is counted: a connection, or one that is still in its TLS handshake."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """None: it is not silent, or ends already."""
        ...

    def drop(self) -> None:
        """Closes it at once."""
        ...


class ConnectionLimit:
    """Limits the connections of one worker. Make it once the application has started: files open then stay open."""

    def __init__(
        self,
        connections: Collection[EvictableConnection],
        handshakes: Collection[EvictableConnection],
        requests: Sized,
        clock: Callable[[], float],
        *,
        limit: int | None = None,
    ) -> None:
        """The collections are the worker's own; `requests` are those in progress. `limit`: of descriptors."""
        self._connections = connections
        self._handshakes = handshakes
        self._requests = requests
        self._clock = clock
        self._limit = file_limit() if limit is None else limit
        self._margin = max(_LEAST_MARGIN, self._limit // 8)
        self._fixed = count_open_files()
        self._budget = self._limit
        self._victims: list[tuple[EvictableConnection, EvictionCandidate]] = []
        self._leaving: set[EvictableConnection] = set()  # closed, and perhaps not gone yet
        self._place = 0  # where the next choice goes on
        self._no_candidate_until = -_NONE_SECONDS
        self._credit = 0
        self._closed = 0
        self._said = -_QUIET_SECONDS
        self._said_busy = -_QUIET_SECONDS
        self._set_budget(self._fixed)

    @property
    def capacity(self) -> int:
        """How many connections there may be while none has a request in progress."""
        return min(self._budget, MAX_CONNECTIONS)

    def warn_if_low(self) -> None:
        """One line in the log where a busy registry could come to that limit."""
        if self.capacity < _LOW:
            log.warning(
                "at most %d open files leave room for %d connections in this process: see docs/network.md",
                self._limit,
                self.capacity,
            )

    def accept_delay(self) -> float:
        """Before a connection is accepted. 0.0: there is room for it, perhaps made just now; else how many seconds to
        take none."""
        if self._free() > 0:
            return 0.0
        if not self._credit:
            self._credit = _BATCH
            return _STAND_BACK_SECONDS  # another worker may have room
        if self.shed(1 - self._free()):
            self._credit -= 1
            return 0.0
        self._say_busy()
        return _BUSY_SECONDS

    def on_request(self) -> None:
        """A request begins: its files may need the room of silent connections."""
        free = self._free()
        if free < 0:
            self.shed(-free)

    def shed(self, count: int) -> bool:
        """Closes up to `count` silent connections; whether there was one."""
        now, done = self._clock(), 0
        while done < count and (victim := self._next(now)) is not None:
            victim.drop()
            self._leaving.add(victim)
            done += 1
        if done:
            self._say(done, now)
        return done > 0

    def measure(self) -> None:
        """Once a second: takes into account what else is open, such as the files of fills and connections to
        upstreams."""
        if self._limit <= _MEASURED:
            ours = len(self._connections) + len(self._handshakes) + FILES_PER_REQUEST * len(self._requests)
            self._set_budget(max(self._fixed, count_open_files() - ours))
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
        """The silent connection to be closed next."""
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
        """Some connections to be closed, the last of them first. Made for several closings at once: a look at each
        takes up to ten microseconds. Of many only some are looked at, and others the next time."""
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

    def _say(self, count: int, now: float) -> None:
        self._closed += count
        if now - self._said >= _QUIET_SECONDS:
            log.warning(
                "closed %d silent connections to make room for others: with at most %d open files there is room for %d "
                "connections in this process; docs/network.md says how to raise that",
                self._closed,
                self._limit,
                self.capacity,
            )
            self._said, self._closed = now, 0

    def _say_busy(self) -> None:
        now = self._clock()
        if now - self._said_busy >= _QUIET_SECONDS:
            log.warning(
                "new connections have to wait: all %d have requests in progress, and this process may have at most %d "
                "open files; docs/network.md says how to raise that",
                len(self._connections),
                self._limit,
            )
            self._said_busy = now


def _ordered(
    silent: list[tuple[EvictableConnection, EvictionCandidate]],
) -> list[tuple[EvictableConnection, EvictionCandidate]]:
    """In the order in which they are kept: first those that fell silent last. An address that has more than its share
    has its older ones at the end."""
    silent.sort(key=lambda each: -each[1].since)
    seen: Counter[str] = Counter()
    excess: dict[int, int] = {}
    for connection, candidate in silent:
        if candidate.address is not None:
            excess[id(connection)] = max(0, seen[candidate.address] + 1 - FAIR_SHARE)
            seen[candidate.address] += 1
    return sorted(silent, key=lambda each: (excess.get(id(each[0]), 0), -each[1].since))

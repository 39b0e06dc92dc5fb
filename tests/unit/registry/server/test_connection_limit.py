"""Which connections a worker closes when it has as many open files as it may have, and in which order."""

from __future__ import annotations

import pytest

from registry.server.gate.connection_limit import (
    FAIR_SHARE,
    FILES_PER_REQUEST,
    MAX_CONNECTIONS,
    MAX_EVICTIONS,
    MAX_EXAMINED,
    STALLED_SECONDS,
    ConnectionLimit,
    EvictableConnection,
    EvictionCandidate,
    SilentConnectionKind,
)
from registry.server.kernel import count_open_files

NOW = 1000.0


class FakeConnection:
    """A connection to a client, in place of the real protocol object. If `kind` is None, a request of the connection is
    in progress, and the connection must not be closed."""

    def __init__(
        self,
        open_connections: set[EvictableConnection],
        kind: SilentConnectionKind | None,
        since: float,
        address: str | None,
    ) -> None:
        self._candidate = None if kind is None else EvictionCandidate(kind, since, address)
        self._open_connections = open_connections
        open_connections.add(self)

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return self._candidate if self in self._open_connections else None

    def evict(self) -> None:
        self._open_connections.remove(self)


class StillClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def few_earlier_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the descriptors that the test process has open at the start of the test. Earlier tests may have left
    hundreds open until a garbage collection."""
    earlier_files = count_open_files()
    module = "registry.server.gate.connection_limit"
    monkeypatch.setattr(f"{module}.count_open_files", lambda: 20 + max(0, count_open_files() - earlier_files))


class LimitedWorker:
    """A worker with a limit of 400 file descriptors. The descriptors that the test opens count as well."""

    def __init__(self, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self.open_connections: set[EvictableConnection] = set()
        self.requests: set[object] = set()
        self.clock = StillClock()
        self.limit = ConnectionLimit(
            self.open_connections, set(), self.requests, self.clock, max_open_files=400, max_connections=max_connections
        )

    def add(
        self, count: int, kind: SilentConnectionKind | None, since: float = 0.0, address: str | None = "a"
    ) -> list[FakeConnection]:
        """Adds `count` connections. `since`: when the first one became silent; each further one did so a second later.
        `address`: the client's; None: the connections come from a trusted proxy."""
        return [FakeConnection(self.open_connections, kind, since + number, address) for number in range(count)]

    def closed_counts(self, *groups: list[FakeConnection]) -> list[int]:
        """Returns how many connections of each group were closed."""
        return [sum(connection not in self.open_connections for connection in group) for group in groups]


def test_longest_silent_connections_are_closed_first() -> None:
    """Of connections of the same kind, the one that has been silent for the longest time is closed first."""
    worker = LimitedWorker()
    connections = worker.add(10, "idle")
    assert worker.limit.evict_connections(3)
    assert [connection in worker.open_connections for connection in connections] == [False] * 3 + [True] * 7


def test_new_and_idle_connections_do_not_displace_each_other() -> None:
    """A *new* connection has not sent a request yet, an *idle* one waits between two requests. If there are many new
    connections, only new ones are closed. If there are many idle connections, only idle ones are closed."""
    worker = LimitedWorker()
    idle, new = worker.add(10, "idle", address="b"), worker.add(30, "new", since=500, address=None)
    worker.limit.evict_connections(15)
    assert worker.closed_counts(idle, new) == [0, 15]
    worker = LimitedWorker()
    idle, new = worker.add(60, "idle", since=500, address=None), worker.add(3, "new", address="b")
    worker.limit.evict_connections(15)
    assert worker.closed_counts(idle, new) == [15, 0]


def test_an_address_with_many_connections_loses_its_own_first() -> None:
    """If an address has more connections than its fair share, its connections are closed before those of other
    addresses. Connections of a trusted proxy, whose address is None, are not limited to a share."""
    worker = LimitedWorker()
    others = worker.add(FAIR_SHARE, "idle", address="b")
    proxied = worker.add(40, "idle", since=100, address=None)
    many = worker.add(FAIR_SHARE + 20, "idle", since=500)
    worker.limit.evict_connections(20)
    assert worker.closed_counts(others, proxied, many) == [0, 0, 20]
    worker.limit.evict_connections(1)
    assert worker.closed_counts(others, proxied, many) == [1, 0, 20]


def test_connections_with_a_request_in_progress_stay_open() -> None:
    """A connection with a request in progress is closed only if it has stalled, and only after all new and idle
    connections."""
    worker = LimitedWorker()
    busy, stalled, new = worker.add(5, None), worker.add(2, "stalled", NOW - STALLED_SECONDS), worker.add(2, "new")
    worker.limit.evict_connections(2)
    assert worker.closed_counts(busy, stalled, new) == [0, 0, 2]
    worker.limit.evict_connections(10)
    assert worker.closed_counts(busy, stalled, new) == [0, 2, 2]
    assert not worker.limit.evict_connections(1)


def test_a_request_makes_room_for_its_files() -> None:
    """A request may need file descriptors. When a request begins on a full worker, as many silent connections are
    closed as the request may need descriptors."""
    worker = LimitedWorker()
    connections = worker.add(worker.limit.capacity, "idle", address=None)
    worker.requests.add(object())
    worker.limit.make_room_for_request()
    assert worker.closed_counts(connections) == [FILES_PER_REQUEST]


def test_a_full_worker_first_leaves_connections_to_other_workers() -> None:
    """A worker at its limit first delays accepting, so that other workers can accept the new connections. Then it
    closes a silent connection. If it has no silent connections, it delays accepting again."""
    worker = LimitedWorker()
    assert worker.limit.make_room_for_connection() == 0.0
    silent_connections = worker.add(worker.limit.capacity, "new", address=None)
    assert worker.limit.make_room_for_connection() > 0
    assert worker.limit.make_room_for_connection() == 0.0
    assert worker.closed_counts(silent_connections) == [1]
    for connection in silent_connections:
        worker.open_connections.discard(connection)
    worker.add(worker.limit.capacity, None)
    assert worker.limit.make_room_for_connection() > 0
    assert worker.limit.make_room_for_connection() > 0


def test_the_number_of_connections_can_be_limited_further() -> None:
    """A worker may be given a limit of connections that is below what the open files allow. Its log then names this
    limit, not that of the open files."""
    worker = LimitedWorker(max_connections=50)
    assert worker.limit.capacity == 50
    idle = worker.add(50, "idle")
    assert worker.limit.make_room_for_connection() > 0
    assert worker.limit.make_room_for_connection() == 0.0
    assert worker.closed_counts(idle) == [1]


def test_the_log_says_which_limit_closes_connections(caplog: pytest.LogCaptureFixture) -> None:
    """The log line about closed connections says whether the open files or the number of connections is limited."""
    for max_connections, text in (
        (50, "this process may have at most 50 connections;"),
        (1000, "at most 400 open files"),
    ):
        worker = LimitedWorker(max_connections=max_connections)
        worker.add(50, "idle")
        worker.limit.evict_connections(1)
        assert text in caplog.messages[-1]


def test_one_eviction_examines_a_limited_number_of_connections() -> None:
    """With 16,000 open connections, each eviction examines at most about `MAX_EXAMINED` of them. The next evictions
    continue with the other connections, until the only silent connection is found."""
    limit = 20_000
    examined: list[FakeConnection] = []

    class RecordedConnection(FakeConnection):
        def eviction_candidate(self, now: float) -> EvictionCandidate | None:
            examined.append(self)
            return super().eviction_candidate(now)

    open_connections: set[EvictableConnection] = set()
    connections = [RecordedConnection(open_connections, None, 0.0, "a") for _ in range(15_999)]
    silent_connection = RecordedConnection(open_connections, "idle", 0.0, "a")
    clock = StillClock()
    connection_limit = ConnectionLimit(open_connections, set(), set(), clock, max_open_files=limit)
    most_examined = 0
    for _ in range(20):
        examined.clear()
        connection_limit.evict_connections(1)
        most_examined = max(most_examined, len(examined))
        clock.now += 1.0
    assert most_examined <= MAX_EXAMINED + 10
    assert silent_connection not in open_connections
    assert all(connection in open_connections for connection in connections)


def test_one_call_evicts_a_limited_number_of_connections() -> None:
    """If many connections have to be closed, one call closes only `MAX_EVICTIONS` of them, so that the worker serves
    its other clients before it closes more."""
    worker = LimitedWorker()
    idle = worker.add(MAX_EVICTIONS + 50, "idle")
    assert worker.limit.evict_connections(1000)
    assert worker.closed_counts(idle) == [MAX_EVICTIONS]
    assert worker.limit.evict_connections(1000)
    assert worker.closed_counts(idle) == [MAX_EVICTIONS + 50]


def test_absence_of_silent_connections_is_cached_briefly() -> None:
    """If no silent connection was found, the limit does not search again for a quarter of a second."""
    worker = LimitedWorker()
    worker.add(10, None)
    assert not worker.limit.evict_connections(1)
    idle = worker.add(1, "idle")
    assert not worker.limit.evict_connections(1)
    worker.clock.now += 0.3
    assert worker.limit.evict_connections(1)
    assert worker.closed_counts(idle) == [1]

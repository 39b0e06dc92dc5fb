"""Which connections are closed to make room for others, and in which order."""

from __future__ import annotations

from registry.server.gate.connection_limit import (
    FAIR_SHARE,
    FILES_PER_REQUEST,
    MAX_EXAMINED,
    STALLED_SECONDS,
    ConnectionLimit,
    EvictableConnection,
    EvictionCandidate,
    EvictionKind,
)

NOW = 1000.0


class SilentPeer:
    """A connection as the limit sees it. Without a kind, a request of the connection is in progress."""

    def __init__(
        self, there: set[EvictableConnection], kind: EvictionKind | None, since: float, address: str | None
    ) -> None:
        self._silence = None if kind is None else EvictionCandidate(kind, since, address)
        self._there = there
        there.add(self)

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return self._silence if self in self._there else None

    def evict(self) -> None:
        self._there.remove(self)


class StillClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class LimitedWorker:
    """A worker with a limit of 400 descriptors, some of which this process has open."""

    def __init__(self) -> None:
        self.there: set[EvictableConnection] = set()
        self.requests: set[object] = set()
        self.clock = StillClock()
        self.limit = ConnectionLimit(self.there, set(), self.requests, self.clock, limit=400)

    def add(
        self, count: int, kind: EvictionKind | None, since: float = 0.0, address: str | None = "a"
    ) -> list[SilentPeer]:
        return [SilentPeer(self.there, kind, since + number, address) for number in range(count)]

    def closed(self, *groups: list[SilentPeer]) -> list[int]:
        """Returns how many connections of each group were closed."""
        return [sum(peer not in self.there for peer in group) for group in groups]


def test_the_longest_silent_go_first() -> None:
    """Of connections of the same kind, the one that has been silent for the longest time is closed first."""
    site = LimitedWorker()
    peers = site.add(10, "idle")
    assert site.limit.evict_connections(3)
    assert [peer in site.there for peer in peers] == [False] * 3 + [True] * 7


def test_new_ones_go_before_idle_ones() -> None:
    """Many new connections do not make the limit close idle ones, and many idle connections do not make it close new
    ones."""
    site = LimitedWorker()
    idle, new = site.add(10, "idle", address="b"), site.add(30, "new", since=500, address=None)
    site.limit.evict_connections(15)
    assert site.closed(idle, new) == [0, 15]
    site = LimitedWorker()
    idle, new = site.add(60, "idle", since=500, address=None), site.add(3, "new", address="b")
    site.limit.evict_connections(15)
    assert site.closed(idle, new) == [15, 0]


def test_an_address_loses_its_own_first() -> None:
    """If an address has more connections than its share, its oldest connections are closed before those of other
    addresses. A trusted proxy has no such share."""
    site = LimitedWorker()
    others = site.add(FAIR_SHARE, "idle", address="b")
    proxied = site.add(40, "idle", since=100, address=None)
    many = site.add(FAIR_SHARE + 20, "idle", since=500)
    site.limit.evict_connections(20)
    assert site.closed(others, proxied, many) == [0, 0, 20]
    site.limit.evict_connections(1)
    assert site.closed(others, proxied, many) == [1, 0, 20]


def test_who_is_at_work_stays() -> None:
    """A connection with a request in progress is closed only if it has stalled, and only after all other kinds of
    connections."""
    site = LimitedWorker()
    busy, stalled, new = site.add(5, None), site.add(2, "stalled", NOW - STALLED_SECONDS), site.add(2, "new")
    site.limit.evict_connections(2)
    assert site.closed(busy, stalled, new) == [0, 0, 2]
    site.limit.evict_connections(10)
    assert site.closed(busy, stalled, new) == [0, 2, 2]
    assert not site.limit.evict_connections(1)


def test_a_request_makes_room_for_its_files() -> None:
    """A request that begins closes as many silent connections as its files need descriptors."""
    site = LimitedWorker()
    peers = site.add(site.limit.capacity, "idle", address=None)
    site.requests.add(object())
    site.limit.make_room_for_request()
    assert site.closed(peers) == [FILES_PER_REQUEST]


def test_a_full_worker_stands_back_first() -> None:
    """A worker at its limit first leaves new connections to other workers. Then it closes silent connections. If it has
    none, it accepts no connections for a while."""
    site = LimitedWorker()
    assert site.limit.accept_delay() == 0.0
    silent = site.add(site.limit.capacity, "new", address=None)
    assert site.limit.accept_delay() > 0
    assert site.limit.accept_delay() == 0.0
    assert site.closed(silent) == [1]
    for peer in silent:
        site.there.discard(peer)
    site.add(site.limit.capacity, None)
    assert site.limit.accept_delay() > 0
    assert site.limit.accept_delay() > 0


def test_a_choice_looks_at_a_bounded_number() -> None:
    """Of 16,000 connections, one choice examines some, and the next choices examine the others, until all were
    examined."""
    limit = 20_000
    looked: list[SilentPeer] = []

    class Looked(SilentPeer):
        def eviction_candidate(self, now: float) -> EvictionCandidate | None:
            looked.append(self)
            return super().eviction_candidate(now)

    there: set[EvictableConnection] = set()
    peers = [Looked(there, None, 0.0, "a") for _ in range(15_999)]
    silent = Looked(there, "idle", 0.0, "a")
    clock = StillClock()
    made = ConnectionLimit(there, set(), set(), clock, limit=limit)
    most = 0
    for _ in range(20):
        looked.clear()
        made.evict_connections(1)
        most = max(most, len(looked))
        clock.now += 1.0
    assert most <= MAX_EXAMINED + 10
    assert silent not in there
    assert all(peer in there for peer in peers)


def test_that_nobody_is_silent_is_remembered_for_a_moment() -> None:
    """If no connection was silent, this result is cached for a quarter of a second."""
    site = LimitedWorker()
    site.add(10, None)
    assert not site.limit.evict_connections(1)
    idle = site.add(1, "idle")
    assert not site.limit.evict_connections(1)
    site.clock.now += 0.3
    assert site.limit.evict_connections(1)
    assert site.closed(idle) == [1]

"""Connection counts and rate limits that all workers share."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from http.client import HTTPException

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.server.gate.per_address_limit import PerAddressLimit, TooManyConnections
from registry.server.shared_counters import SharedCounters, SharedRateLimiter
from tests.system.server.app_process import AppProcess, Start, read_response, wait_for


def in_children(count: int, work: Callable[[int], int]) -> list[int]:
    """Runs `work` in many processes at once. Returns their exit codes."""
    pids = []
    for place in range(count):
        pid = os.fork()
        if pid == 0:
            code = 255
            try:
                code = work(place)
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# Paces


class LimiterClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_rate() -> None:
    """After a burst, one request per step of time passes; the wait is exact, and a refused request counts nothing."""
    clock = LimiterClock()
    pace = SharedRateLimiter(2.0, 3, clock=clock)
    assert [pace.take("a") for _ in range(3)] == [0.0] * 3
    assert pace.take("a") == pytest.approx(0.5)
    assert pace.take("a") == pytest.approx(0.5)
    clock.now += 0.4
    assert pace.take("a") == pytest.approx(0.1)
    clock.now += 0.11
    assert pace.take("a") == 0.0
    assert pace.take("a") > 0
    clock.now += 1000
    assert [pace.take("a") for _ in range(3)] == [0.0] * 3
    assert pace.take("a") > 0


def test_keys_have_nothing_to_do_with_each_other() -> None:
    """A thousand keys at their limit do not affect others, unless two cells collide."""
    pace = SharedRateLimiter(1.0, 1, clock=LimiterClock())
    assert sum(1 for key in range(1000) if pace.take(f"10.0.0.{key}")) < 20
    assert all(pace.take(f"10.0.0.{key}") for key in range(1000))


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.5, 20), st.integers(1, 10))
def test_never_more_than_allowed(pauses: list[float], per_second: float, burst: int) -> None:
    """In no period more requests pass than the burst and the rate allow."""
    clock, taken = LimiterClock(), []
    pace = SharedRateLimiter(per_second, burst, clock=clock)
    for pause in pauses:
        clock.now += pause
        if pace.take("a") == 0.0:
            taken.append(clock.now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + per_second * (taken[last] - taken[first]) + 1e-6


def test_processes_share_a_pace() -> None:
    """A request that one process counts is counted for all. Processes that count at the same moment let at most one
    request too many pass each."""
    pace = SharedRateLimiter(0.001, 100)
    codes = in_children(4, lambda _: sum(1 for _ in range(100) if pace.take("a") == 0.0))
    assert 100 <= sum(codes) <= 100 + 3 * 100
    assert pace.take("a") > 0
    again = SharedRateLimiter(0.001, 100)
    assert in_children(1, lambda _: sum(1 for _ in range(60) if again.take("a") == 0.0)) == [60]
    assert in_children(1, lambda _: sum(1 for _ in range(60) if again.take("a") == 0.0)) == [40]


@pytest.mark.parametrize(("per_second", "burst"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_a_pace_that_is_none(per_second: float, burst: int) -> None:
    """A rate of 0 and a burst of 0 are errors."""
    with pytest.raises(ValueError, match="a rate limit needs"):
        SharedRateLimiter(per_second, burst)


# Counts


def test_columns_add_up() -> None:
    """Each process counts in its own column, and all read the sum; a process that has ended counts no more."""
    counts = SharedCounters(3)
    assert [counts.add(column, "a") for column in (0, 1, 1, 2)] == [1, 2, 3, 4]
    assert counts.add(0, "b") == 1
    counts.remove(1, "a")
    assert counts.add(0, "a") == 4
    counts.clear(0)
    assert counts.add(2, "a") == 3


def test_processes_share_counts() -> None:
    """No count is lost, however many processes count at once."""
    counts = SharedCounters(4)

    def work(column: int) -> int:
        for _ in range(2000):
            counts.add(column, "a")
        for _ in range(1990):
            counts.remove(column, "a")
        return 0

    assert in_children(4, work) == [0] * 4
    assert counts.add(0, "a") == 41


def test_no_more_columns() -> None:
    """A process without a column admits every connection; a released column is empty and can be claimed again."""
    limit = PerAddressLimit(1, workers=1)
    columns = [limit.claim_column() for _ in range(5)]
    assert columns[-1] is None
    limit.use_column(None)
    for _ in range(3):
        limit.admit("192.0.2.1").release()
    limit.use_column(columns[2])
    limit.admit("192.0.2.1")
    with pytest.raises(TooManyConnections):
        limit.admit("::ffff:192.0.2.1")
    limit.release_column(columns[2])
    limit.use_column(limit.claim_column())
    limit.admit("192.0.2.1")


def test_a_seat_is_left_once() -> None:
    """Releasing a connection twice counts once."""
    limit = PerAddressLimit(2, workers=1)
    limit.use_column(limit.claim_column())
    first, _ = limit.admit("2001:db8::1"), limit.admit("2001:db8::2")
    with pytest.raises(TooManyConnections):
        limit.admit("2001:db8::3")
    first.release()
    first.release()
    limit.admit("2001:db8::3")
    with pytest.raises(TooManyConnections):
        limit.admit("2001:db8::4")


# Connections of an address, in a real server


def closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def serves(sock: socket.socket) -> bool:
    """Returns whether a request on the connection is answered."""
    try:
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        return read_response(sock)[0] == 200
    except (ConnectionError, HTTPException):
        return False


def open_some(running: AppProcess, count: int) -> tuple[list[socket.socket], int]:
    """Opens `count` connections. Returns those that are served, and how many are not."""
    socks = [running.connect() for _ in range(count)]
    good = [sock for sock in socks if serves(sock)]
    for sock in socks:
        if sock not in good:
            sock.close()
    return good, count - len(good)


def test_connections_of_an_address(start: Start) -> None:
    """An address has at most the configured number of connections over two workers. Those beyond are closed, and room
    is made when one ends. One log line tells of it."""
    running = start(workers=2, connections=6)
    good, refused = open_some(running, 16)
    assert (len(good), refused) == (6, 10)
    assert all(map(serves, good))
    good.pop().close()
    wait_for(lambda: bool(open_some_into(running, good)))
    assert len(good) == 6
    assert running.errors.count("closed") in (1, 2)  # at most a line for each worker
    assert "beyond the limit of 6, the last from 127.0.0.1" in running.errors
    for sock in good:
        sock.close()


def open_some_into(running: AppProcess, good: list[socket.socket]) -> list[socket.socket]:
    more, _ = open_some(running, 1)
    good += more
    return more


def test_a_worker_that_dies_takes_its_counts_along(start: Start) -> None:
    """The connections of a killed worker no longer count."""
    running = start(workers=2, connections=4)
    good, _ = open_some(running, 8)
    assert len(good) == 4
    for pid in running.children():
        os.kill(pid, signal.SIGKILL)
    assert all(map(closed, good))
    found: list[socket.socket] = []
    wait_for(lambda: bool(open_some_into(running, found)) and len(found) == 4)
    assert open_some(running, 4)[1] == 4
    for sock in (*good, *found):
        sock.close()


def test_connections_go_on_while_workers_are_renewed(start: Start) -> None:
    """During a renewal by SIGUSR2 every open connection counts exactly once."""
    running = start(workers=2, connections=4)
    before = running.children()
    with running.connect() as slow:
        slow.sendall(b"GET /slow?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        running.said("slow")
        os.kill(running.pid, signal.SIGUSR2)
        assert read_response(slow)[2] == b"slow"
    wait_for(lambda: len(running.children()) == 2 and not set(running.children()) & set(before))
    good, refused = open_some(running, 8)
    assert (len(good), refused) == (4, 4)
    for sock in good:
        sock.close()


def test_a_trusted_proxy_has_as_many_as_it_likes(start: Start) -> None:
    """The limit does not apply to trusted proxies, which have the connections of many clients."""
    running = start(workers=2, connections=2, proxies=["127.0.0.1/32"])
    good, refused = open_some(running, 8)
    assert (len(good), refused) == (8, 0)
    for sock in good:
        sock.close()

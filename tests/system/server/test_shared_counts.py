"""Tests of the connection counts and rate limits that all worker processes share."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.server.gate.per_address_limit import PerAddressLimit, TooManyConnections
from registry.server.shared_counters import SharedCounters, SharedRateLimiter, allocate_limiter_cells
from tests.system.server.app_process import AppProcess, Start, read_response, wait_for


def in_children(count: int, work: Callable[[int], int]) -> list[int]:
    """Runs `work` in `count` child processes at the same time, with the number of the process. Returns their exit
    codes, which are the results of `work`."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            exit_code = 255
            try:
                exit_code = work(number)
            finally:
                os._exit(exit_code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


# Rate limits


class LimiterClock:
    """A clock in seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_rate() -> None:
    """The limiter allows two requests per second and a burst of three. After the burst it allows one request each half
    second. It returns the exact wait, and does not count refused requests."""
    clock = LimiterClock()
    limiter = SharedRateLimiter(2.0, 3, clock=clock)
    assert [limiter.take("a") for _ in range(3)] == [0.0] * 3
    assert limiter.take("a") == pytest.approx(0.5)
    assert limiter.take("a") == pytest.approx(0.5)
    clock.now += 0.4
    assert limiter.take("a") == pytest.approx(0.1)
    clock.now += 0.11
    assert limiter.take("a") == 0.0
    assert limiter.take("a") > 0
    clock.now += 1000
    assert [limiter.take("a") for _ in range(3)] == [0.0] * 3
    assert limiter.take("a") > 0


@pytest.mark.parametrize(("per_second", "burst"), [(100.0, 100), (1.0, 1)])
def test_limiter_with_new_limits_frees_blocked_clients(per_second: float, burst: int) -> None:
    """A client has used up a burst of 100 with a rate of one request per second. Then a limiter with a higher rate or a
    smaller burst uses the same memory, as after a change of the settings. It refuses the client for the time of one
    request at most, and then applies its own limits."""
    clock, cells = LimiterClock(), allocate_limiter_cells()
    old_limiter = SharedRateLimiter(1.0, 100, clock=clock, cells=cells)
    assert [old_limiter.take("a") for _ in range(100)] == [0.0] * 100
    limiter = SharedRateLimiter(per_second, burst, clock=clock, cells=cells)
    for _ in range(2):
        assert limiter.take("a") == pytest.approx(1 / per_second)
    clock.now += 1.001 / per_second
    assert limiter.take("a") == 0.0
    assert limiter.take("a") > 0
    clock.now += 1000
    assert [limiter.take("a") for _ in range(burst)] == [0.0] * burst
    assert limiter.take("a") > 0


def test_keys_are_limited_separately() -> None:
    """A thousand keys are limited separately from each other. Few keys are refused because their cells collide with
    those of other keys."""
    limiter = SharedRateLimiter(1.0, 1, clock=LimiterClock())
    assert sum(1 for key in range(1000) if limiter.take(f"10.0.0.{key}")) < 20
    assert all(limiter.take(f"10.0.0.{key}") for key in range(1000))


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.5, 20), st.integers(1, 10))
def test_rate_and_burst_are_never_exceeded(pauses: list[float], per_second: float, burst: int) -> None:
    """In no period does the limiter allow more requests than the burst and the rate permit."""
    clock, allowed_times = LimiterClock(), []
    limiter = SharedRateLimiter(per_second, burst, clock=clock)
    for pause in pauses:
        clock.now += pause
        if limiter.take("a") == 0.0:
            allowed_times.append(clock.now)
    for start in range(len(allowed_times)):
        for end in range(start, len(allowed_times)):
            assert end - start + 1 <= burst + per_second * (allowed_times[end] - allowed_times[start]) + 1e-6


def test_processes_share_a_rate_limit() -> None:
    """A request that one process counts is counted for all processes. If four processes count at the same moment, they
    may allow some requests too many, but fewer than with a limit for each. Processes that count one after another allow
    exactly the burst."""
    limiter = SharedRateLimiter(0.001, 100)
    allowed_counts = in_children(4, lambda _: sum(1 for _ in range(100) if limiter.take("a") == 0.0))
    assert 100 <= sum(allowed_counts) < 4 * 100
    assert limiter.take("a") > 0
    second_limiter = SharedRateLimiter(0.001, 100)
    assert in_children(1, lambda _: sum(1 for _ in range(60) if second_limiter.take("a") == 0.0)) == [60]
    assert in_children(1, lambda _: sum(1 for _ in range(60) if second_limiter.take("a") == 0.0)) == [40]


@pytest.mark.parametrize(("per_second", "burst"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_invalid_rate_limits(per_second: float, burst: int) -> None:
    """A rate of 0 or less and a burst of 0 are errors."""
    with pytest.raises(ValueError, match="a rate limit needs"):
        SharedRateLimiter(per_second, burst)


# Counts


def test_count_is_the_sum_of_all_columns() -> None:
    """Each process counts in a column of its own, and every process reads the sum of all columns. The counts of a
    process that has ended are cleared."""
    counts = SharedCounters(3)
    assert [counts.add(column, "a") for column in (0, 1, 1, 2)] == [1, 2, 3, 4]
    assert counts.add(0, "b") == 1
    counts.remove(1, "a")
    assert counts.add(0, "a") == 4
    counts.clear(0)
    assert counts.add(2, "a") == 3


class InterruptedCells:
    """The memory of a `SharedCounters`. Calls `interrupt` before a cell is written for the second time."""

    def __init__(self, cells: memoryview, interrupt: Callable[[], None]) -> None:
        self._cells = cells
        self._interrupt = interrupt
        self._writes = 0

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._writes += 1
        if self._writes == 2:
            self._interrupt()
        self._cells[index] = value


def test_one_of_two_simultaneous_additions_sees_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a process adds to a key while another process is between its writes to the two cells of the key, one of them
    gets the sum of both additions. So together they cannot exceed a limit."""
    counts = SharedCounters(2)
    results: list[int] = []
    memory = counts._cells

    def add_in_other_process() -> None:
        monkeypatch.setattr(counts, "_cells", memory)
        results.append(counts.add(1, "a"))

    monkeypatch.setattr(counts, "_cells", InterruptedCells(memory, add_in_other_process))
    results.append(counts.add(0, "a"))
    assert max(results) == 2


def test_processes_share_counts() -> None:
    """No count is lost when four processes count at the same time."""
    counts = SharedCounters(4)

    def work(column: int) -> int:
        for _ in range(2000):
            counts.add(column, "a")
        for _ in range(1990):
            counts.remove(column, "a")
        return 0

    assert in_children(4, work) == [0] * 4
    assert counts.add(0, "a") == 41  # ten are left of each process


def test_process_without_a_column_admits_every_connection() -> None:
    """If there are more processes than columns, a process without a column admits every connection. A released column
    is cleared, and another process can claim it."""
    limit = PerAddressLimit(1, workers=1)
    columns = [limit.claim_column() for _ in range(5)]
    assert columns[-1] is None
    limit.set_own_column(None)
    for _ in range(3):
        limit.admit("192.0.2.1").release()
    limit.set_own_column(columns[2])
    limit.admit("192.0.2.1")
    with pytest.raises(TooManyConnections):
        limit.admit("::ffff:192.0.2.1")
    limit.release_column(columns[2])
    limit.set_own_column(limit.claim_column())
    limit.admit("192.0.2.1")


def test_releasing_a_connection_twice_counts_once() -> None:
    """If a connection is released twice, the limit frees only one place."""
    limit = PerAddressLimit(2, workers=1)
    limit.set_own_column(limit.claim_column())
    first, _ = limit.admit("2001:db8::1"), limit.admit("2001:db8::2")
    with pytest.raises(TooManyConnections):
        limit.admit("2001:db8::3")
    first.release()
    first.release()
    limit.admit("2001:db8::3")
    with pytest.raises(TooManyConnections):
        limit.admit("2001:db8::4")


# The limit of connections per address, in a real server


def closed(sock: socket.socket) -> bool:
    """Returns whether the server has closed the connection."""
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
    """Opens `count` connections. Returns those that the server serves, and the number of those that it closes."""
    socks = [running.connect() for _ in range(count)]
    served = [sock for sock in socks if serves(sock)]
    for sock in socks:
        if sock not in served:
            sock.close()
    return served, count - len(served)


def test_connections_of_an_address(start: Start) -> None:
    """Two workers together serve at most the configured number of connections of one client address, and close further
    connections. When a connection ends, another one is served. Each worker logs at most one line about this."""
    running = start(workers=2, connections=6)
    served, refused = open_some(running, 16)
    assert (len(served), refused) == (6, 10)
    assert all(map(serves, served))
    served.pop().close()
    wait_for(lambda: bool(open_some_into(running, served)))
    assert len(served) == 6
    wait_for(lambda: "beyond the limit of 6, the last from 127.0.0.1" in running.errors)
    assert running.errors.count("closed") in (1, 2)  # at most a line for each worker
    for sock in served:
        sock.close()


def open_some_into(running: AppProcess, served: list[socket.socket]) -> list[socket.socket]:
    """Opens one connection, and adds it to `served` if the server serves it. Returns the added connections."""
    added, _ = open_some(running, 1)
    served += added
    return added


def test_connections_of_a_killed_worker_do_not_count(start: Start) -> None:
    """After the workers were killed, their connections no longer count against the limit."""
    running = start(workers=2, connections=4)
    served, _ = open_some(running, 8)
    assert len(served) == 4
    for pid in running.children():
        os.kill(pid, signal.SIGKILL)
    assert all(map(closed, served))
    new: list[socket.socket] = []
    wait_for(lambda: bool(open_some_into(running, new)) and len(new) == 4)
    assert open_some(running, 4)[1] == 4
    for sock in (*served, *new):
        sock.close()


def test_connections_count_once_after_a_renewal_of_workers(start: Start) -> None:
    """On SIGUSR2 the server replaces its workers. Afterwards the address can have exactly the configured number of
    connections."""
    running = start(workers=2, connections=4)
    old_workers = running.children()
    with running.connect() as slow:
        slow.sendall(b"GET /slow?seconds=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        running.wait_for_line("slow")
        os.kill(running.pid, signal.SIGUSR2)
        assert read_response(slow)[2] == b"slow"
    wait_for(lambda: running.has_replaced(old_workers))
    served, refused = open_some(running, 8)
    assert (len(served), refused) == (4, 4)
    for sock in served:
        sock.close()


def test_trusted_proxies_have_no_connection_limit(start: Start) -> None:
    """The limit does not apply to the address of a trusted proxy, because the proxy forwards the requests of many
    clients."""
    running = start(workers=2, connections=2, proxies=["127.0.0.1/32"])
    served, refused = open_some(running, 8)
    assert (len(served), refused) == (8, 0)
    for sock in served:
        sock.close()

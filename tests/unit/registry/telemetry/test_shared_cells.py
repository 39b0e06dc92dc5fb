"""Numbers and names that processes share: nothing is lost, whoever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from registry.telemetry.shared_cells import SharedCells, SharedNames


def in_child(work: Callable[[], None], *, killed: bool = False) -> int:
    """Runs `work` in a forked process, which then ends, or is killed by SIGKILL. Returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_numbers_of_all_processes_add_up() -> None:
    """Also of those that were killed, and of those that took over their columns."""
    cells = SharedCells(3, columns=2)

    def count() -> None:
        assert cells.claim_column()
        cells.own[1] += 2

    for number in range(5):
        assert in_child(count, killed=number % 2 == 1) == (signal.SIGKILL if number % 2 else 0)
    assert cells.claim_column()
    cells.own[0] += 1
    assert cells.totals() == [1, 10, 0]


def test_no_two_running_processes_share_a_column() -> None:
    """Where all are taken, a process counts for itself, and fails nothing."""
    cells = SharedCells(1, columns=1)
    assert cells.claim_column()

    def count() -> None:
        assert not cells.claim_column()
        cells.own[0] += 100

    assert in_child(count) == 0
    assert cells.totals() == [0]


def test_before_a_column_is_claimed_nothing_is_counted() -> None:
    """A parent that only forks workers adds nothing."""
    cells = SharedCells(1, columns=1)
    cells.own[0] += 1
    assert cells.totals() == [0]


def test_names_keep_their_numbers() -> None:
    """In all processes, also those of names that one of them adds."""
    names = SharedNames(["docker.io", "ghcr.io"], capacity=3)

    def add() -> None:
        assert names.number("quay.io") == 2
        assert names.number("ghcr.io") == 1

    assert in_child(add) == 0
    assert names.names() == ["docker.io", "ghcr.io", "quay.io"]
    assert names.number("quay.io") == 2
    assert names.number("gcr.io") is None


@pytest.mark.parametrize("name", ["ä.example", "x" * 255])
def test_long_and_foreign_names(name: str) -> None:
    """Are read as they were written."""
    assert SharedNames([name], capacity=1).names() == [name]


def test_what_a_dead_process_left_in_a_gauge_does_not_count() -> None:
    """Nor does it count when its column is claimed again."""
    cells = SharedCells(2, columns=2)

    def count() -> None:
        assert cells.claim_column(gauges=[1])
        cells.own[0] += 1
        cells.own[1] += 1
        assert cells.live_totals([1]) == {1: 1}
        assert [pid for _, pid in cells.processes()] == [os.getpid()]

    for _ in range(3):
        assert in_child(count, killed=True) == signal.SIGKILL
    assert cells.live_totals([0, 1]) == {0: 0, 1: 0}
    assert cells.processes() == []
    assert cells.claim_column(gauges=[1])
    assert cells.totals() == [3, 0]


def test_running_processes_are_seen_from_all_others() -> None:
    """And a look does not take a column away from the process that looks."""
    cells = SharedCells(1, columns=3)
    assert cells.claim_column()

    def look() -> None:
        assert cells.claim_column()
        assert {pid for _, pid in cells.processes()} == {os.getppid(), os.getpid()}
        assert len(cells.processes()) == 2

    for _ in range(2):
        assert in_child(look) == 0
        assert [pid for _, pid in cells.processes()] == [os.getpid()]

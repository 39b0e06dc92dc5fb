"""Numbers and names in memory that processes share. Nothing is lost when a process dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.telemetry.metric_families import CellPlan, Counter, Histogram
from registry.telemetry.metrics import CountsMemory, Metrics
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
    """The numbers of all processes add up, including those of killed processes and of processes that took over their
    columns."""
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
    """No two running processes have the same column. If all columns are taken, a process counts for itself, and nothing
    fails."""
    cells = SharedCells(1, columns=1)
    assert cells.claim_column()

    def count() -> None:
        assert not cells.claim_column()
        cells.own[0] += 100

    assert in_child(count) == 0
    assert cells.totals() == [0]


def test_before_a_column_is_claimed_nothing_is_counted() -> None:
    """A parent process that only forks workers counts nothing."""
    cells = SharedCells(1, columns=1)
    cells.own[0] += 1
    assert cells.totals() == [0]


def test_names_keep_their_numbers() -> None:
    """A name has the same number in all processes, also if one of them adds it later."""
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
    """Long names and names in any script are read as they were written."""
    assert SharedNames([name], capacity=1).names() == [name]


def test_what_a_dead_process_left_in_a_gauge_does_not_count() -> None:
    """The values of a dead process in a gauge do not count, also when its column is claimed again."""
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
    """Each process sees which processes run. Looking does not take a column away from the process that looks."""
    cells = SharedCells(1, columns=3)
    assert cells.claim_column()

    def look() -> None:
        assert cells.claim_column()
        assert {pid for _, pid in cells.processes()} == {os.getppid(), os.getpid()}
        assert len(cells.processes()) == 2

    for _ in range(2):
        assert in_child(look) == 0
        assert [pid for _, pid in cells.processes()] == [os.getpid()]


def test_the_counts_go_on_in_a_new_version() -> None:
    """A new version of the program maps the memory of the old version, whose workers still count until they end. Names
    keep their numbers."""
    old = Metrics(["docker.io", "ghcr.io"], workers=2)

    def count() -> None:
        old.start_worker()

    assert in_child(count) == 0
    new = Metrics(["ghcr.io", "quay.io"], 3, CountsMemory(os.dup(old.memory.descriptor), old.memory.layout))
    assert in_child(count) == 0
    assert in_child(new.start_worker) == 0
    assert new.cells.totals()[new.worker_starts.first] == 3
    assert new.upstreams.names() == ["docker.io", "ghcr.io", "quay.io"]
    assert new.memory.layout == old.memory.layout


@pytest.mark.parametrize(("layout", "workers"), [("another", 2), ("", 1000)], ids=["layout", "number of workers"])
def test_memory_that_does_not_suit(layout: str, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """If the cells in the memory have another meaning, or are too few, the counts begin at 0, the log says so, and the
    file is closed."""
    old = Metrics([], workers=2)
    assert in_child(old.start_worker) == 0
    descriptor = os.dup(old.memory.descriptor)
    new = Metrics([], workers, CountsMemory(descriptor, layout or old.memory.layout))
    assert new.cells.totals()[new.worker_starts.first] == 0
    assert ["all metrics begin at 0" in message for message in caplog.messages] == [True]
    path = Path(f"/proc/self/fd/{descriptor}")  # another file may have got the number
    assert not path.exists() or not path.samefile(f"/proc/self/fd/{old.memory.descriptor}")


def test_the_layout_names_what_each_cell_means() -> None:
    """Another label value, another bucket or another order makes another layout."""

    def layout(
        names: tuple[str, ...] = ("a_total", "b_total"), values: tuple[str, ...] = ("x",), bound: int = 1
    ) -> str:
        plan = CellPlan()
        for name in names:
            Counter(plan, name, "A.", {"label": values})
        Histogram(plan, "c", "C.", bounds=[bound])
        return plan.layout()

    assert layout() == layout()
    assert len({layout(), layout(("b_total", "a_total")), layout(values=("y",)), layout(bound=2)}) == 4

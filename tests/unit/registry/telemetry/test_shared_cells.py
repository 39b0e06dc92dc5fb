"""Numbers (cells) and names in memory that the processes of a server share. Each process counts in a column of its own.
No counts are lost when a process dies."""

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
    """Runs `work` in a forked process and waits for its end. If `killed` is true, the process is killed by SIGKILL
    after `work`. Returns the wait status of the process."""
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


@pytest.mark.slow
def test_numbers_of_all_processes_add_up() -> None:
    """The totals include the numbers of all processes: processes that run, have ended or were killed, and processes
    that use the column of an earlier process."""
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
    """No two running processes have the same column. If all columns are in use, a process counts in memory of its own,
    which is not in the totals."""
    cells = SharedCells(1, columns=1)
    assert cells.claim_column()

    def count() -> None:
        assert not cells.claim_column()
        cells.own[0] += 100

    assert in_child(count) == 0
    assert cells.totals() == [0]


def test_counts_before_a_column_is_claimed_are_ignored() -> None:
    """A process that has not claimed a column, such as a parent that only forks workers, does not change the totals."""
    cells = SharedCells(1, columns=1)
    cells.own[0] += 1
    assert cells.totals() == [0]


def test_names_keep_their_numbers() -> None:
    """A name has the same number in all processes, also if one of the processes adds the name later. If there is no
    capacity for a name, it has no number."""
    names = SharedNames(["docker.io", "ghcr.io"], capacity=3)

    def add() -> None:
        assert names.find_or_add("quay.io") == 2
        assert names.find_or_add("ghcr.io") == 1

    assert in_child(add) == 0
    assert names.names() == ["docker.io", "ghcr.io", "quay.io"]
    assert names.find_or_add("quay.io") == 2
    assert names.find_or_add("gcr.io") is None


@pytest.mark.parametrize("name", ["ä.example", "x" * 255])
def test_long_and_non_ascii_names(name: str) -> None:
    """Long names and names with non-ASCII characters are read as they were written."""
    assert SharedNames([name], capacity=1).names() == [name]


@pytest.mark.slow
def test_gauges_of_dead_processes_do_not_count() -> None:
    """The totals of a gauge do not include the values of dead processes, even if another process claims the column of a
    dead process."""
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


@pytest.mark.slow
def test_each_process_sees_all_running_processes() -> None:
    """Each process can list all running processes. The process that lists them keeps its own column."""
    cells = SharedCells(1, columns=3)
    assert cells.claim_column()

    def list_processes() -> None:
        assert cells.claim_column()
        assert {pid for _, pid in cells.processes()} == {os.getppid(), os.getpid()}
        assert len(cells.processes()) == 2

    for _ in range(2):
        assert in_child(list_processes) == 0
        assert [pid for _, pid in cells.processes()] == [os.getpid()]


@pytest.mark.slow
def test_counts_continue_in_a_new_version_of_the_program() -> None:
    """When a new version of the program takes over from the running one, it uses the memory of the old version. The old
    workers count in this memory until they end. Names keep their numbers."""
    old = Metrics(["docker.io", "ghcr.io"], workers=2)

    def count() -> None:
        old.start_worker()

    assert in_child(count) == 0
    new = Metrics(["ghcr.io", "quay.io"], 3, CountsMemory(os.dup(old.memory.descriptor), old.memory.layout))
    assert in_child(count) == 0
    assert in_child(new.start_worker) == 0
    assert new.cells.totals()[new.worker_starts.first_cell] == 3
    assert new.upstreams.names() == ["docker.io", "ghcr.io", "quay.io"]
    assert new.memory.layout == old.memory.layout


@pytest.mark.parametrize(("layout", "workers"), [("another", 2), ("", 1000)], ids=["layout", "number of workers"])
@pytest.mark.slow
def test_memory_with_another_layout_is_not_used(layout: str, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """If the cells in the memory of the old version have another meaning, or if there are too few of them, all counts
    begin at 0. This is logged, and the file of the memory is closed."""
    old = Metrics([], workers=2)
    assert in_child(old.start_worker) == 0
    descriptor = os.dup(old.memory.descriptor)
    new = Metrics([], workers, CountsMemory(descriptor, layout or old.memory.layout))
    assert new.cells.totals()[new.worker_starts.first_cell] == 0
    assert ["all metrics begin at 0" in message for message in caplog.messages] == [True]
    path = Path(f"/proc/self/fd/{descriptor}")  # another file may have this descriptor number now
    assert not path.exists() or not path.samefile(f"/proc/self/fd/{old.memory.descriptor}")


def test_the_layout_differs_if_cells_have_another_meaning() -> None:
    """The layout text differs if label values, bounds of buckets, or the order of the metrics differ."""

    def layout(
        names: tuple[str, ...] = ("a_total", "b_total"), values: tuple[str, ...] = ("x",), bound: int = 1
    ) -> str:
        plan = CellPlan()
        for name in names:
            Counter(plan, name, "A.", {"label": values})
        Histogram(plan, "c", "C.", bounds=[bound])
        return plan.layout_hash()

    assert layout() == layout()
    assert len({layout(), layout(("b_total", "a_total")), layout(values=("y",)), layout(bound=2)}) == 4

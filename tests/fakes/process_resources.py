"""Measures the memory and the open files of processes with the numbers that the kernel has in /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

KIB = 1024
_OWN_MEMORY = ("Pss_Anon:", "Pss_Shmem:")


def pss_of(pids: Iterable[int]) -> int:
    """Returns how many bytes of memory the processes use (proc(5), smaps_rollup). Counts anonymous pages and pages of
    shared memory; a page that several of the processes share counts once. Pages of files do not count, because the
    share of a process in such a page changes whenever another process with the same library starts or ends. Ignores
    processes that have ended."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except ProcessLookupError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(_OWN_MEMORY)) * KIB
    return total


class MemoryPeak:
    """Reads the memory of a process tree again and again until the `with` block ends, and keeps the highest value.
    `every`: seconds between two readings. `samples`: the number of readings."""

    def __init__(self, pids: Callable[[], Sequence[int]], every: float = 0.05) -> None:
        self._pids, self._every = pids, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = self.highest = 0
        self.samples = 0

    @property
    def growth(self) -> int:
        return self.highest - self.before

    def __enter__(self) -> MemoryPeak:
        self.before = self.highest = pss_of(self._pids())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            self.highest = max(self.highest, pss_of(self._pids()))
            self.samples += 1


TIMEOUT_SECONDS = 20.0


def open_files(pids: Iterable[int]) -> dict[int, int]:
    """Returns the number of open file descriptors of each process."""
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}


def files_below(*folders: Path) -> int:
    """Returns the number of files below these folders."""
    return sum(len(files) for folder in folders for _, _, files in os.walk(folder))


def eventually(fact: Callable[[], bool], patience: float = TIMEOUT_SECONDS) -> bool:
    """Returns whether `fact` becomes true within `patience` seconds. Calls it again and again, because nothing reports
    when another process has changed something, such as closed a file or socket."""
    deadline = time.monotonic() + patience
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True

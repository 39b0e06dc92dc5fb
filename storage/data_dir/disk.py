"""The objects that one process needs to work with the files of a data directory (`Disk`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from storage.data_dir.blocking_calls import ThreadPool, UncancellableFuture, run_in_thread
from storage.data_dir.layout import Layout
from storage.data_dir.replaced_directory import OpenedDirectory
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System

THREADS = 16
"""Largest number of blocking calls that one process runs at a time. Further calls wait in the thread pool's queue."""
T = TypeVar("T")


class Disk:
    """Bundles the paths of the data directory (`layout`), the system calls (`system`), a thread pool for blocking calls
    (`threads`), and the disk reserve (`reserve`). The reserve is disk space that the registry keeps allocated, so
    that it can delete content when the disk is full. `opened_directory` finds out whether another data directory has
    replaced this one."""

    def __init__(self, layout: Layout, system: System, reserve: Reserve) -> None:
        self.layout = layout
        self.opened_directory = OpenedDirectory(layout)
        self.system = system
        self.reserve = reserve
        self.threads = ThreadPool(THREADS, thread_name_prefix="disk")

    def run(self, call: Callable[[], T]) -> UncancellableFuture[T]:
        """Runs a blocking call in a thread and returns a future for its result. The call runs to its end even if the
        task that awaits it is cancelled. If the call raises OSError, the future gets StorageFull, TooManyOpenFiles or
        StorageFailed."""
        return run_in_thread(self.threads, call)

    def close(self) -> None:
        """Waits until all running and queued calls have ended, and stops the threads. Blocks."""
        self.threads.shutdown()

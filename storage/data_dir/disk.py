"""The disk of a data directory, as one process uses it (`Disk`)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from storage.data_dir.blocking_calls import UncancellableFuture, run_in_thread
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System

THREADS = 16
T = TypeVar("T")


class Disk:
    """Paths, system calls, reserve, and the thread pool for calls that block."""

    def __init__(self, layout: Layout, system: System, reserve: Reserve) -> None:
        self.layout = layout
        self.system = system
        self.reserve = reserve
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")

    def run(self, call: Callable[[], T]) -> UncancellableFuture[T]:
        """Runs a blocking call in a thread. It runs to its end even if nobody waits for it any more. An OSError becomes
        StorageFull or StorageFailed."""
        return run_in_thread(self.threads, call)

    def close(self) -> None:
        """Waits for the calls that run, and ends the threads."""
        self.threads.shutdown()

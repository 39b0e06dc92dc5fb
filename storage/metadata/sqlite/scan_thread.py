"""A thread for database lookups that read many rows (`ScanThread`).

Such a lookup does not block the event loop, because SQLite reads each row without Python's global interpreter lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw

from storage.data_dir.blocking_calls import ThreadPool
from storage.metadata.sqlite.database import connect

T = TypeVar("T")


class ScanThread:
    """Runs lookups one after the other in a thread with its own connection to the database. Used from one event loop.
    The first lookup starts the thread and opens the connection."""

    def __init__(self, path: Path) -> None:
        """`path`: the database file. Opens nothing yet."""
        self._path = path
        self._executor = ThreadPool(max_workers=1, thread_name_prefix="scan")
        self._connection_lock = threading.Lock()
        self._db: apsw.Connection | None = None
        self._closed = False

    async def run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs `lookup` in the thread and returns its result. The lookup sees every commit made before this call.

        `lookup` must read all rows of each of its statements; otherwise the statement keeps its read transaction open.
        Raises what `lookup` raises, and apsw.Error. A cancellation of this call does not interrupt a lookup that has
        started; a lookup that is still queued is not run."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, lookup)

    def close(self) -> None:
        """Interrupts the running lookup, which then raises apsw.InterruptError. Waits until the thread has ended, and
        closes the connection. Lookups that are still queued are cancelled."""
        with self._connection_lock:
            self._closed = True
            if self._db is not None:
                self._db.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._db is not None:
            self._db.close()

    def _run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        return lookup(self._connection())

    def _connection(self) -> apsw.Connection:
        """Returns the thread's connection; opens it at the first call. Raises apsw.InterruptError after `close`."""
        with self._connection_lock:
            if self._closed:
                raise apsw.InterruptError("the store is being closed")
            if self._db is None:
                self._db = connect(self._path, read_only=True)
            return self._db

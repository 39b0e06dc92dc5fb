"""A thread for database lookups that read many rows (`ScanThread`). The event loop goes on while the thread reads,
because SQLite reads each row without Python's global interpreter lock."""

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
    """Runs lookups, one at a time, in a thread with its own connection to the database. The first lookup starts the
    thread and opens the connection. For use from one event loop only."""

    def __init__(self, path: Path) -> None:
        """`path`: the database file."""
        self._path = path
        self._executor = ThreadPool(max_workers=1, thread_name_prefix="scan")
        self._connection_lock = threading.Lock()
        self._db: apsw.Connection | None = None
        self._closed = False

    async def run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs `lookup` in the thread and returns its result. The lookup sees every commit made before this call. It
        must read all rows of each of its statements: an unfinished statement keeps a read transaction open.

        Raises what `lookup` raises, and apsw.Error. If this call is cancelled, a lookup that is still queued is not
        run, and a lookup that has started goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, lookup)

    def close(self) -> None:
        """Cancels the queued lookups and interrupts the running one, which then raises apsw.InterruptError. Waits until
        the thread has ended, and closes the connection."""
        with self._connection_lock:
            self._closed = True
            if self._db is not None:
                self._db.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._db is not None:
            self._db.close()

    def _run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        return lookup(self._get_connection())

    def _get_connection(self) -> apsw.Connection:
        """Returns the thread's connection. The first call opens it. Raises apsw.InterruptError after `close`."""
        with self._connection_lock:
            if self._closed:
                raise apsw.InterruptError("the store is being closed")
            if self._db is None:
                self._db = connect(self._path, read_only=True)
            return self._db

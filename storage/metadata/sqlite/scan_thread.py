"""Lookups that read many rows. They run in a thread, one after the other, with a connection of their own.

The event loop continues meanwhile: SQLite releases Python's lock at every row, and Python itself does every 5 ms.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import apsw

from storage.metadata.sqlite.database import connect

T = TypeVar("T")


class ScanThread:
    """Used from one event loop. The first lookup starts the thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scan")
        self._opening = threading.Lock()
        self._db: apsw.Connection | None = None
        self._closed = False

    async def run(self, look: Callable[[apsw.Connection], T]) -> T:
        """Runs `look`, which must read each of its statements to the end, and returns its result. It sees every commit
        that was made before this call. Raises what `look` raises, and apsw.Error. Cancelled: the lookup does not start,
        or runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, look)

    def close(self) -> None:
        """Interrupts the running lookup, and waits for its end."""
        with self._opening:
            self._closed = True
            if self._db is not None:
                self._db.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._db is not None:
            self._db.close()

    def _run(self, look: Callable[[apsw.Connection], T]) -> T:
        return look(self._open())

    def _open(self) -> apsw.Connection:
        with self._opening:
            if self._closed:
                raise apsw.InterruptError("the store is being closed")
            if self._db is None:
                self._db = connect(self._path, read_only=True)
            return self._db

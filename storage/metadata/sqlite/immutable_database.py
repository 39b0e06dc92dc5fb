"""The metadata database, opened read-only on a disk without any free space (`ImmutableDatabase`).

SQLite needs 32 KiB for the index of its log before it reads anything. If not even that is free, the file can still be
read without the log ("immutable"), as long as the log is empty and nobody changes the file. A shared lock on the
writers' lock file ensures that, since writers need it exclusively. So writers wait until the last such reader has
opened the database normally, which each does as soon as there is space.

Sources: "Uniform Resource Identifiers" (sqlite.org/uri.html), `immutable`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import apsw

from storage.data_dir.blocking_calls import UncancellableFuture
from storage.data_dir.layout import Layout
from storage.data_dir.locks import try_flock, unlock_flock
from storage.data_dir.reserve import ReserveUse
from storage.errors import StorageFull
from storage.metadata.sqlite.writer_thread import Change

T = TypeVar("T")
NO_ROOM = "the disk is full, and there is no room to open the database for writing; only reads work until there is"
OPENED_ANEW = "the database was opened anew just now; try again"


class ImmutableDatabase:
    """Replaces `DataVersion`, `SharedReadTransaction` and `WriterThread` for a database that is only read.

    Close it after all other connections of this process to the same file: closing it drops their locks.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises StorageFull if the log is not empty or another process is writing; apsw.Error, OSError."""
        self._lock = os.open(layout.metadata_lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_flock(self._lock, shared=True):
                raise StorageFull(NO_ROOM)
            if _size(Path(f"{layout.metadata}-wal")):
                raise StorageFull(f"{NO_ROOM}, and the log of the database has to be read first")
            where = f"file:{quote(str(layout.metadata))}?immutable=1"
            self.db = apsw.Connection(where, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        except BaseException:
            os.close(self._lock)
            raise
        self._ended = False

    def retire(self) -> None:
        """Lets others write, and refuses all reads from now on."""
        self._ended = True
        self.db.set_exec_trace(_refuse)  # for users of the connection itself
        unlock_flock(self._lock)

    def close(self) -> None:
        self.db.close()
        os.close(self._lock)

    def __call__(self) -> object:
        """Returns a version, as `DataVersion` does."""
        return object() if self._ended else self

    def at(self, _version: object) -> apsw.Connection:
        if self._ended:
            raise StorageFull(OPENED_ANEW)
        return self.db

    def run(
        self, change: Change[T], *, durable: bool = True, need: ReserveUse = ReserveUse.GROWTH
    ) -> UncancellableFuture[T]:
        """Refuses the change, as `WriterThread.run` does on a full disk."""
        refused: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        refused.set_exception(StorageFull(NO_ROOM))
        return refused

    def has_same_rights(self, before: object, after: object) -> bool:
        return False


class ImmutableScans:
    """Replaces `ScanThread`. Lookups run on the event loop: a second connection would drop this process's locks on the
    file when it is closed."""

    def __init__(self, database: ImmutableDatabase) -> None:
        self._database = database

    async def run(self, look: Callable[[apsw.Connection], T]) -> T:
        """Runs `look` and returns its result. Raises what `look` raises, and StorageFull after `retire`."""
        return look(self._database.at(None))

    def close(self) -> None:
        """Does nothing: the connection is closed with `ImmutableDatabase`."""


def _refuse(_cursor: apsw.Cursor, _sql: str, _values: object) -> bool:
    raise StorageFull(OPENED_ANEW)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0

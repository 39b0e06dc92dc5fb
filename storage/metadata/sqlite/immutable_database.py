"""The metadata database, opened read-only on a disk without any free space (`ImmutableDatabase`).

SQLite normally needs 32 KiB of disk space for the index of its write-ahead log before it reads anything. If not even
that is free, the file can still be read without the log, in SQLite's mode `immutable`. This is correct as long as the
log is empty and no process changes the file. A shared lock on the writers' lock file ensures this, since a writer needs
the lock exclusively. As soon as there is space, each such reader releases the lock (`ImmutableDatabase.retire`) and its
process opens the database normally; writers wait until the last one has done so.

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
from storage.metadata.sqlite.commit_thread import Change

T = TypeVar("T")
NO_ROOM = "the disk is full, and there is no room to open the database for writing; only reads work until there is"
RETIRED = "the database was just opened again for writing; retry the request"


class ImmutableDatabase:
    """A connection that reads the database without its log. `db` is the connection itself.

    Has the methods of `DataVersion` (call), `SharedReadTransaction` (`connection_at`) and `CommitThread` (`run`,
    `has_same_rights`), and takes their places. Close it after all other connections of this process to the same file,
    because the process holds the file locks, and closing one descriptor of a file drops all of them.
    """

    def __init__(self, layout: Layout) -> None:
        """Opens the database. Raises StorageFull if the log is not empty or another process is writing; apsw.Error,
        OSError."""
        self._lock = os.open(layout.metadata_lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_flock(self._lock, shared=True):
                raise StorageFull(NO_ROOM)
            if _size(Path(f"{layout.metadata}-wal")):
                raise StorageFull(f"{NO_ROOM}, and the log of the database has to be read first")
            uri = f"file:{quote(str(layout.metadata))}?immutable=1"
            self.db = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        except BaseException:
            os.close(self._lock)
            raise
        self._retired = False

    def retire(self) -> None:
        """Releases the lock, so that processes can write again. From now on every read raises StorageFull, since the
        file may change."""
        self._retired = True
        self.db.set_exec_trace(_refuse_statement)  # for callers that use `db` without `connection_at`
        unlock_flock(self._lock)

    def close(self) -> None:
        """Closes the connection and releases the lock."""
        self.db.close()
        os.close(self._lock)

    def __call__(self) -> object:
        """Returns the data version. It stays the same until `retire`, since no process changes the data. After
        `retire`, each call returns a new object, which equals no other version."""
        return object() if self._retired else self

    def connection_at(self, _version: object) -> apsw.Connection:
        """Returns the connection. Raises StorageFull after `retire`."""
        if self._retired:
            raise StorageFull(RETIRED)
        return self.db

    def run(
        self, change: Change[T], *, durable: bool = True, reserve_use: ReserveUse = ReserveUse.GROWTH
    ) -> UncancellableFuture[T]:
        """Refuses the change: returns a future that raises StorageFull."""
        refused: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        refused.set_exception(StorageFull(NO_ROOM))
        return refused

    def has_same_rights(self, before: object, after: object) -> bool:
        """Returns False: nothing is known about what lies between two data versions."""
        return False


class ImmutableScans:
    """Runs lookups that read many rows, in place of a `ScanThread`. They run on the event loop with the one connection
    that `ImmutableDatabase` has, because closing a second connection would drop this process's locks on the file."""

    def __init__(self, database: ImmutableDatabase) -> None:
        self._database = database

    async def run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs `lookup` and returns its result. Raises what `lookup` raises, and StorageFull once the database is
        retired."""
        return lookup(self._database.connection_at(None))

    def close(self) -> None:
        """Does nothing: `ImmutableDatabase` closes the connection."""


def _refuse_statement(_cursor: apsw.Cursor, _sql: str, _values: object) -> bool:
    raise StorageFull(RETIRED)


def _size(file: Path) -> int:
    """Returns the file's size in bytes; 0 if there is no such file."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0

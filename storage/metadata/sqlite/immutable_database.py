"""Reads the metadata database on a disk that is too full to open it normally (`ImmutableDatabase`).

SQLite commits to a write-ahead log. To open the database, it normally needs 32 KiB of disk space for the log's index.
In the mode `immutable`, SQLite reads the database file alone and needs no space. The data is right if the log is empty
and no process changes the file.

Every process that writes holds an exclusive lock on the *writers' lock file*. An `ImmutableDatabase` holds a shared
lock on this file, so no process can write. When there is space again, each process releases its shared lock
(`ImmutableDatabase.retire`) and opens the database normally. Its changes then wait until all processes have released
their shared locks.

Source: "Uniform Resource Identifiers" (sqlite.org/uri.html), parameter `immutable`.
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
DISK_FULL_TEXT = (
    "the disk is full, and there is no room to open the database for writing; only reads work until there is space"
)
"""Text of the StorageFull in these cases:

- The database is open only for reading, and a change is refused.
- The caller needs the database for changes, and the disk has too little space to open the database for changes.
- The database cannot be opened for reading, because another process is writing."""
_LOG_NOT_EMPTY_TEXT = (
    "the disk is full, and there is no room to open the database; reads do not work either, because the write-ahead "
    "log of the database is not empty"
)
"""Text of the StorageFull if the database cannot be opened for reading, because its log is not empty."""
_RETIRED_TEXT = "the database was just opened again for writing; retry the request"
"""Text of the StorageFull that refuses reads after `ImmutableDatabase.retire`."""


class ImmutableDatabase:
    """The database without its log, open for reading on the connection `db`.

    An ImmutableDatabase takes the place of three objects that are used if the database is opened normally. It has their
    methods:

    - `DataVersion`: a call returns the *data version*, a value that every commit to the database changes.
    - `SharedReadTransaction`: `connection_at` returns the connection for reads.
    - `CommitThread`: `run` is for changes, which are refused here. `has_same_rights` compares the access rights at two
      data versions.

    Before you make this object, close all connections of this process to the database file. A process that closes any
    descriptor of a file loses all its POSIX locks on the file, and SQLite uses POSIX locks."""

    def __init__(self, layout: Layout) -> None:
        """Takes a shared lock on the writers' lock file and opens the database. Raises StorageFull if the log is not
        empty or another process is writing. Also raises apsw.Error, OSError."""
        self._lock = os.open(layout.metadata_lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not try_flock(self._lock, shared=True):
                raise StorageFull(DISK_FULL_TEXT)
            if _size(Path(f"{layout.metadata}-wal")):
                raise StorageFull(_LOG_NOT_EMPTY_TEXT)
            uri = f"file:{quote(str(layout.metadata))}?immutable=1"
            self.db = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        except BaseException:
            os.close(self._lock)
            raise
        self._retired = False

    def retire(self) -> None:
        """Releases the lock, so that processes can write again. Later reads raise StorageFull, because they could
        return wrong data while the file changes."""
        self._retired = True
        self.db.set_exec_trace(_refuse_statement)  # refuses reads that use `db` without `connection_at`
        unlock_flock(self._lock)

    def close(self) -> None:
        """Closes the connection and releases the lock."""
        self.db.close()
        os.close(self._lock)

    def __call__(self) -> object:
        """Returns the data version: always the same one before `retire`. After `retire`, each call returns a new
        version, which equals no other."""
        return object() if self._retired else self

    def connection_at(self, _version: object) -> apsw.Connection:
        """Returns the connection, whatever the version is. Raises StorageFull after `retire`."""
        if self._retired:
            raise StorageFull(_RETIRED_TEXT)
        return self.db

    def run(
        self, change: Change[T], *, durable: bool = True, reserve_use: ReserveUse = ReserveUse.NONE
    ) -> UncancellableFuture[T]:
        """Refuses the change without calling it: returns a future that raises StorageFull. `durable` and `reserve_use`
        have no effect; they are parameters of `CommitThread.run`."""
        refused: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        refused.set_exception(StorageFull(DISK_FULL_TEXT))
        return refused

    def has_same_rights(self, before: object, after: object) -> bool:
        """Returns whether the access rights at the data versions `before` and `after` are known to be the same. Always
        returns False, so that the caller reads the access rights again."""
        return False


class ImmutableScans:
    """Takes the place of a `ScanThread`, and runs its lookups on the event loop, with the connection of `database`. A
    thread would need a second connection, and closing it would release the process's POSIX locks on the file (see
    `ImmutableDatabase`)."""

    def __init__(self, database: ImmutableDatabase) -> None:
        self._database = database

    async def run(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs `lookup` and returns its result. Raises what `lookup` raises, and StorageFull after
        `ImmutableDatabase.retire`."""
        return lookup(self._database.connection_at(None))

    def close(self) -> None:
        """Does nothing: `ImmutableDatabase` closes the connection."""


def _refuse_statement(_cursor: apsw.Cursor, _sql: str, _values: object) -> bool:
    raise StorageFull(_RETIRED_TEXT)


def _size(file: Path) -> int:
    """Returns the file's size in bytes; 0 if there is no such file."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0

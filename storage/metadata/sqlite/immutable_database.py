"""The metadata of a registry that finds no room to open its database: read as the file stands, changed by nobody.

SQLite wants 32 KiB for the index of its log before it reads anything. Where there is no byte free and no reserve, the
database's file can still be read without a log ("immutable"), as long as the log is empty and nobody changes the file.
A shared hold on the writers' lock sees to that: whoever writes needs the lock alone. So writers wait until the last
such reader has opened the database anew, which each does as soon as there is room.

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
    """A database that is only read, in the place of a connection's `DataVersion`, `SharedReadTransaction` and `Writer`.

    To be closed after all other connections of this process to the same file: closing it drops their locks.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises StorageFull: the log is not empty, or somebody writes; apsw.Error, OSError."""
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
        """From here on others may write, and nothing is read here any more."""
        self._ended = True
        self.db.set_exec_trace(_refuse)  # some use the connection directly
        unlock_flock(self._lock)

    def close(self) -> None:
        self.db.close()
        os.close(self._lock)

    def __call__(self) -> object:
        """A mark, as of `DataVersion`."""
        return object() if self._ended else self

    def at(self, _mark: object) -> apsw.Connection:
        if self._ended:
            raise StorageFull(OPENED_ANEW)
        return self.db

    def run(
        self, change: Change[T], *, durable: bool = True, need: ReserveUse = ReserveUse.GROWTH
    ) -> UncancellableFuture[T]:
        """Refuses, as `Writer.run` does on a full disk."""
        refused: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        refused.set_exception(StorageFull(NO_ROOM))
        return refused

    def has_same_rights(self, before: object, after: object) -> bool:
        return False


class ImmutableScans:
    """Look-ups that look at many rows, in the place of a `ScanThread`. They run on the event loop: the database has
    this one connection, and a second one would drop the process's locks when it is closed."""

    def __init__(self, frozen: ImmutableDatabase) -> None:
        self._frozen = frozen

    async def run(self, look: Callable[[apsw.Connection], T]) -> T:
        """Raises what `look` raises, and StorageFull once the database was opened anew."""
        return look(self._frozen.at(None))

    def close(self) -> None:
        """Does nothing: the connection is closed with `ImmutableDatabase`."""


def _refuse(_cursor: apsw.Cursor, _sql: str, _values: object) -> bool:
    raise StorageFull(OPENED_ANEW)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0

"""How a connection to the metadata database is set up.

Brings the database to this version's tables: numbered SQL files, one transaction each.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from importlib import resources
from pathlib import Path
from typing import Final

import apsw

from storage.data_dir.check import DataDirectoryError
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import FULL, System

BUSY = 10_000
"""Milliseconds to wait for somebody outside (a backup, a person with a shell) who holds the database."""
PAGE: Final = 4096
"""Bytes of memory that are mapped at once."""
INDEX: Final = 160 * 1024
"""Bytes of the log's index that are allocated where blocks are small: enough for a log of 80 MiB."""
ROOM_TO_OPEN: Final = 512 * 1024
"""Free bytes that the index can surely be mapped with."""
LONGEST_LOG: Final = 16 * 1024 * 1024
"""Bytes: a log that grew beyond is cut back to this once it begins anew."""


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """A connection to the database at `path`, which must exist, with its log open. `read_only` refuses changes; the
    file is still opened for writing, since readers keep their marks in the shared memory beside it. On a full disk that
    memory gets its room from the reserve. Raises apsw.Error; FullError: there is no room."""
    return _with_room(path, lambda: _connect(path, read_only))


def create(path: Path) -> apsw.Connection:
    """A connection to the database at `path`, made if it is missing, in WAL mode. Tokens of upstreams stand in it, so
    it is made, and an older one becomes, unreadable for others on the machine. Raises OSError, and what `connect`
    raises."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660))
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError, PermissionError):  # those who may not change it do not own it
            if (mode := stat.S_IMODE(name.stat().st_mode)) & 0o007:
                name.chmod(mode & ~0o007)
    return _with_room(path, lambda: _create(path))


def is_full(db: apsw.Connection, error: BaseException) -> bool:
    """Whether the last call on `db` failed for want of room. SQLite itself calls only some of these errors that."""
    if isinstance(error, apsw.IOError | apsw.CantOpenError):
        return db.system_errno in FULL
    return isinstance(error, apsw.FullError)


def _connect(path: Path, read_only: bool) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)

    def set_up() -> None:
        _keep_log(db)
        db.pragma("foreign_keys", True)
        # Without this SQLite plans a statement anew for each value it is given, since a partial index or a LIKE might
        # then apply: a look-up by tag took 15 µs, and takes 2.
        db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        if read_only:
            db.pragma("query_only", True)
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # opens the log

    return _set_up(db, set_up)


def _create(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path))

    def set_up() -> None:
        _keep_log(db)
        db.pragma("journal_mode", "wal")
        db.pragma("synchronous", "FULL")

    return _set_up(db, set_up)


def _keep_log(db: apsw.Connection) -> None:
    """The log and its index stay as files when the last connection is closed, the log empty: the next start then needs
    no new file. What a statement puts aside stays in memory, not on a disk that may be full."""
    db.set_busy_timeout(BUSY)
    db.pragma("wal_autocheckpoint", 0)
    db.pragma("journal_size_limit", LONGEST_LOG)
    db.pragma("temp_store", "memory")
    on = ctypes.c_int(1)
    db.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(on))


def _set_up(db: apsw.Connection, steps: Callable[[], None]) -> apsw.Connection:
    try:
        steps()
    except apsw.Error as error:
        full = is_full(db, error)
        with suppress(apsw.Error):
            db.close()
        if full:
            raise apsw.FullError(str(error)) from error
        raise
    return db


def _with_room(path: Path, attempt: Callable[[], apsw.Connection]) -> apsw.Connection:
    small = _has_small_blocks(path)

    def opened() -> apsw.Connection:
        if small and _free(path) < ROOM_TO_OPEN:
            raise apsw.FullError("there is no room for the index of the log")
        db = attempt()
        return _set_up(db, lambda: _allocate_index(path)) if small else db

    try:
        return opened()
    except apsw.FullError:
        with closing(Reserve(Layout(path.parent).reserve, System())) as reserve:
            return reserve.spend(opened, apsw.FullError)


def _has_small_blocks(path: Path) -> bool:
    """SQLite writes one byte to each page of the index before it maps it. Where a block is smaller than a page, that
    does not allocate all of the page, and who writes to the rest on a full disk is killed (SIGBUS)."""
    return os.statvfs(path.parent).f_bsize < PAGE


def _free(path: Path) -> int:
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize


def _allocate_index(path: Path) -> None:
    """Through SQLite's own descriptor: to close another one of this file would drop the locks that SQLite has on it."""
    name = os.path.realpath(f"{path}-shm")
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{number}") == name:
                try:
                    os.posix_fallocate(int(number), 0, INDEX)
                except OSError as error:
                    raise apsw.FullError(f"there is no room for the index of the log: {error.strerror}") from None
                return


def migrations() -> list[tuple[int, str]]:
    """The migrations, by number: (number, SQL)."""
    found = []
    for file in resources.files("storage.metadata.sqlite.migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            found.append((int(match[1]), file.read_text()))
    return sorted(found)


def migrate(db: apsw.Connection) -> None:
    """Applies what is missing. The caller holds the writers' lock. Raises DataDirectoryError when the database was
    written by a newer version."""
    have = db.pragma("user_version")
    known = migrations()
    newest = known[-1][0]
    if have > newest:
        raise DataDirectoryError(
            f"{db.filename} was written by a newer Entrepot (its tables have version {have}, this one knows {newest}); "
            "start that version, or use another --data directory"
        )
    for number, sql in known:
        if number > have:
            db.execute(f"BEGIN IMMEDIATE; {sql}; PRAGMA user_version = {number}; COMMIT")

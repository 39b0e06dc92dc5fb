"""Connections to the metadata database, and its migrations: numbered SQL files, one transaction each."""

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
from storage.data_dir.system import DISK_FULL_ERRNOS, System

BUSY = 10_000
"""Milliseconds to wait for another program (a backup, a shell) that has locked the database."""
PAGE: Final = 4096
"""Bytes of memory that are mapped at once."""
INDEX: Final = 160 * 1024
"""Bytes of the log's index that are allocated in advance on file systems with small blocks: enough for a log of 80
MiB."""
ROOM_TO_OPEN: Final = 512 * 1024
"""Free bytes with which the index can surely be mapped."""
LONGEST_LOG: Final = 16 * 1024 * 1024
"""Size in bytes to which SQLite truncates a larger log when it starts over."""


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """Opens the database at `path`, which must exist, and its log. `read_only` refuses changes; the file is opened for
    writing all the same, since readers write to the shared memory of the log's index. On a full disk that memory gets
    its space from the reserve. Raises apsw.Error; FullError if there is no space."""
    return _with_room(path, lambda: _connect(path, read_only))


def create(path: Path) -> apsw.Connection:
    """Opens the database at `path` in WAL mode, and creates it if it is missing. Takes away read access from other
    users of the machine, since it stores tokens of upstreams. Raises OSError, and what `connect` raises."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660))
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError, PermissionError):  # another user owns the file
            if (mode := stat.S_IMODE(name.stat().st_mode)) & 0o007:
                name.chmod(mode & ~0o007)
    return _with_room(path, lambda: _create(path))


def is_full(db: apsw.Connection, error: BaseException) -> bool:
    """Returns whether the last call on `db` failed for lack of space. SQLite reports only some of these as
    FullError."""
    if isinstance(error, apsw.IOError | apsw.CantOpenError):
        return db.system_errno in DISK_FULL_ERRNOS
    return isinstance(error, apsw.FullError)


def _connect(path: Path, read_only: bool) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)

    def set_up() -> None:
        _keep_log(db)
        db.pragma("foreign_keys", True)
        # Without this, SQLite prepares a statement again for each new value, since a partial index or a LIKE might
        # apply then: a lookup by tag took 15 µs instead of 2.
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
    """Keeps the files of the log and its index when the last connection is closed, so that the next start needs no new
    file, and temporary data in memory: the disk may be full."""
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
    """Returns whether blocks are smaller than a page. SQLite writes one byte to each page of the index before it maps
    it. With small blocks that does not allocate the whole page, and a write to the rest on a full disk kills the
    process (SIGBUS)."""
    return os.statvfs(path.parent).f_bsize < PAGE


def _free(path: Path) -> int:
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize


def _allocate_index(path: Path) -> None:
    """Allocates the index through SQLite's own descriptor: closing another descriptor of the file would drop SQLite's
    locks on it."""
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
    """Returns the migrations in order: (number, SQL)."""
    found = []
    for file in resources.files("storage.metadata.sqlite.migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            found.append((int(match[1]), file.read_text()))
    return sorted(found)


def migrate(db: apsw.Connection) -> None:
    """Applies missing migrations. The caller holds the writers' lock. Raises DataDirectoryError if a newer version
    wrote the database."""
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

"""Opens connections to the metadata database, and applies its migrations.

The database is in SQLite's WAL mode: commits append to a write-ahead log (`…-wal`). The log's index (`…-shm`) is shared
memory of all processes, backed by a file. Opening the database needs disk space for the index file. On a full disk,
this space comes from the *reserve*: a file that keeps disk space allocated (`storage.data_dir.reserve`).
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
from storage.data_dir.system import DISK_FULL_ERRNOS, System

BUSY_TIMEOUT_MILLISECONDS = 10_000
"""Time that a statement waits for another program that has locked the database, such as a backup or an SQL shell."""
MEMORY_PAGE_BYTES: Final = 4096
"""Size of a page of memory: the unit in which files are mapped."""
ALLOCATED_INDEX_BYTES: Final = 160 * 1024
"""Bytes of the log's index that are allocated when the database is opened, if the file system has small blocks
(`_has_small_blocks`). An index of this size suffices for a log of 80 MiB."""
MIN_FREE_BYTES_TO_OPEN: Final = 512 * 1024
"""On a file system with small blocks, the database is opened only if at least this number of bytes is free. The index
needs less. The rest is a margin: if the space ran out while SQLite writes to the index, the kernel would kill the
process."""
LOG_SIZE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""Size to which SQLite truncates a longer log, after it has copied all of the log into the database file."""


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """Opens the existing database at `path`, and its log. On a full disk, uses the reserve.

    A `read_only` connection refuses changes. SQLite nevertheless opens the files for writing, because every reader
    writes to the log's index. Raises apsw.FullError if there is no space; other apsw.Error, OSError."""
    return _open_with_reserve(path, lambda: _connect(path, read_only))


def create(path: Path) -> apsw.Connection:
    """Opens the database at `path` in WAL mode, and creates it if it is missing. On a full disk, uses the reserve.

    The database stores secrets, such as tokens for upstream registries. So its files lose all permissions for users
    other than their owner and group. Raises apsw.FullError if there is no space; other apsw.Error, OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660))
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError, PermissionError):  # PermissionError: another user owns the file
            if (mode := stat.S_IMODE(file.stat().st_mode)) & 0o007:
                file.chmod(mode & ~0o007)
    return _open_with_reserve(path, lambda: _create(path))


def is_full(db: apsw.Connection, error: BaseException) -> bool:
    """Returns whether `error`, raised by the last call on `db`, means that the disk is full. For some operations on a
    full disk, SQLite raises IOError or CantOpenError instead of FullError."""
    if isinstance(error, apsw.IOError | apsw.CantOpenError):
        return db.system_errno in DISK_FULL_ERRNOS
    return isinstance(error, apsw.FullError)


def _connect(path: Path, read_only: bool) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)

    def set_up() -> None:
        _configure_files(db)
        db.pragma("foreign_keys", True)
        # Enables the "query planner stability guarantee". Without it, SQLite compiles a statement again for each new
        # value of a parameter, in case a partial index or a LIKE applies to that value. A lookup by tag would then take
        # 15 µs instead of 2.
        db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        if read_only:
            db.pragma("query_only", True)
        db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # makes SQLite open the log

    return _run_or_close(db, set_up)


def _create(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path))

    def set_up() -> None:
        _configure_files(db)
        db.pragma("journal_mode", "wal")
        db.pragma("synchronous", "FULL")

    return _run_or_close(db, set_up)


def _configure_files(db: apsw.Connection) -> None:
    """Sets the busy timeout and the log's size limit. Switches off automatic checkpoints, which copy the log into the
    database file. SQLite would run a checkpoint at the end of a commit, and so delay the commit.

    Two other settings help on a full disk. SQLite stores temporary data in memory. When the last connection is closed,
    SQLite keeps the files of the log and of the index, so that the next start need not create them."""
    db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
    db.pragma("wal_autocheckpoint", 0)
    db.pragma("journal_size_limit", LOG_SIZE_LIMIT_BYTES)
    db.pragma("temp_store", "memory")
    enabled = ctypes.c_int(1)
    db.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(enabled))


def _run_or_close(db: apsw.Connection, action: Callable[[], None]) -> apsw.Connection:
    """Calls `action`, which uses `db`, and returns `db`. If `action` raises apsw.Error, closes `db`. Then raises
    apsw.FullError if the disk is full, or else the error of `action`."""
    try:
        action()
    except apsw.Error as error:
        is_disk_full = is_full(db, error)
        with suppress(apsw.Error):
            db.close()
        if is_disk_full:
            raise apsw.FullError(str(error)) from error
        raise
    return db


def _open_with_reserve(path: Path, open_connection: Callable[[], apsw.Connection]) -> apsw.Connection:
    """Opens a connection with `open_connection` and returns it. On a file system with small blocks, also allocates disk
    space for the log's index. If the disk is full, frees the reserve step by step and tries again after each step.
    Raises apsw.FullError if there is still no space; what `open_connection` raises; OSError."""
    has_small_blocks = _has_small_blocks(path)

    def attempt() -> apsw.Connection:
        if has_small_blocks and _free_bytes(path) < MIN_FREE_BYTES_TO_OPEN:
            raise apsw.FullError("there is no room for the index of the log")
        db = open_connection()
        return _run_or_close(db, lambda: _allocate_index(path)) if has_small_blocks else db

    try:
        return attempt()
    except apsw.FullError:
        with closing(Reserve(Layout(path.parent).reserve, System())) as reserve:
            return reserve.spend(attempt, apsw.FullError)


def _has_small_blocks(path: Path) -> bool:
    """Returns whether the file system's blocks are smaller than a page of memory.

    SQLite writes one byte to each page of the log's index before it maps the page. With small blocks, this allocates
    only a part of the page on the disk. A later write to the rest of the page kills the process (SIGBUS) if the disk is
    full then."""
    return os.statvfs(path.parent).f_bsize < MEMORY_PAGE_BYTES


def _free_bytes(path: Path) -> int:
    file_system = os.statvfs(path.parent)
    return file_system.f_bavail * file_system.f_frsize


def _allocate_index(path: Path) -> None:
    """Allocates disk space for the log's index, through the file descriptor that SQLite has open. If this function
    opened and closed the file itself, the process would lose SQLite's locks on the file. Raises apsw.FullError."""
    index_path = os.path.realpath(f"{path}-shm")
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == index_path:
                try:
                    os.posix_fallocate(int(descriptor), 0, ALLOCATED_INDEX_BYTES)
                except OSError as error:
                    raise apsw.FullError(f"there is no room for the index of the log: {error.strerror}") from None
                return


def migrations() -> list[tuple[int, str]]:
    """Returns the migrations, each as (number, SQL), in the order of their numbers. They are the numbered SQL files of
    the package `migrations`."""
    numbered_scripts = []
    for file in resources.files("storage.metadata.sqlite.migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            numbered_scripts.append((int(match[1]), file.read_text()))
    return sorted(numbered_scripts)


def newest_table_version() -> int:
    """Returns the version of the tables that this program needs: the number of the last migration. The `user_version`
    of a database is the number of the last migration that was applied to the database."""
    return migrations()[-1][0]


def migrate(db: apsw.Connection) -> None:
    """Applies the migrations that the database lacks, each in a transaction. The caller holds the lock that keeps other
    processes from writing. Raises DataDirectoryError if a newer version of the program wrote the database; apsw.Error,
    after which the caller rolls back the transaction."""
    current = db.pragma("user_version")
    newest = newest_table_version()
    if current > newest:
        raise DataDirectoryError(
            f"{db.filename} was written by a newer Entrepot (its tables have version {current}, this one knows "
            f"{newest}); start that version, or use another --data directory"
        )
    for number, sql in migrations():
        if number > current:
            db.execute(f"BEGIN IMMEDIATE; {sql}; PRAGMA user_version = {number}; COMMIT")

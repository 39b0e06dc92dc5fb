"""Opens connections to the metadata database, and applies its migrations.

The database is in SQLite's WAL mode: a commit appends to a write-ahead log (`…-wal`). The *index* of the log (`…-shm`)
is a file that all processes map into their memory. SQLite needs disk space for the index when it opens the database. On
a full disk, this space comes from the *reserve*, a file that keeps disk space allocated (`storage.data_dir.reserve`).
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
"""Size of a page of memory. A file is mapped into memory in whole pages."""
ALLOCATED_INDEX_BYTES: Final = 160 * 1024
"""Disk space that is allocated for the log's index when the database is opened on a file system with small blocks
(`_has_small_blocks`). An index of this size suffices for a log of 80 MiB."""
MIN_FREE_BYTES_TO_OPEN: Final = 512 * 1024
"""Free disk space that is required to open the database on a file system with small blocks. This is more than the index
needs, because the kernel kills the process if the disk becomes full while SQLite writes to the index."""
LOG_SIZE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""After SQLite has copied all of the log into the database file, it truncates the log to at most this size."""


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """Opens the existing database at `path`, and its log. On a full disk, uses the reserve.

    `read_only`: whether the connection refuses changes of the data. Even then the process needs the right to write the
    files, because every reader writes to the log's index.

    Raises apsw.FullError if there is no disk space, another apsw.Error, or OSError."""
    return _open_with_reserve(path, lambda: _connect(path, read_only))


def create(path: Path) -> apsw.Connection:
    """Opens the database at `path` in WAL mode, and creates it if it is missing. On a full disk, uses the reserve.

    The database stores secrets, such as tokens for upstream registries. So this function takes all permissions of
    others (mode bits 0o007) away from its files. It leaves a file of another user unchanged.

    Raises apsw.FullError if there is no disk space, another apsw.Error, or OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660))
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError, PermissionError):  # PermissionError: another user owns the file
            if (mode := stat.S_IMODE(file.stat().st_mode)) & 0o007:
                file.chmod(mode & ~0o007)
    return _open_with_reserve(path, lambda: _create(path))


def means_full_disk(db: apsw.Connection, error: BaseException) -> bool:
    """Returns whether `error` means that the disk is full. The last call on `db` must have raised `error`. On a full
    disk, some operations of SQLite raise IOError or CantOpenError instead of FullError."""
    if isinstance(error, apsw.IOError | apsw.CantOpenError):
        return db.system_errno in DISK_FULL_ERRNOS
    return isinstance(error, apsw.FullError)


def _connect(path: Path, read_only: bool) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)

    def set_up() -> None:
        _configure_files(db)
        db.pragma("foreign_keys", True)
        # Enables the "query planner stability guarantee". Without this guarantee, SQLite can compile a statement again
        # for each new value of a parameter: a lookup by tag takes 15 µs instead of 2 µs.
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
    """Sets the busy timeout and the log's size limit, and makes three other settings:

    - SQLite runs no automatic checkpoints, which would delay commits. A checkpoint copies the log into the database
      file.
    - SQLite stores temporary data in memory, which works on a full disk.
    - When the last connection is closed, SQLite keeps the log and its index. So on a full disk the next start need not
      create them."""
    db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
    db.pragma("wal_autocheckpoint", 0)
    db.pragma("journal_size_limit", LOG_SIZE_LIMIT_BYTES)
    db.pragma("temp_store", "memory")
    enabled = ctypes.c_int(1)
    db.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(enabled))


def _run_or_close(db: apsw.Connection, action: Callable[[], None]) -> apsw.Connection:
    """Calls `action`, which uses `db`, and returns `db`. If `action` raises apsw.Error, closes `db`, and raises
    apsw.FullError if the disk is full, otherwise the error of `action`."""
    try:
        action()
    except apsw.Error as error:
        is_disk_full = means_full_disk(db, error)
        with suppress(apsw.Error):
            db.close()
        if is_disk_full:
            raise apsw.FullError(str(error)) from error
        raise
    return db


def _open_with_reserve(path: Path, open_connection: Callable[[], apsw.Connection]) -> apsw.Connection:
    """Opens a connection with `open_connection` and returns it. On a file system with small blocks, also allocates disk
    space for the log's index. If the disk is full, frees the reserve step by step, and tries again after each step.
    Raises apsw.FullError if there is still no space, another error of `open_connection`, or OSError."""
    has_small_blocks = _has_small_blocks(path)

    def attempt() -> apsw.Connection:
        if has_small_blocks and _free_bytes(path) < MIN_FREE_BYTES_TO_OPEN:
            raise apsw.FullError("there is no disk space for the index of the log")
        db = open_connection()
        return _run_or_close(db, lambda: _allocate_index(path)) if has_small_blocks else db

    try:
        return attempt()
    except apsw.FullError:
        with closing(Reserve(Layout(path.parent).reserve, System())) as reserve:
            return reserve.spend(attempt, apsw.FullError)


def _has_small_blocks(path: Path) -> bool:
    """Returns whether the file system's blocks are smaller than a page of memory.

    SQLite writes one byte to each page of the log's index before it maps the page. With small blocks, this write
    allocates disk space for only a part of the page. If the disk is full when SQLite later writes to another part, the
    kernel kills the process (SIGBUS)."""
    return os.statvfs(path.parent).f_bsize < MEMORY_PAGE_BYTES


def _free_bytes(path: Path) -> int:
    file_system = os.statvfs(path.parent)
    return file_system.f_bavail * file_system.f_frsize


def _allocate_index(path: Path) -> None:
    """Allocates disk space for the log's index. Uses the file descriptor that SQLite has open: a process that closes
    another descriptor of a file loses all its locks on the file. Raises apsw.FullError."""
    index_path = os.path.realpath(f"{path}-shm")
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == index_path:
                try:
                    os.posix_fallocate(int(descriptor), 0, ALLOCATED_INDEX_BYTES)
                except OSError as error:
                    raise apsw.FullError(f"no disk space for the index of the log: {error.strerror}") from None
                return


def migrations() -> list[tuple[int, str]]:
    """Returns the migrations, each as (number, SQL), in the order of their numbers. Each migration is a numbered SQL
    file of the package `migrations`."""
    numbered_scripts = []
    for file in resources.files("storage.metadata.sqlite.migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            numbered_scripts.append((int(match[1]), file.read_text()))
    return sorted(numbered_scripts)


def newest_table_version() -> int:
    """Returns the version of the tables that this program needs: the number of the last migration. A database stores
    the version of its tables as `user_version`."""
    return migrations()[-1][0]


def migrate(db: apsw.Connection) -> None:
    """Applies the migrations that the database lacks, each in a transaction. The caller holds the lock that keeps other
    processes from writing. Raises DataDirectoryError if a newer version of the program wrote the database. After an
    apsw.Error, the caller must roll back the transaction."""
    current = db.pragma("user_version")
    newest = newest_table_version()
    if current > newest:
        raise DataDirectoryError(
            f"{db.filename} was written by a newer Entrepot: its tables have version {current}, this Entrepot knows "
            f"versions up to {newest}; start the newer Entrepot, or use another `--data` directory"
        )
    for number, sql in migrations():
        if number > current:
            db.execute(f"BEGIN IMMEDIATE; {sql}; PRAGMA user_version = {number}; COMMIT")

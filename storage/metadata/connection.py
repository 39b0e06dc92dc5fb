"""How a connection to the metadata database is set up."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import apsw

BUSY = 10_000
"""Milliseconds to wait for somebody outside (a backup, a person with a shell) who holds the database."""


def connect(path: Path, *, read_only: bool = False) -> apsw.Connection:
    """A connection to the database at `path`, which must exist. `read_only` refuses changes; the file is still opened
    for writing, since readers keep their marks in the shared memory beside it."""
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    db.set_busy_timeout(BUSY)
    db.pragma("wal_autocheckpoint", 0)
    db.pragma("foreign_keys", True)
    # Without this SQLite plans a statement anew for each value it is given, since a partial index or a LIKE might then
    # apply: a look-up by tag took 15 µs, and takes 2.
    db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    if read_only:
        db.pragma("query_only", True)
    db.pragma("user_version")  # opens the log, too, so that no look-up needs another file descriptor later
    return db


def create(path: Path) -> apsw.Connection:
    """A connection to the database at `path`, made if it is missing, in WAL mode. Tokens of upstreams stand in it, so
    it is made, and an older one becomes, unreadable for others on the machine. Raises OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660))
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError, PermissionError):  # those who may not change it do not own it
            if (mode := stat.S_IMODE(name.stat().st_mode)) & 0o007:
                name.chmod(mode & ~0o007)
    db = apsw.Connection(str(path))
    db.set_busy_timeout(BUSY)
    db.pragma("journal_mode", "wal")
    db.pragma("synchronous", "FULL")
    db.pragma("wal_autocheckpoint", 0)
    return db

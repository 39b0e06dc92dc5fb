"""Opens the database of a registry from a test, beside the registry's own connections (`second_connection`)."""

from __future__ import annotations

import os
from pathlib import Path

import apsw

# A worker's background tasks write at any time, so a statement of a test must wait for the lock. Without a timeout,
# SQLite raises BusyError at once.
BUSY_TIMEOUT_MILLISECONDS = 60_000


def second_connection(database: Path, *, read_only: bool = False) -> apsw.Connection:
    """Returns a new connection to the existing file `database`. Its statements wait for the locks of the other
    connections. The caller closes it."""
    db = apsw.Connection(
        os.fspath(database), flags=apsw.SQLITE_OPEN_READONLY if read_only else apsw.SQLITE_OPEN_READWRITE
    )
    db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
    return db

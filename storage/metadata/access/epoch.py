"""The one row that every request reads, and that every change of rights raises in its own transaction."""

from __future__ import annotations

import apsw

READ = "SELECT epoch, closed FROM access"
CLOSED = "SELECT closed FROM access"
INSTANCE = "SELECT instance FROM access"


def raise_epoch(db: apsw.Connection) -> int:
    """Gives the new one."""
    epoch: int = db.execute("UPDATE access SET epoch = epoch + 1 RETURNING epoch").get
    return epoch


def close(db: apsw.Connection) -> None:
    """There is an account. Once and for all."""
    db.execute("UPDATE access SET closed = 1 WHERE closed = 0")

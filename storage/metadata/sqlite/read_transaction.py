"""A connection whose look-ups share a read transaction, as long as one turn of the event loop lasts.

To begin and to end a transaction takes SQLite as long as a look-up in a small store: it locks a byte of a file twice
and compares the log's index. A loaded server does several look-ups in a turn. None is older than the mark it was asked
for under: when that has changed, the transaction is another. It ends with the turn, since the log cannot begin anew
while somebody reads what stands in it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import apsw

from storage.metadata.sqlite.database import connect


class SharedReadTransaction:
    """Used from one event loop."""

    def __init__(self, path: Path) -> None:
        """Raises apsw.Error."""
        self._db = connect(path, read_only=True)
        self._mark: object = None
        self._ending: asyncio.Handle | None = None

    def at(self, mark: object) -> apsw.Connection:
        """For look-ups that end before anything is awaited. They see what `mark` stands for, a mark of the database's
        `DataVersion` that was taken just now, or something newer. Raises apsw.Error."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().call_soon(self._end)
        elif mark == self._mark:
            return self._db
        else:
            self._finish()
        self._db.execute("BEGIN")
        self._mark = mark
        return self._db

    def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._db.close()

    def _end(self) -> None:
        self._ending = None
        self._finish()

    def _finish(self) -> None:
        self._mark = None
        if self._db.in_transaction:  # an error may have ended it
            try:
                self._db.execute("COMMIT")
            except apsw.Error:
                with suppress(apsw.Error):
                    self._db.execute("ROLLBACK")
                raise

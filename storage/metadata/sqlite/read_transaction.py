"""A connection whose lookups share one read transaction per iteration of the event loop.

To begin and end a transaction takes SQLite as long as a lookup in a small store: it locks a byte of a file twice and
compares the log's index. A loaded server makes several lookups per iteration. When the data version has changed, the
next lookup starts a new transaction, so none sees older data than that of its version. The transaction ends with the
iteration, since SQLite cannot reuse the log's space while somebody reads from it.
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
        self._version: object = None
        self._ending: asyncio.Handle | None = None

    def at(self, version: object) -> apsw.Connection:
        """Returns the connection for lookups that end before the next `await`. They see the data of `version`, which
        was taken just now, or newer data. Raises apsw.Error."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().call_soon(self._end)
        elif version == self._version:
            return self._db
        else:
            self._finish()
        self._db.execute("BEGIN")
        self._version = version
        return self._db

    def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._db.close()

    def _end(self) -> None:
        self._ending = None
        self._finish()

    def _finish(self) -> None:
        self._version = None
        if self._db.in_transaction:  # an error may have ended it
            try:
                self._db.execute("COMMIT")
            except apsw.Error:
                with suppress(apsw.Error):
                    self._db.execute("ROLLBACK")
                raise

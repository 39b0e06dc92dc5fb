"""`SharedReadTransaction`: a connection whose lookups share one read transaction in each iteration of the event loop.

Sharing saves time: in a small store, starting and ending a transaction takes as long as one lookup.

The *data version* is a value that every commit to the database changes. A caller reads the version before each lookup.
If the version has changed since the transaction started, the lookup starts a new transaction, so that it does not
return older data. At the end of the iteration, the transaction ends, because SQLite cannot reuse the space of the
write-ahead log while a transaction reads from the log.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import apsw

from storage.metadata.sqlite.database import connect


class SharedReadTransaction:
    """A read-only connection to the metadata database, and the current read transaction, if there is one. Used from one
    event loop."""

    def __init__(self, path: Path) -> None:
        """Opens the database at `path`. Raises apsw.Error."""
        self._db = connect(path, read_only=True)
        self._transaction_version: object = None
        self._scheduled_end: asyncio.Handle | None = None

    def connection_at(self, version: object) -> apsw.Connection:
        """Returns the connection, inside a read transaction that sees the data of `version` or newer data.

        `version`: the data version that the caller has just read. The caller must finish its lookups on the connection
        before its next `await`, because the transaction may end during the `await`. Raises apsw.Error."""
        if self._scheduled_end is None:  # the first lookup of this iteration
            self._scheduled_end = asyncio.get_running_loop().call_soon(self._end_iteration)
        elif version == self._transaction_version:
            return self._db
        else:
            self._end_transaction()
        self._db.execute("BEGIN")
        self._transaction_version = version
        return self._db

    def close(self) -> None:
        """Closes the connection, which ends the transaction."""
        if self._scheduled_end is not None:
            self._scheduled_end.cancel()
        self._db.close()

    def _end_iteration(self) -> None:
        """Ends the transaction. The event loop calls this method after the iteration."""
        self._scheduled_end = None
        self._end_transaction()

    def _end_transaction(self) -> None:
        """Ends the transaction, if there is one. Raises apsw.Error."""
        self._transaction_version = None
        if self._db.in_transaction:  # False if SQLite ended the transaction after an error
            try:
                self._db.execute("COMMIT")
            except apsw.Error:
                with suppress(apsw.Error):
                    self._db.execute("ROLLBACK")
                raise

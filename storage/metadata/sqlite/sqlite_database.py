"""The metadata database as one process has it open, and the stores over it (`SqliteDatabase`)."""

from __future__ import annotations

from collections.abc import Callable

from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.metadata.sqlite.access.sqlite_accounts import SqliteAccounts
from storage.metadata.sqlite.data_version import open_data_version
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.sqlite_metadata import SqliteMetadata
from storage.metadata.sqlite.sqlite_upstream_records import SqliteUpstreamRecords
from storage.metadata.sqlite.writer_thread import WriterThread


class SqliteDatabase:
    """Opened after a fork, by the process that uses it; used from one event loop. `metadata`, `records` and `accounts`
    share its connections."""

    def __init__(
        self,
        layout: Layout,
        system: System,
        clock: Callable[[], float],
        reserve: Reserve,
        *,
        immutable: ImmutableDatabase | None = None,
    ) -> None:
        """`immutable` is read in place of a connection, and closed with this. Raises apsw.FullError (no space to open
        the database), apsw.Error."""
        self._db = immutable.db if immutable else connect(layout.metadata, read_only=True)
        version = immutable or open_data_version(self._db, lambda: connect(layout.metadata, read_only=True))
        reading = immutable or SharedReadTransaction(layout.metadata)
        scans = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        writer = immutable or WriterThread(layout, system, version, reserve)
        self._parts = writer, scans, version, reading
        self.immutable = immutable
        self.metadata = SqliteMetadata(self._db, version, reading, scans, writer, clock)
        self.records = SqliteUpstreamRecords(self._db, writer, clock)
        self.accounts = SqliteAccounts(self._db, writer, clock, version, scans)

    def close(self) -> None:
        """Makes the changes that are queued, then closes."""
        if self.immutable is not None:
            self.immutable.close()
            return
        for part in self._parts:
            part.close()
        self._db.close()

"""The connections of one process to the metadata database, and the stores that use them (`SqliteDatabase`)."""

from __future__ import annotations

from collections.abc import Callable

from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.metadata.sqlite.access.sqlite_accounts import SqliteAccounts
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.cross_process_change_counter import open_data_version
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.sqlite_metadata import SqliteMetadata
from storage.metadata.sqlite.sqlite_upstream_records import SqliteUpstreamRecords


class SqliteDatabase:
    """Opens the connections and makes the stores. Each process makes its own after it was forked, and uses it from one
    event loop.

    `metadata` stores repositories, manifests, tags, blobs and uploads; `records` what the mirror learned about its
    upstreams; `accounts` accounts and rights. `immutable` is the read-only database of a full disk, or None."""

    def __init__(
        self,
        layout: Layout,
        system: System,
        clock: Callable[[], float],
        reserve: Reserve,
        *,
        immutable: ImmutableDatabase | None = None,
    ) -> None:
        """With `immutable`, all reads use that database, changes are refused, and `close` closes it. `clock` returns
        the time in seconds since 1970. Raises apsw.FullError if there is no space to open the database; apsw.Error."""
        self._db = immutable.db if immutable else connect(layout.metadata, read_only=True)
        version = immutable or open_data_version(self._db, lambda: connect(layout.metadata, read_only=True))
        shared_reads = immutable or SharedReadTransaction(layout.metadata)
        scans = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        writer = immutable or CommitThread(layout, system, version, reserve)
        self._closed_in_order = writer, scans, version, shared_reads
        self.immutable = immutable
        self.metadata = SqliteMetadata(self._db, version, shared_reads, scans, writer, clock)
        self.records = SqliteUpstreamRecords(self._db, writer, clock)
        self.accounts = SqliteAccounts(self._db, writer, clock, version, scans)

    def close(self) -> None:
        """Makes the changes that are queued, then closes all connections."""
        if self.immutable is not None:
            self.immutable.close()
            return
        for part in self._closed_in_order:
            part.close()
        self._db.close()

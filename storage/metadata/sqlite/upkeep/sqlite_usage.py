"""Counts the blobs, bytes and tags of *scopes* (sets of repositories that are counted together), in the metadata
database (`SqliteUsage`)."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import usage_tables
from storage.names import Digest, RepositoryName
from storage.usage import ScopeDefinition, ScopeUsage


class SqliteUsage:
    """Implements `storage.usage.Usage`, which describes the methods. Short reads run on the event loop."""

    def __init__(
        self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase, scans: ScanThread | ImmutableScans
    ) -> None:
        """Reads with `db`, runs long reads in `scans`, and changes through `writer`. If the disk is too full to open
        the database for writing, `writer` is an ImmutableDatabase, which refuses every change with StorageFull."""
        self._db = db
        self._writer = writer
        self._scans = scans

    async def configure(self, definitions: Sequence[ScopeDefinition]) -> None:
        # Not durable: each start of a server configures the scopes again. `ReserveUse.HALF`: on a full disk, the change
        # may use half of the reserve, which is disk space that was allocated in advance.
        await self._writer.run(
            lambda db: usage_tables.configure(db, definitions), durable=False, reserve_use=ReserveUse.HALF
        )

    async def count_batch(self) -> bool:
        # Not durable: after a power cut, the counting continues from the last batch that is on the disk.
        return await self._writer.run(usage_tables.count_batch, durable=False)

    async def scope(self, name: str) -> ScopeUsage | None:
        return usage_tables.read_scope(self._db, name)

    async def scopes(self) -> list[ScopeUsage]:
        return usage_tables.read_scopes(self._db)

    async def recount(self, name: str) -> ScopeUsage | None:
        return await self._scans.run(lambda db: usage_tables.recount(db, name))

    async def check_quota(self, repo: RepositoryName, size: int, digest: Digest | None) -> None:
        usage_tables.check_quota(self._db, repo, size, digest)

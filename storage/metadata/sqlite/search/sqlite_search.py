"""The search index of the metadata database, for one process (`SqliteSearch`)."""

from __future__ import annotations

from collections.abc import Sequence

import apsw

from storage.content_search import (
    DigestFound,
    LabelsFound,
    ManifestBatch,
    ManifestLabels,
    SearchPage,
    TagFound,
)
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.search import index_tables, search_queries
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NameSet


class SqliteSearch:
    """Implements `storage.content_search.ContentSearch` and `SearchIndex`, which describe the methods. Searches run one
    after the other in a thread of their own, so that other long lookups do not wait for them."""

    def __init__(
        self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase, searches: ScanThread | ImmutableScans
    ) -> None:
        """Reads positions with `db`, searches in `searches`, and changes the index through `writer`."""
        self._db = db
        self._writer = writer
        self._searches = searches

    async def repositories(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        return await self._searches.run(lambda db: search_queries.repositories(db, words, within, offset, limit))

    async def tags(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[TagFound]:
        return await self._searches.run(lambda db: search_queries.tags(db, words, within, offset, limit))

    async def labels(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[LabelsFound]:
        return await self._searches.run(lambda db: search_queries.labels(db, words, within, offset, limit))

    async def digests(self, digest: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestFound]:
        return await self._searches.run(lambda db: search_queries.digests(db, digest, within, offset, limit))

    async def tags_of(self, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        return await self._searches.run(lambda db: search_queries.tags_of(db, repo, limit))

    async def is_indexing(self) -> bool:
        return index_tables.is_indexing(self._db)

    def has_unindexed(self) -> bool:
        return index_tables.has_unindexed(self._db)

    async def index_names(self) -> bool:
        # After a power cut the index continues from the last batch that is on the disk.
        return await self._writer.run(index_tables.index_names, durable=False)

    async def unindexed_manifests(self) -> ManifestBatch:
        return await self._searches.run(index_tables.read_unindexed_manifests)

    async def add_manifests(self, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
        await self._writer.run(lambda db: index_tables.add_manifests(db, batch, labels), durable=False)

"""The search index of the metadata database, for one process (`SqliteSearch`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import apsw

from storage.content_search import (
    DigestMatch,
    IncompleteManifestPage,
    LabelsMatch,
    ManifestBatch,
    ManifestLabels,
    SearchPage,
    TagMatch,
)
from storage.data_dir.reserve import ReserveUse
from storage.errors import SearchIndexDamaged, StorageFailed, StorageFull
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.search import index_tables, search_queries
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NameSet

T = TypeVar("T")


class SqliteSearch:
    """Implements `ContentSearch` and `SearchIndex` of `storage.content_search`, whose docstrings describe the methods.
    Searches run one after the other, in a thread that only searches use.

    Content is *unindexed* if it is not in the index. A manifest is *incomplete* if it is in the index without all its
    labels, because they could not be read when it was indexed."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        search_thread: ScanThread | ImmutableScans,
        data_version: Callable[[], object],
    ) -> None:
        """Runs short lookups on `db` and searches in `search_thread`. Changes the index through `writer`.
        `data_version` returns a value that changes with every commit to the database."""
        self._db = db
        self._data_version = data_version
        self._complete_version: object = None
        """The data version at the last check that found no unindexed content; None before the first such check. At this
        version, the index may have incomplete manifests."""
        self._writer = writer
        self._search_thread = search_thread

    async def find_repositories(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        return await self._run_in_search_thread(
            lambda db: search_queries.find_repositories(db, words, within, offset, limit)
        )

    async def find_tags(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[TagMatch]:
        return await self._run_in_search_thread(lambda db: search_queries.find_tags(db, words, within, offset, limit))

    async def find_by_labels(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[LabelsMatch]:
        return await self._run_in_search_thread(lambda db: search_queries.find_labels(db, words, within, offset, limit))

    async def find_by_digest(self, prefix: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestMatch]:
        return await self._run_in_search_thread(
            lambda db: search_queries.find_digests(db, prefix, within, offset, limit)
        )

    async def first_tags(self, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        return await self._run_in_search_thread(lambda db: search_queries.first_tags(db, repo, limit))

    async def is_indexing(self) -> bool:
        return self._run_on_event_loop(index_tables.is_indexing)

    def has_unindexed(self) -> bool:
        return self._run_on_event_loop(self._has_unindexed)

    async def index_names(self) -> bool:
        return await self._change(index_tables.index_names)

    async def unindexed_manifests(self) -> ManifestBatch:
        return await self._run_in_search_thread(index_tables.read_unindexed_manifests)

    async def add_manifests(self, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
        await self._change(lambda db: index_tables.add_manifests(db, batch, labels))

    async def incomplete_manifests(self, after: tuple[str, int] | None) -> IncompleteManifestPage:
        return await self._run_in_search_thread(lambda db: index_tables.read_incomplete_manifests(db, after))

    async def replace_labels(self, labels: Sequence[ManifestLabels]) -> None:
        def replace(db: apsw.Connection) -> None:
            for entry in labels:
                index_tables.set_labels(db, entry)

        await self._change(replace)

    async def rebuild(self) -> None:
        await self._writer.run(index_tables.rebuild, reserve_use=ReserveUse.ALL)

    def _has_unindexed(self, db: apsw.Connection) -> bool:
        """Returns whether some content is not in the index. If an earlier call returned False, and the database has not
        changed since that call, returns False without reading a table."""
        version = self._data_version()
        if version != self._complete_version and not index_tables.has_unindexed(db):
            self._complete_version = version
        return version != self._complete_version

    def _run_on_event_loop(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs a short lookup on the event loop."""
        try:
            return lookup(self._db)
        except apsw.Error as error:
            raise _as_registry_error(error) from error

    async def _run_in_search_thread(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs a lookup in the thread for searches."""
        try:
            return await self._search_thread.run(lookup)
        except apsw.Error as error:
            raise _as_registry_error(error) from error

    async def _change(self, change: Callable[[apsw.Connection], T]) -> T:
        """Changes the index. Does not wait until the change is durable: after a power cut, the indexing continues from
        the last change that is on the disk."""
        try:
            return await self._writer.run(change, durable=False)
        except StorageFailed as error:
            # A change violates a constraint only if the index is damaged.
            if _is_damage(error.__cause__) or isinstance(error.__cause__, apsw.ConstraintError):
                raise SearchIndexDamaged from error.__cause__
            raise


def _as_registry_error(error: apsw.Error) -> StorageFull | StorageFailed:
    if isinstance(error, apsw.FullError):
        return StorageFull()
    return SearchIndexDamaged() if _is_damage(error) else StorageFailed(f"the search failed: {error}")


def _is_damage(error: BaseException | None) -> bool:
    """Returns whether an error of SQLite means that the index is damaged: SQLite has found damage in a table, or cannot
    open a full-text index (FTS5)."""
    return isinstance(error, apsw.CorruptError) or "fts5" in str(error)

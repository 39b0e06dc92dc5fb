"""Metadata in an embedded SQLite database (`Metadata`).

Lookups run on the event loop with its own connections: they take microseconds, and see all commits of all processes.
Those that may read many rows run in a thread. Changes go through the `WriterThread`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast
from weakref import WeakValueDictionary

import apsw

from storage.content import Actor, Condition, Descriptor, Manifest, Page
from storage.data_dir.reserve import ReserveUse
from storage.metadata.catalog import BlobRow, QueuedLink, UploadRow
from storage.metadata.sqlite import blob_changes, lookups, manifest_changes
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.writer_thread import WriterThread
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet
from storage.versioned_cache import VersionedCache

CACHE_BYTES: Final = 16 * 1024 * 1024
"""Approximate size of the lookup cache in bytes."""
MANIFEST_WEIGHT: Final = 8
"""Memory that a manifest and its parsed content take, per byte of the manifest."""
_FEW: Final = 1024
"""Approximate size in bytes of a cached value of a few fields."""
_SMALL_PAGE: Final = 1000
"""Largest page of repositories that is read on the event loop, if no name has to be matched."""
_FEW_REFERRERS: Final = 100
"""Most referrers that are read on the event loop,"""
_FEW_ANNOTATIONS: Final = 64 * 1024
"""and most bytes of their annotations."""
_PORTION: Final = 500
"""Rows that are looked up in one iteration of the event loop: about 5 ms."""
T = TypeVar("T")
S = TypeVar("S", bound=str)


def _page_size(page: Page[Tag] | Page[RepositoryName]) -> int:
    return _FEW + sum(64 + len(name) for name in page.items)


def _manifest_size(manifest: Manifest) -> int:
    return _FEW + MANIFEST_WEIGHT * len(manifest.body)  # the parsed content is cached with it


def _row_size(_: BlobRow | Descriptor) -> int:
    return _FEW


class SqliteMetadata:
    """Made by `SqliteDatabase`, which closes what this uses."""

    def __init__(
        self,
        db: apsw.Connection,
        version: Callable[[], object],
        reading: SharedReadTransaction | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        writer: WriterThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """`version` gives the version of the data, `reading` a connection that sees it; `scans` runs slow lookups,
        `writer` changes."""
        self._db = db
        self.version = version
        self._reading = reading
        self._scans = scans
        self._cache: VersionedCache[Any] = VersionedCache(version, CACHE_BYTES)
        self._writer = writer
        self._large: WeakValueDictionary[Digest, Manifest] = WeakValueDictionary()
        self._clock = clock

    def _look(self, weigh: Callable[[T], int], look: Callable[..., T], *what: object) -> T:
        """Returns `look(db, *what)`, from the cache if there was no commit since. Errors are not cached."""
        key = (look, *what)
        kept = self._cache.get(key)
        if kept is not None:
            return cast("T", kept)
        since = self._cache.last_version
        answer = look(self._reading.at(since), *what)
        if self._cache.should_cache(key):
            self._cache.put(key, answer, weigh(answer), since)
        return answer

    async def _scan(self, weigh: Callable[[T], int], look: Callable[..., T], *what: object) -> T:
        """Does the same in the thread for slow lookups."""
        key = (look, *what)
        kept = self._cache.get(key)
        if kept is not None:
            return cast("T", kept)
        since = self._cache.last_version
        answer = await self._scans.run(lambda db: look(db, *what))
        if self._cache.should_cache(key):
            self._cache.put(key, answer, weigh(answer), since)
        return answer

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        return self._look(_row_size, lookups.blob, repo, digest)

    async def touch_blob(self, repo: RepositoryName, digest: Digest) -> None:
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.need_blob(db, repo, digest, now), durable=False)

    async def add_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID) -> None:
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.add_blob(db, repo, digest, size, place, upload, now))

    async def adopt_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str) -> None:
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.adopt_blob(db, repo, digest, size, place, now))

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        now = self._clock()
        return await self._writer.run(lambda db: blob_changes.mount_blob(db, repo, digest, source, by, now))

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None:
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.delete_blob(db, repo, digest, by, now, even_if_referenced=even_if_referenced),
            need=ReserveUse.RELIEF,
        )

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.start_upload(db, upload, repo, algorithm, boot, owner, now), durable=False
        )

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        return lookups.upload(self._db, repo, upload)

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.save_upload(db, upload, offset, state, boot, now), durable=False)

    async def end_upload(self, upload: UploadID) -> None:
        await self._writer.run(lambda db: blob_changes.end_upload(db, upload), durable=False, need=ReserveUse.RELIEF)

    async def manifest_descriptor(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return self._look(_row_size, lookups.manifest_descriptor, repo, reference)

    async def manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return self._look(_manifest_size, self._find_manifest, repo, reference)

    def _find_manifest(self, db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Manifest:
        return lookups.manifest(db, repo, reference, self._large)

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag],
        by: Actor,
        sparse: bool,
        condition: Condition | None,
    ) -> None:
        now = self._clock()
        await self._writer.run(
            lambda db: manifest_changes.put_manifest(
                db, repo, manifest, tags, by, now, sparse=sparse, condition=condition
            )
        )

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, by: Actor) -> None:
        now = self._clock()
        await self._writer.run(
            lambda db: manifest_changes.delete_manifest(db, repo, digest, by, now), need=ReserveUse.RELIEF
        )

    async def delete_tag(self, repo: RepositoryName, tag: Tag, by: Actor) -> None:
        now = self._clock()
        await self._writer.run(lambda db: manifest_changes.delete_tag(db, repo, tag, by, now), need=ReserveUse.RELIEF)

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        return lookups.is_known_repository(self._db, repo)

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]:
        if within.has_every_name and limit <= _SMALL_PAGE:
            return self._look(_page_size, lookups.repositories, after, limit, within)
        return await self._scan(_page_size, lookups.repositories, after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return self._look(_page_size, lookups.tags, repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        what = repo, subject, artifact_type, after
        page = lookups.referrers(self._db, *what, min(limit, _FEW_REFERRERS), _FEW_REFERRERS, _FEW_ANNOTATIONS)
        if not page.more or len(page.items) == limit:
            return page
        return await self._scans.run(lambda db: lookups.referrers(db, *what, limit))

    async def queued_links(self, before: float, limit: int) -> list[QueuedLink]:
        return blob_changes.queued_links(self._db, before, limit)

    async def unlinked_blobs(self, limit: int) -> list[Digest]:
        return blob_changes.unlinked_blobs(self._db, limit)

    async def drop_link(self, entry: QueuedLink, before: float) -> bool:
        now = self._clock()
        return await self._writer.run(lambda db: blob_changes.drop_link(db, entry, before, now), need=ReserveUse.RELIEF)

    async def drop_blob(self, digest: Digest) -> str | None:
        return await self._writer.run(lambda db: blob_changes.drop_blob(db, digest), need=ReserveUse.RELIEF)

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        return await self._known("blob", "digest", digests)

    async def stale_uploads(self, before: float, limit: int) -> list[UploadID]:
        return blob_changes.stale_uploads(self._db, before, limit)

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        return await self._writer.run(
            lambda db: blob_changes.drop_upload(db, upload, before), durable=False, need=ReserveUse.RELIEF
        )

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]:
        return await self._known("upload", "id", uploads)

    async def _known(self, table: str, column: str, values: Sequence[S]) -> set[S]:
        """Looks the values up in portions, and lets the event loop continue in between: there may be tens of
        thousands."""
        found: set[S] = set()
        for start in range(0, len(values), _PORTION):
            if start:
                await asyncio.sleep(0)
            portion = values[start : start + _PORTION]
            known = lookups.known(self._db, table, column, portion)
            found.update(value for value in portion if value in known)
        return found

"""Metadata of repositories, manifests, tags, blobs and uploads in an embedded SQLite database (`SqliteMetadata`).

Short lookups run on the event loop, because they take microseconds. They see all commits of all processes. Lookups that
may read many rows run in a thread (`ScanThread`). Changes run in another thread (`CommitThread`); unless they pass
`durable=False`, they survive a power cut once the method has returned.

`ReserveUse.RELIEF` marks changes that free space: on a full disk they may use disk space that was allocated in advance.
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
from storage.metadata.sqlite import blob_changes, lookups, manifest_and_tag_changes
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet
from storage.versioned_cache import VersionedCache

CACHE_BYTES: Final = 16 * 1024 * 1024
"""Approximate capacity of the lookup cache in bytes of memory."""
MEMORY_PER_MANIFEST_BYTE: Final = 8
"""Bytes of memory that a manifest with its parsed content takes for each byte of its body."""
_SMALL_VALUE_BYTES: Final = 1024
"""Approximate memory that a cached value of a few fields takes."""
_MAX_REPOSITORIES_ON_LOOP: Final = 1000
"""Most repositories of a page that is read on the event loop. Larger pages, and pages of a restricted set of names, are
read in the thread."""
_MAX_REFERRERS_ON_LOOP: Final = 100
"""Most referrers of a page that is read on the event loop."""
_MAX_REFERRERS_BYTES_ON_LOOP: Final = 64 * 1024
"""Approximate limit of the bytes of such a page of referrers."""
_ROWS_PER_ITERATION: Final = 500
"""Rows that are looked up in one iteration of the event loop, which takes about 5 ms."""
T = TypeVar("T")
S = TypeVar("S", bound=str)


def _page_memory(page: Page[Tag] | Page[RepositoryName]) -> int:
    return _SMALL_VALUE_BYTES + sum(64 + len(name) for name in page.items)


def _manifest_memory(manifest: Manifest) -> int:
    return _SMALL_VALUE_BYTES + MEMORY_PER_MANIFEST_BYTE * len(manifest.body)


def _row_memory(_: BlobRow | Descriptor) -> int:
    return _SMALL_VALUE_BYTES


class SqliteMetadata:
    """Implements `storage.metadata.catalog.Metadata`, which says what each method raises. Used from one event loop.

    `SqliteDatabase` makes it, and closes the connections and threads that it uses. `version` returns the data version:
    a value that every commit of any process changes."""

    def __init__(
        self,
        db: apsw.Connection,
        version: Callable[[], object],
        shared_reads: SharedReadTransaction | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """`db` and `shared_reads` are connections for short lookups; `shared_reads` combines those of one iteration of
        the event loop into one transaction. `scans` runs long lookups, `writer` runs changes. `clock` returns the time
        in seconds since 1970."""
        self._db = db
        self.version = version
        self._shared_reads = shared_reads
        self._scans = scans
        self._cache: VersionedCache[Any] = VersionedCache(version, CACHE_BYTES)
        self._writer = writer
        self._large_manifests: WeakValueDictionary[Digest, Manifest] = WeakValueDictionary()
        self._clock = clock

    def _cached_lookup(self, memory_of: Callable[[T], int], lookup: Callable[..., T], *arguments: object) -> T:
        """Returns `lookup(db, *arguments)`, or its cached result if nothing was committed since. `memory_of` returns
        the approximate bytes of memory that the result takes. Errors are not cached."""
        key = (lookup, *arguments)
        cached = self._cache.get(key)
        if cached is not None:
            return cast("T", cached)
        version = self._cache.last_version  # the data version that `get` read
        result = lookup(self._shared_reads.connection_at(version), *arguments)
        if self._cache.should_cache(key):
            self._cache.put(key, result, memory_of(result), version)
        return result

    async def _cached_scan(self, memory_of: Callable[[T], int], lookup: Callable[..., T], *arguments: object) -> T:
        """Returns the same as `_cached_lookup`, but runs the lookup in the thread for long lookups."""
        key = (lookup, *arguments)
        cached = self._cache.get(key)
        if cached is not None:
            return cast("T", cached)
        version = self._cache.last_version  # the data version that `get` read
        result = await self._scans.run(lambda db: lookup(db, *arguments))
        if self._cache.should_cache(key):
            self._cache.put(key, result, memory_of(result), version)
        return result

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        return self._cached_lookup(_row_memory, lookups.blob, repo, digest)

    async def touch_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores that a client now relies on the blob being here, so that garbage collection keeps it for a grace
        period."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.need_blob(db, repo, digest, now), durable=False)

    async def add_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID) -> None:
        """Adds an uploaded blob to the repository and ends its upload session. `place`: the blob store's key for it."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.add_blob(db, repo, digest, size, place, upload, now))

    async def adopt_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str) -> None:
        """Adds a blob without an upload session, whose bytes are stored already, to the repository."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.adopt_blob(db, repo, digest, size, place, now))

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Adds a blob of another repository (`source`, or any in the set `source`), and returns its size in bytes."""
        now = self._clock()
        return await self._writer.run(lambda db: blob_changes.mount_blob(db, repo, digest, source, by, now))

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None:
        """Removes the blob from the repository. Refuses if a manifest there refers to it, unless
        `even_if_referenced`."""
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.delete_blob(db, repo, digest, by, now, even_if_referenced=even_if_referenced),
            reserve_use=ReserveUse.RELIEF,
        )

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Stores a new upload session. `boot`: of the machine; `owner`: the actor that may continue the session."""
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.start_upload(db, upload, repo, algorithm, boot, owner, now), durable=False
        )

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        return lookups.upload(self._db, repo, upload)

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Stores the progress of an upload: the digest's `state` after `offset` bytes, and the `boot` (of the machine)
        during which these were written."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.save_upload(db, upload, offset, state, boot, now), durable=False)

    async def end_upload(self, upload: UploadID) -> None:
        await self._writer.run(
            lambda db: blob_changes.end_upload(db, upload), durable=False, reserve_use=ReserveUse.RELIEF
        )

    async def manifest_descriptor(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return self._cached_lookup(_row_memory, lookups.manifest_descriptor, repo, reference)

    async def manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return self._cached_lookup(_manifest_memory, self._find_manifest, repo, reference)

    def _find_manifest(self, db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Manifest:
        return lookups.manifest(db, repo, reference, self._large_manifests)

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag],
        by: Actor,
        sparse: bool,
        condition: Condition | None,
    ) -> None:
        """Stores the manifest and points the tags at it, if `condition` holds for the first tag. `sparse`: what the
        manifest refers to may be missing."""
        now = self._clock()
        await self._writer.run(
            lambda db: manifest_and_tag_changes.put_manifest(
                db, repo, manifest, tags, by, now, sparse=sparse, condition=condition
            )
        )

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, by: Actor) -> None:
        """Deletes the manifest and all its tags."""
        now = self._clock()
        await self._writer.run(
            lambda db: manifest_and_tag_changes.delete_manifest(db, repo, digest, by, now),
            reserve_use=ReserveUse.RELIEF,
        )

    async def delete_tag(self, repo: RepositoryName, tag: Tag, by: Actor) -> None:
        now = self._clock()
        await self._writer.run(
            lambda db: manifest_and_tag_changes.delete_tag(db, repo, tag, by, now), reserve_use=ReserveUse.RELIEF
        )

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        return lookups.is_known_repository(self._db, repo)

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]:
        if within.has_every_name and limit <= _MAX_REPOSITORIES_ON_LOOP:
            return self._cached_lookup(_page_memory, lookups.repositories, after, limit, within)
        return await self._cached_scan(_page_memory, lookups.repositories, after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return self._cached_lookup(_page_memory, lookups.tags, repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the manifests whose subject is `subject`."""
        key = repo, subject, artifact_type, after
        few = _MAX_REFERRERS_ON_LOOP
        page = lookups.referrers(self._db, *key, min(limit, few), few, _MAX_REFERRERS_BYTES_ON_LOOP)
        if not page.more or len(page.items) == limit:
            return page
        # There are too many referrers to read on the event loop, so the whole page is read in the thread.
        return await self._scans.run(lambda db: lookups.referrers(db, *key, limit))

    async def queued_links(self, before: float, limit: int) -> list[QueuedLink]:
        """Returns blobs that lost their last reference in a repository before `before`."""
        return blob_changes.queued_links(self._db, before, limit)

    async def unlinked_blobs(self, limit: int) -> list[Digest]:
        """Returns blobs that no repository has any more."""
        return blob_changes.unlinked_blobs(self._db, limit)

    async def drop_link(self, entry: QueuedLink, before: float) -> bool:
        """Removes a blob from a repository if nothing has referred to it since `before`. Returns whether it did."""
        now = self._clock()
        return await self._writer.run(
            lambda db: blob_changes.drop_link(db, entry, before, now), reserve_use=ReserveUse.RELIEF
        )

    async def drop_blob(self, digest: Digest) -> str | None:
        """Deletes the row of a blob that no repository has, and returns the blob store's key for the blob; returns None
        if a repository has it."""
        return await self._writer.run(lambda db: blob_changes.drop_blob(db, digest), reserve_use=ReserveUse.RELIEF)

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Returns those of `digests` that have a row."""
        return await self._existing("blob", "digest", digests)

    async def stale_uploads(self, before: float, limit: int) -> list[UploadID]:
        """Returns upload sessions without progress since `before`."""
        return blob_changes.stale_uploads(self._db, before, limit)

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes an upload session without progress since `before`. Returns whether it did."""
        return await self._writer.run(
            lambda db: blob_changes.drop_upload(db, upload, before), durable=False, reserve_use=ReserveUse.RELIEF
        )

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]:
        """Returns those of `uploads` that have a row."""
        return await self._existing("upload", "id", uploads)

    async def _existing(self, table: str, column: str, values: Sequence[S]) -> set[S]:
        """Returns those of `values` that occur in the column. There may be tens of thousands of values, so the event
        loop runs other tasks between groups of `_ROWS_PER_ITERATION`."""
        found: set[S] = set()
        for start in range(0, len(values), _ROWS_PER_ITERATION):
            if start:
                await asyncio.sleep(0)
            group = values[start : start + _ROWS_PER_ITERATION]
            existing = lookups.existing_values(self._db, table, column, group)
            found.update(value for value in group if value in existing)
        return found

"""The hosted registry (`Registry`): each call becomes calls to metadata and to the blob store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from storage.accounts import Accounts
from storage.blobs.blob_store import BlobStore, BytesMissing
from storage.content import BLOB_TYPE, Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import BlobUploadUnknown, RangeInvalid, StorageFailed, StorageFull
from storage.interface import BlobReader
from storage.leases import DigestLocks, Leases
from storage.metadata.catalog import NOBODY, BlobRow, Metadata, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID, as_algorithm
from storage.partials import Partials
from storage.patterns import ALL_NAMES, NameSet
from storage.store.publication import Publication
from storage.store.stored_upload import StoredUpload, checkpoint_of, resume
from storage.upkeep.collector import Collector
from storage.upstream_records import UpstreamRecords

NEED_NOTED_SECONDS = 60.0
"""A blob that a client was told of within this time is not noted again. At most half the collector's grace."""


@dataclass(frozen=True, slots=True)
class StorageHealth:
    """How the registry asks about the storage below it. `problem` says in a sentence why nothing can be stored at
    present, or returns None. `retire` exists where the metadata was opened read-only, since there was no space to open
    it for changes; it ends the reading, once another registry is open in its place."""

    problem: Callable[[], str | None]
    retire: Callable[[], None] | None = None


class StoredRegistry:
    """Repositories in a data directory, and what a mirror keeps beside them. Opened by
    `storage.composition.open_registry`."""

    def __init__(
        self,
        metadata: Metadata,
        blobs: BlobStore,
        clock: Callable[[], float],
        collector: Collector,
        health: StorageHealth,
        *,
        partials: Partials,
        records: UpstreamRecords,
        locks: DigestLocks,
        leases: Leases,
        accounts: Accounts,
    ) -> None:
        self._need_noted = min(NEED_NOTED_SECONDS, collector.grace / 2)
        self._clock = clock
        self._health = health
        self._publication = Publication(blobs, metadata, locks)
        self.metadata = metadata
        self.blobs = blobs
        self.collector = collector
        self.partials = partials
        self.records = records
        self.locks = locks
        self.leases = leases
        self.accounts = accounts

    def storage_problem(self) -> str | None:
        """Says in a sentence why nothing can be stored at present; None if nothing is known."""
        return self._health.problem()

    @property
    def is_read_only(self) -> bool:
        """Whether the metadata was opened read-only, since there was no space to open it for changes."""
        return self._health.retire is not None

    def retire(self) -> None:
        """Ends reading read-only metadata: another registry has been opened in the place of this one."""
        if self._health.retire is not None:
            self._health.retire()

    async def known(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        return await self.metadata.is_known_repository(repo)

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        row = await self.metadata.blob(repo, digest)
        if row.is_unreferenced and self._clock() - row.needed > self._need_noted:
            with suppress(StorageFull):  # the blob is here all the same
                await self.metadata.need_blob(repo, digest)
        return Descriptor(BLOB_TYPE, digest, row.size)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except BytesMissing:
            # Collected after the row was read, and perhaps pushed again: the row says so.
            row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except BytesMissing:
            raise StorageFailed(f"the file of {digest} is missing; push it again to restore it") from None

    async def _open(self, row: BlobRow, span: Span | None) -> BlobReader:
        return await self.blobs.open(row.digest, row.size, row.place, span)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await self.metadata.manifest_descriptor(repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return await self.metadata.manifest(repo, reference)

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> StoredUpload:
        owner = by.name if by else NOBODY
        upload = UploadID.random()
        await self.metadata.start_upload(upload, repo, as_algorithm(algorithm), self.blobs.boot, owner)
        session = self.blobs.start_upload(upload, algorithm)
        return StoredUpload(self.blobs, self.metadata, self._publication, repo, upload, session)

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> StoredUpload:
        def check(actual: int) -> None:
            if offset is not None and offset != actual:
                raise RangeInvalid(
                    f"the upload stands at byte {actual}; a chunk that starts at {offset} does not follow",
                    offset=actual,
                )

        row = await self._session(repo, upload, by)

        def check_before(stored: int) -> None:
            checkpoint_of(row).check_not_truncated(stored)
            check(stored)

        before = check_before if row.boot == self.blobs.boot else None
        return await resume(self.blobs, self.metadata, self._publication, repo, upload, before, check)

    async def _session(self, repo: RepositoryName, upload: UploadID, by: Actor | None) -> UploadRow:
        row = await self.metadata.upload(repo, upload)
        if by is not None and row.owner not in (NOBODY, by.name):
            raise BlobUploadUnknown
        return row

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        row = await self._session(repo, upload, by)
        if row.boot == self.blobs.boot:
            stored = await self.blobs.upload_size(upload)
            checkpoint_of(row).check_not_truncated(stored)
            return stored
        taken = await self.resume_upload(repo, upload)
        try:
            return taken.offset
        finally:
            await taken.aclose()

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        return Descriptor(BLOB_TYPE, digest, await self.metadata.mount_blob(repo, digest, source, by))

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        await self.metadata.put_manifest(repo, manifest, tags, by, sparse, condition)
        return manifest.descriptor

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        await self.metadata.delete_blob(repo, digest, by, even_if_referenced)

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        await self.metadata.delete_manifest(repo, digest, by)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        await self.metadata.delete_tag(repo, tag, by)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        return await self.metadata.repositories(after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await self.metadata.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        return await self.metadata.referrers(repo, subject, artifact_type, after, limit)

"""The registry hosted here (`Registry`), told in calls to metadata and blob files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from storage.accounts import Accounts
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.content import BLOB_TYPE, Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import BlobUploadUnknown, RangeInvalid, StorageFailed, StorageFull
from storage.interface import BlobReader, Leases, Partials, UpstreamRecords
from storage.metadata.catalog import NOBODY, BlobRow, Metadata, UploadRow
from storage.metadata.sqlite.immutable_database import NO_ROOM, ImmutableDatabase
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID, as_algorithm
from storage.patterns import ALL_NAMES, NameSet
from storage.running_digest import start_digest
from storage.store.stored_upload import StoredUpload, check_not_truncated, resume
from storage.upkeep.collector import Collector

FRESH = 60.0
"""Seconds for which a blob that was needed just now is not noted again; half the grace at the most."""


class StoredRegistry:
    """Repositories in a data directory, and what a mirror keeps beside them. Opened by
    `storage.composition.open_registry`."""

    def __init__(
        self,
        metadata: Metadata,
        blobs: FileBlobStore,
        clock: Callable[[], float],
        boot: str,
        collector: Collector,
        *,
        partials: Partials,
        records: UpstreamRecords,
        leases: Leases,
        accounts: Accounts,
        frozen: ImmutableDatabase | None = None,
    ) -> None:
        """`frozen`: there was no room to open the metadata, and this is what it is read from."""
        self._frozen = frozen
        self._fresh = min(FRESH, collector.grace / 2)
        self.metadata = metadata
        self.blobs = blobs
        self._clock = clock
        self._boot = boot
        self.collector = collector
        self.partials = partials
        self.records = records
        self.leases = leases
        self.accounts = accounts

    def storage_problem(self) -> str | None:
        """Why nothing can be stored at present, in a sentence; None where nothing is known."""
        return NO_ROOM if self.frozen else self.blobs.reserve.storage_problem()

    @property
    def frozen(self) -> bool:
        """Whether the metadata is only read, since there was no room to open it."""
        return self._frozen is not None

    def retire(self) -> None:
        """Ends that: another registry has been opened in the place of this one."""
        if self._frozen is not None:
            self._frozen.retire()

    async def known(self, repo: RepositoryName) -> bool:
        """Whether anything was ever put into that repository; also when all of it is deleted."""
        return await self.metadata.is_known_repository(repo)

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        row = await self.metadata.blob(repo, digest)
        if row.is_unreferenced and self._clock() - row.needed > self._fresh:
            with suppress(StorageFull):  # it is told apart from a blob that is not there all the same
                await self.metadata.need_blob(repo, digest)
        return Descriptor(BLOB_TYPE, digest, row.size)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except FileNotFoundError:
            # Collected between the two, and perhaps pushed again: the row knows.
            row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except FileNotFoundError:
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
        row = UploadRow(UploadID.random(), repo, as_algorithm(algorithm), 0, None, self._boot, owner)
        await self.metadata.start_upload(row.id, repo, algorithm, self._boot, owner)
        return StoredUpload(self.blobs, self.metadata, self._boot, row, start_digest(algorithm))

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

        def check_before(size: int) -> None:
            check_not_truncated(row, size)
            check(size)

        before = check_before if row.boot == self._boot else None
        return await resume(self.blobs, self.metadata, self._boot, repo, upload, before, check)

    async def _session(self, repo: RepositoryName, upload: UploadID, by: Actor | None) -> UploadRow:
        row = await self.metadata.upload(repo, upload)
        if by is not None and row.owner not in (NOBODY, by.name):
            raise BlobUploadUnknown
        return row

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        row = await self._session(repo, upload, by)
        if row.boot == self._boot:
            size = await self.blobs.session_size(upload)
            check_not_truncated(row, size)
            return size
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

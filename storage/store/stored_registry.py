"""The registry that combines a metadata store and a blob store (`StoredRegistry`). The metadata store has a *row* for
each blob and each upload session; the blob store has their bytes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from storage.accounts import Accounts
from storage.activity import ActivityLog
from storage.backups import Snapshots
from storage.blobs.blob_store import BlobStore, BytesMissing
from storage.cached_images import CachedImages
from storage.consistency import Consistency
from storage.content import BLOB_TYPE, Actor, Condition, Descriptor, Manifest, Page, Span
from storage.content_search import ContentSearch, SearchIndex
from storage.damage import DamageRecords
from storage.descriptions import Descriptions
from storage.errors import BlobUploadUnknown, DataDirectoryReplaced, RangeInvalid, StorageFailed, StorageFull
from storage.imports import ImportRecords
from storage.interface import BlobReader
from storage.jobs import Jobs
from storage.leases import DigestLocks, Leases
from storage.metadata.catalog import ANY_ACTOR, BlobRow, Metadata, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID, as_algorithm
from storage.outbox import Outbox
from storage.partials import Partials
from storage.patterns import ALL_NAMES, NameSet
from storage.pulls import Pulls
from storage.retention import Retention
from storage.store.publication import Publication
from storage.store.stored_upload import StoredUpload, checkpoint_of, resume
from storage.tag_history import TagHistory
from storage.tag_listing import TagListing
from storage.tag_removal import TagRemovalPlanner
from storage.tag_rules import ImmutableTags
from storage.upkeep.checker import Checker
from storage.upkeep.collector import Collector
from storage.upkeep.quarantine import Quarantine
from storage.upkeep.search_indexing import SearchIndexer
from storage.upstream_records import UpstreamRecords
from storage.upstream_tags import UpstreamTags
from storage.usage import Usage

TOUCH_INTERVAL_SECONDS = 60.0
"""Shortest time between two updates of `BlobRow.last_used` for one blob. It limits the writes when many clients request
the blob. If half of the garbage collector's grace period is shorter, the registry uses half of the grace period."""


@dataclass(frozen=True, slots=True)
class StorageHealth:
    """The functions that a `StoredRegistry` calls for its disk and its data directory.

    - `problem`: implements `StoredRegistry.storage_problem`.
    - `retire`: implements `StoredRegistry.retire` if the metadata was opened read-only. None: the metadata was opened
      for changes, and `StoredRegistry.retire` does nothing.
    - `refusal`: implements `StoredRegistry.push_refusal_reason`.
    - `free_bytes`: implements `StoredRegistry.free_bytes`.
    - `directory_problem`: implements `StoredRegistry.directory_problem`."""

    problem: Callable[[], str | None]
    retire: Callable[[], None] | None = None
    refusal: Callable[[int], str | None] = lambda _: None
    free_bytes: Callable[[], int | None] = lambda: None
    directory_problem: Callable[[], str | None] = lambda: None


class StoredRegistry:
    """The registry in a data directory. The methods without a description implement `storage.interface.Registry`, which
    describes them. `storage.composition.open_registry` creates the object.

    The other stores of the directory are attributes, for code that needs more than `storage.interface.Registry`:

    - `metadata`, `blobs`, `locks` (of digests) and `leases` (exclusive rights to do some work);
    - `accounts`: accounts, rights and the audit log;
    - `partials`: the partial blobs, whose download is not complete; `records`: what the mirror records about its
      upstreams; `upstream_tags`: the digests of mirrored tags, and the frozen tags;
    - `collector`, `jobs`: garbage collection, and the jobs of upkeep;
    - `consistency`, `checker`: the checks of the metadata, and the check of the whole store;
    - `damage`, `quarantine`: the records of damaged content, and the object that takes damaged blobs out of use;
    - `snapshots`, `imports`: copies of the metadata for backups, and the records of imports from other registries;
    - `pulls`, `retention`: the last pulls of manifests, and the deletion of tags and manifests that no retention rule
      keeps;
    - `usage`, `cached_images`: the disk usage of sets of repositories, and the images in the cache of the mirror;
    - `tag_history`, `tag_listing`, `tag_removals`: the history of tags, lists of tags for people, and previews of
      removals of tags;
    - `descriptions`: texts that people write about repositories; `activity`: counts of pulls and pushes for each hour;
    - `outbox`: events, and their pending deliveries to webhooks;
    - `search`, `search_index`, `search_indexer`: the search of content, the search index, and the indexer that keeps
      the index up to date;
    - `immutable_tags`: the rules about tags that clients cannot change."""

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
        jobs: Jobs,
        upstream_tags: UpstreamTags,
        tag_history: TagHistory,
        tag_listing: TagListing,
        tag_removals: TagRemovalPlanner,
        immutable_tags: ImmutableTags,
        usage: Usage,
        cached_images: CachedImages,
        pulls: Pulls,
        retention: Retention,
        consistency: Consistency,
        damage: DamageRecords,
        snapshots: Snapshots,
        imports: ImportRecords,
        descriptions: Descriptions,
        activity: ActivityLog,
        outbox: Outbox,
        search: ContentSearch,
        search_index: SearchIndex,
        run_upkeep_rounds: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.run_upkeep_rounds = run_upkeep_rounds
        """Runs the rounds of garbage collection and other upkeep until it is cancelled; None: this process runs no
        rounds."""
        self._touch_interval = min(TOUCH_INTERVAL_SECONDS, collector.grace / 2)
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
        self.jobs = jobs
        self.upstream_tags = upstream_tags
        self.tag_history = tag_history
        self.tag_listing = tag_listing
        self.tag_removals = tag_removals
        self.immutable_tags = immutable_tags
        self.usage = usage
        self.cached_images = cached_images
        self.pulls = pulls
        self.retention = retention
        self.consistency = consistency
        self.checker = Checker(consistency, metadata, blobs, damage, locks, clock)
        self.damage = damage
        self.quarantine = Quarantine(blobs, damage, locks)
        self.snapshots = snapshots
        self.imports = imports
        self.descriptions = descriptions
        self.activity = activity
        self.outbox = outbox
        self.search = search
        self.search_index = search_index
        self.search_indexer = SearchIndexer(search_index, metadata, blobs)

    def storage_problem(self) -> str | None:
        """Returns a sentence on why nothing can be stored now; None if no problem is known."""
        return self._health.problem()

    def push_refusal_reason(self, size: int = 0) -> str | None:
        """Returns a sentence for the operator if a push of `size` bytes would leave less free space on the disk than
        the settings demand. Otherwise returns None, also if the settings demand none."""
        return self._health.refusal(size)

    def free_bytes(self) -> int | None:
        """Returns the free bytes of the disk; None if they are not known."""
        return self._health.free_bytes()

    def directory_problem(self) -> str | None:
        """Returns None if the opened data directory is still at its path. Otherwise returns what is wrong: another data
        directory is there, or none is. The store then refuses all changes. Blocks. Raises OSError."""
        return self._health.directory_problem()

    @property
    def is_read_only(self) -> bool:
        """Whether the metadata was opened read-only. This happens if a full disk has no space to open the metadata
        for changes."""
        return self._health.retire is not None

    def retire(self) -> None:
        """Called when another registry has replaced this one. Does nothing if the metadata is open for changes. If the
        metadata is open read-only, stops reading the metadata, and releases the lock that keeps all processes from
        changing it. All later calls of this registry then raise StorageFull."""
        if self._health.retire is not None:
            self._health.retire()

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        return await self.metadata.is_known_repository(repo)

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        row = await self.metadata.blob(repo, digest)
        # The garbage collector keeps an unreferenced blob for some time after its last use, because a client that found
        # the blob may push a manifest that refers to it.
        if row.is_queued_for_collection and self._clock() - row.last_used > self._touch_interval:
            # The returned descriptor is right even if the time of this use cannot be saved.
            with suppress(StorageFull, DataDirectoryReplaced):
                await self.metadata.touch_blob(repo, digest)
        return Descriptor(BLOB_TYPE, digest, row.size)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except BytesMissing:
            # The garbage collector may have removed the blob after its row was read. If a client has pushed the blob
            # again, there is a new row.
            row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except BytesMissing:
            # The bytes are lost. `mark_missing` marks the blob as damaged. `metadata.blob` then raises BlobUnknown, so
            # that a client pushes the blob again, or the mirror downloads it again. If the blob was stored again in the
            # meantime, its row has a new place. `mark_missing` then changes nothing, and `metadata.blob` returns the
            # new place.
            with suppress(StorageFull):  # a read-only store cannot record the damage
                await self.quarantine.mark_missing(digest, row.place)
            row = await self.metadata.blob(repo, digest)
        try:
            return await self._open(row, span)
        except BytesMissing:
            raise StorageFailed(f"the file of {digest} is missing; push it again to restore it") from None

    async def _open(self, row: BlobRow, span: Span | None) -> BlobReader:
        """Opens the blob of the row. Raises RangeInvalid, BytesMissing."""
        return await self.blobs.open(row.digest, row.size, row.place, span)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await self.metadata.manifest_descriptor(repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return await self.metadata.manifest(repo, reference)

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> StoredUpload:
        owner = by.name if by else ANY_ACTOR
        upload = UploadID.random()
        # The row records the machine's current boot, because a restart of the machine may lose written bytes.
        await self.metadata.start_upload(upload, repo, as_algorithm(algorithm), self.blobs.boot, owner)
        session = self.blobs.start_upload(upload, algorithm)
        return StoredUpload(self.blobs, self.metadata, self._publication, repo, upload, session, by or Actor())

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> StoredUpload:
        def check_offset(actual: int) -> None:
            if offset is not None and offset != actual:
                raise RangeInvalid(
                    f"the upload has {actual} bytes; a chunk that starts at byte {offset} does not follow",
                    offset=actual,
                )

        row = await self._upload_row(repo, upload, by)

        def check_stored(stored: int) -> None:
            checkpoint_of(row).check_not_truncated(stored)
            check_offset(stored)

        # A wrong offset is refused before this request takes the session over from an earlier request. After a restart
        # of the machine, some of the stored bytes may be unusable. The takeover determines how many bytes are usable,
        # so the offset is then checked only after the takeover.
        is_same_boot = row.boot == self.blobs.boot
        return await resume(
            *(self.blobs, self.metadata, self._publication, repo, upload, by or Actor()),
            check_before_take_over=check_stored if is_same_boot else None,
            check_after_take_over=check_offset,
        )

    async def _upload_row(self, repo: RepositoryName, upload: UploadID, by: Actor | None) -> UploadRow:
        """Returns the row of an upload session. Raises BlobUploadUnknown if there is no such session, or if `by` is not
        None and another actor started the session."""
        row = await self.metadata.upload(repo, upload)
        if by is not None and row.owner not in (ANY_ACTOR, by.name):
            raise BlobUploadUnknown
        return row

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        row = await self._upload_row(repo, upload, by)
        if row.boot == self.blobs.boot:
            stored = await self.blobs.upload_size(upload)
            checkpoint_of(row).check_not_truncated(stored)
            return stored
        # The machine was restarted since the row was saved. Resuming determines how many bytes are usable.
        writer = await self.resume_upload(repo, upload)
        try:
            return writer.offset
        finally:
            await writer.aclose()

    async def link_blob(self, repo: RepositoryName, digest: Digest, size: int, fd: int, by: Actor) -> None:
        """Adds a blob to `repo`. Takes the bytes from a file of another program, without copying them. `fd`: the file,
        opened for reading. The caller must have verified that the file has `size` bytes and this digest. Raises
        StorageFull, StorageFailed. Raises LinkRefused if the file cannot be linked safely; the caller can then push the
        bytes with `start_upload`."""
        await self._publication.commit_without_upload(repo, self.blobs.prepare_link(fd, digest, size), by)

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
        is_immutable = self.immutable_tags.in_repository(repo)  # a function: is this tag of `repo` immutable?
        await self.metadata.put_manifest(repo, manifest, tags, by, sparse, condition, is_immutable)
        return manifest.descriptor

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        await self.metadata.delete_blob(repo, digest, by, even_if_referenced)

    async def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> None:
        is_immutable = self.immutable_tags.in_repository(repo)  # a function: is this tag of `repo` immutable?
        await self.metadata.delete_manifest(repo, digest, by, restorable, is_immutable)

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, condition: Condition | None = None
    ) -> None:
        await self.metadata.delete_tag(repo, tag, by, self.immutable_tags.in_repository(repo), condition)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        return await self.metadata.repositories(after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await self.metadata.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        return await self.metadata.referrers(repo, subject, artifact_type, after, limit)

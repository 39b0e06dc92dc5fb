"""Garbage collection (`Collector`): removes content that nothing refers to, while the registry serves requests.

The bytes of a blob are in the blob store; the metadata store has a *row* for each blob. A *link* is the right of one
repository to serve the blob. The metadata store has a queue of the links that may be garbage. A link enters the queue:

- when the link is created, and no manifest of the repository refers to the blob yet,
- when the last manifest of the repository that refers to the blob is deleted.

The collector checks only the links in this queue, so the cost depends on the amount of garbage and not on the size of
the store.

The blob store deletes bytes in two steps. `remove` makes them unreachable, and `reclaim_space` frees their disk space.
If the bytes are in files, `remove` moves a file to the trash, and `reclaim_space` unlinks the files in the trash
(`storage.blobs.files.trash`).

A push stores the bytes first, and then the row. If the process crashes between these steps, it leaves a *stray*: a blob
in the blob store that has no row. The blob store is divided into *shards*. To find strays, the collector lists the
blobs of some shards in each round.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from storage.blobs.blob_store import UNREADABLE, BlobStore, ListedBlob
from storage.errors import BytesForbidden, StorageFull
from storage.human_text import utc_text
from storage.leases import DigestLocks, Leases
from storage.metadata.catalog import DeletedManifest, Metadata, QueuedLink, StaleUpload
from storage.names import Digest
from storage.partials import Partials
from storage.upkeep.collection_report import CollectionReport, OnRemoval, Removal, RemovalKind
from storage.upkeep.removal_gate import removal_slot

BATCH_SIZE = 500
"""Number of rows that one call reads from the metadata store."""
IDLE_SECONDS_ON_FULL_DISK = 60.0
"""Seconds after which a partial blob without progress is deleted while the disk is full. A partial blob is a blob whose
download from an upstream registry is not complete."""
CONFIRM_FUTURE_SECONDS = 3600.0
"""If stored times are in the future, the collector waits for this many seconds. It then corrects such times, if every
round since the start of the wait has seen some. Without the wait, the collector could change right times: after a
machine starts, its clock may be behind, and right times then seem to be in the future. Machines usually set the clock
within this many seconds."""
MIN_STRAY_AGE_SECONDS = 60.0
"""Bytes without a row are kept for at least this many seconds, because a push stores the row shortly after the
bytes."""
SHARDS_PER_ROUND = 16
"""Largest number of shards of the blob store that a round lists, unless it lists all shards."""
BLOBS_LISTED_PER_ROUND = 1000
"""Number of listed blobs after which a round lists no more shards, unless it lists all shards. The limit bounds the
cost of a round in a large store."""
log = logging.getLogger("storage.collect")

OnRealRemoval = Callable[[Removal], None]
"""A function that is called after each removal, except in dry runs. It must return at once and raise nothing."""


def ignore_removal(_: Removal) -> None:
    """An `OnRealRemoval` that does nothing."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One round of garbage collection.

    - `dry_run`: whether the round removes nothing, and only counts the removals that a real round would make.
    - `shards`: the numbers of the shards to search for strays.
    - `max_listed`: number of listed blobs after which the round lists no more shards.
    - `on_removal`: called for each removal, also in a dry run.
    - `on_real_removal`: called for each removal, except in a dry run.
    - `report`: counts the removals."""

    dry_run: bool
    shards: Iterable[int]
    max_listed: float
    on_removal: OnRemoval | None
    on_real_removal: OnRealRemoval
    report: CollectionReport = field(default_factory=CollectionReport)

    async def note(self, kind: RemovalKind, item: str, size: int, reason: str, repository: str = "") -> None:
        """Counts a removal and reports it. The parameters are the attributes of `Removal`."""
        removal = Removal(kind, repository, item, size, reason)
        self.report.add(removal)
        if not self.dry_run:
            self.on_real_removal(removal)
        if self.on_removal is not None:
            await self.on_removal(removal)
        if self.dry_run:  # let other tasks run; real removals do this while they wait for the disk
            await asyncio.sleep(0)


class Collector:
    """The garbage collector. Several processes may collect at the same time.

    - `grace`: seconds for which a repository keeps a deleted manifest, and a blob to which no manifest of the
      repository refers. Strays are kept for the same time, or for `MIN_STRAY_AGE_SECONDS` if this is longer.
    - `expire`: seconds for which an upload session or a partial blob is kept without progress.
    - `is_full`: returns whether the disk is full. While the disk is full, the collector frees the space of each blob
      right after removing it, and keeps partial blobs for `IDLE_SECONDS_ON_FULL_DISK` if this is less than `expire`.
    - `check_directory`: raises DataDirectoryReplaced if the opened data directory was moved away or replaced. Then no
      round begins."""

    def __init__(
        self,
        metadata: Metadata,
        blobs: BlobStore,
        partials: Partials,
        locks: DigestLocks,
        clock: Callable[[], float],
        grace: float,
        expire: float,
        is_full: Callable[[], bool] = lambda: False,
        *,
        leases: Leases,
        check_directory: Callable[[], None] = lambda: None,
        on_real_removal: OnRealRemoval = ignore_removal,
    ) -> None:
        self._metadata = metadata
        self._blobs = blobs
        self._partials = partials
        self._locks = locks
        self._leases = leases
        self._clock = clock
        self.grace = grace
        self._expire = expire
        self._is_full = is_full
        self._check_directory = check_directory
        self._on_real_removal = on_real_removal
        self._future_seen_since: float | None = None
        """When a round first saw times in the future (`time.monotonic`). None: the latest round saw none, or corrected
        them."""
        self._next_shard = int(clock()) % blobs.shard_count
        """Number of the next shard to list. The first number depends on the time of the start, so that a process that
        is often restarted does not list the same shards each time."""

    async def collect(
        self, on_removal: OnRemoval | None = None, *, dry_run: bool = False, all_shards: bool = False
    ) -> CollectionReport:
        """Runs one round, and returns a report that counts its removals. `on_removal` is called for each removal, also
        in a dry run. `dry_run`: whether to remove nothing, and only to report the removals that a round would make now.
        `all_shards`: whether to search all shards of the blob store for strays. If False, the round searches only the
        next shards.

        If steps raise StorageFull, the later steps still run, and the round raises the first of these errors at its
        end. If a step raises StorageFailed, or `on_removal` raises an error, the round raises it at once. Removals that
        were made before an error or a cancellation are not undone."""
        self._check_directory()
        shards = range(self._blobs.shard_count) if all_shards else self._next_shards()
        this_round = _Round(
            dry_run, shards, float("inf") if all_shards else BLOBS_LISTED_PER_ROUND, on_removal, self._on_real_removal
        )
        failure: StorageFull | None = None
        for step in (
            self._correct_future_times,
            self._empty_trash,
            self._expire_partials,
            self._remove_stale_uploads,
            self._drop_deleted_manifests,
            self._remove_links,
            self._remove_blobs,
            self._remove_strays,
            self._reclaim_space,
        ):
            try:
                await step(this_round)
            except StorageFull as error:  # later steps may free the space that this step needs
                failure = failure or error
        report = this_round.report
        if report and not dry_run:
            log.info("removed %d bytes of garbage; number of removed items by kind: %s", report.freed_bytes, report)
        if failure is not None:
            raise failure
        return report

    async def free_unlinked_blobs(self) -> int:
        """Removes the blobs that have no link now, and then frees the disk space of removed bytes. Runs no other step
        of a round. Removes no blob while a backup is running. Returns the number of removed blobs. Raises StorageFull,
        StorageFailed."""
        this_round = _Round(
            dry_run=False, shards=(), max_listed=0, on_removal=None, on_real_removal=self._on_real_removal
        )
        await self._remove_blobs(this_round)
        await self._reclaim_space(this_round)
        return this_round.report.blobs

    async def may_remove_blobs(self) -> bool:
        """Returns whether blobs may be removed now; False while a backup runs. Raises StorageFailed."""
        async with removal_slot(self._leases) as may_remove:
            return may_remove

    async def remove_stray(self, stray: ListedBlob) -> bool:
        """Removes a stray that the blob store has listed. Keeps the stray if the metadata store has a row for its
        digest now. Returns whether it removed the stray. `BlobStore.reclaim_space` then frees the disk space."""
        async with self._locks.hold(stray.digest):
            if stray.digest in await self._metadata.known_blobs([stray.digest]):
                return False
            await self._blobs.remove(stray.place)
            return True

    def _next_shards(self) -> Iterable[int]:
        """Yields the numbers of the next shards to list. The next round continues after the last number that this round
        took."""
        for _ in range(SHARDS_PER_ROUND):
            shard, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shard_count
            yield shard

    async def _correct_future_times(self, this_round: _Round) -> None:
        """Corrects stored times that are in the future, if each round in the last `CONFIRM_FUTURE_SECONDS` has seen
        such times."""
        if this_round.dry_run:
            return
        if not await self._metadata.has_future_times():
            self._future_seen_since = None
            return
        if self._future_seen_since is None:
            self._future_seen_since = time.monotonic()
        if time.monotonic() - self._future_seen_since >= CONFIRM_FUTURE_SECONDS:
            await self._metadata.correct_future_times()
            self._future_seen_since = None

    async def _empty_trash(self, this_round: _Round) -> None:
        """Frees the disk space of bytes that an earlier round has removed."""
        if size := await self._blobs.unreclaimed_size():
            await self._reclaim_space(this_round)
            await this_round.note(RemovalKind.TRASH, "", size, "the bytes of blobs that an earlier round has removed")

    async def _reclaim_space(self, this_round: _Round) -> None:
        """Frees the disk space of removed bytes. Counts nothing, because the steps that remove bytes count the
        removals."""
        if not this_round.dry_run:
            await self._blobs.reclaim_space()

    async def _expire_partials(self, this_round: _Round) -> None:
        """Removes partial blobs that no process is downloading and that made no recent progress. Also removes partial
        blobs from before a restart of the machine, because a restart may lose some of their bytes."""
        idle_seconds = min(self._expire, IDLE_SECONDS_ON_FULL_DISK) if self._is_full() else self._expire
        before = self._clock() - idle_seconds
        for partial in await self._partials.expire(before, dry_run=this_round.dry_run):
            reason = f"its download made no progress after {utc_text(before)}, or ended with a restart of the machine"
            await this_round.note(RemovalKind.PARTIAL, partial.digest, partial.size, reason)

    async def _remove_stale_uploads(self, this_round: _Round) -> None:
        """Removes upload sessions without recent progress. Also removes uploaded bytes that were not written recently
        and whose session no longer exists."""
        before = self._clock() - self._expire
        after: StaleUpload | None = None
        while stale := await self._metadata.stale_uploads(before, BATCH_SIZE, after):
            after = stale[-1]
            for upload in stale:
                size = await self._blobs.upload_size(upload.id)
                if not this_round.dry_run:
                    if not await self._metadata.drop_stale_upload(upload.id, before):
                        continue
                    await self._blobs.discard_upload(upload.id)
                reason = f"the upload made no progress after {utc_text(upload.last_progress)}"
                await this_round.note(RemovalKind.UPLOAD, upload.id, size, reason, upload.repository)
        written_before = self._clock() - max(self.grace, MIN_STRAY_AGE_SECONDS)
        listed_uploads = await self._blobs.list_uploads()
        old_uploads = [(upload, changed_at) for upload, changed_at in listed_uploads if changed_at < written_before]
        known_ids = await self._metadata.known_uploads([upload for upload, _ in old_uploads])
        for upload_id, changed_at in old_uploads:
            if upload_id not in known_ids:
                size = await self._blobs.upload_size(upload_id)
                if not this_round.dry_run:
                    await self._blobs.discard_upload(upload_id)
                reason = f"the session of these bytes has ended; they were written at {utc_text(changed_at)}"
                await this_round.note(RemovalKind.UPLOAD, upload_id, size, reason)

    async def _drop_deleted_manifests(self, this_round: _Round) -> None:
        """Removes the deleted manifests whose grace period is over. During the grace period, a deleted manifest can be
        put back."""
        before = self._clock() - self.grace
        after: DeletedManifest | None = None
        while expired := await self._metadata.deleted_manifests(before, BATCH_SIZE, after):
            if this_round.dry_run:
                after = expired[-1]
            else:
                expired = await self._metadata.drop_deleted_manifests(before, BATCH_SIZE)
            for manifest in expired:
                reason = f"it was deleted at {utc_text(manifest.deleted_at)}, and the time to put it back is over"
                await this_round.note(RemovalKind.MANIFEST, manifest.digest, manifest.size, reason, manifest.repository)

    async def _remove_links(self, this_round: _Round) -> None:
        """Removes a link if no manifest of its repository has referred to the blob during the whole grace period. A dry
        run also counts the blobs that would lose their last link."""
        before = self._clock() - self.grace
        after: QueuedLink | None = None
        while entries := await self._metadata.queued_links(before, BATCH_SIZE, after):
            after = entries[-1] if this_round.dry_run else None
            for entry in entries:
                frees_blob = False
                if this_round.dry_run:
                    preview = await self._metadata.preview_link(entry, before)
                    is_dropped, frees_blob = preview.is_dropped, preview.frees_blob
                else:
                    is_dropped = await self._metadata.drop_link(entry, before)
                if is_dropped:
                    reason = f"no manifest of {entry.repository} has referred to it since {utc_text(entry.queued_at)}"
                    await this_round.note(RemovalKind.LINK, entry.digest, 0, reason, entry.repository)
                if frees_blob:
                    await self._note_blob(this_round, entry.digest, entry.size)

    async def _remove_blobs(self, this_round: _Round) -> None:
        """Removes blobs without a link: first the row, then the bytes. Needs no grace period, because a push of the
        same blob waits for the lock of the digest, and then stores the bytes again. Removes nothing while a backup is
        running."""
        if this_round.dry_run:
            await self._preview_blobs(this_round)
            return
        may_continue = True
        while may_continue:
            async with removal_slot(self._leases) as may_remove:
                may_continue = may_remove and await self._remove_blob_batch(this_round)

    async def _preview_blobs(self, this_round: _Round) -> None:
        """Counts and reports the blobs that `_remove_blobs` would remove now."""
        after: Digest | None = None
        while entries := await self._metadata.unlinked_blobs(BATCH_SIZE, after):
            after = entries[-1].digest
            for entry in entries:
                if entry.is_still_unlinked:  # False if the blob was linked again or deleted
                    await self._note_blob(this_round, entry.digest, entry.size)

    async def _remove_blob_batch(self, this_round: _Round) -> bool:
        """Removes at most `BATCH_SIZE` blobs without a link. Returns False if there was no such blob."""
        entries = await self._metadata.unlinked_blobs(BATCH_SIZE)
        for entry in entries:
            async with self._locks.hold(entry.digest):
                place = await self._metadata.drop_blob(entry.digest)
                if place:  # empty if the bytes of the blob are missing or damaged
                    await self._blobs.remove(place)
            if place is not None:
                await self._note_blob(this_round, entry.digest, entry.size)
            if self._is_full():
                await self._blobs.reclaim_space()
        if entries:
            await self._blobs.reclaim_space()
        return bool(entries)

    async def _note_blob(self, this_round: _Round, digest: Digest, size: int) -> None:
        await this_round.note(RemovalKind.BLOB, digest, size, "no repository has it any more")

    async def _remove_strays(self, this_round: _Round) -> None:
        """Removes the strays in the shards of this round. Keeps strays that were written recently, and strays that the
        store cannot read. Skips shards that this process has no permission to list."""
        listed_count = 0
        for shard in this_round.shards:
            written_before = self._clock() - max(self.grace, MIN_STRAY_AGE_SECONDS)
            try:
                blobs = await self._blobs.list_shard(shard)
            except BytesForbidden:  # the store has logged a warning
                continue
            old_blobs = [listed for listed in blobs if listed.written < written_before and listed.size != UNREADABLE]
            known_digests = await self._metadata.known_blobs([listed.digest for listed in old_blobs])
            for stray in old_blobs:
                if stray.digest not in known_digests and (this_round.dry_run or await self.remove_stray(stray)):
                    reason = f"the store has no such blob; the bytes were written at {utc_text(stray.written)}"
                    await this_round.note(RemovalKind.STRAY, stray.digest, stray.size, reason)
            listed_count += len(blobs)
            if listed_count >= this_round.max_listed:
                break

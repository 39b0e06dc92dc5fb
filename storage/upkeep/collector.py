"""Garbage collection (`Collector`): removes content that nothing refers to, while the registry serves requests.

The bytes of a blob are in the blob store; the metadata store has a *row* for each blob. A *link* is the right of one
repository to serve the blob. The metadata store queues a link in two cases: when it creates the link and no manifest of
the repository refers to the blob yet, and when it deletes the last manifest of the repository that refers to the blob.
The collector works through this queue, so its cost depends on the amount of garbage and not on the size of the store.

The blob store deletes bytes in two steps. `remove` makes them unreachable, and `reclaim_space` frees their disk space.
With files, `remove` moves the file to the trash, and `reclaim_space` unlinks the files in the trash
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
"""The collector corrects times in the future only after it has seen such times for this many seconds. After a start, a
machine's clock may be behind, and right times then look like times in the future. Machines usually set the clock within
this time."""
MIN_STRAY_AGE_SECONDS = 60.0
"""Bytes without a row are kept for at least this time in seconds, because a push stores the row shortly after the
bytes."""
SHARDS_PER_ROUND = 16
"""Largest number of shards of the blob store that are listed in one round, unless the round lists all."""
BLOBS_LISTED_PER_ROUND = 1000
"""Number of listed blobs after which a round lists no more shards, unless it lists all. Without this limit, the cost of
a round would grow with the store, because the shards of a large store have many blobs."""
log = logging.getLogger("storage.collect")

OnRealRemoval = Callable[[Removal], None]
"""Called after each removal, except in dry runs. Returns at once and raises nothing."""


def ignore_removal(_: Removal) -> None:
    """An `OnRealRemoval` that does nothing."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One round of garbage collection. `dry_run`: the round removes nothing. `shards`: the numbers of the shards to
    search for strays. `max_listed`: number of listed blobs after which the round lists no more shards. `report` counts
    the removals. `on_removal` is called for each removal, and in a dry run for each removal that a real round would
    make. `on_real_removal` is not called in a dry run."""

    dry_run: bool
    shards: Iterable[int]
    max_listed: float
    on_removal: OnRemoval | None
    on_real_removal: OnRealRemoval
    report: CollectionReport = field(default_factory=CollectionReport)

    async def note(self, kind: RemovalKind, item: str, size: int, reason: str, repository: str = "") -> None:
        """Counts a removal and reports it."""
        removal = Removal(kind, repository, item, size, reason)
        self.report.add(removal)
        if not self.dry_run:
            self.on_real_removal(removal)
        if self.on_removal is not None:
            await self.on_removal(removal)
        if self.dry_run:  # lets other tasks run; real removals let them run while they wait for the disk
            await asyncio.sleep(0)


class Collector:
    """The garbage collector. Several processes may collect at the same time.

    `grace`: seconds for which a repository keeps a blob to which none of its manifests refers, and a deleted manifest.
    Strays are kept for this time too, but at least for `MIN_STRAY_AGE_SECONDS`. `expire`: seconds for which an upload
    session or a partial blob is kept without progress. `is_full`: a function that returns whether the disk is full.
    While it is full, the collector frees the space of each blob right after removing it, and
    `IDLE_SECONDS_ON_FULL_DISK` replaces `expire` for partial blobs. `grace` stays the same on a full disk.
    `check_directory`: raises DataDirectoryReplaced if the data directory is not the opened one any more; no round
    begins then."""

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
        self._saw_future_at: float | None = None
        """When a round first saw times in the future, in seconds of `time.monotonic`; None: the last round saw none."""
        self._next_shard = int(clock()) % blobs.shard_count
        """Number of the next shard to list. The first one depends on the time of the start, so that a process that is
        often restarted does not list the same shards again and again."""

    async def collect(
        self, on_removal: OnRemoval | None = None, *, dry_run: bool = False, all_shards: bool = False
    ) -> CollectionReport:
        """Runs one round, and returns the numbers of its removals. `on_removal` is called after each removal, also in
        dry runs. `dry_run`: whether to remove nothing, and only to report the removals that a round would make now.
        `all_shards`: whether to search all shards of the blob store for strays, and not only the next shards.

        If a step raises StorageFull, the later steps still run, and the round then raises that error. If a step raises
        StorageFailed, or `on_removal` raises an error, the round raises it at once. Removals that were made before an
        error or a cancellation are not undone."""
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
        """Removes the blobs that have no link now, and frees their space at once. Removes nothing else, and no blobs
        while a backup is running. Returns the number of removed blobs. Raises StorageFull, StorageFailed."""
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
        """Removes bytes that the blob store has listed, unless there is a row with their digest now. Returns whether it
        removed the bytes. `BlobStore.reclaim_space` frees their disk space."""
        async with self._locks.hold(stray.digest):
            if stray.digest in await self._metadata.known_blobs([stray.digest]):
                return False
            await self._blobs.remove(stray.place)
            return True

    def _next_shards(self) -> Iterable[int]:
        """Yields the numbers of the next shards to list. If a round takes only some of these numbers, the next round
        begins with the remaining ones."""
        for _ in range(SHARDS_PER_ROUND):
            shard, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shard_count
            yield shard

    async def _correct_future_times(self, this_round: _Round) -> None:
        """Corrects times that were stored while the clock was ahead, if this and earlier rounds have seen times in the
        future for `CONFIRM_FUTURE_SECONDS`."""
        if this_round.dry_run:
            return
        if not await self._metadata.has_future_times():
            self._saw_future_at = None
            return
        if self._saw_future_at is None:
            self._saw_future_at = time.monotonic()
        if time.monotonic() - self._saw_future_at >= CONFIRM_FUTURE_SECONDS:
            await self._metadata.correct_future_times()
            self._saw_future_at = None

    async def _empty_trash(self, this_round: _Round) -> None:
        """Frees the disk space of bytes that an earlier round has removed."""
        if size := await self._blobs.unreclaimed_size():
            await self._reclaim_space(this_round)
            await this_round.note(RemovalKind.TRASH, "", size, "the bytes of blobs that an earlier round has removed")

    async def _reclaim_space(self, this_round: _Round) -> None:
        """Frees the disk space of removed bytes. Other steps count the removals."""
        if not this_round.dry_run:
            await self._blobs.reclaim_space()

    async def _expire_partials(self, this_round: _Round) -> None:
        """Removes the partial blobs without recent progress that no process is downloading. After a restart of the
        machine, also removes those from before the restart, which may have lost bytes."""
        idle_seconds = min(self._expire, IDLE_SECONDS_ON_FULL_DISK) if self._is_full() else self._expire
        before = self._clock() - idle_seconds
        for partial in await self._partials.expire(before, dry_run=this_round.dry_run):
            reason = f"its download made no progress after {utc_text(before)}, or ended with a restart of the machine"
            await this_round.note(RemovalKind.PARTIAL, partial.digest, partial.size, reason)

    async def _remove_stale_uploads(self, this_round: _Round) -> None:
        """Removes upload sessions without recent progress. Also removes uploaded bytes whose session no longer exists,
        if they were not written recently."""
        before = self._clock() - self._expire
        after: StaleUpload | None = None
        while stale := await self._metadata.stale_uploads(before, BATCH_SIZE, after):
            after = stale[-1]
            for upload in stale:
                size = await self._blobs.upload_size(upload.id)
                if not this_round.dry_run:
                    if not await self._metadata.drop_upload(upload.id, before):
                        continue
                    await self._blobs.discard_upload(upload.id)
                reason = f"the upload made no progress after {utc_text(upload.touched)}"
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
        """Removes the deleted manifests whose grace period is over. Until then they are kept, so that they can be put
        back."""
        before = self._clock() - self.grace
        after: DeletedManifest | None = None
        while expired := await self._metadata.deleted_manifests(before, BATCH_SIZE, after):
            if this_round.dry_run:
                after = expired[-1]
            else:
                expired = await self._metadata.drop_deleted_manifests(before, BATCH_SIZE)
            for manifest in expired:
                reason = f"it was deleted at {utc_text(manifest.deleted)}, and the time to put it back is over"
                await this_round.note(RemovalKind.MANIFEST, manifest.digest, manifest.size, reason, manifest.name)

    async def _remove_links(self, this_round: _Round) -> None:
        """Removes each link whose blob no manifest of the repository has referred to during the whole grace period. A
        dry run also counts the blobs that would lose their last link."""
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
                    reason = f"no manifest of {entry.name} has referred to it since {utc_text(entry.since)}"
                    await this_round.note(RemovalKind.LINK, entry.digest, 0, reason, entry.name)
                if frees_blob:
                    await self._note_blob(this_round, entry.digest, entry.size)

    async def _remove_blobs(self, this_round: _Round) -> None:
        """Removes blobs without a link: first the row, then the bytes, which the blob store finds under the key in the
        row (`place`). These blobs need no grace period: a push of the same blob waits for the lock of the digest, and
        then stores the bytes again. While a backup is running, leaves the blobs for a later round."""
        if this_round.dry_run:
            await self._preview_blobs(this_round)
            return
        is_more = True
        while is_more:
            async with removal_slot(self._leases) as may_remove:
                is_more = may_remove and await self._remove_blob_batch(this_round)

    async def _preview_blobs(self, this_round: _Round) -> None:
        """Counts and reports the blobs that `_remove_blobs` would remove now."""
        after: Digest | None = None
        while entries := await self._metadata.unlinked_blobs(BATCH_SIZE, after):
            after = entries[-1].digest
            for entry in entries:
                if entry.is_unlinked:  # False if the blob has a link again, or was deleted
                    await self._note_blob(this_round, entry.digest, entry.size)

    async def _remove_blob_batch(self, this_round: _Round) -> bool:
        """Removes at most `BATCH_SIZE` blobs without a link. Returns False if there was no such blob."""
        entries = await self._metadata.unlinked_blobs(BATCH_SIZE)
        for entry in entries:
            async with self._locks.hold(entry.digest):
                place = await self._metadata.drop_blob(entry.digest)
                if place:  # the place of a blob whose bytes are missing or damaged is empty
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
        """Removes the strays in some shards of the blob store, except strays that were written recently, and those that
        the store cannot read. Skips shards that this process has no permission to list."""
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

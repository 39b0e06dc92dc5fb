"""Scrub (`Scrubber`): reads all stored content again, at a limited rate, and takes damaged content out of use, so that
it is not served any more. The bytes of a damaged blob go to the *quarantine*, a part of the blob store.

A *round* goes through all blobs and manifests that are stored when the round starts. The store keeps the progress of
the round, so any process can continue the round: a command, or a server after a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from storage.damage import DamageRecords, ScrubRound, StoredBlob
from storage.errors import BytesForbidden, RegistryError
from storage.jobs import JSON
from storage.names import Digest
from storage.upkeep.job_runner import JobContext
from storage.upkeep.quarantine import DamageBrake, Quarantine
from storage.upkeep.read_rate import ReadRate

BATCH_SIZE: Final = 500
"""Number of blobs whose rows one query of the store returns."""
MIN_BYTES_PER_BLOB: Final = 64 * 1024
"""The limit of the rate counts a smaller blob as this number of bytes, because a disk needs time to find a file."""
SAVE_SECONDS: Final = 1.0
"""Shortest time between two writes of the progress."""
DAMAGED_BATCH_SIZE: Final = 100
"""Number of damaged blobs whose records one query of the store returns."""
MAX_REPORTED_HOLDERS: Final = 20
"""Largest number of repositories that the report of a damaged blob names."""
MAX_LOGGED_UNREADABLE: Final = 20
"""Largest number of unreadable blobs that one run logs. A blob is *unreadable* if the process has no permission to read
its bytes."""
SCRUB_KIND: Final = "scrub"
"""The kind of the jobs that scrub."""

OnDamagedBlob = Callable[[Digest], None]
"""Called with the digest of a damaged blob."""
OnScrubbed = Callable[[int], None]
"""Called each time that bytes were read and hashed, with the number of these bytes."""
log = logging.getLogger("storage.damage")


def ignore_scrubbed(count: int) -> None:
    """An `OnScrubbed` that does nothing."""


class Scrubber:
    """One run of scrub. It completes the current round. If there is no current round, it starts a round first.

    `rate`: limits the rate of the reads. `quarantine_bytes`: largest number of damaged bytes that the quarantine keeps;
    during the scrub, the quarantine may exceed this limit by an eighth. `continue_after_many_damaged`: whether to
    continue after many damaged blobs in a row (`DamageBrake`). `on_damaged`: called for each damaged blob, even if the
    blob was already known to be damaged. `on_scrubbed`: called after each read."""

    def __init__(
        self,
        damage: DamageRecords,
        quarantine: Quarantine,
        rate: ReadRate,
        context: JobContext,
        *,
        quarantine_bytes: int,
        continue_after_many_damaged: bool = False,
        on_damaged: OnDamagedBlob = lambda _: None,
        on_scrubbed: OnScrubbed = ignore_scrubbed,
    ) -> None:
        self._damage = damage
        self._quarantine = quarantine
        self._rate = rate
        self._context = context
        self._quarantine_bytes = quarantine_bytes
        self._brake = DamageBrake(is_on=not continue_after_many_damaged)
        self._on_damaged = on_damaged
        self._on_scrubbed = on_scrubbed
        self._read_bytes_of_blob = 0
        """Number of bytes that were read of the current blob."""
        self._new_quarantine_bytes = 0
        """Upper bound for the number of bytes that were added to the quarantine since it was last shrunk."""
        self._saved_at = 0.0
        self._round: ScrubRound
        self._healed = 0
        self._unreadable = 0

    async def run(self) -> dict[str, JSON]:
        """Runs until the round is complete. Returns the totals of the round, the number of damaged blobs and manifests
        that this run healed (`healed`), and the number of unreadable blobs. Raises JobStopped, StorageFull and
        StorageFailed; after these errors, the next run continues the round."""
        self._round = await self._damage.current_round() or await self._damage.start_round()
        await self._recheck_damaged()
        await self._shrink_quarantine()
        try:
            await self._check_blobs()
            await self._check_manifests()
        finally:
            with suppress(RegistryError):  # an error of the checks must not be replaced by an error of this call
                await self._damage.save_round(self._round)
        self._round = await self._damage.end_round(self._round)
        await self._shrink_quarantine()
        if self._unreadable > MAX_LOGGED_UNREADABLE:
            log.warning(
                "scrub has no permission to read the files of %d blobs; earlier lines name the first of them",
                self._unreadable,
            )
        ended_round = self._round
        return {
            "round": ended_round.id,
            "blobs": ended_round.blobs,
            "manifests": ended_round.manifests,
            "bytes": ended_round.checked_bytes,
            "damaged": ended_round.damaged,
            "healed": self._healed,
            "unreadable": self._unreadable,
        }

    async def _recheck_damaged(self) -> None:
        """Checks the content that is already known to be damaged, and heals it if its bytes now have the right digest.
        Looks for the bytes of a damaged blob at its *former place*: the key in the blob store under which the bytes
        were before the blob was marked as damaged."""
        after: str | None = None
        has_more = True
        while has_more:
            page = await self._damage.damaged_blobs(after, DAMAGED_BATCH_SIZE)
            for blob in page.items:
                try:
                    is_healed = await self._quarantine.check_former_place(blob, self._count_recheck)
                except BytesForbidden as error:
                    self._report_unreadable(blob.digest, blob.size, error)
                    is_healed = False
                if is_healed:
                    self._healed += 1
                    self._context.step("healed", digest=blob.digest, size=blob.size)
                else:
                    self._on_damaged(blob.digest)
                after = blob.digest
            has_more = page.more
        self._healed += await self._damage.recheck_damaged_manifests()

    async def _check_blobs(self) -> None:
        """Checks the blobs that the round has not checked yet."""
        while blobs := await self._damage.blobs_after(self._round.after_blob, self._round.until_blob, BATCH_SIZE):
            for blob in blobs:
                await self._check_blob(blob)

    async def _check_blob(self, blob: StoredBlob) -> None:
        """Checks one blob. Counts the blob as checked, even if this process has no permission to read its bytes."""
        self._read_bytes_of_blob = 0
        problem: str | None = None
        is_readable = True
        try:
            problem = await self._quarantine.find_and_take_out(blob, self._count_reading, self._note_second_read)
        except BytesForbidden as error:
            self._report_unreadable(blob.digest, blob.size, error)
            is_readable = False
        if problem is not None:
            await self._report_damage(blob, problem)
        previous = self._round
        self._read_bytes_of_blob = 0
        self._round = replace(
            previous,
            after_blob=blob.row_id,
            blobs=previous.blobs + 1,
            checked_bytes=previous.checked_bytes + blob.size,
            damaged=previous.damaged + (problem is not None),
        )
        await self._rate.wait(max(MIN_BYTES_PER_BLOB - blob.size, 0), self._save_progress)
        if is_readable:
            self._brake.note(is_damaged=problem is not None)

    async def _report_damage(self, blob: StoredBlob, problem: str) -> None:
        """Reports a damaged blob, and the repositories that have the blob. `problem`: what is wrong with its bytes."""
        holders = await self._damage.holders(blob.digest, MAX_REPORTED_HOLDERS)
        self._context.step(
            "damaged", kind="blob", digest=blob.digest, size=blob.size, reason=problem, repositories=list(holders)
        )
        self._on_damaged(blob.digest)
        self._new_quarantine_bytes += blob.size
        if self._new_quarantine_bytes * 8 > self._quarantine_bytes:  # listing a full quarantine is slow
            await self._shrink_quarantine()

    def _report_unreadable(self, digest: Digest, size: int, error: BytesForbidden) -> None:
        """Reports a blob that this process has no permission to read. The blob stays as it is."""
        self._context.step("unreadable", digest=digest, size=size, reason=error.message)
        self._unreadable += 1
        if self._unreadable <= MAX_LOGGED_UNREADABLE:
            log.warning("the blob %s was not checked: %s", digest, error.message)

    async def _shrink_quarantine(self) -> None:
        await self._quarantine.shrink(self._quarantine_bytes)
        self._new_quarantine_bytes = 0

    async def _check_manifests(self) -> None:
        """Checks the manifests that the round has not checked yet."""
        while check := await self._damage.check_manifests(self._round.after_manifest, self._round.until_manifest):
            damaged = 0
            for row_id in check.damaged_row_ids:
                if (manifest := await self._damage.mark_manifest_damaged(row_id)) is not None:
                    damaged += 1
                    self._context.step(
                        "damaged", kind="manifest", digest=manifest.digest, reason=manifest.reason,
                        repositories=[manifest.repository],
                    )  # fmt: skip
            self._on_scrubbed(check.read_bytes)
            previous = self._round
            self._round = replace(
                previous,
                after_manifest=check.last_row_id,
                manifests=previous.manifests + check.manifest_count,
                damaged=previous.damaged + damaged,
            )
            await self._rate.wait(check.read_bytes, self._save_progress)

    async def _count_reading(self, count: int) -> None:
        """Counts `count` bytes of a blob that were read, and waits until the rate allows more."""
        self._read_bytes_of_blob += count
        self._on_scrubbed(count)
        await self._rate.wait(count, self._save_progress)

    async def _count_recheck(self, count: int) -> None:
        """Reports `count` bytes that were read of a blob already known to be damaged, and waits until the rate allows
        more. Does not add the bytes to `_read_bytes_of_blob`, because the round's total does not contain them."""
        self._on_scrubbed(count)
        await self._rate.wait(count, self._save_progress)

    async def _note_second_read(self, count: int) -> None:
        """Saves the progress during the second read of a blob, which checks the result of the first read. Does not
        limit the rate, because a damaged blob should be taken out of use soon."""
        self._on_scrubbed(count)
        await self._save_progress()

    async def _save_progress(self) -> None:
        """Stores the progress of the round and of the job, at most once in `SAVE_SECONDS`. Raises JobStopped."""
        now = asyncio.get_running_loop().time()
        if now - self._saved_at < SAVE_SECONDS:
            return
        self._saved_at = now
        await self._damage.save_round(self._round)
        done_bytes = self._round.checked_bytes + self._read_bytes_of_blob
        # The round's total does not contain the blobs that were marked as damaged when the round began. If such a blob
        # is healed during the round, the round may read it too, and then reads more bytes than its total.
        total_bytes = max(self._round.total_bytes, done_bytes)
        await self._context.report(
            done_bytes, total=total_bytes, unit="bytes", message="reading content", save_now=True
        )

"""Scrub (`Scrubber`): reads all stored content again, at a limited rate, and takes damaged content out of use. The
registry does not serve content that is out of use. The bytes of a damaged blob go to the *quarantine*, a part of the
blob store.

A *round* checks all blobs and manifests that are stored when the round starts. The store keeps the progress of the
round, so that any process can continue the round.
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
"""Largest number of blobs that one query of the store returns."""
MIN_BYTES_PER_BLOB: Final = 64 * 1024
"""The rate limit counts every smaller blob as this number of bytes, because a disk needs time to find a file."""
SAVE_SECONDS: Final = 1.0
"""Shortest time between two writes of the progress."""
DAMAGED_BATCH_SIZE: Final = 100
"""Largest number of damaged blobs that one query of the store returns."""
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
"""Called after each read of bytes, with the number of bytes."""
log = logging.getLogger("storage.damage")


def ignore_scrubbed(count: int) -> None:
    """An `OnScrubbed` that does nothing."""


class Scrubber:
    """One run of scrub. Completes the current round. If there is no current round, starts a round and completes it.

    - `rate`: limits the rate of the reads.
    - `quarantine_bytes`: largest number of damaged bytes that the quarantine keeps. During the run, the quarantine may
      exceed this limit by an eighth.
    - `continue_after_many_damaged`: whether to continue after many damaged blobs in a row (`DamageBrake`).
    - `on_damaged`: called for each damaged blob, both for new damage and for damage found earlier."""

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
        """Number of bytes of the current blob that were read."""
        self._new_quarantine_bytes = 0
        """Largest possible number of bytes that were added to the quarantine since it was last shrunk."""
        self._saved_at = 0.0
        self._round: ScrubRound
        self._healed_count = 0
        self._unreadable_count = 0

    async def run(self) -> dict[str, JSON]:
        """Runs until the round is complete. Returns the totals of the round, and two totals of this run: `healed` (the
        number of healed blobs and manifests) and `unreadable` (the number of unreadable blobs). Raises JobStopped,
        StorageFull and StorageFailed. After these errors, the next run continues the round."""
        self._round = await self._damage.current_round() or await self._damage.start_round()
        await self._recheck_damaged()
        await self._shrink_quarantine()
        try:
            await self._check_blobs()
            await self._check_manifests()
        finally:
            with suppress(RegistryError):  # an error of the checks must reach the caller
                await self._damage.save_round(self._round)
        self._round = await self._damage.end_round(self._round)
        await self._shrink_quarantine()
        if self._unreadable_count > MAX_LOGGED_UNREADABLE:
            log.warning(
                "scrub has no permission to read the files of %d blobs; earlier log lines name the first of them",
                self._unreadable_count,
            )
        ended_round = self._round
        return {
            "round": ended_round.id,
            "blobs": ended_round.blobs,
            "manifests": ended_round.manifests,
            "bytes": ended_round.checked_bytes,
            "damaged": ended_round.damaged,
            "healed": self._healed_count,
            "unreadable": self._unreadable_count,
        }

    async def _recheck_damaged(self) -> None:
        """Checks the content that is already marked as damaged. If its bytes have the right digest, marks it as healed.
        The bytes of a damaged blob are read at its *former place*: the key that they had in the blob store before the
        blob was marked as damaged."""
        after: str | None = None
        has_more = True
        while has_more:
            page = await self._damage.damaged_blobs(after, DAMAGED_BATCH_SIZE)
            for blob in page.items:
                try:
                    is_healed = await self._quarantine.check_former_place(blob, self._note_recheck)
                except BytesForbidden as error:
                    self._report_unreadable(blob.digest, blob.size, error)
                    is_healed = False
                if is_healed:
                    self._healed_count += 1
                    self._context.step("healed", digest=blob.digest, size=blob.size)
                else:
                    self._on_damaged(blob.digest)
                after = blob.digest
            has_more = page.more
        self._healed_count += await self._damage.recheck_damaged_manifests()

    async def _check_blobs(self) -> None:
        """Checks the blobs that the round has not checked yet."""
        while blobs := await self._damage.blobs_after(self._round.after_blob, self._round.until_blob, BATCH_SIZE):
            for blob in blobs:
                await self._check_blob(blob)

    async def _check_blob(self, blob: StoredBlob) -> None:
        """Checks one blob. An unreadable blob counts as checked."""
        self._read_bytes_of_blob = 0
        problem: str | None = None
        is_readable = True
        try:
            problem = await self._quarantine.find_and_take_out(blob, self._note_first_read, self._note_second_read)
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
        """Reports a damaged blob and the repositories that have it. `problem`: what is wrong with the blob's bytes."""
        holders = await self._damage.holders(blob.digest, MAX_REPORTED_HOLDERS)
        self._context.step(
            "damaged", kind="blob", digest=blob.digest, size=blob.size, reason=problem, repositories=list(holders)
        )
        self._on_damaged(blob.digest)
        self._new_quarantine_bytes += blob.size
        if self._new_quarantine_bytes * 8 > self._quarantine_bytes:  # listing a full quarantine is slow
            await self._shrink_quarantine()

    def _report_unreadable(self, digest: Digest, size: int, error: BytesForbidden) -> None:
        """Reports an unreadable blob. Does not take the blob out of use."""
        self._context.step("unreadable", digest=digest, size=size, reason=error.message)
        self._unreadable_count += 1
        if self._unreadable_count <= MAX_LOGGED_UNREADABLE:
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

    async def _note_first_read(self, count: int) -> None:
        """Notes that the first read of a blob has read `count` bytes. Waits until the rate allows the next read."""
        self._read_bytes_of_blob += count
        self._on_scrubbed(count)
        await self._rate.wait(count, self._save_progress)

    async def _note_recheck(self, count: int) -> None:
        """Notes that `count` bytes of a blob already marked as damaged were read. Waits until the rate allows the next
        read. Does not change `_read_bytes_of_blob`, because the round's total does not contain these bytes."""
        self._on_scrubbed(count)
        await self._rate.wait(count, self._save_progress)

    async def _note_second_read(self, count: int) -> None:
        """Notes that the second read of a blob has read `count` bytes. The second read confirms damage that the first
        read found. Does not limit the rate, because a damaged blob should be taken out of use soon."""
        self._on_scrubbed(count)
        await self._save_progress()

    async def _save_progress(self) -> None:
        """Stores the progress of the round and of the job. Does nothing if the last call that stored it was less than
        `SAVE_SECONDS` ago. Raises JobStopped."""
        now = asyncio.get_running_loop().time()
        if now - self._saved_at < SAVE_SECONDS:
            return
        self._saved_at = now
        await self._damage.save_round(self._round)
        done_bytes = self._round.checked_bytes + self._read_bytes_of_blob
        # The total of a round leaves out the blobs that are marked as damaged when the round starts. If such a blob is
        # healed during the round, the round can read the blob too. `done_bytes` can then exceed the total.
        total_bytes = max(self._round.total_bytes, done_bytes)
        await self._context.report(
            done_bytes, total=total_bytes, unit="bytes", message="reading content", save_now=True
        )

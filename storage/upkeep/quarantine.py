"""Finds damaged blobs and takes them out of use (`Quarantine`). The *quarantine* is the part of the blob store that
keeps damaged bytes.

`Quarantine.take_out` takes a blob out of use in three steps. It holds the lock of the blob's digest, so that no push
stores the blob during the steps, and garbage collection does not remove it.

1. `is_current` checks that no push has replaced the damaged bytes. If a push has, the other steps are left out.
2. The metadata store marks the blob as damaged. After this commit, the registry does not serve the bytes.
3. The blob store moves the bytes to the quarantine.

A crash after step 2 leaves the damaged bytes at their place (key in the blob store). The next scrub (the job that reads
all content) does step 3, unless a push has replaced the bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from storage.blobs.blob_store import BlobStore, BytesMissing, ContentCheck, OnRead
from storage.damage import DamagedBlob, DamageRecords, StoredBlob
from storage.errors import StorageFailed
from storage.leases import DigestLocks
from storage.names import Digest

MISSING = "its bytes are missing"
MAX_DAMAGED_IN_A_ROW: Final = 20
"""After this number of damaged blobs in a row, `DamageBrake` stops the work. Without this limit, a failing disk or a
file system that is not mounted would take all blobs out of use."""
log = logging.getLogger("storage.damage")


@dataclass(frozen=True, slots=True)
class FoundDamage:
    """The damage of a blob. `problem`: what is wrong with its bytes, for people. `place`: the key under which the blob
    store has the bytes. `version`: identifies these bytes (`BlobStore.version`); None if there are no bytes."""

    digest: Digest
    place: str
    problem: str
    version: str | None


class DamageBrake:
    """Stops the work, with an error, if too many blobs in a row were taken out of use."""

    def __init__(self, *, is_on: bool = True) -> None:
        """`is_on`: False if the brake must not stop the work."""
        self._is_on = is_on
        self._in_a_row = 0

    def note(self, *, is_damaged: bool) -> None:
        """Counts the next blob. `is_damaged`: whether the blob was taken out of use. Raises StorageFailed if the brake
        is on and the last `MAX_DAMAGED_IN_A_ROW` blobs were all taken out of use."""
        self._in_a_row = self._in_a_row + 1 if is_damaged else 0
        if self._in_a_row >= MAX_DAMAGED_IN_A_ROW and self._is_on:
            raise StorageFailed(
                f"the last {self._in_a_row} blobs are all damaged; look at the disk first, then go on with "
                "`entrepot scrub --keep-going`"
            )


class Quarantine:
    """Checks blobs, takes damaged blobs out of use, and puts healed blobs back into use. All methods may raise
    StorageFull and StorageFailed.

    A method with the parameter `on_read` reads bytes. It calls `on_read` after each part of the bytes, with the size of
    the part, and raises the errors of `on_read`. `on_read` may wait, to limit the rate of the reads. A method with
    `on_read` raises BytesForbidden if this process has no permission to read the bytes."""

    def __init__(self, blobs: BlobStore, damage: DamageRecords, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._damage = damage
        self._locks = locks

    async def find_and_take_out(self, blob: StoredBlob, on_read: OnRead, on_second_read: OnRead) -> str | None:
        """Calls `find_damage`, and takes the blob out of use if its bytes are damaged. Returns what is wrong with the
        bytes, as a text for people. Returns None if the blob was not taken out of use: its bytes are not damaged, or
        were removed or replaced during the reads."""
        damage = await self.find_damage(blob, on_read, on_second_read)
        return damage.problem if damage is not None and await self.take_out(damage) else None

    async def find_damage(self, blob: StoredBlob, on_read: OnRead, on_second_read: OnRead) -> FoundDamage | None:
        """Reads the blob's bytes. If they are damaged, reads them a second time, from the disk. Returns the damage if
        the second read finds damage too, or if there are no bytes. The blob may have been deleted, or its bytes
        replaced, during the reads (see `is_current`).

        The second read calls `on_second_read` instead of `on_read`. `on_second_read` should not wait, because clients
        get the damaged bytes until the blob is taken out of use."""
        first_check = await self._read(blob, on_read, from_disk=False)
        if first_check is not None and first_check.problem is None:
            return None
        second_check = first_check and await self._read(blob, on_second_read, from_disk=True)
        if second_check is None:
            return FoundDamage(blob.digest, blob.place, MISSING, None)
        if second_check.problem is None:
            log.warning(
                "a first read of %s found damage (%s), but a second read, from the disk, found none",
                blob.digest,
                first_check and first_check.problem,
            )
            return None
        return FoundDamage(blob.digest, blob.place, second_check.problem, second_check.version)

    async def is_current(self, damage: FoundDamage) -> bool:
        """Returns whether the blob still has the bytes in which `damage` was found. The caller holds the lock of the
        digest."""
        return (
            await self._damage.place_of(damage.digest) == damage.place
            and await self._blobs.version(damage.place) == damage.version
        )

    async def take_out(self, damage: FoundDamage) -> bool:
        """Takes the blob out of use, unless its bytes were removed or replaced since they were read. Returns whether it
        took the blob out of use."""
        digest, place = damage.digest, damage.place
        quarantine_place = "" if damage.version is None else self._blobs.quarantine_place(digest)
        async with self._locks.hold(digest):
            if not await self.is_current(damage) or not await self._damage.mark_blob_damaged(
                digest, place, damage.problem, quarantine_place
            ):
                return False
            if quarantine_place:
                await self._blobs.quarantine(digest, place)
        log.error(
            "the blob %s is damaged and is not served any more: %s; push it again to restore it", digest, damage.problem
        )
        return True

    async def mark_missing(self, digest: Digest, place: str) -> bool:
        """Marks the blob as damaged if its metadata row says that its bytes are at `place`, but `place` has no bytes.
        Returns whether it marked the blob."""
        return await self.take_out(FoundDamage(digest, place, MISSING, None))

    async def check_former_place(self, blob: DamagedBlob, on_read: OnRead) -> bool:
        """Reads the bytes at the *former place* of a damaged blob: the place that the blob had before it was marked as
        damaged. Returns whether it marked the blob as healed.

        - If the bytes are right, for example because an operator has restored the file, marks the blob as healed.
        - If the bytes are wrong, moves them to the quarantine. A crash during `take_out` can have left them there."""
        if not blob.former_place:
            return False
        stored = StoredBlob(0, blob.digest, blob.size, blob.former_place)
        check = await self._read(stored, on_read, from_disk=True)
        if check is None:
            return False
        async with self._locks.hold(blob.digest):
            version = await self._blobs.version(blob.former_place)
            # The place of a blob is empty while the blob is marked as damaged.
            if await self._damage.place_of(blob.digest) != "" or version != check.version:
                return False
            if check.problem is not None:
                await self._blobs.quarantine(blob.digest, blob.former_place)
                return False
            is_healed = await self._damage.mark_blob_healed(blob.digest, blob.former_place)
        if is_healed:
            log.warning("the damaged blob %s is repaired: its right bytes are stored again", blob.digest)
        return is_healed

    async def shrink(self, max_bytes: int) -> int:
        """Deletes the oldest bytes in the quarantine until the quarantine has at most `max_bytes`. Returns the number
        of blobs whose bytes were deleted."""
        quarantined = await self._blobs.list_quarantine()
        total_bytes = sum(blob.size for blob in quarantined)
        deleted = 0
        for blob in quarantined:
            if total_bytes <= max_bytes:
                break
            deleted += await self._blobs.delete_quarantined(blob.digest)
            total_bytes -= blob.size
        return deleted

    async def _read(self, blob: StoredBlob, on_read: OnRead, *, from_disk: bool) -> ContentCheck | None:
        """Reads and checks the blob's bytes. `from_disk`: see `BlobStore.check`. Returns None if there are no bytes."""
        try:
            return await self._blobs.check(blob.digest, blob.size, blob.place, on_read, from_disk=from_disk)
        except BytesMissing:
            return None

"""Finds damaged blobs and takes them out of use, and puts them back when their bytes are right again (`Quarantine`).
Stops the work if too many blobs in a row are damaged (`DamageBrake`). The *quarantine* is the part of the blob store
that keeps damaged bytes; the class `Quarantine` moves bytes to it.

After damage was found, the blob is taken out of use in the three steps below. The lock of the blob's digest is held
during all of them, so that no push stores the bytes, and garbage collection does not remove them, at the same time.

1. The place (key in the blob store) and version of the blob's bytes are compared with those of the damaged bytes
   (`FoundDamage`), because a push may have replaced the damaged bytes since.
2. The metadata store marks the blob as damaged. From this commit on, the registry does not serve the bytes.
3. The blob store moves the bytes to the quarantine.

A crash after step 2 leaves the bytes where they were. The next scrub (the job that reads all content) finds these bytes
damaged and does step 3. A push of the blob replaces them. The lock is not held while bytes are read to find damage,
because step 1 shows whether the bytes are still the same.
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
MAX_IN_A_ROW: Final = 20
"""After this number of damaged blobs in a row, the work stops. A disk that fails, or a file system that is not mounted,
should not take all blobs out of use."""
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
    """Counts how many blobs in a row were taken out of use. `is_on`: whether `note` stops the work."""

    def __init__(self, *, is_on: bool = True) -> None:
        self._is_on = is_on
        self._in_a_row = 0

    def note(self, *, is_damaged: bool) -> None:
        """Notes the next blob. `is_damaged`: whether it was taken out of use. Raises StorageFailed after `MAX_IN_A_ROW`
        damaged blobs in a row."""
        self._in_a_row = self._in_a_row + 1 if is_damaged else 0
        if self._in_a_row >= MAX_IN_A_ROW and self._is_on:
            raise StorageFailed(
                f"the last {self._in_a_row} blobs are all damaged; look at the disk first, then go on with "
                "`entrepot scrub --keep-going`"
            )


class Quarantine:
    """Checks blobs of the blob store and takes the damaged ones out of use. All methods may raise StorageFull and
    StorageFailed. Methods that read bytes also raise BytesForbidden, and what their `on_read` raises. They call
    `on_read` after each part of the bytes, with the size of the part. It may wait, to limit the rate of the reads."""

    def __init__(self, blobs: BlobStore, damage: DamageRecords, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._damage = damage
        self._locks = locks

    async def find_and_take_out(self, blob: StoredBlob, on_read: OnRead, on_second_read: OnRead) -> str | None:
        """Calls `find`, and takes the blob out of use if its bytes are damaged. Returns a text that says what is wrong
        with the bytes. Returns None if they are not damaged, or were removed or replaced in the meantime."""
        damage = await self.find(blob, on_read, on_second_read)
        return damage.problem if damage is not None and await self.take_out(damage) else None

    async def find(self, blob: StoredBlob, on_read: OnRead, on_second_read: OnRead) -> FoundDamage | None:
        """Reads the blob's bytes. If they are damaged, reads them a second time from the disk. Returns the damage if
        the second read finds damage too, or if there are no bytes. By then the blob may have been deleted, or its bytes
        replaced; `take_out` and `is_current` check this. `on_second_read` is called during the second read. It should
        not slow down that read, because clients get the damaged bytes until the read has ended."""
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
            if not await self.is_current(damage) or not await self._damage.mark_blob(
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
        """Marks the blob as damaged if there are no bytes at `place`, where its row says they are. Returns whether it
        marked the blob."""
        return await self.take_out(FoundDamage(digest, place, MISSING, None))

    async def check_former_place(self, blob: DamagedBlob, on_read: OnRead) -> bool:
        """Reads the bytes at the *former place* of a damaged blob: the place that the blob had before it was marked as
        damaged. If the bytes there are right, for example because an operator has restored the file, marks the blob as
        healed. If they are wrong, because a crash has prevented their move to the quarantine, moves them to the
        quarantine. Returns whether the blob is healed."""
        if not blob.former_place:
            return False
        stored = StoredBlob(0, blob.digest, blob.size, blob.former_place)
        check = await self._read(stored, on_read, from_disk=True)
        if check is None:
            return False
        async with self._locks.hold(blob.digest):
            version = await self._blobs.version(blob.former_place)
            # The place of a blob is empty while it is marked as damaged.
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
        """Deletes the oldest bytes in the quarantine until it has at most `max_bytes`. Returns the number of blobs
        whose bytes it deleted."""
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

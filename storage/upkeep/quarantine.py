"""Takes damaged blobs out of use (`Quarantine`), and puts them back when their bytes turn out to be right.

A blob is taken out in three steps, all under the lock of its digest, so that neither a push nor the garbage collector
stores or removes its bytes meanwhile:

1. The version of the bytes is compared: a push may have replaced the damaged bytes after they were read.
2. The metadata store marks the blob as damaged. From this commit on nobody gets the bytes from this registry.
3. The blob store moves the bytes to the quarantine.

A crash after step 2 leaves the bytes where they were. The next scrub looks there, finds them damaged, and does step 3;
a push replaces them. The lock is not held while bytes are read: the version says whether they are still the same.
"""

from __future__ import annotations

import logging

from storage.blobs.blob_store import BlobStore, BytesMissing, ContentCheck, OnRead
from storage.damage import DamagedBlob, DamageRecords, StoredBlob
from storage.leases import DigestLocks
from storage.names import Digest

MISSING = "its bytes are missing"
log = logging.getLogger("storage.damage")


class Quarantine:
    """Checks blobs of the blob store and takes the damaged ones out of use. All methods may raise StorageFull and
    StorageFailed, and those that read bytes what their `on_read` raises."""

    def __init__(self, blobs: BlobStore, damage: DamageRecords, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._damage = damage
        self._locks = locks

    async def check(self, blob: StoredBlob, on_read: OnRead, on_second_read: OnRead) -> str | None:
        """Reads the blob's bytes. If they are damaged, reads them a second time from the disk, and if they still are,
        takes the blob out of use. Returns what is wrong with them; None if the blob is right or was deleted.
        `on_second_read` is called during the second read, which should be fast, because clients get the damaged bytes
        until it has ended."""
        first = await self._read(blob, on_read, read_again=False)
        if first is None:
            return MISSING if await self.mark_missing(blob.digest, blob.place) else None
        if first.problem is None:
            return None
        second = await self._read(blob, on_second_read, read_again=True)
        if second is None:
            return MISSING if await self.mark_missing(blob.digest, blob.place) else None
        if second.problem is None:
            log.warning("a read of %s returned other bytes than the next one: %s", blob.digest, first.problem)
            return None
        return second.problem if await self._take_out(blob, second) else None

    async def mark_missing(self, digest: Digest, place: str) -> bool:
        """Marks the blob as damaged if there are no bytes at `place`, where its row says they are. Returns whether it
        marked the blob."""
        async with self._locks.hold(digest):
            if await self._damage.place_of(digest) != place or await self._blobs.version(place) is not None:
                return False
            marked = await self._damage.mark_blob(digest, place, MISSING, "")
        if marked:
            log.error("the blob %s is damaged: %s; push it again to restore it", digest, MISSING)
        return marked

    async def look_again(self, blob: DamagedBlob, on_read: OnRead) -> bool:
        """Looks where the bytes of a damaged blob were. If right bytes are there, because somebody has put them back,
        the blob is whole again. If wrong bytes are there, because a crash has left them, moves them to the quarantine.
        Returns whether the blob is whole again."""
        if not blob.former:
            return False
        stored = StoredBlob(0, blob.digest, blob.size, blob.former)
        check = await self._read(stored, on_read, read_again=True)
        if check is None:
            return False
        async with self._locks.hold(blob.digest):
            version = await self._blobs.version(blob.former)
            if await self._damage.place_of(blob.digest) != "" or version != check.version:
                return False
            if check.problem is not None:
                await self._blobs.quarantine(blob.digest, blob.former)
                return False
            restored = await self._damage.restore_blob(blob.digest, blob.former)
        if restored:
            log.warning("the damaged blob %s is whole again: its bytes are back", blob.digest)
        return restored

    async def shrink(self, max_bytes: int) -> int:
        """Deletes the oldest bytes in the quarantine until it has at most `max_bytes`. Returns how many blobs' bytes it
        deleted."""
        kept = await self._blobs.list_quarantine()
        total = sum(item.size for item in kept)
        deleted = 0
        for item in kept:
            if total <= max_bytes:
                break
            deleted += await self._blobs.delete_quarantined(item.digest)
            total -= item.size
        return deleted

    async def _read(self, blob: StoredBlob, on_read: OnRead, *, read_again: bool) -> ContentCheck | None:
        """Reads the blob's bytes. Returns None if there are none."""
        try:
            return await self._blobs.check(blob.digest, blob.size, blob.place, on_read, read_again=read_again)
        except BytesMissing:
            return None

    async def _take_out(self, blob: StoredBlob, check: ContentCheck) -> bool:
        """Takes the blob out of use, unless its bytes were removed or replaced since they were read. Returns whether it
        did."""
        digest, place = blob.digest, blob.place
        async with self._locks.hold(digest):
            if await self._damage.place_of(digest) != place or await self._blobs.version(place) != check.version:
                return False
            reason = check.problem or ""
            if not await self._damage.mark_blob(digest, place, reason, self._blobs.quarantine_place(digest)):
                return False
            await self._blobs.quarantine(digest, place)
        log.error("the blob %s is damaged and is not served any more: %s; push it again to restore it", digest, reason)
        return True

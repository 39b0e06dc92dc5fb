"""Upload sessions of the stored registry (`StoredUpload`).

The blob store has the bytes of a session, the metadata store has a row about its progress. This module writes to both,
so that another process can resume the session. A session is *owned* by the request that resumed it last; an older
request that still writes to it gets BlobUploadInvalid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from storage.blobs.blob_store import BlobStore, Checkpoint, UploadSession
from storage.content import BLOB_TYPE, Descriptor
from storage.errors import (
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
)
from storage.metadata.catalog import Metadata, UploadRow
from storage.names import Digest, RepositoryName, UploadID
from storage.store.publication import Publication

SAVE_INTERVAL_BYTES = 64 * 1024 * 1024
"""Number of bytes after which the progress is saved while a request is still sending. It bounds the bytes that must be
hashed again when the session is resumed after a crash."""
log = logging.getLogger("storage")


class StoredUpload:
    """An upload session that one request owns (`storage.interface.BlobWriter`, which describes the public methods)."""

    def __init__(
        self,
        blobs: BlobStore,
        metadata: Metadata,
        publication: Publication,
        repo: RepositoryName,
        upload: UploadID,
        session: UploadSession,
        saved: int = 0,
    ) -> None:
        """`saved`: number of bytes that the metadata row says the session has."""
        self.id: UploadID = upload
        self.repository: RepositoryName = repo
        self._blobs = blobs
        self._metadata = metadata
        self._publication = publication
        self._session = session
        self._saved = saved
        self._committing: asyncio.Future[Descriptor] | None = None
        self._ended = False

    @property
    def offset(self) -> int:
        return self._session.offset

    async def write(self, data: bytes | memoryview) -> None:
        self._check_open()
        try:
            await self._session.append(data)
            if self._session.offset - self._saved >= SAVE_INTERVAL_BYTES:
                await self._save()
        except StorageFull:
            await self._give_up()
            raise

    async def read_at(self, offset: int, length: int) -> bytes:
        self._check_open()
        try:
            return await self._session.read_at(offset, length)
        except StorageFull:
            await self._give_up()
            raise

    async def commit(self, digest: Digest) -> Descriptor:
        """Runs the commit in a task of its own, so that it runs to its end even if the request is cancelled."""
        self._check_open()
        self._committing = asyncio.ensure_future(self._commit(digest))
        return await asyncio.shield(self._committing)

    async def _commit(self, digest: Digest) -> Descriptor:
        try:
            try:
                content = await self._session.verify(digest)
            except DigestInvalid:
                await self._cancel()
                raise
            await self._publication.commit_upload(self.repository, content, self.id)
        except (StorageFull, StorageFailed):
            # After a failed fsync, the kernel does not know which bytes never reached the disk. So none can be trusted.
            await self._give_up()
            raise
        self._ended = True
        self._session.release()
        return Descriptor(BLOB_TYPE, digest, content.size)

    async def cancel(self) -> None:
        if self._committing is not None:
            await asyncio.wait([self._committing])
        await self._cancel()

    async def _cancel(self) -> None:
        if self._ended:
            return
        await self._session.discard()
        self._ended = True
        await self._session.close()
        with suppress(BlobUploadUnknown):
            await self._metadata.end_upload(self.id)
        # Until the row was deleted, another request could resume the session. Deletes the bytes that it stored.
        await self._blobs.discard_upload(self.id)

    async def aclose(self) -> None:
        try:
            if self._committing is not None:
                await asyncio.wait([self._committing])
            if not self._ended:
                await self._save()
        except StorageFull:
            await self._give_up()
            raise
        finally:
            self._ended = True
            if self._committing is not None and not self._committing.done():  # this call was cancelled
                self._committing.add_done_callback(lambda _: self._session.release())
            else:
                self._session.release()

    def _check_open(self) -> None:
        """Raises BlobUploadInvalid if the session was committed, cancelled or closed."""
        if self._ended:
            raise BlobUploadInvalid("the upload session has ended")

    async def _save(self) -> None:
        """Stores all bytes that were written, and saves the progress in the metadata row."""
        checkpoint = await self._session.flush()
        if checkpoint.offset != self._saved:
            await self._metadata.save_upload(self.id, checkpoint.offset, checkpoint.state, checkpoint.boot)
            self._saved = checkpoint.offset

    async def _give_up(self) -> None:
        """Deletes the session after an error of the disk. This frees space on a full disk for other pushes."""
        try:
            await self._cancel()
        except BlobUploadInvalid:
            pass
        except RegistryError as error:
            log.warning("could not delete the bytes of the failed upload %s: %s", self.id, error)


async def resume(
    blobs: BlobStore,
    metadata: Metadata,
    publication: Publication,
    repo: RepositoryName,
    upload: UploadID,
    check_early: Callable[[int], None] | None,
    check: Callable[[int], None],
) -> StoredUpload:
    """Takes the session from its present owner and returns it, ready to be continued. Both checks get the number of
    bytes of the session and refuse the request by raising an error. `check_early` (None: no check) runs before the
    present owner loses the session. `check` runs afterwards, when the number of usable bytes is known. Raises
    BlobUploadUnknown."""
    claimed = await blobs.take_over(upload, check_early)
    try:
        # The row is read after the session was taken, because its owner could still save progress or end it before.
        row = await metadata.upload(repo, upload)
        session, saved = await claimed.resume(row.algorithm, checkpoint_of(row)), row.offset
        if row.boot != blobs.boot:
            checkpoint = await session.flush()
            saved = checkpoint.offset
            await metadata.save_upload(upload, saved, checkpoint.state, checkpoint.boot)
        check(session.offset)
    except BlobUploadUnknown:
        await claimed.discard()  # the session has no row any more, so its bytes are useless
        raise
    except BaseException:
        claimed.release()
        raise
    return StoredUpload(blobs, metadata, publication, repo, upload, session, saved)


def checkpoint_of(row: UploadRow) -> Checkpoint:
    """Returns the progress that the row records."""
    return Checkpoint(row.offset, row.state, row.boot)

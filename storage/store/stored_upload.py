"""A stored registry's upload session while one request owns it (`BlobWriter`).

The bytes are the blob store's (`UploadSession`); this module keeps the session's metadata row in step with them.
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

SAVE_EVERY = 64 * 1024 * 1024
"""Bytes after which the progress of a session is saved while a request is still sending. After a crash, the next
request hashes no more than so many bytes again."""
log = logging.getLogger("storage")


class StoredUpload:
    """Made by `StoredRegistry.start_upload` and `resume`."""

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
        """`saved`: bytes of the session that its row knows of."""
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
            if self._session.offset - self._saved >= SAVE_EVERY:
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
        """A commit that has begun runs to its end, even if its request is cancelled."""
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
            await self._publication.add(self.repository, content, self.id)
        except (StorageFull, StorageFailed):
            # After a failed fsync the kernel forgets which bytes never reached the disk: they cannot be trusted again.
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
        # Until the row was gone, another request could still take the session over. From here on none can.
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
        if self._ended:
            raise BlobUploadInvalid("the upload session has ended")

    async def _save(self) -> None:
        checkpoint = await self._session.flush()
        if checkpoint.offset != self._saved:
            await self._metadata.save_upload(self.id, checkpoint.offset, checkpoint.state, checkpoint.boot)
            self._saved = checkpoint.offset

    async def _give_up(self) -> None:
        """Drops the session. On a full disk its bytes are the first to go, so that other pushes can work."""
        try:
            await self._cancel()
        except BlobUploadInvalid:
            pass
        except RegistryError as error:
            log.warning("upload %s could not be dropped from the full disk: %s", self.id, error)


async def resume(
    blobs: BlobStore,
    metadata: Metadata,
    publication: Publication,
    repo: RepositoryName,
    upload: UploadID,
    check_before: Callable[[int], None] | None,
    check: Callable[[int], None],
) -> StoredUpload:
    """Takes the session over and continues it. Both checks get the offset and may refuse it by raising; the first one
    runs before the owner loses the session. Raises BlobUploadUnknown."""
    claimed = await blobs.take_over(upload, check_before)
    try:
        # Read after the take-over: until then the owner may have saved more, or ended the session.
        row = await metadata.upload(repo, upload)
        session, saved = await claimed.resume(row.algorithm, checkpoint_of(row)), row.offset
        if row.boot != blobs.boot:
            checkpoint = await session.flush()
            saved = checkpoint.offset
            await metadata.save_upload(upload, saved, checkpoint.state, checkpoint.boot)
        check(session.offset)
    except BlobUploadUnknown:
        await claimed.discard()  # no row names the session, so there is nothing to continue
        raise
    except BaseException:
        claimed.release()
        raise
    return StoredUpload(blobs, metadata, publication, repo, upload, session, saved)


def checkpoint_of(row: UploadRow) -> Checkpoint:
    """Returns the progress that the row knows of."""
    return Checkpoint(row.offset, row.state, row.boot)

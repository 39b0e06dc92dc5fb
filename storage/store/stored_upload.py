"""The writer of an upload session in a `StoredRegistry` (`StoredUpload`).

The blob store has the bytes of a session. The metadata store has a *row* with the session's progress. Another process
can resume the session from both. The field `boot` of the row identifies the boot of the machine during which the bytes
were written, because a restart of the machine may lose bytes (`BlobStore.boot`).

The *owner* of a session is the request that has resumed it last, or else the request that has started it. An earlier
owner that still writes to the session gets BlobUploadInvalid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from storage.blobs.blob_store import BlobStore, Checkpoint, UploadSession
from storage.content import BLOB_TYPE, Actor, Descriptor
from storage.errors import (
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    QuotaExceeded,
    RegistryError,
    StorageFailed,
    StorageFull,
)
from storage.metadata.catalog import Metadata, UploadRow
from storage.names import Digest, RepositoryName, UploadID
from storage.store.publication import Publication

SAVE_INTERVAL_BYTES = 64 * 1024 * 1024
"""A request saves the session's progress whenever this many bytes were written since the last save, and when the
request ends. If the process crashes and the session is resumed, the bytes after the saved progress are hashed again."""
log = logging.getLogger("storage")


class StoredUpload:
    """The writer of an upload session, for the request that owns it. Implements `storage.interface.BlobWriter`, which
    describes the public methods."""

    def __init__(
        self,
        blobs: BlobStore,
        metadata: Metadata,
        publication: Publication,
        repo: RepositoryName,
        upload: UploadID,
        session: UploadSession,
        by: Actor,
        saved_bytes: int = 0,
    ) -> None:
        """`publication`: makes the verified content a blob of the repository `repo`. `session`: the bytes of the upload
        session in the blob store. `by`: the client that pushes the blob. `saved_bytes`: the number of bytes that the
        session has according to its row."""
        self.id: UploadID = upload
        self.repository: RepositoryName = repo
        self._blobs = blobs
        self._metadata = metadata
        self._publication = publication
        self._session = session
        self._by = by
        self._saved_bytes = saved_bytes
        self._commit_task: asyncio.Future[Descriptor] | None = None
        """The task that `commit` starts. None before `commit`."""
        self._is_closed = False
        """Whether the session was committed or deleted, or this writer was closed."""

    @property
    def offset(self) -> int:
        return self._session.offset

    async def write(self, data: bytes | memoryview) -> None:
        self._check_open()
        try:
            await self._session.append(data)
            if self._session.offset - self._saved_bytes >= SAVE_INTERVAL_BYTES:
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
        """Runs the commit in a separate task, which continues to its end even if the request is cancelled."""
        self._check_open()
        self._commit_task = asyncio.ensure_future(self._commit(digest))
        return await asyncio.shield(self._commit_task)

    async def _commit(self, digest: Digest) -> Descriptor:
        try:
            try:
                content = await self._session.verify(digest)
            except DigestInvalid:
                await self._cancel()
                raise
            await self._publication.commit_upload(self.repository, content, self.id, self._by)
        except (StorageFull, StorageFailed, QuotaExceeded):
            # The session cannot be committed later: there is no space on the disk or in the quota, or an fsync failed
            # and it is not known which bytes are on the disk.
            await self._give_up()
            raise
        self._is_closed = True
        self._session.release()
        return Descriptor(BLOB_TYPE, digest, content.size)

    async def cancel(self) -> None:
        if self._commit_task is not None:
            await asyncio.wait([self._commit_task])
        await self._cancel()

    async def _cancel(self) -> None:
        """Deletes the bytes and the row of the session. Does nothing if `_is_closed` is True."""
        if self._is_closed:
            return
        await self._session.discard()
        self._is_closed = True
        # Waits until the disk space of the deleted bytes is free. `release` would not wait.
        await self._session.close()
        with suppress(BlobUploadUnknown):
            await self._metadata.end_upload(self.id)
        # Another request may have resumed the session before the row was deleted. The bytes that it has stored are
        # useless without the row.
        await self._blobs.discard_upload(self.id)

    async def aclose(self) -> None:
        try:
            if self._commit_task is not None:
                await asyncio.wait([self._commit_task])
            if not self._is_closed:
                await self._save()
        except StorageFull:
            await self._give_up()
            raise
        finally:
            self._is_closed = True
            if self._commit_task is not None and not self._commit_task.done():
                # `aclose` was cancelled while it waited for the commit, which still uses the session.
                self._commit_task.add_done_callback(lambda _: self._session.release())
            else:
                self._session.release()

    def _check_open(self) -> None:
        """Raises BlobUploadInvalid if `_is_closed` is True."""
        if self._is_closed:
            raise BlobUploadInvalid("the upload session has ended")

    async def _save(self) -> None:
        """Stores all written bytes, and saves the progress in the row."""
        checkpoint = await self._session.flush()
        if checkpoint.offset != self._saved_bytes:
            await self._metadata.save_upload(self.id, checkpoint.offset, checkpoint.state, checkpoint.boot)
            self._saved_bytes = checkpoint.offset

    async def _give_up(self) -> None:
        """Deletes the session because its content cannot be stored. On a full disk, the deletion frees space for other
        pushes. If the deletion fails, logs a warning and raises nothing."""
        try:
            await self._cancel()
        except BlobUploadInvalid:
            pass  # a newer request owns the session now
        except RegistryError as error:
            log.warning("could not delete the bytes of the failed upload %s: %s", self.id, error)


async def resume(
    blobs: BlobStore,
    metadata: Metadata,
    publication: Publication,
    repo: RepositoryName,
    upload: UploadID,
    by: Actor,
    *,
    check_before_take_over: Callable[[int], None] | None,
    check_after_take_over: Callable[[int], None],
) -> StoredUpload:
    """Makes the current request the owner of the session `upload`, and returns a writer for it. `by`: the client that
    makes the request.

    Each check gets a number of bytes, and raises an error if the session must not be resumed.

    - `check_before_take_over` gets the number of stored bytes. If it raises an error, the owner stays the same. None:
      there is no check before the takeover.
    - `check_after_take_over` gets the number of usable bytes. After a restart of the machine, there may be fewer usable
      bytes than stored bytes.

    Raises BlobUploadUnknown, BlobUploadInvalid, StorageFull, StorageFailed, and the errors of the checks."""
    claimed_upload = await blobs.take_over(upload, check_before_take_over)
    try:
        # Before the takeover, the old owner can still change or delete the row.
        row = await metadata.upload(repo, upload)
        session, saved_bytes = await claimed_upload.resume(row.algorithm, checkpoint_of(row)), row.offset
        if row.boot != blobs.boot:  # after a restart of the machine, bytes may be lost
            checkpoint = await session.flush()
            saved_bytes = checkpoint.offset
            await metadata.save_upload(upload, saved_bytes, checkpoint.state, checkpoint.boot)
        check_after_take_over(session.offset)
    except BlobUploadUnknown:
        await claimed_upload.discard()  # the session has ended, so its bytes are useless
        raise
    except BaseException:
        claimed_upload.release()
        raise
    return StoredUpload(blobs, metadata, publication, repo, upload, session, by, saved_bytes)


def checkpoint_of(row: UploadRow) -> Checkpoint:
    """Returns the progress in a row as a checkpoint for the blob store."""
    return Checkpoint(row.offset, row.state, row.boot)

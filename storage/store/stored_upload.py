"""The writer of an upload session (`StoredUpload`) in a registry that combines a metadata store and a blob store
(`StoredRegistry`).

The blob store has the bytes of a session. The metadata store has a *row* about the session's progress. This module
writes to both, so that another process can resume the session. The field `boot` of the row identifies the boot of the
machine during which the bytes were written, because a restart of the machine may lose these bytes (`BlobStore.boot`).

A session is *owned* by the request that started it or, later, by the request that resumed it last. An older request
that still writes to the session gets BlobUploadInvalid.
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
"""A request saves the session's progress each time it has written this number of bytes, and when it ends. So if the
process crashes, at most about this number of bytes must be hashed again when the session is resumed."""
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
        """`publication`: makes the verified content a blob of the repository `repo`. `session`: reads and writes the
        bytes of the upload session `upload` in the blob store. `by`: the client that pushes the blob. `saved_bytes`:
        number of bytes that the session has according to its row."""
        self.id: UploadID = upload
        self.repository: RepositoryName = repo
        self._blobs = blobs
        self._metadata = metadata
        self._publication = publication
        self._session = session
        self._by = by
        self._saved_bytes = saved_bytes
        self._committing: asyncio.Future[Descriptor] | None = None
        """The task that runs the commit. None before `commit`."""
        self._is_closed = False
        """Whether the session was committed or cancelled, or this writer was closed."""

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
        self._committing = asyncio.ensure_future(self._commit(digest))
        return await asyncio.shield(self._committing)

    async def _commit(self, digest: Digest) -> Descriptor:
        try:
            try:
                content = await self._session.verify(digest)
            except DigestInvalid:
                await self._cancel()
                raise
            await self._publication.commit_upload(self.repository, content, self.id, self._by)
        except (StorageFull, StorageFailed, QuotaExceeded):
            # Either there is no space for the content, or an fsync failed and it is not known which bytes are on the
            # disk. In both cases, the session is deleted.
            await self._give_up()
            raise
        self._is_closed = True
        self._session.release()
        return Descriptor(BLOB_TYPE, digest, content.size)

    async def cancel(self) -> None:
        if self._committing is not None:
            await asyncio.wait([self._committing])
        await self._cancel()

    async def _cancel(self) -> None:
        """Deletes the bytes and the row of the session. Does nothing if `_is_closed` is True."""
        if self._is_closed:
            return
        await self._session.discard()
        self._is_closed = True
        await self._session.close()  # unlike `release`, also waits until the disk space is free
        with suppress(BlobUploadUnknown):
            await self._metadata.end_upload(self.id)
        # Another request may have resumed the session and stored bytes before the row was deleted. These bytes are
        # useless without the row.
        await self._blobs.discard_upload(self.id)

    async def aclose(self) -> None:
        try:
            if self._committing is not None:
                await asyncio.wait([self._committing])
            if not self._is_closed:
                await self._save()
        except StorageFull:
            await self._give_up()
            raise
        finally:
            self._is_closed = True
            if self._committing is not None and not self._committing.done():
                # `aclose` was cancelled while it waited for the commit, which still uses the session.
                self._committing.add_done_callback(lambda _: self._session.release())
            else:
                self._session.release()

    def _check_open(self) -> None:
        """Raises BlobUploadInvalid if `_is_closed` is True."""
        if self._is_closed:
            raise BlobUploadInvalid("the upload session has ended")

    async def _save(self) -> None:
        """Stores all bytes that were written, and saves the progress in the row."""
        checkpoint = await self._session.flush()
        if checkpoint.offset != self._saved_bytes:
            await self._metadata.save_upload(self.id, checkpoint.offset, checkpoint.state, checkpoint.boot)
            self._saved_bytes = checkpoint.offset

    async def _give_up(self) -> None:
        """Deletes the session because its content cannot be stored. On a full disk, this frees space for other pushes.
        If the bytes cannot be deleted, logs a warning and raises nothing."""
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
    """Takes the session `upload` over from the request that owns it, and returns a writer for the new owner. `by`: the
    client that makes the request.

    Each check is a function that gets a number of bytes, and raises an error if the session must not be resumed.

    - `check_before_take_over` gets the number of stored bytes, while the session still has its old owner. None: there
      is no check before the takeover.
    - `check_after_take_over` gets the number of usable bytes, after the takeover. Bytes that were stored before a
      restart of the machine may be unusable.

    Raises BlobUploadUnknown, and the errors of the checks."""
    claimed_upload = await blobs.take_over(upload, check_before_take_over)
    try:
        # The row is read after the takeover, because until then the old owner can change or delete the row.
        row = await metadata.upload(repo, upload)
        session, saved_bytes = await claimed_upload.resume(row.algorithm, checkpoint_of(row)), row.offset
        if row.boot != blobs.boot:  # the machine was restarted, so bytes that the row counts may be lost
            checkpoint = await session.flush()
            saved_bytes = checkpoint.offset
            await metadata.save_upload(upload, saved_bytes, checkpoint.state, checkpoint.boot)
        check_after_take_over(session.offset)
    except BlobUploadUnknown:
        await claimed_upload.discard()  # the session was committed or cancelled, so its remaining bytes are useless
        raise
    except BaseException:
        claimed_upload.release()
        raise
    return StoredUpload(blobs, metadata, publication, repo, upload, session, by, saved_bytes)


def checkpoint_of(row: UploadRow) -> Checkpoint:
    """Returns the saved progress of the session, in the form that the blob store needs."""
    return Checkpoint(row.offset, row.state, row.boot)

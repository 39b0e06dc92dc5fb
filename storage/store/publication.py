"""Turns bytes whose digest was verified into a blob of a repository (`Publication`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from storage.blobs.blob_store import BlobStore, VerifiedContent
from storage.content import Actor
from storage.errors import QuotaExceeded, StorageFull
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import RepositoryName, UploadID


class Publication:
    """Commits content in two steps. First the blob store stores the bytes durably under a key, the *place*. Then the
    metadata store commits the blob's *row*, which contains the place and makes the blob exist. This class holds the
    lock of the digest during both steps, so that the garbage collector does not remove the bytes between the steps."""

    def __init__(self, blobs: BlobStore, metadata: Metadata, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._metadata = metadata
        self._locks = locks

    async def commit_upload(self, repo: RepositoryName, content: VerifiedContent, upload: UploadID, by: Actor) -> None:
        """Makes a blob of `repo` from the content of the upload session `upload`. The transaction that commits the
        blob's row also deletes the session's row. `by`: the client that pushed the content. Raises BlobUploadUnknown,
        BlobUploadInvalid, StorageFull, StorageFailed, QuotaExceeded."""
        await self._commit(
            content, lambda: self._metadata.add_blob(repo, content.digest, content.size, content.place, upload, by)
        )

    async def commit_without_upload(
        self, repo: RepositoryName, content: VerifiedContent, by: Actor | None = None
    ) -> None:
        """Makes a blob of `repo` from content without an upload session, for example from a file that an import links
        into the store. For content that was downloaded from another registry, call `commit_download`. Raises
        StorageFull, StorageFailed, QuotaExceeded.

        `by`: the client that pushed the content. The blob's event names this client. If `by` is None, no client pushed
        the content, and the blob gets no event."""
        await self._commit(
            content,
            lambda: self._metadata.add_blob_without_upload(repo, content.digest, content.size, content.place, by=by),
        )

    async def commit_download(self, repo: RepositoryName, content: VerifiedContent) -> None:
        """Makes a blob of `repo` from content that the mirror or an import downloaded from another registry. The blob's
        event has the action `EventAction.FILL`. Raises StorageFull, StorageFailed, QuotaExceeded."""
        await self._commit(
            content,
            lambda: self._metadata.add_blob_without_upload(
                repo, content.digest, content.size, content.place, is_fill=True
            ),
        )

    async def _commit(self, content: VerifiedContent, commit_row: Callable[[], Awaitable[None]]) -> None:
        """Stores the bytes and then commits the row by calling `commit_row`."""
        async with self._locks.hold(content.digest):
            try:
                await content.publish()
                await commit_row()
            except (StorageFull, QuotaExceeded):
                # After these errors, the new row is certainly not committed. The bytes are deleted to free their space,
                # unless an older row has this digest. After other errors, such as a failed fsync, the row may be in the
                # database's files although the commit failed. If the process then crashes, the database may contain the
                # row after the restart. So the bytes must stay.
                if not await self._metadata.known_blobs([content.digest]):
                    await self._blobs.remove(content.place)
                    await self._blobs.reclaim_space()
                raise

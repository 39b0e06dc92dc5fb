"""Turns verified content into a blob of a repository (`Publication`), for pushed and for mirrored content."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from storage.blobs.blob_store import BlobStore, VerifiedContent
from storage.errors import StorageFull
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import RepositoryName, UploadID


class Publication:
    """Commits content in two steps. First the blob store stores the bytes durably at their *place*, the key under which
    it finds them again. Then the metadata store commits the blob's row, which contains the place. The lock of the
    digest is held over both steps, so that the garbage collector does not remove the bytes in between."""

    def __init__(self, blobs: BlobStore, metadata: Metadata, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._metadata = metadata
        self._locks = locks

    async def commit_upload(self, repo: RepositoryName, content: VerifiedContent, upload: UploadID) -> None:
        """Makes the content of the upload session `upload` a blob of `repo`, and ends the session. Raises
        BlobUploadUnknown, BlobUploadInvalid, StorageFull, StorageFailed."""
        await self._commit(
            content, lambda: self._metadata.add_blob(repo, content.digest, content.size, content.place, upload)
        )

    async def commit_content(self, repo: RepositoryName, content: VerifiedContent) -> None:
        """Makes content that did not come through an upload session a blob of `repo`. Raises StorageFull,
        StorageFailed."""
        await self._commit(
            content, lambda: self._metadata.adopt_blob(repo, content.digest, content.size, content.place)
        )

    async def _commit(self, content: VerifiedContent, commit_row: Callable[[], Awaitable[None]]) -> None:
        async with self._locks.hold(content.digest):
            try:
                await content.publish()
                await commit_row()
            except StorageFull:
                # After StorageFull the new row is certainly not committed. Unless an older row of the blob exists, the
                # bytes only occupy the full disk. After other errors, such as a failed fsync, the bytes must stay: a
                # crash may still bring the row back.
                if not await self._metadata.known_blobs([content.digest]):
                    await self._blobs.remove(content.place)
                    await self._blobs.reclaim_space()
                raise

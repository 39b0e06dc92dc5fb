"""How verified content becomes a blob: one order for pushed and for mirrored content."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from storage.blobs.blob_store import BlobStore, VerifiedContent
from storage.errors import StorageFull
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import RepositoryName, UploadID


class Publication:
    """Makes the bytes durable at their place first, then commits the row that names them; both with the digest's lock
    held, so that the collector never removes bytes that a row is about to name."""

    def __init__(self, blobs: BlobStore, metadata: Metadata, locks: DigestLocks) -> None:
        self._blobs = blobs
        self._metadata = metadata
        self._locks = locks

    async def add(self, repo: RepositoryName, content: VerifiedContent, upload: UploadID) -> None:
        """Makes the content of an upload session a blob of `repo`, and ends the session. Raises BlobUploadUnknown,
        BlobUploadInvalid, StorageFull, StorageFailed."""
        await self._publish(
            content, lambda: self._metadata.add_blob(repo, content.digest, content.size, content.place, upload)
        )

    async def adopt(self, repo: RepositoryName, content: VerifiedContent) -> None:
        """Makes content without an upload session a blob of `repo`. Raises StorageFull, StorageFailed."""
        await self._publish(
            content, lambda: self._metadata.adopt_blob(repo, content.digest, content.size, content.place)
        )

    async def _publish(self, content: VerifiedContent, commit_row: Callable[[], Awaitable[None]]) -> None:
        async with self._locks.hold(content.digest):
            try:
                await content.publish()
                await commit_row()
            except StorageFull:
                # The row is surely not committed, and the bytes fill the disk. (After another error, such as a failed
                # fsync of the commit, the row might come back after a crash, and must find its bytes.)
                if not await self._metadata.known_blobs([content.digest]):
                    await self._blobs.remove(content.place)
                    await self._blobs.reclaim_space()
                raise

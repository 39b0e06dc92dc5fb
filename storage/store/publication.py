"""How bytes become a blob: the one order for all that come in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from storage.blobs.blob_store import Publishable
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.errors import StorageFull
from storage.metadata.catalog import Metadata
from storage.names import Digest


async def publish(
    blobs: FileBlobStore,
    metadata: Metadata,
    content: Publishable,
    digest: Digest,
    add: Callable[[str], Awaitable[None]],
) -> None:
    """Puts the synced and verified `content` in its place, then has `add` commit a row for that place, both under the
    digest's lock. Raises what they raise."""
    async with blobs.hold(digest):
        try:
            await add(await blobs.publish(content, digest))
        except StorageFull:
            # Surely not committed; the file is what fills the disk. (A failed fsync of the commit would not be so
            # sure: the row could come back after a crash, and must find its file.)
            if not await metadata.known_blobs([digest]):
                await blobs.remove(blobs.layout.place(digest))
                await blobs.empty_trash()
            raise

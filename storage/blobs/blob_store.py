"""The bytes of blobs, by digest. Knows nothing of repositories: what exists is for metadata to say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from storage.blobs.files.upload_file import UploadFile
from storage.content import Span
from storage.interface import BlobReader
from storage.names import Digest, UploadID


class Publishable(Protocol):
    """Synced bytes under a temporary name."""

    def publish(self, target: Path) -> None:
        """Moves them to `target`, durably. Blocking."""
        ...


class BlobStore(Protocol):
    """Where blobs lie. Errors: StorageFull, StorageFailed."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Raises RangeInvalid, and FileNotFoundError where the bytes are not at `place`."""
        ...

    def create(self, upload: UploadID) -> Awaitable[UploadFile]:
        """A new session's bytes. Raises BlobUploadInvalid when somebody has resumed the session already."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[UploadFile]:
        """The session's bytes, from whoever has them. `check` is told before, in a thread, how many there are, and may
        refuse by raising."""
        ...

    async def session_size(self, upload: UploadID) -> int: ...

    def hold(self, digest: Digest) -> AbstractAsyncContextManager[None]:
        """The digest's lock, over all processes. Held from a publish to the commit of its row, and from the commit of a
        removed row to the move of its file: so a push and a collection of one digest cannot cross."""
        ...

    async def publish(self, content: Publishable, digest: Digest) -> str:
        """Puts the synced bytes in place, durably; returns the place. Call it inside `hold`."""
        ...

    async def remove(self, place: str) -> None:
        """Takes the bytes at `place` away. Call it inside `hold`, with no row naming them."""
        ...

    async def empty_trash(self) -> None:
        """Frees what `remove` took away."""
        ...

    async def discard(self, upload: UploadID) -> None:
        """Drops a session's bytes."""
        ...

    async def shard(self, number: int) -> list[tuple[Digest, str, float]]:
        """The blobs that lie in one of `shards` parts of the store, with their places and when they were written
        (seconds since 1970)."""
        ...

    async def sessions(self) -> list[tuple[UploadID, float]]:
        """Upload sessions that have bytes, and when they last changed."""
        ...

    shards: int

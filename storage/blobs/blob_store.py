"""Where the bytes of blobs lie (`BlobStore`).

The Protocols speak of content only. A store may keep files on a local disk or objects in a bucket: nothing here needs a
rename, a path, a file descriptor, or a second write to a stored object. Which blobs exist is for `Metadata` to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from storage.content import Span
from storage.errors import BlobUploadUnknown
from storage.interface import BlobReader
from storage.names import Digest, UploadID


class BytesMissing(Exception):
    """The store has no bytes at the given place."""


class ListedBlob(NamedTuple):
    """Stored bytes, as a listing shows them. `written`: seconds since 1970."""

    digest: Digest
    place: str
    written: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Progress of an upload session, as its metadata row keeps it. `state` is opaque to all but the store: what it
    needs to continue after the first `offset` bytes without reading them again. `boot`: `BlobStore.boot` at the
    time."""

    offset: int
    state: bytes | None
    boot: str

    def check_not_truncated(self, stored: int) -> None:
        """Raises BlobUploadUnknown if the session has fewer than `offset` bytes stored: a commit has taken them."""
        if stored < self.offset:
            raise BlobUploadUnknown()


class VerifiedContent(Protocol):
    """Durable bytes whose digest was verified, and which are not a blob yet."""

    digest: Digest
    size: int
    place: str
    """Key under which `publish` stores the bytes. Opaque to all but the store; metadata keeps it with the blob."""

    async def publish(self) -> None:
        """Stores the bytes at `place`, durably. Bytes that are there already have the same digest. Call it with the
        digest's lock held (`DigestLocks`). Raises StorageFull, StorageFailed, BlobUploadInvalid (a newer request has
        taken the session over)."""
        ...


class UploadSession(Protocol):
    """The bytes of an upload session, owned by this caller until a newer one takes them over. Then all calls but
    `release` and `close` raise BlobUploadInvalid. All raise StorageFull and StorageFailed."""

    @property
    def offset(self) -> int:
        """Bytes appended so far."""
        ...

    async def append(self, data: bytes | memoryview) -> None:
        """Appends. The store reads the memory of a view later, so the caller must not change it."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns appended bytes; fewer than `length` where they end."""
        ...

    async def flush(self) -> Checkpoint:
        """Stores all appended bytes, so that they survive this process and any process can continue after them."""
        ...

    async def verify(self, digest: Digest) -> VerifiedContent:
        """Stores all appended bytes durably and checks their digest. Raises DigestInvalid with the actual one."""
        ...

    async def discard(self) -> None:
        """Drops the session's bytes. Bytes that were published stay."""
        ...

    def release(self) -> None:
        """Releases memory and handles without waiting, once nothing uses them. Flushed bytes stay for the next owner.
        Idempotent."""
        ...

    async def close(self) -> None:
        """Releases them, and waits until the space of discarded bytes is free, cancelled or not."""
        ...


class ClaimedUpload(Protocol):
    """An upload session that this caller has just taken over, before its progress is known."""

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> UploadSession:
        """Continues the session. Where the bytes were stored under another `boot`, only those that `checkpoint` proves
        right count; the rest are dropped. Raises BlobUploadUnknown (there are fewer bytes than the checkpoint says: a
        commit has taken them), BlobUploadInvalid, StorageFull, StorageFailed."""
        ...

    async def discard(self) -> None:
        """Drops the session's bytes, if it is still this caller's. Raises StorageFull, StorageFailed."""
        ...

    def release(self) -> None:
        """Releases the session without waiting; its bytes stay."""
        ...


class BlobStore(Protocol):
    """Stores content by digest, and upload sessions that any process can continue. Safe for several processes at once.
    Errors: StorageFull, StorageFailed, and those named."""

    boot: str
    """Period within which bytes that were flushed but not verified survive: a run of the machine for a store that
    leaves them in the page cache; always the same text for one that makes them durable at once."""
    shards: int
    """Parts in which the stored blobs can be listed."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Opens the bytes at `place`. Raises RangeInvalid, BytesMissing."""
        ...

    def start_upload(self, upload: UploadID, algorithm: str) -> UploadSession:
        """Returns a new session whose bytes are hashed with `algorithm` while they come. Stores nothing yet. Its calls
        raise BlobUploadInvalid if another caller has taken over the same id."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedUpload]:
        """Takes the session over from its owner at once; an unknown id becomes an empty session. `check` gets the
        number of stored bytes beforehand, possibly in a thread, and may refuse by raising. Raises BlobUploadUnknown
        (the session is just being ended)."""
        ...

    async def upload_size(self, upload: UploadID) -> int:
        """Returns the number of bytes the session has stored; 0 for an unknown one."""
        ...

    async def discard_upload(self, upload: UploadID) -> None:
        """Drops a session's bytes, whoever owns it. Does nothing for an unknown one."""
        ...

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        """Returns the sessions that have stored bytes, and when each last changed (seconds since 1970)."""
        ...

    async def remove(self, place: str) -> None:
        """Removes the bytes at `place`, if there are any. Call it with the digest's lock held and no row naming the
        place. The space may stay in use until `reclaim_space`."""
        ...

    async def reclaim_space(self) -> None:
        """Frees the space of removed bytes."""
        ...

    async def list_shard(self, number: int) -> list[ListedBlob]:
        """Returns the stored blobs of one of `shards` parts."""
        ...

"""Protocols of a store for the bytes of blobs (`BlobStore`) and of upload sessions (`UploadSession`).

A store may keep files on a local disk or objects in a bucket: no method here needs a rename, a path, a file descriptor,
or a second write to a stored object. The store does not decide which blobs exist; the metadata database does.

Words: a *place* is the key under which a store keeps the bytes of one blob; the metadata database stores it with the
blob, and only the store knows what it means. To *publish* verified bytes is to store them durably at their place. A
session's *owner* is the caller that may write to it; a newer caller can take the session over at any time.
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
    """A blob in a listing of the stored bytes. `place`: see the module docstring. `written`: when the bytes were last
    written, in seconds since 1970."""

    digest: Digest
    place: str
    written: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved progress of an upload session: its first `offset` bytes are stored. `state`: the state of the digest
    computation over these bytes, which only the store can read; with it, the store continues without reading the bytes
    again (None: it has to read them). `boot`: the value of `BlobStore.boot` when the checkpoint was made."""

    offset: int
    state: bytes | None
    boot: str

    def check_not_truncated(self, stored_bytes: int) -> None:
        """Raises BlobUploadUnknown if the session has fewer bytes than the checkpoint says, because that means that an
        earlier commit has already moved them. `stored_bytes`: number of bytes that the session has now."""
        if stored_bytes < self.offset:
            raise BlobUploadUnknown()


class VerifiedContent(Protocol):
    """Durable bytes whose digest was verified, and which are not a blob yet. `size`: their number."""

    digest: Digest
    size: int
    place: str
    """Key under which `publish` stores the bytes."""

    async def publish(self) -> None:
        """Stores the bytes at `place`, durably. Replaces bytes that are stored there; they have the same digest. Call
        it while holding the lock of the digest (`DigestLocks`). Raises StorageFull, StorageFailed, BlobUploadInvalid (a
        newer request has taken the session over)."""
        ...


class UploadSession(Protocol):
    """The bytes of an upload session, of which this caller is the owner until a newer caller takes the session over.
    From then on, all methods except `release` and `close` raise BlobUploadInvalid. The async methods also raise
    StorageFull and StorageFailed."""

    @property
    def offset(self) -> int:
        """Number of bytes appended so far."""
        ...

    async def append(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. The store may read the memory of a memoryview after this call returns, so the
        caller must not change it."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes that were appended at `offset`, or fewer if the appended bytes end before."""
        ...

    async def flush(self) -> Checkpoint:
        """Stores all appended bytes and returns a checkpoint, from which any process can continue. The bytes survive
        the end of this process, but not always a crash of the machine."""
        ...

    async def verify(self, digest: Digest) -> VerifiedContent:
        """Stores all appended bytes durably, checks that they have this digest, and returns them for `publish`. Raises
        DigestInvalid, with the actual digest."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes. Bytes that were published stay."""
        ...

    def release(self) -> None:
        """Releases memory and file handles, without waiting. Those that a running write uses are released after it.
        Flushed bytes stay for the next owner. May be called more than once."""
        ...

    async def close(self) -> None:
        """Releases memory and file handles like `release`, and waits until the disk space of discarded bytes is free,
        even if cancelled."""
        ...


class ClaimedUpload(Protocol):
    """An upload session that this caller has just taken over, but whose bytes have not been compared with its
    checkpoint yet."""

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> UploadSession:
        """Returns the session, ready for more bytes. `algorithm`: of the digest that is computed. If the bytes were
        stored under another `BlobStore.boot`, keeps only bytes whose digest the checkpoint confirms and deletes the
        rest. Raises BlobUploadUnknown (the session has fewer bytes than the checkpoint says, because a commit has moved
        them), BlobUploadInvalid, StorageFull, StorageFailed."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless a newer caller has taken the session over. Raises StorageFull,
        StorageFailed."""
        ...

    def release(self) -> None:
        """Releases the session without waiting. Its bytes stay for the next owner."""
        ...


class BlobStore(Protocol):
    """Stores the bytes of blobs, and of upload sessions, which any process can continue. Several processes may use the
    same store at the same time. The async methods raise StorageFull and StorageFailed, besides the errors that their
    docstrings name."""

    boot: str
    """Identifies the period in which flushed bytes survive. A store that leaves flushed bytes in the page cache uses
    the id of the machine's boot, because a reboot may lose them. A store that syncs at each flush always uses the same
    text."""
    shards: int
    """Number of parts in which `list_shard` lists the blobs."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Opens the blob with this digest and size, whose bytes are at `place`, or only a `span` of it. Raises
        RangeInvalid, BytesMissing."""
        ...

    def start_upload(self, upload: UploadID, algorithm: str) -> UploadSession:
        """Returns a new session, whose bytes are hashed with `algorithm` as they are appended. Stores nothing yet."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedUpload]:
        """Takes the session over from its owner, without waiting for that owner. An unknown id becomes an empty
        session. `check` is called first, possibly in a thread, with the number of stored bytes; if it raises, the owner
        keeps the session. Raises BlobUploadUnknown (another request is just ending the session)."""
        ...

    async def upload_size(self, upload: UploadID) -> int:
        """Returns the number of bytes that the session has stored; 0 for an unknown id."""
        ...

    async def discard_upload(self, upload: UploadID) -> None:
        """Deletes a session's bytes, even while a caller owns it. Does nothing for an unknown id."""
        ...

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        """Returns the sessions that have stored bytes, and when each last changed (seconds since 1970)."""
        ...

    async def remove(self, place: str) -> None:
        """Removes the bytes at `place`, if there are any. This is where garbage collection deletes a blob. Call it
        while holding the lock of the digest, after the metadata row that names the place was deleted. The disk space
        may stay in use until `reclaim_space`."""
        ...

    async def reclaim_space(self) -> None:
        """Frees the disk space of removed bytes."""
        ...

    async def list_shard(self, number: int) -> list[ListedBlob]:
        """Returns the stored blobs of one part. `number`: 0 to `shards` - 1."""
        ...

"""Protocols of a store for the bytes of blobs (`BlobStore`) and of upload sessions (`UploadSession`).

A store may keep its bytes in files on a local disk or in objects of a bucket. So the methods of these Protocols need no
rename, no path, no file descriptor, and no change inside a stored object: an object is only replaced or deleted as a
whole. There are two exceptions: `prepare_link`, which a store may refuse, and the attribute `file` of a `BlobReader`,
which may be None. The store does not decide which blobs exist; the metadata database does.

A *place* is the key under which a store keeps the bytes of one blob. The metadata database stores the place with the
blob, but only the store understands it. To *publish* verified bytes is to store them durably at their place. A
session's *owner* is the caller that may write to it; a newer caller can take the session over at any time. Bytes are
*durable* if they survive a crash of the machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from storage.content import Span
from storage.errors import BlobUploadUnknown
from storage.interface import BlobReader
from storage.names import Digest, UploadID

UNREADABLE: Final = -1
"""Stands for the number of stored bytes if the store has bytes but cannot read them."""


class BytesMissing(Exception):
    """The store has no bytes at the given place."""


class LinkRefused(Exception):
    """The store cannot use a file of another program without copying its bytes. The text says why."""


class ListedBlob(NamedTuple):
    """A blob in a listing of the stored bytes. `place`: the key under which the store keeps the bytes. `written`: when
    they were last written, in seconds since 1970. `size`: number of the bytes; `UNREADABLE` if the store cannot read
    how many, and then `written` is 0."""

    digest: Digest
    place: str
    written: float
    size: int


class QuarantinedBytes(NamedTuple):
    """Damaged bytes that the store keeps aside, in its *quarantine*. `digest`: the digest that they should have.
    `place`: the key under which the store keeps them. `size`: number of the bytes. `since`: when they were moved to the
    quarantine, in seconds since 1970."""

    digest: Digest
    place: str
    size: int
    since: float


class ContentCheck(NamedTuple):
    """The result of reading all stored bytes of a blob. `problem`: what is wrong with the bytes, for people; None if
    they have the right digest and size. `version`: text that identifies exactly these bytes (`BlobStore.version`)."""

    problem: str | None
    version: str


OnRead = Callable[[int], Awaitable[None]]
"""Called while bytes are checked, after each part that was read, with the number of its bytes. It may wait, to limit
the rate of the reads. An error that it raises ends the check."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved progress of an upload session: its first `offset` bytes are stored. `state`: the state of the digest
    computation over these bytes, in a format that only the store can read. With the state, the store can continue the
    computation. None: not saved. The store then has to hash the stored bytes again, before the upload is complete;
    after a reboot, `ClaimedUpload.resume` deletes them instead. `boot`: the value of `BlobStore.boot` when the
    checkpoint was made."""

    offset: int
    state: bytes | None
    boot: str

    def check_not_truncated(self, stored_bytes: int) -> None:
        """Raises BlobUploadUnknown if the session has fewer bytes than the checkpoint says. An earlier request has then
        already published or deleted the bytes. `stored_bytes`: number of bytes that the session has now."""
        if stored_bytes < self.offset:
            raise BlobUploadUnknown()


class VerifiedContent(Protocol):
    """Bytes that are durable and whose digest was verified. They are not a blob yet. `size`: number of the bytes."""

    digest: Digest
    size: int
    place: str
    """Key under which `publish` stores the bytes."""

    async def publish(self) -> None:
        """Stores the bytes durably at `place`. Replaces bytes that are stored there already, because they may be
        damaged. The caller must hold the lock of the digest (`DigestLocks`). Raises StorageFull, StorageFailed,
        BlobUploadInvalid (a newer request has taken the session over)."""
        ...


class UploadSession(Protocol):
    """The bytes of an upload session. This caller is the session's owner until a newer caller takes the session over.
    After the takeover, a method of this object that reads, writes or deletes stored bytes raises BlobUploadInvalid. The
    async methods also raise StorageFull and StorageFailed."""

    @property
    def offset(self) -> int:
        """Number of bytes appended so far."""
        ...

    async def append(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. If `data` is a memoryview, the caller must never change its memory afterwards,
        because the store may read the memory after this call has returned."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes at `offset`, or fewer if fewer have been appended."""
        ...

    async def flush(self) -> Checkpoint:
        """Stores all appended bytes and returns a checkpoint, from which any process can continue the session. The
        bytes then survive the end of this process, but need not survive a crash of the machine (`BlobStore.boot`)."""
        ...

    async def verify(self, digest: Digest) -> VerifiedContent:
        """Stores all appended bytes durably, checks that they have this digest, and returns an object that can publish
        them. Raises DigestInvalid, with the actual digest."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless they have been published."""
        ...

    def release(self) -> None:
        """Releases memory and file handles, without waiting. If a write is running, they are released when it has
        ended. Flushed bytes are kept for the next owner. May be called more than once."""
        ...

    async def close(self) -> None:
        """Releases memory and file handles like `release`. After `discard`, also waits until the disk space of the
        deleted bytes is free, even if this call is cancelled. Call it only while no write is running."""
        ...


class ClaimedUpload(Protocol):
    """An upload session that this caller has just taken over. Its stored bytes have not been compared with its last
    checkpoint yet; `resume` does that."""

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> UploadSession:
        """Returns the session, ready for more bytes. `algorithm`: the digest algorithm of the session, such as
        `sha256`.

        If the checkpoint has the `boot` of the store, all stored bytes are kept. If it has another `boot`, the bytes
        may be damaged, so this call deletes all bytes after the first `checkpoint.offset` bytes. It keeps these first
        bytes only if it hashes them again and gets `checkpoint.state`. A checkpoint without a state proves nothing, so
        then all bytes are deleted.

        Raises BlobUploadUnknown (the session has fewer bytes than the checkpoint says, because an earlier request has
        published or deleted them), BlobUploadInvalid (a newer caller has taken the session over), StorageFull,
        StorageFailed."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes and releases the file handles. If a newer caller has taken the session over,
        keeps the bytes. Raises StorageFull, StorageFailed."""
        ...

    def release(self) -> None:
        """Releases the file handles without waiting. The session's bytes are kept for the next owner."""
        ...


class BlobStore(Protocol):
    """Stores the bytes of blobs, and of upload sessions, which any process can continue. Several processes may use the
    same store at the same time. The async methods raise StorageFull and StorageFailed, in addition to the errors that
    their docstrings name."""

    boot: str
    """A text that changes when flushed bytes may have been lost. A store that leaves flushed bytes in the page cache
    uses the id of the machine's present boot, because a reboot may lose these bytes. A store that syncs at each flush
    always uses the same text."""
    shard_count: int
    """Number of *shards*: the parts in which `list_shard` lists the blobs. Each blob is in one of them."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Opens the blob with this digest and size, whose bytes are at `place`. `span`: the part of the blob to read;
        None: all of it. Raises RangeInvalid, BytesMissing."""
        ...

    def start_upload(self, upload: UploadID, algorithm: str) -> UploadSession:
        """Returns a new session. Stores nothing yet. `algorithm`: the digest algorithm, such as `sha256`, with which
        the bytes are hashed as they are appended."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedUpload]:
        """Takes the session over from its owner, without waiting for the owner. If the id is unknown, creates an empty
        session. First calls `check`, possibly in a thread, with the number of stored bytes; if `check` raises, the
        owner keeps the session, and this call raises the same error. A cancelled call leaves nothing open; it may have
        taken the session over. Raises BlobUploadUnknown if another request publishes or deletes the session's bytes at
        the same time."""
        ...

    async def upload_size(self, upload: UploadID) -> int:
        """Returns the number of bytes that the session has stored; 0 for an unknown id, and for bytes that the store
        cannot read."""
        ...

    async def discard_upload(self, upload: UploadID) -> None:
        """Deletes a session's bytes, even while a caller owns it. Does nothing for an unknown id. Keeps bytes that
        the store cannot read."""
        ...

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        """Returns the sessions for which the store has any data, and when each last changed (seconds since 1970)."""
        ...

    def prepare_link(self, fd: int, digest: Digest, size: int) -> VerifiedContent:
        """Returns content whose `publish` links to another program's file, instead of copying its bytes. Makes no link
        itself. `fd`: the file, opened for reading. This method does not verify the digest: the caller has to verify, at
        the latest before it calls `publish`, that the `size` bytes of the file have this digest. The caller closes `fd`
        after `publish` has returned. The bytes of the file must never change after this call; the other program may
        delete the file. Raises LinkRefused if the store cannot link to this file; `publish` also raises it."""
        ...

    async def remove(self, place: str) -> None:
        """Removes the bytes at `place`. Does nothing if there are no bytes, or if `place` is the empty text (the place
        of a damaged blob). The caller must hold the lock of the digest (`DigestLocks`) and must have deleted the
        metadata row of the blob. The disk space can stay in use until `reclaim_space` is called."""
        ...

    async def reclaim_space(self) -> None:
        """Frees the disk space of the bytes that `remove` has removed."""
        ...

    async def unreclaimed_size(self) -> int:
        """Returns the number of bytes whose disk space `reclaim_space` would free now."""
        ...

    async def stored_sizes(self, places: Sequence[str]) -> list[int | None]:
        """Returns for each place the number of bytes that the store has there; None if it has nothing there;
        `UNREADABLE` if it has bytes there but cannot read them."""
        ...

    async def list_shard(self, number: int) -> list[ListedBlob]:
        """Returns the stored blobs of one shard. `number`: 0 to `shard_count` - 1. Raises BytesForbidden if this
        process has no permission to list them."""
        ...

    async def check(
        self, digest: Digest, size: int, place: str, on_read: OnRead, *, from_disk: bool = False
    ) -> ContentCheck:
        """Reads all bytes at `place` and compares them with the digest and the size. Does not displace other content
        from memory. `from_disk`: reads all bytes from the disk, even if earlier reads have left a copy of them in
        memory, because that copy can be wrong too. Raises BytesMissing, BytesForbidden, and the errors of
        `on_read`."""
        ...

    async def version(self, place: str) -> str | None:
        """Returns a text that identifies the bytes at `place`. The text changes when other bytes are stored there.
        Returns None if there are no bytes."""
        ...

    def quarantine_place(self, digest: Digest) -> str:
        """Returns the key under which `quarantine` keeps the damaged bytes of a blob."""
        ...

    async def quarantine(self, digest: Digest, place: str) -> None:
        """Moves the bytes at `place` to `quarantine_place(digest)`, so that they cannot be opened as the blob any more.
        Replaces damaged bytes of the same blob that are already there. If the disk has no space to keep the bytes,
        deletes them. Does nothing if there are no bytes at `place`. The caller must hold the lock of the digest, and
        the blob's metadata row must not name `place`."""
        ...

    async def list_quarantine(self) -> list[QuarantinedBytes]:
        """Returns the damaged bytes that the store keeps, oldest first."""
        ...

    async def delete_quarantined(self, digest: Digest) -> bool:
        """Deletes the damaged bytes of a blob from the quarantine. Returns whether there were such bytes."""
        ...

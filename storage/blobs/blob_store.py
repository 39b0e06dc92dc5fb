"""Protocols of a store for the bytes of blobs (`BlobStore`) and of upload sessions (`UploadSession`).

A store may keep its bytes in files on a local disk or in objects of a bucket. For a bucket, the methods must not need
renames, paths, file descriptors, or changes inside a stored object: they replace or delete an object only as a
whole. Two members are for local files only: `BlobStore.prepare_link`, which a store may refuse, and `BlobReader.file`,
which may be None. The metadata database, not the store, decides which blobs exist.

A *place* is the key under which a store keeps the bytes of one blob. The metadata database stores the place of each
blob, but only the store understands it. Bytes are *durable* if they survive a crash of the machine. To *publish*
verified bytes is to store them durably at their place. The *owner* of an upload session is the caller that may write to
the session; a newer caller can take the session over at any time.
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
"""The number of bytes that the store reports if it has bytes but cannot read them."""


class BytesMissing(Exception):
    """The store has no bytes at the given place."""


class LinkRefused(Exception):
    """The store cannot link to a file of another program. The message of the exception says why."""


class ListedBlob(NamedTuple):
    """A blob in a listing of the stored bytes. `place`: the key under which the store keeps the bytes. `written`: when
    the bytes were last written, in seconds since 1970. `size`: number of the bytes. If the store cannot read these two
    values, `size` is `UNREADABLE` and `written` is 0."""

    digest: Digest
    place: str
    written: float
    size: int


class QuarantinedBytes(NamedTuple):
    """Damaged bytes of a blob. The store keeps them in its *quarantine*, where nobody can open them as the blob.
    `digest`: the digest that the bytes should have. `place`: the key under which the store keeps them. `size`: number
    of the bytes. `since`: when they were moved to the quarantine, in seconds since 1970."""

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
"""`BlobStore.check` calls this function after each part of the bytes that it has read, with the number of bytes in the
part. The function may wait, to limit the rate of the reads. An error of the function ends the check."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved progress of an upload session: its first `offset` bytes are stored. `boot`: the value of `BlobStore.boot`
    when the checkpoint was made. `state`: the state of the digest computation over the stored bytes, in a format that
    only the store can read; with it, the store can continue the computation. If `state` is None, the store has to hash
    the stored bytes again before the upload is complete; after a reboot, `ClaimedUpload.resume` deletes the bytes."""

    offset: int
    state: bytes | None
    boot: str

    def check_not_truncated(self, stored_bytes: int) -> None:
        """Raises BlobUploadUnknown if the session has fewer bytes than the checkpoint says, because an earlier request
        has published or deleted them. `stored_bytes`: number of bytes that the session has now."""
        if stored_bytes < self.offset:
            raise BlobUploadUnknown()


class VerifiedContent(Protocol):
    """Bytes that are durable and whose digest was verified. They are not a blob yet. `size`: number of the bytes."""

    digest: Digest
    size: int
    place: str
    """Key under which `publish` stores the bytes."""

    async def publish(self) -> None:
        """Stores the bytes durably at `place`. Replaces bytes that `place` already has, because the old bytes may be
        damaged. The caller must hold the lock of the digest (`DigestLocks`). Raises StorageFull, StorageFailed,
        BlobUploadInvalid (a newer request has taken the session over)."""
        ...


class UploadSession(Protocol):
    """The bytes of an upload session, for the caller that is the session's owner. After a newer caller has taken the
    session over, methods of this object that read, write or delete stored bytes raise BlobUploadInvalid. The async
    methods also raise StorageFull and StorageFailed."""

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
        """Stores all appended bytes and returns a checkpoint. Any process can continue the session from the checkpoint.
        The bytes survive the end of this process, but may be lost in a crash of the machine (`BlobStore.boot`)."""
        ...

    async def verify(self, digest: Digest) -> VerifiedContent:
        """Stores all appended bytes durably, checks that they have this digest, and returns an object that can publish
        them. Raises DigestInvalid, with the actual digest."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless they have been published."""
        ...

    def release(self) -> None:
        """Releases memory and file handles, without waiting. If a write is running, the end of the write releases them.
        Flushed bytes are kept for the next owner. May be called more than once."""
        ...

    async def close(self) -> None:
        """Releases memory and file handles like `release`. After `discard`, also waits until the disk space of the
        deleted bytes is free; a cancelled call waits too. Call `close` only while no write is running."""
        ...


class ClaimedUpload(Protocol):
    """An upload session that the caller has just taken over. `resume` compares its stored bytes with its last
    checkpoint before more bytes are appended."""

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> UploadSession:
        """Returns the session, ready for more bytes. `algorithm`: the digest algorithm of the session, such as
        `sha256`.

        - If `checkpoint.boot` is the `boot` of the store, keeps all stored bytes.
        - If `checkpoint.boot` differs, the stored bytes may be damaged. Hashes the first `checkpoint.offset` bytes
          again. If this gives `checkpoint.state`, keeps these bytes and deletes the bytes after them. If it gives
          another state, or if `checkpoint.state` is None, deletes all bytes.

        Raises BlobUploadUnknown (the session has fewer bytes than the checkpoint says, because an earlier request has
        published or deleted them), BlobUploadInvalid (a newer caller has taken the session over), StorageFull,
        StorageFailed."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless a newer caller has taken the session over. Releases the file handles.
        Raises StorageFull, StorageFailed."""
        ...

    def release(self) -> None:
        """Releases the file handles without waiting. The session's bytes are kept for the next owner."""
        ...


class BlobStore(Protocol):
    """Stores the bytes of blobs and of upload sessions. Several processes may use the same store at the same time, and
    any process can continue an upload session. The async methods raise StorageFull and StorageFailed, in addition to
    the errors that their docstrings name."""

    boot: str
    """A text that changes when bytes that `UploadSession.flush` has stored may have been lost. If `flush` leaves the
    bytes in the page cache, `boot` is the id of the machine's present boot, because a reboot may lose these bytes.
    If `flush` syncs the bytes, `boot` is always the same text."""
    shard_count: int
    """Number of *shards*: the parts in which `list_shard` lists the blobs. Each blob is in one of them."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Opens the blob with this digest and size, whose bytes are at `place`. `span`: the part of the blob to read;
        None: all of it. Raises RangeInvalid, BytesMissing."""
        ...

    def start_upload(self, upload: UploadID, algorithm: str) -> UploadSession:
        """Returns a new session. Stores nothing yet. `algorithm`: the digest algorithm, such as `sha256`, that hashes
        the appended bytes."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedUpload]:
        """Takes the session over from its owner, without waiting for the owner. If the id is unknown, creates an empty
        session. Before the takeover, calls `check`, possibly in a thread, with the number of stored bytes. If `check`
        raises an error, the owner keeps the session, and this call raises the same error. A cancelled call leaves
        nothing open, but may have taken the session over. Raises BlobUploadUnknown if another request publishes or
        deletes the session's bytes at the same time."""
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
        """Returns an object whose `publish` makes the blob a link to another program's file, without copying its bytes.
        `fd`: the file, opened for reading. The caller closes `fd` after `publish` has returned. This method does not
        verify the digest: before it calls `publish`, the caller has to verify that the `size` bytes of the file have
        this digest. The bytes of the file must never change after this call, but the other program may delete the file.
        This method and `publish` raise LinkRefused if the store cannot link to the file."""
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
        """Returns for each place the number of its bytes; None if the place has no bytes; `UNREADABLE` if it has bytes
        that the store cannot read."""
        ...

    async def list_shard(self, number: int) -> list[ListedBlob]:
        """Returns the stored blobs of one shard. `number`: 0 to `shard_count` - 1. Raises BytesForbidden if this
        process has no permission to list them."""
        ...

    async def check(
        self, digest: Digest, size: int, place: str, on_read: OnRead, *, from_disk: bool = False
    ) -> ContentCheck:
        """Reads all bytes at `place` and compares them with the digest and the size. Does not displace other content
        from the page cache. `from_disk`: whether to read all bytes from the disk, even if they are in the page cache,
        because the copy there can be wrong. Raises BytesMissing, BytesForbidden, and the errors of `on_read`."""
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
        Replaces bytes of the blob that are already in the quarantine. If the disk is too full for the move, deletes the
        bytes at `place`. Does nothing if `place` has no bytes. The caller must hold the lock of the digest, and the
        blob's metadata row must not name `place`."""
        ...

    async def list_quarantine(self) -> list[QuarantinedBytes]:
        """Returns the damaged bytes that the store keeps, oldest first."""
        ...

    async def delete_quarantined(self, digest: Digest) -> bool:
        """Deletes the damaged bytes of a blob from the quarantine. Returns whether there were such bytes."""
        ...

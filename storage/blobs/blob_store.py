"""Protocols of a store for the bytes of blobs (`BlobStore`) and of upload sessions (`UploadSession`).

A store may keep its bytes in files on a local disk or in objects of a bucket. Two members are for local files only:
`BlobStore.prepare_link`, which a store may refuse, and `BlobReader.file`, which may be None. No other member may need
renames, paths, file descriptors, or changes of a part of an object: a bucket can only replace or delete a whole object.
The metadata database, not the store, decides which blobs exist.

A *place* is the key under which a store keeps the bytes of one blob. The metadata database has the place of each blob,
but only the store understands places. Bytes are *durable* if they survive a crash of the machine. To *publish*
verified bytes is to store them durably at their place. The *owner* of an upload session is the caller that may write to
the session. A newer caller can take the session over at any time.
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
"""The size that the store returns for bytes that it has but cannot read."""


class BytesMissing(Exception):
    """The store has no bytes at the given place."""


class LinkRefused(Exception):
    """The store cannot link to a file of another program. The message of the exception says why."""


class ListedBlob(NamedTuple):
    """A blob in a listing of the stored bytes. `place`: the key under which the store keeps the bytes. `written`: when
    the bytes were last written, in seconds since 1970. `size`: number of the bytes. If the store cannot find out
    the time and the size, `written` is 0 and `size` is `UNREADABLE`."""

    digest: Digest
    place: str
    written: float
    size: int


class QuarantinedBytes(NamedTuple):
    """Damaged bytes of a blob. The store keeps them in its *quarantine*, where nobody can open them as the blob.
    `digest`: the digest that the bytes should have. `place`: the key under which the store keeps the bytes. `size`:
    number of the bytes. `since`: when the bytes were moved to the quarantine, in seconds since 1970."""

    digest: Digest
    place: str
    size: int
    since: float


class ContentCheck(NamedTuple):
    """The result of reading all stored bytes of a blob. `problem`: a message that says what is wrong with the bytes;
    None if they have the right digest and size. `version`: a text that identifies the bytes (`BlobStore.version`)."""

    problem: str | None
    version: str


OnRead = Callable[[int], Awaitable[None]]
"""`BlobStore.check` calls this function each time that it has read some bytes. The argument is the number of these
bytes. The function may wait, to limit the rate of the reads. An error of the function ends the check."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved progress of an upload session.

    - `offset`: the number of bytes that the session has stored.
    - `state`: the state of the digest computation over these bytes, in a format that only the store can read. None: the
      store has to hash the bytes again.
    - `boot`: the value of `BlobStore.boot` when the checkpoint was made."""

    offset: int
    state: bytes | None
    boot: str

    def check_not_truncated(self, stored_bytes: int) -> None:
        """Raises BlobUploadUnknown if `stored_bytes`, the number of bytes that the session has now, is less than
        `offset`. In this case, an earlier request has published or deleted the bytes."""
        if stored_bytes < self.offset:
            raise BlobUploadUnknown()


class VerifiedContent(Protocol):
    """Bytes that are durable and whose digest was verified, but which are not a blob yet. `size`: number of the
    bytes."""

    digest: Digest
    size: int
    place: str
    """Key under which `publish` stores the bytes."""

    async def publish(self) -> None:
        """Stores the bytes durably at `place`. Replaces older bytes at `place`, because they may be damaged. The
        caller must hold the lock of the digest (`DigestLocks`). Raises StorageFull, StorageFailed, BlobUploadInvalid (a
        newer request has taken the session over)."""
        ...


class UploadSession(Protocol):
    """The bytes of an upload session, for the session's owner. After a newer caller has taken the session over, the
    methods of this object that read, write or delete stored bytes raise BlobUploadInvalid. All async methods can raise
    StorageFull and StorageFailed."""

    @property
    def offset(self) -> int:
        """Number of bytes appended so far."""
        ...

    async def append(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. If `data` is a memoryview, the caller must never change its memory afterwards,
        because the store may read the memory after this call has returned."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes at `offset`, or fewer bytes if the appended bytes end before."""
        ...

    async def flush(self) -> Checkpoint:
        """Stores all appended bytes and returns a checkpoint, from which any process can continue the session. The
        bytes survive the end of this process, but a crash of the machine may lose them (`BlobStore.boot`)."""
        ...

    async def verify(self, digest: Digest) -> VerifiedContent:
        """Stores all appended bytes durably, checks that they have this digest, and returns an object that can publish
        the bytes. Raises DigestInvalid, with the actual digest, if the digest differs."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless they have been published."""
        ...

    def release(self) -> None:
        """Releases memory and file handles, without waiting. While a write is running, they are released when the write
        ends. Keeps flushed bytes for the next owner. May be called more than once."""
        ...

    async def close(self) -> None:
        """Releases memory and file handles like `release`. After `discard`, waits until the disk space of the deleted
        bytes is free, even if the call is cancelled. Call `close` only while no write is running."""
        ...


class ClaimedUpload(Protocol):
    """An upload session that the caller has just taken over. To append more bytes, call `resume`."""

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> UploadSession:
        """Returns the session, ready for more bytes. `algorithm`: the digest algorithm of the session, such as
        `sha256`.

        - If `checkpoint.boot` is the `boot` of the store, keeps all stored bytes.
        - If `checkpoint.boot` differs, the stored bytes may be damaged. Hashes the first `checkpoint.offset` bytes
          again. If the result is `checkpoint.state`, keeps these bytes and deletes the bytes after them. Otherwise, and
          if `checkpoint.state` is None, deletes all bytes.

        Raises BlobUploadUnknown (the session has fewer than `checkpoint.offset` bytes), BlobUploadInvalid (a newer
        caller has taken the session over), StorageFull, StorageFailed."""
        ...

    async def discard(self) -> None:
        """Deletes the session's bytes, unless a newer caller has taken the session over. Releases the file handles.
        Raises StorageFull, StorageFailed."""
        ...

    def release(self) -> None:
        """Releases the file handles without waiting. Keeps the session's bytes for the next owner."""
        ...


class BlobStore(Protocol):
    """Stores the bytes of blobs and of upload sessions. Several processes may use the same store at the same time, and
    any process can continue an upload session. All async methods can raise StorageFull and StorageFailed, in addition
    to the errors that their docstrings name."""

    boot: str
    """If this text differs from its value at a call of `UploadSession.flush`, the bytes that the call has stored may
    have been lost. Otherwise, no crash of the machine has lost them.

    - If `flush` leaves the bytes in the page cache, a reboot may lose them: `boot` is the machine's boot id.
    - If `flush` syncs the bytes, `boot` never changes."""
    shard_count: int
    """Number of *shards*, the parts of the list of blobs that `list_shard` returns. Each blob is in one shard."""

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> BlobReader:
        """Opens the blob with this digest and size, whose bytes are at `place`. `span`: the part of the blob to read;
        None: the whole blob. Raises RangeInvalid, BytesMissing."""
        ...

    def start_upload(self, upload: UploadID, algorithm: str) -> UploadSession:
        """Returns a new session. Stores nothing yet. `algorithm`: the digest algorithm, such as `sha256`, that hashes
        the appended bytes."""
        ...

    def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> Awaitable[ClaimedUpload]:
        """Takes the session over from its owner, without waiting for the owner. If the id is unknown, creates an empty
        session. Raises BlobUploadUnknown if another request publishes or deletes the session's bytes at the same time.
        A cancelled call leaves nothing open, but may have taken the session over.

        `check`: called before the takeover, possibly in a thread, with the number of stored bytes. If `check` raises an
        error, the owner keeps the session, and this call raises the error of `check`."""
        ...

    async def upload_size(self, upload: UploadID) -> int:
        """Returns the number of bytes that the session has stored; 0 for an unknown id, and for bytes that the store
        cannot read."""
        ...

    async def discard_upload(self, upload: UploadID) -> None:
        """Deletes a session's bytes, even while the session has an owner. Does nothing for an unknown id. Keeps bytes
        that the store cannot read."""
        ...

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        """Returns each session for which the store has any data, and the time of the session's last change, in seconds
        since 1970."""
        ...

    def prepare_link(self, fd: int, digest: Digest, size: int) -> VerifiedContent:
        """Returns an object whose `publish` makes the blob a link to another program's file, without copying its bytes.
        This method and `publish` raise LinkRefused if the store cannot link to the file.

        `fd`: the file descriptor of the file, opened for reading. The caller must verify the digest and the size of the
        file before it calls `publish`, and close `fd` after `publish` has returned. After this call, the bytes of the
        file must never change, but the other program may delete the file."""
        ...

    async def remove(self, place: str) -> None:
        """Removes the bytes at `place`. Does nothing if `place` has no bytes, or if `place` is the empty text (the
        place of a damaged blob). The caller must hold the lock of the digest (`DigestLocks`) and must have deleted the
        metadata row of the blob. The bytes may occupy disk space until `reclaim_space` is called."""
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
        from the page cache. `from_disk`: whether to read all bytes from the disk, and none from the page cache, where
        the copy can be wrong. Raises BytesMissing, BytesForbidden, and the errors of `on_read`."""
        ...

    async def version(self, place: str) -> str | None:
        """Returns a text that identifies the bytes at `place`; None if `place` has no bytes. The text changes when
        other bytes are stored at `place`."""
        ...

    def quarantine_place(self, digest: Digest) -> str:
        """Returns the key under which `quarantine` keeps the damaged bytes of a blob."""
        ...

    async def quarantine(self, digest: Digest, place: str) -> None:
        """Moves the bytes at `place` to `quarantine_place(digest)`, so that they cannot be opened as the blob any more.
        Replaces older bytes at `quarantine_place(digest)`. If the disk is too full for the move, deletes the
        bytes at `place`. Does nothing if `place` has no bytes. The caller must hold the lock of the digest, and the
        blob's metadata row must not name `place`."""
        ...

    async def list_quarantine(self) -> list[QuarantinedBytes]:
        """Returns the damaged bytes in the quarantine, oldest first."""
        ...

    async def delete_quarantined(self, digest: Digest) -> bool:
        """Deletes the damaged bytes of a blob from the quarantine. Returns whether the quarantine had any bytes of the
        blob."""
        ...

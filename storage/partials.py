"""The interface of partial blobs (`Partials`): blobs whose download from an upstream registry is not complete.

All processes share the partial blobs of a data directory. A request that needs a partial blob gets a *handle* to it. At
any time, at most one handle in all processes is the *owner*: its request downloads the blob. The other handles are
*followers*: their requests read the bytes as they arrive.

A partial blob is always a file (`Partial.file`), even if the blob store keeps blobs as objects: its bytes arrive out of
order, and other processes read them at the same time. The one implementation is
`storage.blobs.files.file_partial_store`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from storage.content import Descriptor, OpenFile, PartialFailures
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

MIN_KEPT_BYTES: Final = 256 * 1024
"""`discard_if_nearly_empty` deletes partial blobs with fewer bytes. If they stayed, an upstream that sends only a few
bytes of each blob could fill the store with nearly empty files."""


@dataclass(frozen=True, slots=True)
class ExpiredPartial:
    """A partial blob that `Partials.expire` has found. `size`: number of bytes that the partial blob occupies."""

    digest: Digest
    size: int


class Partial(Protocol):
    """One handle to a partial blob, not the partial blob itself. All handles to a partial blob share two things: the
    file with its bytes, and the record of the bytes that have arrived.

    Only the owner writes. When the owner is closed or its process dies, the next handle that calls `take_ownership`
    becomes the owner. The new owner continues the download; bytes that have arrived stay. `write_at` blocks and is
    called in threads; all other methods are called on the event loop.
    """

    digest: Digest
    """The digest that the complete blob must have."""
    size: int
    """Size of the complete blob in bytes."""
    file: OpenFile
    """The file with the bytes. It can be read until this handle is closed, even after the bytes were committed or
    deleted."""

    @property
    def is_owner(self) -> bool:
        """Whether this handle is the owner."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether any process has committed or deleted the partial blob. After that, no process downloads bytes
        into `file`. Reading the property makes a system call, and may raise StorageFailed."""
        ...

    def take_ownership(self) -> bool:
        """Makes this handle the owner if there is no owner, and returns whether this handle is the owner now. Never
        waits. If the partial blob was committed or deleted, returns False; the caller can get a new partial blob from
        `Partials.claim`. Raises StorageFailed."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """Returns the ranges of bytes that have not arrived, in ascending order. A range is a pair: the offset of its
        first byte, and the offset after its last byte. Raises StorageFailed."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` at `offset`. Only for the owner. When the call returns, all handles can read the bytes. Blocks.
        Several threads may call this method at the same time. Raises:

        - StorageFull if the disk is full. The partial blob is then deleted.
        - StorageFailed if the bytes cannot be written for another reason.
        - SizeInvalid if the bytes lie outside the blob.
        - PartialBlobLost if this handle is not the owner any more, or if the partial blob was deleted."""
        ...

    async def wait(self, offset: int, /) -> int:
        """Waits until the byte at `offset` has arrived. Returns the offset of the next missing byte; `size` if no
        further byte is missing. If `offset` is `size`, waits until the blob is committed, and returns `size`.

        Raises PartialBlobLost if no owner is left to download the byte; the caller may call `take_ownership` and
        continue the download. Raises DigestInvalid if the digest of the complete blob is wrong. Raises StorageFailed.
        Cancelling the call affects neither the download nor other calls."""
        ...

    def add_waiter(self) -> None:
        """Registers this handle as a *waiter* until the handle is closed. A waiter is a handle through which a client
        waits for the blob; a handle that only prefetches the blob is no waiter. `wait` does not register a waiter.
        Raises StorageFailed."""
        ...

    @property
    def has_waiters(self) -> bool:
        """Whether any other handle, in any process, is registered as a waiter. Reading the property makes a system
        call, and may raise StorageFailed."""
        ...

    def mark_upstream_request(self, repo: RepositoryName) -> None:
        """Records for all processes that the owner has started to request bytes from the upstream registry. `repo`: the
        upstream registry's repository from which the owner requests them. Only for the owner. Raises StorageFailed."""
        ...

    @property
    def has_upstream_request(self) -> bool:
        """Whether the owner, in any process, has called `mark_upstream_request`. An owner that has not called it is
        still waiting for one of the limited number of connections to the upstream registry. Reading the property may
        raise StorageFailed."""
        ...

    def has_upstream_request_to(self, repo: RepositoryName) -> bool:
        """Returns whether the owner, in any process, has called `mark_upstream_request` with this repository. Raises
        StorageFailed."""
        ...

    def mark_response(self) -> None:
        """Records for all processes that the upstream registry has started to send bytes to the owner. Only for the
        owner. Raises StorageFailed."""
        ...

    @property
    def has_response(self) -> bool:
        """Whether the present owner, in any process, has called `mark_response`. Calls by earlier owners do not count.
        Reading the property may raise StorageFailed."""
        ...

    async def report_failure(self, reason: str) -> None:
        """Tells all followers why the download failed. Only for the owner, which must call `close` next. The bytes that
        have arrived stay. Raises nothing. If the reason cannot be stored, the followers do not learn the reason."""
        ...

    @property
    def owner_failures(self) -> PartialFailures:
        """The number of failures that owners have reported so far, and the reason of the latest failure. Each new
        failure increases the number. A caller can compare the values of two reads to learn whether an owner has
        reported a failure between them. Reading the property makes a system call, and may raise StorageFailed."""
        ...

    async def commit(
        self, repo: RepositoryName, on_corrupt: Callable[[], Awaitable[None]] | None = None, /
    ) -> Descriptor:
        """Checks the digest, stores the bytes durably as a blob of `repo`, lets all calls of `wait` return, and returns
        the blob's descriptor. Only for the owner, when no bytes are missing.

        - If the digest is wrong, calls and awaits `on_corrupt` (unless it is None), deletes all bytes, and raises
          DigestInvalid. From then on, `wait` raises DigestInvalid in all processes.
        - If this handle is not the owner, or bytes are missing, deletes nothing and raises PartialBlobLost.
        - If the bytes cannot be stored, deletes them and raises StorageFull, StorageFailed or QuotaExceeded.

        A cancelled call takes effect either completely or not at all."""
        ...

    async def discard(self) -> None:
        """Deletes the partial blob. Only for the owner; does nothing for other handles. From then on, in all processes,
        `wait` raises PartialBlobLost for the bytes that have not arrived."""
        ...

    def close(self) -> None:
        """Closes this handle. If this handle was the owner, there is no owner afterwards. The bytes that have arrived
        stay for the next owner. May be called more than once."""
        ...


class Partials(Protocol):
    """The partial blobs of a data directory, which all processes share."""

    async def claim(self, digest: Digest, size: int, source: str = "") -> Partial:
        """Returns a handle to the partial blob with this `digest`, `size` and `source`. Creates the partial blob if it
        does not exist. The handle becomes the owner if there is no owner.

        `size`: size of the complete blob in bytes. `source`: a text that names the origin of the bytes, such as the
        upstream registry, so that corrupt bytes from one source do not mix with bytes from another source.

        Raises StorageFull, StorageFailed, SizeInvalid (`size` is negative). A cancelled call leaves no handle open and
        makes no handle the owner."""
        ...

    async def list_downloads(self) -> set[Digest]:
        """Returns the digests of the blobs that a process is downloading now. Includes partial blobs whose state
        cannot be read from the disk, because a process may be downloading them. Raises StorageFailed."""
        ...

    async def expire(self, before: float, *, dry_run: bool = False) -> list[ExpiredPartial]:
        """Deletes each partial blob that has no owner, if its last write was before the time `before` (seconds since
        1970), or before the machine was last booted. Returns the deleted partial blobs. With `dry_run`, returns the
        same partial blobs, but deletes nothing. Raises StorageFull, StorageFailed."""
        ...


async def discard_if_nearly_empty(partial: Partial) -> None:
    """Deletes a partial blob whose download has failed, in two cases:

    - No byte has arrived.
    - Fewer than `MIN_KEPT_BYTES` bytes have arrived, and no other handle is a waiter. (A waiter could become the owner
      and continue the download.)

    Only for the owner; does nothing for other handles. Raises nothing: if the files cannot be deleted,
    `Partials.expire` deletes them later."""
    with suppress(RegistryError):
        if not partial.is_owner:
            return
        stored_bytes = partial.size - sum(stop - start for start, stop in partial.missing())
        if stored_bytes == 0 or (stored_bytes < MIN_KEPT_BYTES and not partial.has_waiters):
            await partial.discard()

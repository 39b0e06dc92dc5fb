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
"""After a failed download, `discard_if_nearly_empty` deletes a partial blob of which fewer bytes than this have
arrived, unless at least one byte has arrived and another client waits for the blob. If such partial blobs stayed, an
upstream that names many blobs, but sends only a few bytes of each, could fill the store with nearly empty files."""


@dataclass(frozen=True, slots=True)
class ExpiredPartial:
    """A partial blob whose download no process continues. `size`: number of bytes that the partial blob occupies."""

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
        """Whether the partial blob was committed or deleted, in any process. No process then downloads further bytes
        into `file`. Reading the property makes a system call, and may raise StorageFailed."""
        ...

    def take_ownership(self) -> bool:
        """Makes this handle the owner if there is no owner, and returns whether it is the owner now. Never waits. After
        the partial blob was committed or deleted, always returns False; `Partials.claim` then creates a new partial
        blob. Raises StorageFailed."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """Returns the ranges of bytes that have not arrived, in order. A range is the offset of its first byte and the
        offset after its last byte. Raises StorageFailed."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` at `offset`. Only for the owner. When the call returns, all handles can read the bytes. Blocks;
        several threads may call it at the same time. Raises StorageFull (the partial blob is deleted to free space),
        StorageFailed, SizeInvalid (the bytes lie outside the blob), PartialBlobLost (this handle is not the owner any
        more, or the partial blob was deleted)."""
        ...

    async def wait(self, offset: int, /) -> int:
        """Waits until the byte at `offset` has arrived, and returns the offset of the first missing byte after it (at
        most `size`). With `offset` equal to `size`, waits until the digest was checked and the blob is committed, and
        returns `size`. Raises PartialBlobLost if no owner is left to download the byte; the caller may then call
        `take_ownership` and continue the download. Raises DigestInvalid if the complete blob had another digest. Raises
        StorageFailed. Cancelling the call affects neither the download nor other calls."""
        ...

    def add_waiter(self) -> None:
        """Registers this handle as a *waiter* until this handle is closed. A waiter is a handle through which a client
        waits for the blob; a handle that only prefetches the blob is no waiter. `has_waiters` of the owner, in any
        process, shows whether there are waiters. Calling `wait` does not register a waiter. Raises StorageFailed."""
        ...

    @property
    def has_waiters(self) -> bool:
        """Whether any other handle, in any process, is registered as a waiter. Reading the property makes a system
        call, and may raise StorageFailed."""
        ...

    def mark_upstream_request(self, repo: RepositoryName) -> None:
        """Records for all processes that the owner has started to request bytes from the upstream registry. `repo`: the
        repository of the upstream registry that the owner requests the bytes from. Only for the owner. Raises
        StorageFailed."""
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
        """Whether the present owner, in any process, has called `mark_response`. Bytes that have arrived do not show
        this, because they may come from the download of an earlier owner. Reading the property may raise
        StorageFailed."""
        ...

    async def report_failure(self, reason: str) -> None:
        """Tells all followers why the download failed. Only for the owner, which then calls `close`. The bytes that
        have arrived stay. Raises nothing: if the reason cannot be stored, the followers only learn that there is no
        owner any more."""
        ...

    @property
    def owner_failures(self) -> PartialFailures:
        """The failures that owners have reported so far. To detect a new failure, a follower compares this value with
        the value that it read before. Reading the property makes a system call, and may raise StorageFailed."""
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
        """Deletes the partial blob. Only for the owner; does nothing for other handles. The owner calls this if the
        blob is stored already, or if the download has failed. From then on, in all processes, `wait` raises
        PartialBlobLost for the bytes that have not arrived."""
        ...

    def close(self) -> None:
        """Closes this handle. If it was the owner, there is no owner afterwards. The bytes that have arrived stay for
        the next owner. May be called more than once."""
        ...


class Partials(Protocol):
    """The partial blobs of a data directory, which all processes share."""

    async def claim(self, digest: Digest, size: int, source: str = "") -> Partial:
        """Returns a handle to the partial blob, and creates the partial blob if it does not exist. The handle becomes
        the owner if there is no owner. `size`: size of the complete blob in bytes. `source`: name of the upstream
        registry that the bytes come from. Two calls get handles to the same partial blob only if they pass the same
        `digest`, `size` and `source`, so that corrupt bytes from one upstream do not mix with bytes from another.
        Raises StorageFull, StorageFailed, SizeInvalid (`size` is negative). If the call is cancelled, it leaves no
        handle open and makes no handle the owner."""
        ...

    async def list_downloads(self) -> set[Digest]:
        """Returns the digests of the blobs that a process is downloading now. Includes partial blobs whose state
        cannot be read from the disk, because a process may be downloading them. Raises StorageFailed."""
        ...

    async def expire(self, before: float, *, dry_run: bool = False) -> list[ExpiredPartial]:
        """Deletes the partial blobs that have no owner and were last written before the time `before` (seconds since
        1970) or during an earlier boot of the machine. Returns them. `dry_run`: returns them without deleting them.
        Raises StorageFull, StorageFailed."""
        ...


async def discard_if_nearly_empty(partial: Partial) -> None:
    """Deletes a partial blob whose download has failed, if fewer than `MIN_KEPT_BYTES` bytes have arrived. Keeps it if
    some bytes have arrived and another handle is a waiter (`Partial.has_waiters`), because that handle can become the
    owner and continue the download. Only for the owner; does nothing for other handles. Raises nothing: if the files
    cannot be deleted, `Partials.expire` deletes them later."""
    with suppress(RegistryError):
        if not partial.is_owner:
            return
        stored_bytes = partial.size - sum(stop - start for start, stop in partial.missing())
        if stored_bytes == 0 or (stored_bytes < MIN_KEPT_BYTES and not partial.has_waiters):
            await partial.discard()

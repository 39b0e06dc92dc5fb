"""Partial blobs: blobs that are being fetched from an upstream, shared by all processes (`Partials`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from storage.content import Descriptor, OpenFile, PartialFailures
from storage.names import Digest, RepositoryName


class Partial(Protocol):
    """A blob whose bytes are arriving in a file, and a record of which bytes are there. All processes see the same.

    One process at a time owns it, and only the owner writes. When the owner dies, the next process that asks becomes
    the owner and continues with the bytes that are there. `write_at` blocks and is called in threads; everything else
    is called on the event loop.
    """

    digest: Digest
    size: int
    file: OpenFile
    """Open for reading until `close`, also after `commit` has made the file a blob."""

    @property
    def is_owner(self) -> bool:
        """Whether this object is the owner."""
        ...

    def take_ownership(self) -> bool:
        """Makes this object the owner if there is none, and returns whether it is the owner now. Never waits."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """Returns the gaps: first byte and the one after the last of each, in order. Raises StorageFailed."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes bytes at their offset; readers see them at once. For the owner. Blocking; several threads may call it.
        Raises StorageFull, StorageFailed, PartialLost (this object is not the owner any more, or the partial was
        dropped)."""
        ...

    async def wait(self, at: int) -> int:
        """Waits until the byte at `at` is there, and returns how far the bytes reach from there without a gap (at most
        `size`). `at` equal to `size` waits for the digest check, and returns `size` once the blob is committed. Raises
        PartialLost (there is no owner any more, and bytes are missing: the caller may `own` it and continue),
        DigestInvalid (the bytes proved wrong). A cancellation leaves nothing."""
        ...

    def add_waiter(self) -> None:
        """Registers a waiter, until `close`: the owner, in whatever process, finds the partial `wanted`. Raises
        StorageFailed."""
        ...

    @property
    def has_waiters(self) -> bool:
        """Whether another object than this has registered a waiter, in any process. Makes a system call; raises
        StorageFailed."""
        ...

    def mark_started(self) -> None:
        """Marks that the owner has started to request bytes from its source. Raises StorageFailed."""
        ...

    @property
    def has_started(self) -> bool:
        """Whether the owner, in whatever process, has started to request bytes; before that it waits for a slot. Raises
        StorageFailed."""
        ...

    async def report_failure(self, reason: str) -> None:
        """Tells all followers why the owner is about to stop. For the owner, before `close`. The bytes that are there
        stay. Raises nothing: if the reason cannot be stored, followers only learn that there is no owner."""
        ...

    @property
    def owner_failures(self) -> PartialFailures:
        """Failures that owners have reported. A follower compares two values. Makes a system call; raises
        StorageFailed."""
        ...

    async def commit(self, repo: RepositoryName, blame: Callable[[], Awaitable[None]] | None = None) -> Descriptor:
        """Checks the digest, makes the bytes a blob of `repo`, durably, and wakes all waiters. For the owner, with
        nothing missing. Most of the digest was computed while the bytes came. Raises DigestInvalid (nothing is kept;
        waiters get it too), PartialLost, StorageFull, StorageFailed. `blame` is called for wrong bytes, before anybody
        learns of them. Cancelled: the commit is made or not, never half."""
        ...

    def close(self) -> None:
        """Releases the partial: ownership is free, and the bytes stay for the next owner. Idempotent."""
        ...


class Partials(Protocol):
    """The partial blobs of all processes of a data directory."""

    async def claim(self, digest: Digest, size: int, source: str = "") -> Partial:
        """Returns the partial blob, creating it if needed, as its owner if there is no other. Partials are shared only
        between requests for the same `source` (whose bytes they are) and the same `size`. Raises StorageFull,
        StorageFailed, SizeInvalid (below 0). Cancelled: nothing is claimed."""
        ...

    async def expire(self, before: float) -> int:
        """Drops the partials without an owner that were last written before `before` (seconds since 1970), and returns
        their number."""
        ...

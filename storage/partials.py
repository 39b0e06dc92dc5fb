"""The interface of partial blobs (`Partials`): blobs that are being downloaded from an upstream registry.

All processes share the partial blobs of a data directory. At any time, at most one process downloads a partial blob; it
is the *owner*. The other processes that want the blob are its *followers*: they read the bytes as they arrive.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from storage.content import Descriptor, OpenFile, PartialFailures
from storage.names import Digest, RepositoryName


class Partial(Protocol):
    """One user's handle to a partial blob: to a file, and to a record of which bytes of it have arrived.

    Only the owner writes. When the owner stops or dies, the next handle that calls `take_ownership` becomes the owner
    and keeps the bytes that have arrived. `write_at` blocks and is called in threads; all other methods are called on
    the event loop.
    """

    digest: Digest
    """Expected digest of the complete blob."""
    size: int
    """Size of the complete blob in bytes."""
    file: OpenFile
    """The file. It can be read until `close`, also after `commit` has made it a blob."""

    @property
    def is_owner(self) -> bool:
        """Whether this handle is the owner."""
        ...

    def take_ownership(self) -> bool:
        """Makes this handle the owner if there is no owner, and returns whether it is the owner now. Never waits.
        Returns False for good once the partial blob was deleted; `Partials.claim` then creates a new one. Raises
        StorageFailed."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """Returns the ranges of bytes that have not arrived, in order: for each, the offsets of its first byte and of
        the byte after its last. Raises StorageFailed."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` at `offset`. All readers can read it at once. For the owner. Blocks; several threads may call
        it at the same time. Raises StorageFull, StorageFailed, PartialLost (this handle is not the owner any more, or
        the partial blob was deleted)."""
        ...

    async def wait(self, offset: int, /) -> int:
        """Waits until the byte at `offset` has arrived, and returns the offset of the first missing byte after it (at
        most `size`). With `offset` equal to `size`, waits until the digest was checked and the blob is committed, and
        returns `size`. Raises PartialLost if bytes are missing and there is no owner: the caller may call
        `take_ownership` and continue the download. Raises DigestInvalid if the complete blob had another digest. A
        cancellation leaves nothing behind."""
        ...

    def add_waiter(self) -> None:
        """Registers this handle as a waiter until `close`, so that `has_waiters` of the owner's handle becomes true, in
        whichever process it is. Raises StorageFailed."""
        ...

    @property
    def has_waiters(self) -> bool:
        """Whether any other handle, in any process, is registered as a waiter. Reading it makes a system call, and may
        raise StorageFailed."""
        ...

    def mark_started(self) -> None:
        """Records that the owner has started to request bytes from the upstream. For the owner. Raises
        StorageFailed."""
        ...

    @property
    def has_started(self) -> bool:
        """Whether the owner, in whichever process, has called `mark_started`. Before that, the owner waits for one of
        the limited connections to the upstream. Reading it may raise StorageFailed."""
        ...

    async def report_failure(self, reason: str) -> None:
        """Tells all followers why the download failed. For the owner, before `close`. The bytes that have arrived are
        kept. Raises nothing: if the reason cannot be stored, the followers only learn that there is no owner."""
        ...

    @property
    def owner_failures(self) -> PartialFailures:
        """The failures that owners have reported. A follower detects a new failure by comparing the value with an
        earlier one. Reading it makes a system call, and may raise StorageFailed."""
        ...

    async def commit(
        self, repo: RepositoryName, on_corrupt: Callable[[], Awaitable[None]] | None = None, /
    ) -> Descriptor:
        """Checks the digest, stores the bytes durably as a blob of `repo`, wakes all readers that `wait`, and returns
        the blob's descriptor. For the owner, when no bytes are missing. If the digest is wrong, it first awaits
        `on_corrupt`, then deletes all bytes, and then raises DigestInvalid, as every `wait` does from then on. Also
        raises PartialLost, StorageFull, StorageFailed. A cancelled commit has either happened completely or not at
        all."""
        ...

    def close(self) -> None:
        """Closes this handle. If it was the owner, there is no owner afterwards. The bytes that have arrived are kept
        for the next owner. May be called more than once."""
        ...


class Partials(Protocol):
    """The partial blobs of all processes of a data directory."""

    async def claim(self, digest: Digest, size: int, source: str = "") -> Partial:
        """Returns a handle to the partial blob, which is created if it does not exist. The handle becomes the owner if
        there is no owner. `source`: name of the upstream that the bytes come from. Two requests share a partial blob
        only if `digest`, `size` and `source` are the same, because another upstream might send corrupt bytes. Raises
        StorageFull, StorageFailed, SizeInvalid (`size` is negative). After a cancellation, nothing is owned."""
        ...

    async def expire(self, before: float) -> int:
        """Deletes the partial blobs that have no owner and were last written before the time `before` (seconds since
        1970). Returns their number."""
        ...

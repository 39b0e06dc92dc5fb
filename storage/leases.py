"""Locks that hold across all processes of a registry: `Leases` for work, `DigestLocks` for blobs.

A *lease* is the exclusive right to do some work. A *slot* is one of a limited number of permits, like that of a
semaphore.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from storage.names import Digest


class Leases(Protocol):
    """Leases and slots across all processes. The leases and slots of a process become free when it dies. All methods
    raise StorageFailed."""

    def take(self, key: str) -> AbstractAsyncContextManager[None]:
        """Waits for the lease of `key` and holds it inside the `async with` block."""
        ...

    def slot(self, name: str, count: int, keep_free: int = 0) -> AbstractAsyncContextManager[None]:
        """Waits for one of the `count` slots of `name` and holds it inside the `async with` block. `keep_free`: takes a
        slot only if at least this number of the other slots is free, so that more urgent work finds a free slot."""
        ...

    def try_slot(self, name: str, count: int, keep_free: int = 0) -> AbstractAsyncContextManager[bool]:
        """Does what `slot` does, but never waits. `async with … as is_held` tells whether the block holds a slot."""
        ...


class DigestLocks(Protocol):
    """A lock for each digest, across all processes. The locks of a process become free when it dies.

    A push holds the lock of a blob's digest while it stores the bytes and then commits the blob's metadata row. The
    garbage collector holds it while it deletes the row and then the bytes. The lock keeps the two from interleaving."""

    def hold(self, digest: Digest) -> AbstractAsyncContextManager[None]:
        """Waits for the lock of `digest` and holds it inside the `async with` block. Raises StorageFull,
        StorageFailed."""
        ...

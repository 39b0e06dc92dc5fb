"""Exclusive work and limited slots across processes (`Leases`), and locks by digest (`DigestLocks`)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from storage.names import Digest


class Leases(Protocol):
    """Leases across all processes. A process that dies loses its leases. All raise StorageFailed."""

    def take(self, key: str) -> AbstractAsyncContextManager[None]:
        """Waits for the lease of `key` and holds it inside the block."""
        ...

    def slot(self, name: str, count: int, keep_free: int = 0) -> AbstractAsyncContextManager[None]:
        """Waits for one of `count` slots of `name` and holds it inside the block. `keep_free`: at least that many other
        slots must be free as well, so that they stay for more urgent work."""
        ...

    def try_slot(self, name: str, count: int, keep_free: int = 0) -> AbstractAsyncContextManager[bool]:
        """The same without waiting; gives whether a slot is held."""
        ...


class DigestLocks(Protocol):
    """Locks by digest, across all processes. A process that dies loses its locks.

    Held from before the bytes of a blob are published until its row is committed, and from before a row is removed
    until its bytes are: so a push and a collection of one digest cannot cross."""

    def hold(self, digest: Digest) -> AbstractAsyncContextManager[None]:
        """Waits for the lock of `digest` and holds it inside the block. Raises StorageFull, StorageFailed."""
        ...

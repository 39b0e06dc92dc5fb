"""Interfaces of locks that all processes of a registry share: `Leases` for work, `DigestLocks` for blobs.

A *lease* is the exclusive right to do some work. A *slot* is a permit for some work. The number of slots is limited, as
in a semaphore.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from math import inf
from typing import Protocol

from storage.names import Digest


class Leases(Protocol):
    """The leases and slots of all processes. If a process dies, its leases and slots become free. All methods may raise
    StorageFailed."""

    def take(self, key: str) -> AbstractAsyncContextManager[bool]:
        """Waits for the lease called `key` and holds it inside the `async with` block. The block's value (`as
        has_waited`) is True if the call had to wait, because another task or process held the lease."""
        ...

    def slot(
        self, name: str, count: int, keep_free: int = 0, *, urgent_after: float = inf
    ) -> AbstractAsyncContextManager[None]:
        """Waits for one of the slots called `name` and holds it inside the `async with` block.

        - `count`: number of slots with this name. All callers must pass the same number.
        - `keep_free`: the call takes a slot only if at least this number of other slots is free. Pass a smaller number
          for more important work.
        - `urgent_after`: number of seconds of waiting after which the call becomes *urgent*. While an urgent call of
          any process waits, other calls that are not urgent take no slot of this name."""
        ...

    def try_slot(self, name: str, count: int, keep_free: int = 0) -> AbstractAsyncContextManager[bool]:
        """Does what `slot` does, but never waits. If it can take no slot now, the block runs without a slot. The
        block's value (`as has_slot`) is True if the block holds a slot."""
        ...

    def is_any_slot_held(self, name: str, count: int) -> bool:
        """Returns whether a task of any process holds at least one of the `count` slots called `name`. Takes no slot
        itself, not even for a moment."""
        ...


class DigestLocks(Protocol):
    """Locks for digests. All processes share the locks. Different digests may have the same lock. If a process dies,
    its locks become free.

    A push holds the lock of a blob's digest while it stores the blob's bytes and then the blob's metadata. The garbage
    collector holds the lock while it deletes the metadata and then the bytes. So the collector cannot run between the
    two steps of a push, nor a push between the two steps of the collector."""

    def hold(self, digest: Digest) -> AbstractAsyncContextManager[None]:
        """Waits for the lock of `digest` and holds it inside the `async with` block. Raises StorageFull,
        StorageFailed."""
        ...

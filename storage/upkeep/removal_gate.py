"""Prevents the removal of blobs while a backup copies them.

A backup copies the metadata first, and then the blobs that this metadata names. All these blobs must stay until they
are copied, even if the registry no longer needs them.

The garbage collector removes blobs only while it holds a *removal slot*: one of `SLOT_COUNT` permits that all processes
share. A backup waits until it holds all removal slots, then copies the metadata and the blobs, and then frees the
slots. If a process dies, its slots become free.

A backup that waits for slots keeps the collectors from taking new slots. So the backup waits only until the running
removals have ended. Without the slots, a collector could find that no backup runs, then a backup could begin, and then
the collector would remove blobs that the backup needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final

from storage.leases import Leases

SLOT_NAME: Final = "blob removal"
SLOT_COUNT: Final = 16
"""Number of removal slots."""
MIN_OTHER_FREE_SLOTS: Final = SLOT_COUNT // 2
"""A garbage collector takes a slot only if at least this number of other slots is free. So collectors hold at most half
of the slots, and a new backup takes the other half immediately. After that, no collector can take a slot until the
backup ends."""


def removal_slot(leases: Leases) -> AbstractAsyncContextManager[bool]:
    """Returns a context manager that takes a removal slot without waiting and frees it when the block ends. Yields
    whether the block may remove blobs: False means that a backup runs or waits, or that too few slots are free. Remove
    at most a few hundred blobs in one block, because a backup waits until the block ends."""
    return leases.try_slot(SLOT_NAME, SLOT_COUNT, keep_free=MIN_OTHER_FREE_SLOTS)


@asynccontextmanager
async def blob_removals_blocked(leases: Leases) -> AsyncIterator[None]:
    """Context manager that waits until no process removes blobs. During its block, no process can remove blobs."""
    async with AsyncExitStack() as stack:
        for _ in range(SLOT_COUNT):
            await stack.enter_async_context(leases.slot(SLOT_NAME, SLOT_COUNT))
        yield

"""Prevents the removal of blobs while a backup copies them.

A backup copies the metadata first and then the blobs that the copy names. A blob that loses its last repository during
the backup must stay until it is copied. So the garbage collector removes blobs only while it holds one of the *removal
slots*: permits, each of which one process at a time can hold. A backup takes all of these slots before it copies the
metadata, and holds them until the last blob is copied. A slot is free again as soon as its process dies, so a backup
that was killed prevents no removals.

While a backup waits for the remaining slots, no collector gets another slot. So the backup waits only until the current
batches of the collectors end.

A check by the collector that no backup runs would not suffice: a backup could begin between the check and the removal.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Final

from storage.leases import Leases

SLOT_NAME: Final = "blob removal"
SLOT_COUNT: Final = 16
"""Number of removal slots."""
KEPT_FREE: Final = SLOT_COUNT // 2
"""A garbage collector takes a slot only if this number of other slots is free. So collectors hold at most half of the
slots, and a backup that starts takes the other half at once. From then on, at most half of the slots can be free. A
collector would need one more, so no collector takes a slot until the backup ends."""


def removal_slot(leases: Leases) -> AbstractAsyncContextManager[bool]:
    """Returns a context manager that yields True if blobs may be removed inside its block, and False while a backup
    runs or waits for running removals. Remove at most a few hundred blobs in one block, because a backup waits until
    the block ends."""
    return leases.try_slot(SLOT_NAME, SLOT_COUNT, keep_free=KEPT_FREE)


@asynccontextmanager
async def blob_removals_blocked(leases: Leases) -> AsyncIterator[None]:
    """Waits until no process removes blobs. Until the `async with` block ends, no process can remove blobs."""
    async with AsyncExitStack() as stack:
        for _ in range(SLOT_COUNT):
            await stack.enter_async_context(leases.slot(SLOT_NAME, SLOT_COUNT))
        yield

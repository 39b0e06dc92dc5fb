"""Follows the list of events: `follow` yields new events as they are recorded, by any process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from storage.outbox import Event, Outbox

POLL_SECONDS: Final = 0.25
"""Time between two checks whether any process has changed the store."""
PAGE_EVENTS: Final = 200
"""Largest number of events that are in memory at a time."""


async def follow(
    outbox: Outbox, version: Callable[[], object], after: int, *, idle_seconds: float
) -> AsyncGenerator[Sequence[Event], None]:
    """Yields the events with numbers above `after`, in pages, oldest first, and goes on with new ones until the
    iterator is closed. Yields an empty page if there was no event for `idle_seconds`. `version` returns a value that
    every commit of any process changes. Raises StorageFailed."""
    time = asyncio.get_running_loop().time
    yielded_at = time()
    while True:
        current = version()
        page = await outbox.after(after, PAGE_EVENTS)
        if page:
            after = page[-1].number
        if page or time() - yielded_at >= idle_seconds:
            yield page
            yielded_at = time()
        is_caught_up = len(page) < PAGE_EVENTS
        while is_caught_up and version() == current and time() - yielded_at < idle_seconds:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)  # other processes add events, too, so there is nothing to wait for

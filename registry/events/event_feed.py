"""Follows the list of events: yields the stored events, and then new events as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from storage.outbox import Event, EventAction, Outbox

POLL_SECONDS: Final = 0.25
"""Seconds between two checks whether any process has changed the store."""
PAGE_EVENTS: Final = 100
"""Largest number of events in a page, and so in the memory of a stream."""


async def follow(
    outbox: Outbox,
    version: Callable[[], object],
    after: int,
    *,
    idle_seconds: float,
    action: EventAction | None = None,
    repository: str | None = None,
) -> AsyncGenerator[Sequence[Event], None]:
    """Yields the events with numbers above `after`, in pages, oldest first. Then waits for new events and yields them,
    until the iterator is closed. Yields an empty page if there was no event for `idle_seconds`. `version` returns a
    value that changes with every commit of any process. `action` and `repository`: yields only events with this action
    and of this repository (None: any). Other tasks of the event loop run between two pages. After the last page, waits
    at least `POLL_SECONDS` before the next read. Raises StorageFailed."""
    time = asyncio.get_running_loop().time
    yielded_at = time()
    while True:
        version_before_read = version()
        page = await outbox.after(after, PAGE_EVENTS, action=action, repository=repository)
        after = page.position
        if page.events or time() - yielded_at >= idle_seconds:
            yield page.events
            yielded_at = time()
        if not page.is_last:
            await asyncio.sleep(0)  # lets other tasks run, because `outbox.after` does not always wait
            continue
        # Waits in any case: the loop below does not wait if the store has changed since `version_before_read`.
        await asyncio.sleep(POLL_SECONDS)
        while version() == version_before_read and time() - yielded_at < idle_seconds:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)  # an asyncio.Event could not report the commits of other processes

"""Follows the list of events: yields the stored events, and then new events as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from storage.outbox import Event, EventAction, Outbox

POLL_SECONDS: Final = 0.25
"""Seconds between two checks whether any process has changed the store."""
PAGE_EVENTS: Final = 100
"""Largest number of events in a page."""


async def follow(
    outbox: Outbox,
    data_version: Callable[[], object],
    after: int,
    *,
    idle_seconds: float,
    action: EventAction | None = None,
    repository: str | None = None,
) -> AsyncGenerator[Sequence[Event], None]:
    """Yields pages of events, oldest first: the stored events with numbers above `after`, and then new events, until
    the iterator is closed. If it has yielded nothing for `idle_seconds`, yields an empty page. Other tasks of the event
    loop run between two pages. Raises StorageFailed.

    - `data_version`: returns a value that changes with every commit of any process.
    - `action`: yields only events with this action; None: with any action.
    - `repository`: yields only events of this repository; None: of any repository."""
    time = asyncio.get_running_loop().time
    yielded_at = time()
    while True:
        version_before_read = data_version()
        page = await outbox.after(after, PAGE_EVENTS, action=action, repository=repository)
        after = page.position
        if page.events or time() - yielded_at >= idle_seconds:
            yield page.events
            yielded_at = time()
        if not page.is_last:
            # `outbox.after` may return without letting other tasks run. This call lets them run.
            await asyncio.sleep(0)
            continue
        # This pause limits the rate of reads. The loop below cannot limit it: if the store has changed since
        # `version_before_read`, the loop ends at once.
        await asyncio.sleep(POLL_SECONDS)
        while data_version() == version_before_read and time() - yielded_at < idle_seconds:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)  # an asyncio.Event could not report the commits of other processes

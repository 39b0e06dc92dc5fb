"""Runs upkeep (garbage collection, pruning of the audit log) at an interval, in one process at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from storage.errors import RegistryError
from storage.leases import Leases

FIRST_ROUND_SECONDS: Final = 300.0
"""Longest time from the start to the first round. It is short, so that a server that is often restarted collects,
too."""
URGENT_SECONDS: Final = 30.0
"""Longest time between two rounds while upkeep is urgent (the disk is full)."""
CHECK_SECONDS: Final = 1.0
"""Seconds between two calls of `is_urgent`."""
UPKEEP_SLOT: Final = "upkeep"
"""Name under which all processes compete for the one slot to do upkeep."""
log = logging.getLogger("storage")


async def run_rounds(
    work: Callable[[], Awaitable[None]], leases: Leases, every: float, is_urgent: Callable[[], bool]
) -> None:
    """Calls `work` at the interval `every` (seconds) until the task is cancelled. As long as `is_urgent` returns True,
    the interval is at most `URGENT_SECONDS`. Every process runs this function, but only the process that holds the slot
    `UPKEEP_SLOT` calls `work`. When a process dies, its slot becomes free. A `RegistryError` of `work` is logged, and
    the rounds continue."""
    await _wait_until_due(min(every, FIRST_ROUND_SECONDS), 0.0, is_urgent)
    while True:
        try:
            async with leases.try_slot(UPKEEP_SLOT, 1) as has_slot:
                if has_slot:
                    await work()
        except RegistryError as error:
            log.warning("a collection was broken off: %s; it is tried again later", error, exc_info=error.__cause__)
        await _wait_until_due(every, URGENT_SECONDS, is_urgent)


async def cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits until they have ended. Logs the errors of tasks that had failed, and raises none."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("a background task of the store had ended with an error", exc_info=result)


async def _wait_until_due(seconds: float, urgent_seconds: float, is_urgent: Callable[[], bool]) -> None:
    """Waits for `seconds`. Returns earlier, but not before `urgent_seconds`, as soon as `is_urgent` returns True."""
    time = asyncio.get_running_loop().time
    start = time()
    while (remaining := start + seconds - time()) > 0:
        if time() - start >= urgent_seconds and is_urgent():
            return
        await asyncio.sleep(min(CHECK_SECONDS, remaining))

"""Runs upkeep in rounds, in one process at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from storage.errors import RegistryError
from storage.leases import Leases

FIRST_ROUND_SECONDS: Final = 300.0
"""Longest time from the start to the first round."""
URGENT_SECONDS: Final = 30.0
"""Longest time between two rounds while the disk is full."""
CHECK_SECONDS: Final = 1.0
UPKEEP_SLOT: Final = "upkeep"
log = logging.getLogger("storage")


async def run_rounds(
    work: Callable[[], Awaitable[None]], leases: Leases, every: float, is_urgent: Callable[[], bool]
) -> None:
    """Does `work` every `every` seconds, sooner while `is_urgent`, until it is cancelled. Of several processes that
    call it, the one that gets the lease does the work; when that one dies, another does. Logs registry errors of
    `work`."""
    await _wait_until_due(min(every, FIRST_ROUND_SECONDS), 0.0, is_urgent)
    while True:
        try:
            async with leases.try_slot(UPKEEP_SLOT, 1) as ours:
                if ours:
                    await work()
        except RegistryError as error:
            log.warning("a collection was broken off: %s", error, exc_info=error.__cause__)
        await _wait_until_due(every, URGENT_SECONDS, is_urgent)


async def cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits for their end. Logs their errors and raises none of them."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            log.error("a background task of the store had ended with an error", exc_info=ended)


async def _wait_until_due(every: float, urgent: float, is_urgent: Callable[[], bool]) -> None:
    """Waits for `every` seconds; no longer than `urgent` seconds if `is_urgent` then."""
    time = asyncio.get_running_loop().time
    since = time()
    while (left := since + every - time()) > 0:
        if time() - since >= urgent and is_urgent():
            return
        await asyncio.sleep(min(CHECK_SECONDS, left))

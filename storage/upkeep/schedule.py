"""Runs upkeep (garbage collection, pruning of the audit log) at an interval, in one process at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from storage.background_rounds import run_in_one_process
from storage.leases import Leases

FIRST_ROUND_SECONDS: Final = 300.0
"""Longest time from the start of the process to the first round. It is short, so that a server that is often restarted
does upkeep."""
URGENT_SECONDS: Final = 30.0
"""Longest pause between two rounds while upkeep is urgent (the disk is full)."""
CHECK_SECONDS: Final = 1.0
"""Seconds between two calls of `is_urgent`."""
UPKEEP_SLOT: Final = "upkeep"
"""Name of the slot for upkeep. A slot is a permit that one process at a time can hold."""
log = logging.getLogger("storage")


async def run_rounds(
    work: Callable[[], Awaitable[None]], leases: Leases, interval: float, is_urgent: Callable[[], bool]
) -> None:
    """Calls `work` every `interval` seconds until the task is cancelled. While `is_urgent` returns True, the pause is
    at most `URGENT_SECONDS`. Every process runs this function, but only the process that holds the slot `UPKEEP_SLOT`
    calls `work`. The other processes skip the round. If a process dies, its slot becomes free. Logs an error of `work`
    and continues with the next round."""
    await _wait_until_due(min(interval, FIRST_ROUND_SECONDS), is_urgent, min_seconds=0.0)
    await run_in_one_process(
        leases,
        UPKEEP_SLOT,
        work,
        lambda: _wait_until_due(interval, is_urgent, min_seconds=URGENT_SECONDS),
        log=log,
        what_failed="upkeep stopped with an error",
    )


async def cancel_all(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits until they have ended. If a task has failed, logs its error and does not raise it."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("a background task of the store has stopped with an error", exc_info=result)


async def _wait_until_due(seconds: float, is_urgent: Callable[[], bool], *, min_seconds: float) -> None:
    """Waits for `seconds`. If `is_urgent` returns True after `min_seconds`, returns at once."""
    time = asyncio.get_running_loop().time
    start = time()
    while (remaining := start + seconds - time()) > 0:
        if time() - start >= min_seconds and is_urgent():
            return
        await asyncio.sleep(min(CHECK_SECONDS, remaining))

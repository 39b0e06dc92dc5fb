"""Background work that one process at a time does (`run_in_one_process`)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from storage.leases import Leases
from storage.round_errors import log_round_error, raise_if_cancelled


async def run_in_one_process(
    leases: Leases,
    slot: str,
    work: Callable[[], Awaitable[None]],
    pause: Callable[[], Awaitable[None]],
    *,
    log: logging.Logger,
    what_failed: str,
) -> None:
    """Runs rounds until the task is cancelled. In a round, tries to get the slot called `slot` without waiting, and
    calls `work` if it gets the slot. Between two rounds, waits for the end of `pause()`. Every process runs this
    function, but only one process at a time calls `work`. The slot becomes free when `work` returns or raises an error,
    or when the process dies. Then the process with the next round gets it.

    An error ends only its round: `log_round_error` logs it to `log`, with `what_failed` as the beginning of the line. A
    cancellation ends this function even if an error in `work` has replaced the CancelledError. Raises the errors of
    `pause`."""
    while True:
        try:
            async with leases.try_slot(slot, count=1) as has_slot:
                if has_slot:
                    await work()
        except Exception as error:
            log_round_error(log, what_failed, error)
        raise_if_cancelled()  # `work` may have returned in spite of the cancellation
        await pause()

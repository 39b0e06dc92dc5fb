"""Helpers for background tasks that work in rounds. `run_in_one_process` runs rounds in one process at a time.
`log_round_error` logs an error that ended a round; the task then continues with the next round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from storage.errors import RegistryError
from storage.leases import Leases


async def run_in_one_process(
    leases: Leases,
    slot_name: str,
    work: Callable[[], Awaitable[None]],
    pause: Callable[[], Awaitable[None]],
    *,
    log: logging.Logger,
    what_failed: str,
) -> None:
    """Runs rounds until the task is cancelled. Every process runs this function, but only one process at a time calls
    `work`: the process that holds the *slot* `slot_name`. A slot is a permit that all processes share. Each round tries
    to get the slot without waiting. If it gets the slot, it calls `work`. The slot becomes free when `work` returns or
    raises an error, or when the process dies. Between two rounds, this function awaits `pause()`.

    An error of `work` or of the slot ends only its round: `log_round_error` logs the error to `log`, in a line that
    begins with `what_failed`. A cancellation ends this function with CancelledError, even if `work` returns or
    raises another error during the cancellation. Raises the errors of `pause`."""
    while True:
        try:
            async with leases.try_slot(slot_name, count=1) as has_slot:
                if has_slot:
                    await work()
        except Exception as error:
            log_round_error(log, what_failed, error)
        raise_if_cancelled()  # `work` may have returned in spite of the cancellation
        await pause()


def log_round_error(log: logging.Logger, what_failed: str, error: Exception) -> None:
    """Logs an error that ended a round of a background task. Call this in the `except` clause of the task's loop, which
    then continues with the next round. `what_failed`: the beginning of the line in the log, such as "eviction failed".

    Logs a RegistryError, such as StorageFull, in one line, followed by the traceback of its cause if it has one. Logs
    other errors with their traceback. No error may end the task, because only a reload of the server would start the
    task again. Raises CancelledError if the cancellation of the task was requested."""
    raise_if_cancelled()
    if isinstance(error, RegistryError):
        log.warning("%s: %s; trying again later", what_failed, error, exc_info=error.__cause__)
    else:
        log.error("%s, because of an unexpected error; trying again later", what_failed, exc_info=error)


def raise_if_cancelled() -> None:
    """Raises CancelledError if the cancellation of this task was requested. Call this in a loop that continues after an
    error. During the cancellation, a `finally` block may raise an error, which replaces the CancelledError. Without
    this call, the loop would handle that error and continue, in spite of the cancellation."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError

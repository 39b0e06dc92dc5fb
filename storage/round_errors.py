"""Logs the error of one round of a background task (`log_round_error`). The task then continues with the next round."""

from __future__ import annotations

import asyncio
import logging

from storage.errors import RegistryError


def log_round_error(log: logging.Logger, what_failed: str, error: Exception) -> None:
    """Logs an error that ended a round of a background task. Call this in the `except` clause of the task's loop, which
    then continues with the next round. `what_failed`: the beginning of the line in the log, such as "eviction failed".

    A RegistryError, such as that of a full disk, is logged in one line, followed by the traceback of its cause if it
    has one. Other errors, such as an SQLite error during a read, are logged with their traceback. They must not end the
    task either, because only a reload of the server would start it again. Raises CancelledError as `raise_if_cancelled`
    does."""
    raise_if_cancelled()
    if isinstance(error, RegistryError):
        log.warning("%s: %s; trying again later", what_failed, error, exc_info=error.__cause__)
    else:
        log.error("%s, because of an unexpected error; trying again later", what_failed, exc_info=error)


def raise_if_cancelled() -> None:
    """Raises CancelledError if the cancellation of this task was requested. Call this in a loop that continues after an
    error. Otherwise, the loop could miss the cancellation: if code in a `finally` block raises an error during the
    cancellation, the loop gets this error instead of the CancelledError."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError

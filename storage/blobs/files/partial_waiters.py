"""Wakes the *waiters*: the tasks of this process that wait for bytes of partial blobs (`PartialWaiters`).

A *partial blob* is a blob that is still being downloaded into a file; its *owner* is the process that downloads it. If
the owner is this process, the threads that write the bytes call `notify`. If the owner is another process, a timer
polls the progress that the owner stores in a file.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from storage.errors import RegistryError

POLL_SECONDS = 0.003
"""Time between two polls of a partial blob that another process downloads."""
MIN_WAKE_SECONDS = 0.006
"""Shortest time between two wake-ups for one partial blob that this process downloads. The limit keeps a fast download
from waking its waiters too often."""


class GrowingFile(Protocol):
    """A partial blob, with the attributes and methods that `PartialWaiters` uses."""

    is_notified: bool
    """Whether `notify` was called after `checked_at`. Only `PartialWaiters` sets this attribute."""
    checked_at: float
    """When `PartialWaiters` last checked which waiters of the file can continue, in seconds of the event loop's clock.
    Only `PartialWaiters` sets this attribute."""

    @property
    def is_owned_here(self) -> bool:
        """Whether this process is the owner. If it is, its threads call `notify` after each write."""
        ...

    def refresh(self) -> None:
        """If another process is the owner, reads the progress that the owner has stored. Raises RegistryError if the
        progress cannot be read."""
        ...

    def stored_until(self, offset: int) -> int | None:
        """Returns the offset of the first missing byte after `offset`. Returns None if the byte at `offset` is missing.
        Raises RegistryError if the download has ended without the byte at `offset`."""
        ...


class PartialWaiters:
    """Lets the tasks of one event loop wait for bytes of partial blobs. Polls only while a task waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[GrowingFile, dict[asyncio.Future[int], int]] = {}
        """By file: the future of each waiting task, with the offset of the byte that the task waits for."""
        self._poll_timer: asyncio.TimerHandle | None = None
        """The timer of the next poll; None if no poll is needed."""

    async def wait(self, file: GrowingFile, offset: int) -> int:
        """Waits until `file.stored_until(offset)` returns a number, and returns that number. Raises the errors of
        `stored_until` and `refresh`. A cancelled call leaves no waiter behind."""
        future: asyncio.Future[int] = self._loop.create_future()
        futures = self._waiting.setdefault(file, {})
        futures[future] = offset
        try:
            # This check must come after the future was added, so that the task misses no change of the file. Only this
            # waiter is checked, because a check of thousands of waiters in each call would be slow.
            if (end := file.stored_until(offset)) is not None:
                return end
            self._poll_later(file)
            return await future
        finally:
            del futures[future]
            if not futures:
                del self._waiting[file]
            if future.done() and not future.cancelled():
                future.exception()  # if the task was cancelled, keeps asyncio from logging an unretrieved exception

    def notify(self, file: GrowingFile) -> None:
        """Makes the event loop wake the waiters of `file` that can continue. Call this method after each change of the
        file, from any thread. Takes almost no time if no task waits for the file."""
        if file in self._waiting and not file.is_notified:
            file.is_notified = True
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._on_notify, file)

    def _on_notify(self, file: GrowingFile) -> None:
        """Wakes the waiters of `file` that can continue, but not before `MIN_WAKE_SECONDS` have passed since the last
        check."""
        delay = file.checked_at + MIN_WAKE_SECONDS - self._loop.time()
        if delay > 0:
            self._loop.call_later(delay, self._on_notify, file)
        else:
            self._wake_ready_waiters(file)

    def _wake_ready_waiters(self, file: GrowingFile) -> None:
        """Refreshes `file`, wakes each waiter whose byte is stored, and passes errors to the waiters. If a task still
        waits and another process is the owner, starts the poll timer."""
        file.is_notified, file.checked_at = False, self._loop.time()
        if (futures := self._waiting.get(file)) is None:
            return  # no task waits any more, and the file may be closed
        try:
            file.refresh()
        except RegistryError as error:
            for future in futures:
                _set_error(future, error)
            return
        for future, offset in futures.items():
            if future.done():
                continue
            try:
                end = file.stored_until(offset)
            except RegistryError as error:
                _set_error(future, error)
            else:
                if end is not None:
                    future.set_result(end)
        if not all(future.done() for future in futures):
            self._poll_later(file)

    def _poll_later(self, file: GrowingFile) -> None:
        """Starts the poll timer if another process is the owner of `file`."""
        if self._poll_timer is None and not file.is_owned_here:
            self._poll_timer = self._loop.call_later(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        """Wakes the waiters that can continue, for all files that other processes own."""
        self._poll_timer = None
        for file in [file for file in self._waiting if not file.is_owned_here]:
            self._wake_ready_waiters(file)

    def close(self) -> None:
        """Stops the poll timer."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()


def _set_error(future: asyncio.Future[int], error: RegistryError) -> None:
    if not future.done():
        future.set_exception(error)

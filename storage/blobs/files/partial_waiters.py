"""Wakes the tasks of this process that wait for bytes of partial blobs (`PartialWaiters`).

A *partial blob* is a blob that is still being downloaded into a file; its *owner* is the process that downloads it. If
the owner is this process, its writing threads call `notify`. If it is another process, a timer polls the progress that
the owner stores.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from storage.errors import RegistryError

POLL_SECONDS = 0.003
"""Time between two polls of a partial blob that another process downloads."""
MIN_WAKE_SECONDS = 0.006
"""Least time between two wake-ups for one partial blob that this process downloads. Without it, a fast download would
keep the event loop busy waking readers for a few bytes each time."""


class GrowingFile(Protocol):
    """A partial blob, as far as `PartialWaiters` needs it."""

    is_notified: bool
    """Whether `notify` was called and the waiters have not been looked at since. Set by `PartialWaiters`."""
    refreshed_at: float
    """When the waiters were last looked at, in seconds of the event loop's clock. Set by `PartialWaiters`."""

    @property
    def is_owned_here(self) -> bool:
        """Whether the owner is in this process and calls `notify` after each write."""
        ...

    def refresh(self) -> None:
        """Reads the progress that an owner in another process has stored. Raises RegistryError."""
        ...

    def available_from(self, offset: int) -> int | None:
        """Returns the end of the stored bytes that begin at `offset`: the offset of the first missing byte. Returns
        None if the byte at `offset` is not stored yet. Raises RegistryError if the download has ended without it."""
        ...


class PartialWaiters:
    """The waiting tasks of one event loop, for all partial blobs. Polls only while a task waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[GrowingFile, dict[asyncio.Future[int], int]] = {}
        """For each file, the future of each waiting task and the offset that it waits for."""
        self._poll_timer: asyncio.TimerHandle | None = None

    async def wait(self, file: GrowingFile, offset: int) -> int:
        """Waits until `file.available_from(offset)` returns a number or raises, and then does the same. A cancellation
        leaves nothing behind."""
        future: asyncio.Future[int] = self._loop.create_future()
        waiting_here = self._waiting.setdefault(file, {})
        waiting_here[future] = offset
        try:
            self._wake_ready(file)  # after the future was added, so that a change in between is not missed
            return await future
        finally:
            del waiting_here[future]
            if not waiting_here:
                del self._waiting[file]
            if future.done() and not future.cancelled():
                future.exception()  # marks the exception as retrieved, also if this task was cancelled just now

    def notify(self, file: GrowingFile) -> None:
        """Wakes the waiters of `file` that can continue. Call it after each change of the file, in any thread. Costs
        almost nothing while no task waits."""
        if file in self._waiting and not file.is_notified:
            file.is_notified = True
            with suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._on_notify, file)

    def _on_notify(self, file: GrowingFile) -> None:
        delay = file.refreshed_at + MIN_WAKE_SECONDS - self._loop.time()
        if delay > 0:
            self._loop.call_later(delay, self._on_notify, file)
        else:
            self._wake_ready(file)

    def _wake_ready(self, file: GrowingFile) -> None:
        """Refreshes `file` and wakes the waiters whose byte is stored or whose wait has failed."""
        file.is_notified, file.refreshed_at = False, self._loop.time()
        if (waiting_here := self._waiting.get(file)) is None:
            return  # no task waits any more, and the file may be closed
        try:
            file.refresh()
        except RegistryError as error:
            for future in waiting_here:
                _set_error(future, error)
            return
        for future, offset in waiting_here.items():
            if future.done():
                continue
            try:
                end = file.available_from(offset)
            except RegistryError as error:
                _set_error(future, error)
            else:
                if end is not None:
                    future.set_result(end)
        if self._poll_timer is None and not file.is_owned_here and not all(future.done() for future in waiting_here):
            self._poll_timer = self._loop.call_later(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._poll_timer = None
        for file in [file for file in self._waiting if not file.is_owned_here]:
            self._wake_ready(file)

    def close(self) -> None:
        """Stops polling."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()


def _set_error(future: asyncio.Future[int], error: RegistryError) -> None:
    if not future.done():
        future.set_exception(error)

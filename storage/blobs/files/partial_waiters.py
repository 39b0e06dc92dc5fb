"""Waiters of this process for bytes of partial blobs, and how they are woken."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from storage.errors import RegistryError

TICK = 0.003
"""Seconds between two polls of a partial that another process fills."""
GAP = 0.006
"""Least seconds between two wake-ups for a partial that this process fills: a fast download must not keep the event
loop busy with waking readers for a few bytes each time."""


class GrowingFile(Protocol):
    """A partial blob, as the waiters see it."""

    is_notified: bool
    refreshed_at: float

    @property
    def filled_here(self) -> bool:
        """Whether its owner is in this process and calls `notify`."""
        ...

    def refresh(self) -> None:
        """Reads the progress that another process has stored. Raises RegistryError."""
        ...

    def available_from(self, at: int) -> int | None:
        """Returns how far the bytes reach from `at`; None if that byte is not there yet. Raises RegistryError."""
        ...


class PartialWaiters:
    """Waiters on one event loop. Polls only while somebody waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[GrowingFile, dict[asyncio.Future[int], int]] = {}
        self._ticking: asyncio.TimerHandle | None = None

    async def wait(self, file: GrowingFile, at: int) -> int:
        """Waits until `available_from(at)` returns a value or raises, and does the same. A cancellation leaves
        nothing."""
        future: asyncio.Future[int] = self._loop.create_future()
        queue = self._waiting.setdefault(file, {})
        queue[future] = at
        try:
            self._look(file)  # after it is on the list, so that no change is missed
            return await future
        finally:
            del queue[future]
            if not queue:
                del self._waiting[file]
            if future.done() and not future.cancelled():
                future.exception()  # marks it as retrieved, also if this wait was cancelled just now

    def notify(self, file: GrowingFile) -> None:
        """Wakes waiters after a change. May be called in any thread; costs next to nothing while nobody waits."""
        if file in self._waiting and not file.is_notified:
            file.is_notified = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._on_notify, file)

    def _on_notify(self, file: GrowingFile) -> None:
        early = file.refreshed_at + GAP - self._loop.time()
        if early > 0:
            self._loop.call_later(early, self._on_notify, file)
        else:
            self._look(file)

    def _look(self, file: GrowingFile) -> None:
        file.is_notified, file.refreshed_at = False, self._loop.time()
        if (queue := self._waiting.get(file)) is None:
            return  # the waiters have left, and the file may be closed by now
        try:
            file.refresh()
        except RegistryError as error:
            for future in queue:
                _tell(future, error)
            return
        for future, at in queue.items():
            if future.done():
                continue
            try:
                reached = file.available_from(at)
            except RegistryError as error:
                _tell(future, error)
            else:
                if reached is not None:
                    future.set_result(reached)
        if self._ticking is None and not file.filled_here and not all(future.done() for future in queue):
            self._ticking = self._loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        for file in [file for file in self._waiting if not file.filled_here]:
            self._look(file)

    def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()


def _tell(future: asyncio.Future[int], error: RegistryError) -> None:
    if not future.done():
        future.set_exception(error)

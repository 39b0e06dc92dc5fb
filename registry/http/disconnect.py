"""Detects that a client has disconnected while its request is being answered, so that long work can stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")
WATCH_AFTER_SECONDS: Final = 1.0
"""Seconds that a call may take before the client is watched. Most calls take less, and a watch costs a task."""


class ClientGone(Exception):
    """The client has closed the connection, so no response can be sent."""


class DisconnectWatch:
    """Watches whether one client disconnects. The request's body must have been read.

    `wait_disconnected` is a coroutine function that returns when the client has disconnected. A task that awaits it
    starts when the watch is first needed; `close` cancels the task."""

    def __init__(self, wait_disconnected: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._wait_disconnected = wait_disconnected
        self._watch_task: asyncio.Task[None] | None = None
        self._calling_task: asyncio.Task[Any] | None = None  # is inside `cancel_on_disconnect`
        self._has_cancelled = False

    def check(self) -> None:
        """Raises ClientGone if the client has disconnected. The first call starts the watch and never raises."""
        if self._start_watch().done():
            raise ClientGone

    async def cancel_on_disconnect(self, call: Awaitable[T]) -> T:
        """Awaits `call` and returns its result. Cancels it and raises ClientGone if the client disconnects after `call`
        has run for `WATCH_AFTER_SECONDS`."""
        loop, self._calling_task = asyncio.get_running_loop(), asyncio.current_task()
        timer = loop.call_later(WATCH_AFTER_SECONDS, self._watch_call)
        try:
            return await call
        except asyncio.CancelledError:
            task = self._calling_task
            if self._has_cancelled and task is not None and task.uncancel() == 0:
                raise ClientGone from None
            raise  # the task was cancelled for another reason
        finally:
            self._calling_task = None
            timer.cancel()

    def _watch_call(self) -> None:
        self._start_watch().add_done_callback(self._on_disconnect)

    def _on_disconnect(self, _: asyncio.Task[None]) -> None:
        if self._calling_task is not None and not self._has_cancelled:
            self._has_cancelled = True
            self._calling_task.cancel()

    def _start_watch(self) -> asyncio.Task[None]:
        if self._watch_task is None:
            self._watch_task = asyncio.create_task(self._wait_disconnected())
        return self._watch_task

    def close(self) -> None:
        """Ends the watch."""
        if self._watch_task is not None:
            self._watch_task.cancel()

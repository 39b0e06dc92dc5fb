"""Detects that a client disconnects while its request is processed, so that long work for the request can stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")
WATCH_AFTER_SECONDS: Final = 1.0
"""Seconds that a call runs before `DisconnectWatch.cancel_on_disconnect` starts a task that watches the client. Most
calls end earlier and need no task."""


class ClientGone(Exception):
    """The client has closed the connection, so no response can be sent."""


class DisconnectWatch:
    """Watches whether the client of one request disconnects. Must not be used before the request's body has been
    received, because the watch discards what the client sends.

    `wait_disconnected`: a coroutine function that returns when the client has disconnected. The first call of `check`,
    or a long call in `cancel_on_disconnect`, starts a task that runs this function. `close` cancels the task."""

    def __init__(self, wait_disconnected: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._wait_disconnected = wait_disconnected
        self._watch_task: asyncio.Task[None] | None = None
        self._calling_task: asyncio.Task[Any] | None = None  # the task that is inside `cancel_on_disconnect`
        self._has_cancelled = False  # whether this object has cancelled `_calling_task`

    def check(self) -> None:
        """Raises ClientGone if the client has disconnected. If the watch has not started yet, starts it and does not
        raise."""
        if self._start_watch().done():
            raise ClientGone

    async def cancel_on_disconnect(self, call: Awaitable[T]) -> T:
        """Awaits `call` and returns its result. Watches the client after `call` has run for `WATCH_AFTER_SECONDS`. If
        the client has disconnected by then or disconnects later, cancels `call` and raises ClientGone."""
        loop, self._calling_task = asyncio.get_running_loop(), asyncio.current_task()
        timer = loop.call_later(WATCH_AFTER_SECONDS, self._watch_call)
        try:
            return await call
        except asyncio.CancelledError:
            task = self._calling_task
            # `uncancel` returns 0 if nothing else has cancelled the task at the same time.
            if self._has_cancelled and task is not None and task.uncancel() == 0:
                raise ClientGone from None
            raise  # something else has cancelled the task
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
        """Cancels the task that watches the client. Does not wait until the task has ended."""
        if self._watch_task is not None:
            self._watch_task.cancel()

"""Detects that the client has disconnected, for answers that take long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")
WATCH_AFTER_SECONDS: Final = 1.0
"""Seconds that a call may take before the client is watched."""


class ClientGone(Exception):
    """The client closed the connection before its request was complete. There is nobody to answer."""


class DisconnectWatch:
    """Watches one client whose request has been read. `wait_disconnected` returns when the client has disconnected.
    The watch starts when it is first needed; `close` ends it."""

    def __init__(self, wait_disconnected: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._wait_disconnected = wait_disconnected
        self._watch: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._cancelled = False

    def check(self) -> None:
        """Raises ClientGone. The first call only starts the watch."""
        if self._start().done():
            raise ClientGone

    async def cancel_on_disconnect(self, call: Awaitable[T]) -> T:
        """Returns the result of `call`. Where that takes long and the client disconnects, cancels it and raises
        ClientGone."""
        loop, self._waiting = asyncio.get_running_loop(), asyncio.current_task()
        timer = loop.call_later(WATCH_AFTER_SECONDS, self._watch_call)
        try:
            return await call
        except asyncio.CancelledError:
            task = self._waiting
            if self._cancelled and task is not None and task.uncancel() == 0:
                raise ClientGone from None
            raise  # the task was cancelled for another reason
        finally:
            self._waiting = None
            timer.cancel()

    def _watch_call(self) -> None:
        self._start().add_done_callback(self._on_disconnect)

    def _on_disconnect(self, watch: asyncio.Task[None]) -> None:
        if self._waiting is not None and not self._cancelled:
            self._cancelled = True
            self._waiting.cancel()

    def _start(self) -> asyncio.Task[None]:
        if self._watch is None:
            self._watch = asyncio.create_task(self._wait_disconnected())
        return self._watch

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

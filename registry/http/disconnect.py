"""Whether the client is still there, for answers that take long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

from registry.http.exchange import ClientGone, Exchange

T = TypeVar("T")
WATCH_AFTER_SECONDS: Final = 1.0
"""Seconds for which something is waited for before somebody watches for the client's leaving."""


class DisconnectWatch:
    """The client of an exchange, watched once that is worth it. Its request has been read; `close` ends the watch."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._watch: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._cut = False

    def check(self) -> None:
        """Raises ClientGone. The first call only starts the watch."""
        if self._start().done():
            raise ClientGone

    async def cancel_on_disconnect(self, call: Awaitable[T]) -> T:
        """What `call` gives. When it takes long and the client leaves, it is cancelled; raises ClientGone then."""
        loop, self._waiting = asyncio.get_running_loop(), asyncio.current_task()
        late = loop.call_later(WATCH_AFTER_SECONDS, self._look)
        try:
            return await call
        except asyncio.CancelledError:
            task = self._waiting
            if self._cut and task is not None and task.uncancel() == 0:
                raise ClientGone from None
            raise  # somebody else wants this ended
        finally:
            self._waiting = None
            late.cancel()

    def _look(self) -> None:
        self._start().add_done_callback(self._on_left)

    def _on_left(self, watch: asyncio.Task[None]) -> None:
        if self._waiting is not None and not self._cut:
            self._cut = True
            self._waiting.cancel()

    def _start(self) -> asyncio.Task[None]:
        if self._watch is None:
            self._watch = asyncio.create_task(self._exchange.gone())
        return self._watch

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

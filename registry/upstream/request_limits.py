"""Time limits that end as errors of ours, and work that many wait for and no one of them can cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from registry.request import detached_context
from storage.errors import UpstreamTimeout

ANSWER_TIMEOUT_SECONDS = 10.0
"""For an answer that is no blob, over all endpoints and with the token it needs: docker waits 15 s for a mirror before
it asks the next."""


@asynccontextmanager
async def time_limit(seconds: float, who: str) -> AsyncIterator[None]:
    """Raises UpstreamTimeout when the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise UpstreamTimeout(f"{who} does not answer in time") from None


class UpstreamSingleFlight:
    """Work under way, by key: whoever asks for the same meanwhile gets the same outcome."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def share(self, key: str, start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The outcome of `start`, or of the flight that has this key. A caller's cancellation leaves it in the air:
        others may wait for it, and what it gets is kept."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(start(), context=detached_context())
            task.add_done_callback(lambda done: self._landed(key, done))
        try:
            return await asyncio.shield(task)
        finally:
            del (
                task
            )  # its error holds this frame: the circle would hold all it came through until the collector comes by

    def _landed(self, key: str, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # is seen even where every caller has left

    async def aclose(self) -> None:
        """Ends all of it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await _settled(tasks)


class KeyedSemaphore:
    """At most `most` at a time for each key; the others wait in line."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and how many use or await it

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        turns, users = self._turns.get(key) or (asyncio.Semaphore(self._most), 0)
        self._turns[key] = turns, users + 1
        try:
            async with turns:
                yield
        finally:
            turns, users = self._turns[key]
            if users > 1:
                self._turns[key] = turns, users - 1
            else:
                del self._turns[key]


async def _settled(tasks: list[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks)


async def wait_uncancelled(future: Awaitable[Any]) -> None:
    """Waits until `future` is done, whatever cancels the waiting, and whatever its outcome."""
    waiting = asyncio.ensure_future(future)
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()

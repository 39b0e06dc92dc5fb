"""One asks, all who want the same thing get the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from registry.request import detached_context
from storage.errors import UpstreamUnavailable

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Requests under way in this process, by what they are for. They belong to nobody who waits for them."""

    def __init__(self) -> None:
        self._flying: dict[Hashable, asyncio.Task[T]] = {}
        self._closed = False

    def launch(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The flight for `key`; it is started if there is none. Raises UpstreamUnavailable after `aclose`."""
        task = self._flying.get(key)
        if task is None:
            if self._closed:
                raise _stopping()
            task = asyncio.create_task(start(), context=detached_context())
            self._flying[key] = task
            task.add_done_callback(lambda ended: self._land(key, ended))
        return task

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the flight for `key` comes to. Cancelled: the flight goes on."""
        return await wait_for_outcome(self.launch(key, start))

    def __len__(self) -> int:
        return len(self._flying)

    async def aclose(self) -> None:
        """Ends them all and lets no more start."""
        self._closed = True
        await cancel_and_wait(self._flying.values())

    def _land(self, key: Hashable, task: asyncio.Task[T]) -> None:
        self._flying.pop(key, None)
        if not task.cancelled():
            task.exception()  # somebody has looked at it, even if nobody waits


async def wait_for_outcome(task: asyncio.Task[T]) -> T:
    """What `task` comes to. Cancelled: the task goes on. Raises UpstreamUnavailable when it was ended itself."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if task.cancelled() and not (current and current.cancelling()):
            raise _stopping() from None
        raise
    finally:
        del task  # its error holds this frame: the circle would hold all it came through until the collector comes by


async def cancel_and_wait(tasks: Any) -> None:
    """Cancels tasks and waits until they have ended; what they raise is nobody's any more."""
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _stopping() -> UpstreamUnavailable:
    return UpstreamUnavailable("the server is stopping; try again in a moment")

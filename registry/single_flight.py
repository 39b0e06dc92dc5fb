"""Single flight: concurrent callers that want the same result share one task.

The task belongs to none of its callers. A caller that is cancelled stops waiting; the task goes on for the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeVar

from registry.request import detached_context
from storage.errors import UpstreamUnavailable

T = TypeVar("T")


def server_stopping() -> UpstreamUnavailable:
    """Returns the error for work that the end of the server interrupts."""
    return UpstreamUnavailable("the server is stopping; try again in a moment")


def start_detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task that may outlive the request that causes it, or serves several. The task has no request: its caller
    and its notices are not visible in it."""
    return asyncio.get_running_loop().create_task(work, context=detached_context())


class SingleFlight(Generic[T]):
    """Running tasks of one kind, by key. At most one task per key runs in this process.

    `stopped` makes the error that callers get when `aclose` ends the task they wait for.
    """

    def __init__(self, stopped: Callable[[], Exception] = server_stopping) -> None:
        self._stopped = stopped
        self._running: dict[Hashable, asyncio.Task[T]] = {}
        self._closed = False

    def start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Returns the running task for `key`, or starts one. Raises the `stopped` error after `aclose`."""
        task = self._running.get(key)
        if task is None:
            if self._closed:
                raise self._stopped()
            task = self._running[key] = start_detached(work())
            task.add_done_callback(lambda done: self._on_done(key, done))
        return task

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Returns the result of the task for `key`, started if none runs. Raises what the task raises, and the
        `stopped` error when `aclose` ends it. When the caller is cancelled, the task goes on."""
        return await wait_for_outcome(self.start(key, work), self._stopped)

    async def settle(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Waits for the end of the task for `key`, started if none runs. Raises nothing that the task raises."""
        await asyncio.wait([self.start(key, work)])

    def __len__(self) -> int:
        """Returns the number of running tasks."""
        return len(self._running)

    async def aclose(self) -> None:
        """Cancels all tasks, waits for their end, and lets no more start. Idempotent."""
        self._closed = True
        await cancel_and_wait(self._running.values())

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks it as retrieved, so that asyncio logs nothing when no caller is left


async def wait_for_outcome(task: asyncio.Task[T], stopped: Callable[[], Exception] = server_stopping) -> T:
    """Returns the result of `task`, or raises its exception. Raises the `stopped` error when the task itself was
    cancelled. When the caller is cancelled, the task goes on."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if task.cancelled() and not (current and current.cancelling()):
            raise stopped() from None
        raise
    finally:
        # The task's exception refers to this frame. Without `del`, the frame would refer back to the task, and the
        # cycle would keep everything on the traceback alive until the garbage collector runs.
        del task


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until all have ended. Drops their results and exceptions."""
    remaining = list(tasks)
    for task in remaining:
        task.cancel()
    await asyncio.gather(*remaining, return_exceptions=True)

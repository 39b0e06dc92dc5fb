"""`SingleFlight`: concurrent callers that need the same result share one task.

The task belongs to no caller. If a caller is cancelled, only its wait ends: the task continues, even if no other caller
waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeVar

from registry.request import detached_context
from storage.errors import UpstreamUnavailable

T = TypeVar("T")


def server_stopping_error() -> UpstreamUnavailable:
    """Returns the error for callers that wait for a task which is cancelled because the server is stopping."""
    return UpstreamUnavailable("the server is stopping; try again in a moment")


def start_detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task that may outlive the current request or work for several requests. In the task,
    `current_request()` returns `NO_REQUEST`."""
    return asyncio.get_running_loop().create_task(work, context=detached_context())


class SingleFlight(Generic[T]):
    """The running tasks of one kind of work, by key. At most one task per key runs at a time.

    A key may be any hashable value that identifies the result. If there is only one result, use None. `make_stop_error`
    returns the error that callers get if `aclose` has cancelled the task whose result they want, or if a task would
    have to be started after `aclose`."""

    def __init__(self, make_stop_error: Callable[[], Exception] = server_stopping_error) -> None:
        self._make_stop_error = make_stop_error
        self._running: dict[Hashable, asyncio.Task[T]] = {}
        self._closed = False

    def start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Returns the running task for `key`. If there is none, starts and returns a task that runs `work()`. If a task
        would have to be started after `aclose`, raises the error of `make_stop_error` instead."""
        task = self._running.get(key)
        if task is None:
            if self._closed:
                raise self._make_stop_error()
            task = self._running[key] = start_detached(work())
            task.add_done_callback(lambda done: self._on_done(key, done))
        return task

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Waits for the task for `key`, and returns its result. If none is running, starts one that runs `work()`.
        Raises the exception of the task. Raises the error of `make_stop_error` if `aclose` cancels the task, or if a
        task would have to be started after `aclose`. If the caller is cancelled, the task continues."""
        return await wait_for_outcome(self.start(key, work), self._make_stop_error)

    async def settle(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Waits until the task for `key` has ended. If none is running, starts one that runs `work()`. Ignores the
        task's result and exception: returns normally even if the task fails or `aclose` cancels it. If a task would
        have to be started after `aclose`, raises the error of `make_stop_error`. If the caller is cancelled, the task
        continues."""
        await asyncio.wait([self.start(key, work)])

    def __len__(self) -> int:
        """Returns the number of running tasks."""
        return len(self._running)

    async def aclose(self) -> None:
        """Cancels all tasks and waits until they have ended. From the start of this call, no task can be started.
        Idempotent."""
        self._closed = True
        await cancel_and_wait(self._running.values())

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, so that asyncio does not log it


async def wait_for_outcome(
    task: asyncio.Task[T], make_stop_error: Callable[[], Exception] = server_stopping_error
) -> T:
    """Waits for `task` and returns its result, or raises its exception. Raises the error of `make_stop_error` if
    `task` was cancelled. If the caller is cancelled, `task` continues. If both were cancelled, raises CancelledError,
    because the caller has to end."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        caller = asyncio.current_task()
        if task.cancelled() and not (caller and caller.cancelling()):
            raise make_stop_error() from None
        raise
    finally:
        # The task's exception refers to this frame by its traceback. If this frame still referred to the task, that
        # cycle would keep all frames of the traceback in memory until Python's garbage collector runs.
        del task


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until all have ended. Ignores their results and exceptions."""
    remaining = list(tasks)
    for task in remaining:
        task.cancel()
    await asyncio.gather(*remaining, return_exceptions=True)


async def finish_in_thread(call: Callable[[], T]) -> T:
    """Runs `call` in a thread of the event loop's pool and returns its result. Raises the errors of `call`.

    If the caller is cancelled, waits for the end of `call` before it raises CancelledError. A thread cannot be stopped,
    and a lock that the caller holds around this call must not become free while the thread works. If `call` reads for a
    client, the caller is cancelled when the client disconnects. Without the wait, the caller would release its slot
    while the thread still works, so clients could make any number of threads work at once."""
    running_call = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running_call)
    finally:
        await wait_uncancelled(running_call)


async def wait_uncancelled(future: Awaitable[Any]) -> None:
    """Waits until `future` is done. A cancellation of the waiting task is ignored, so the caller must raise
    CancelledError itself if that is needed. The result or the exception of `future` is ignored as well."""
    waiting = asyncio.ensure_future(future)
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()  # marks the exception as retrieved, so that asyncio does not log it

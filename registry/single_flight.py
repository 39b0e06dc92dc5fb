"""`SingleFlight`: concurrent callers that need the same result share one task.

The task belongs to no caller. If a caller is cancelled, only its wait ends: the task continues, even if no other caller
waits for it. There is one exception. A task that waits to send its first request to another server is cancelled once
all its callers have left (`waiting_to_send`). Otherwise a client that starts many requests and closes their connections
at once could fill the queue in which the tasks of other clients wait to send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import contextmanager
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


class Flight(asyncio.Task[T]):
    """A task of `SingleFlight`. `callers`: how many callers wait for its result. `is_kept`: whether it continues
    without callers, because `SingleFlight.start` has returned it, or because it has sent a request. `is_waiting`:
    whether it waits to send a request. `give_up`: cancels the flight; later callers start a new one."""

    callers = 0
    is_kept = False
    is_waiting = False
    give_up: Callable[[Flight[T]], None]

    def give_up_if_unwanted(self) -> None:
        """Gives the flight up if it waits to send its first request, and no caller waits for its result."""
        if self.is_waiting and not self.callers and not self.is_kept:
            self.give_up(self)


@contextmanager
def waiting_to_send() -> Iterator[None]:
    """Says that the current task waits inside the `with` block until it may send a request. If the task is a flight
    that has sent no request (`note_sending`), it is cancelled at an `await` of the block once no caller waits for its
    result."""
    flight = asyncio.current_task()
    if not isinstance(flight, Flight):
        yield
        return
    flight.is_waiting = True
    flight.give_up_if_unwanted()
    try:
        yield
    finally:
        flight.is_waiting = False


def note_sending() -> None:
    """Says that the current task is about to send a request. If it is a flight, it continues from now on even if all
    callers leave: the next caller then gets the result without another request."""
    flight = asyncio.current_task()
    if isinstance(flight, Flight):
        flight.is_kept = True


class SingleFlight(Generic[T]):
    """The running tasks of one kind of work, by key. At most one task per key runs at a time, not counting cancelled
    tasks that have not ended yet.

    A key may be any hashable value that identifies the result. If there is only one result, use None. `make_stop_error`
    returns the error that callers get if `aclose` has cancelled the task whose result they want, or if a task would
    have to be started after `aclose`."""

    def __init__(self, make_stop_error: Callable[[], Exception] = server_stopping_error) -> None:
        self._make_stop_error = make_stop_error
        self._running: dict[Hashable, Flight[T]] = {}
        self._given_up: set[asyncio.Task[T]] = set()
        """The flights that were cancelled because their callers had left, and have not ended yet."""
        self._closed = False

    def start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Returns the running task for `key`. If there is none, starts and returns a task that runs `work()`. The task
        continues even if no caller waits for its result. If a task would have to be started after `aclose`, raises the
        error of `make_stop_error` instead."""
        flight = self._find_or_start(key, work)
        flight.is_kept = True
        return flight

    def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> Flight[T]:
        """Returns the running task for `key`, and counts one more caller that waits for its result. If there is none,
        starts one that runs `work()`. The caller must call `leave` when it does not wait any more. If a task would have
        to be started after `aclose`, raises the error of `make_stop_error` instead."""
        flight = self._find_or_start(key, work)
        flight.callers += 1
        return flight

    def leave(self, flight: Flight[T]) -> None:
        """Ends the wait of a caller that has called `join`."""
        flight.callers -= 1
        flight.give_up_if_unwanted()

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Waits for the task for `key`, and returns its result. If none is running, starts one that runs `work()`.
        Raises the exception of the task. Raises the error of `make_stop_error` if `aclose` cancels the task, or if a
        task would have to be started after `aclose`. If the caller is cancelled, the task continues, unless it waits to
        send its first request and has no other caller.

        If the caller is a flight itself, this wait counts as `waiting_to_send`. For example, the flight for a manifest
        may need a token, whose request waits in a queue."""
        flight = self.join(key, work)
        try:
            with waiting_to_send():
                return await wait_for_outcome(flight, self._make_stop_error)
        finally:
            self.leave(flight)
            del flight  # for the reason given in `wait_for_outcome`

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
        await cancel_and_wait([*self._running.values(), *self._given_up])

    def _find_or_start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> Flight[T]:
        """Returns the running flight for `key`, or starts one. Raises the error of `make_stop_error` if it would have
        to be started after `aclose`."""
        flight = self._running.get(key)
        if flight is None:
            if self._closed:
                raise self._make_stop_error()
            flight = Flight(work(), loop=asyncio.get_running_loop(), context=detached_context())
            flight.give_up = lambda unwanted: self._give_up(key, unwanted)
            flight.add_done_callback(lambda done: self._on_done(key, done))
            self._running[key] = flight
        return flight

    def _give_up(self, key: Hashable, flight: Flight[T]) -> None:
        """Cancels the flight for `key`. The next caller with this key starts a new flight, even if this one has not
        ended yet."""
        if self._running.get(key) is flight:
            del self._running[key]
            self._given_up.add(flight)
        flight.cancel()

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        self._given_up.discard(task)
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
    client, the caller is cancelled when the client disconnects. Without the wait, a limit on concurrent calls would
    admit the next call while the thread still works, so clients could make any number of threads work at once."""
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

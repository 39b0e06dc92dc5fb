"""`SingleFlight`: concurrent callers that need the same result share one task.

If a caller is cancelled, the caller leaves the task. A task that waits to send its first request to another server
(`waiting_to_send`) is cancelled once all its callers have left, so that clients that disconnect cannot fill the queue
of waiting tasks. Every other task continues, even without callers. A task that `SingleFlight.start` has returned also
continues, even while it waits to send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from registry.request import detached_context
from storage.errors import UpstreamUnavailable

T = TypeVar("T")


def server_stopping_error() -> UpstreamUnavailable:
    """Returns the error for callers whose task is cancelled because the server stops."""
    return UpstreamUnavailable("the server is stopping; try again in a moment")


def start_detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task that may outlive the current request. In the task, `current_request()` returns `NO_REQUEST`."""
    return asyncio.get_running_loop().create_task(work, context=detached_context())


class Flight(asyncio.Task[T]):
    """A task of `SingleFlight`.

    - `callers`: how many callers wait for its result.
    - `is_kept`: if True, the task continues without callers, even while it waits to send a request.
      `SingleFlight.start` and `note_sending` set this to True.
    - `is_waiting`: whether the task waits to send a request."""

    callers = 0
    is_kept = False
    is_waiting = False

    def __init__(self, work: Coroutine[Any, Any, T], give_up: Callable[[Flight[T]], None]) -> None:
        """Starts the task in the running event loop. `give_up` must cancel the flight that it is called with."""
        super().__init__(work, loop=asyncio.get_running_loop(), context=detached_context())
        self._give_up = give_up

    def give_up_if_unwanted(self) -> None:
        """Cancels the flight if it waits to send its first request and nobody needs its result."""
        if self.is_waiting and not self.callers and not self.is_kept:
            self._give_up(self)


@contextmanager
def waiting_to_send() -> Iterator[None]:
    """A context manager for the code in which a task waits for its turn to send a request. If the current task is a
    `Flight` without `is_kept`, it is cancelled at an `await` in the `with` block once all its callers have left. All
    other tasks continue."""
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
    """Call this when the current task is about to send a request. If the task is a `Flight`, it is no longer cancelled
    when all its callers leave, so that the next caller can use the response."""
    flight = asyncio.current_task()
    if isinstance(flight, Flight):
        flight.is_kept = True


class SingleFlight(Generic[T]):
    """The running tasks of one kind of work: at most one for each key. A key identifies the result of a task. A task
    that was cancelled because its callers left does not count: a new task for its key may start before it has ended.

    `make_stop_error` returns the *stop error*. Callers get this error if `aclose` cancels their task. After `aclose`,
    they get this error instead of a new task."""

    def __init__(self, make_stop_error: Callable[[], Exception] = server_stopping_error) -> None:
        self._make_stop_error = make_stop_error
        self._running: dict[Hashable, Flight[T]] = {}
        self._given_up: set[asyncio.Task[T]] = set()
        """The flights that were given up and have not ended yet."""
        self._closed = False

    def start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Returns the running task for `key`, or starts one that runs `work()`. The task continues without callers.
        Raises the stop error."""
        flight = self._find_or_start(key, work)
        flight.is_kept = True
        return flight

    def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> Flight[T]:
        """Returns the running task for `key`, or starts one that runs `work()`. Counts one more caller. The caller must
        call `leave` when it stops waiting. Raises the stop error."""
        flight = self._find_or_start(key, work)
        flight.callers += 1
        return flight

    def leave(self, flight: Flight[T]) -> None:
        """Counts one caller less. Each caller of `join` must call this method when it stops waiting."""
        flight.callers -= 1
        flight.give_up_if_unwanted()

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Returns the result of the running task for `key`. Starts one that runs `work()` if there is none. Raises the
        exception of the task, or the stop error.

        If the caller is cancelled, the task continues, with one exception: the task is cancelled if it waits to send
        its first request, has no other caller and was not returned by `start`.

        The caller may itself be a task of a `SingleFlight`: for example, the task for a manifest waits for the task for
        a token. During this call, the caller then counts as a task that waits to send (`waiting_to_send`)."""
        flight = self.join(key, work)
        try:
            with waiting_to_send():
                return await wait_for_outcome(flight, self._make_stop_error)
        finally:
            self.leave(flight)
            del flight  # see `wait_for_outcome`

    async def settle(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """Waits until the task for `key` has ended. Starts one that runs `work()` if there is none. Ignores the task's
        result and exception, and returns normally even if `aclose` cancels the task. Raises the stop error only if
        `aclose` was called and no task for `key` is running. If the caller is cancelled, the task continues."""
        await asyncio.wait([self.start(key, work)])

    def __len__(self) -> int:
        """Returns the number of running tasks."""
        return len(self._running)

    async def aclose(self) -> None:
        """Cancels all tasks and waits until they have ended. From now on, no task can be started. Idempotent."""
        self._closed = True
        await cancel_and_wait([*self._running.values(), *self._given_up])

    def _find_or_start(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> Flight[T]:
        """Returns the running flight for `key`, or starts one. Raises the stop error."""
        flight = self._running.get(key)
        if flight is None:
            if self._closed:
                raise self._make_stop_error()
            flight = Flight(work(), partial(self._give_up, key))
            flight.add_done_callback(lambda done: self._on_done(key, done))
            self._running[key] = flight
        return flight

    def _give_up(self, key: Hashable, flight: Flight[T]) -> None:
        """Cancels the flight for `key`. The next caller starts a new flight, even if this one has not ended yet."""
        if self._running.get(key) is flight:
            del self._running[key]
            self._given_up.add(flight)
        flight.cancel()

    def _on_done(self, key: Hashable, task: asyncio.Task[T]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        self._given_up.discard(task)
        if not task.cancelled():
            task.exception()  # otherwise asyncio logs the exception


async def wait_for_outcome(
    task: asyncio.Task[T], make_stop_error: Callable[[], Exception] = server_stopping_error
) -> T:
    """Returns the result of `task`, or raises its exception. If the caller is cancelled, raises CancelledError, and
    `task` continues. If only `task` was cancelled, raises the error that `make_stop_error` returns."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        caller = asyncio.current_task()
        if task.cancelled() and not (caller and caller.cancelling()):
            raise make_stop_error() from None
        raise
    finally:
        # The task's exception refers to this frame. If this frame also referred to the task, the cycle would keep the
        # frames of the traceback in memory until the garbage collector runs.
        del task


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until all have ended. Ignores their results and exceptions."""
    remaining = list(tasks)
    for task in remaining:
        task.cancel()
    await asyncio.gather(*remaining, return_exceptions=True)


async def finish_in_thread(call: Callable[[], T]) -> T:
    """Runs `call` in a thread and returns its result. Raises the errors of `call`.

    If the caller is cancelled, waits for the end of `call` and then raises CancelledError. A thread cannot be stopped,
    so the caller must keep its locks and its places under limits until `call` has ended."""
    running_call = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running_call)
    finally:
        await wait_uncancelled(running_call)


async def wait_uncancelled(future: Awaitable[Any]) -> None:
    """Waits until `future` is done. Ignores its result and exception. Also ignores a cancellation of the caller, so the
    caller must raise CancelledError itself if it should end."""
    task = asyncio.ensure_future(future)
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            continue
    if not task.cancelled():
        task.exception()  # otherwise asyncio logs the exception

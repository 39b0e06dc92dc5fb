"""Runs blocking calls in a thread pool (`ThreadPool`). Turns an OSError of a call into an error of `storage.errors`.

`run_in_thread` is faster than asyncio's `shield(run_in_executor(…))`: a call takes two iterations of the event loop
instead of seven.
"""

from __future__ import annotations

import asyncio
import errno
import queue
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, TypeVar

from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.errors import StorageFailed, StorageFull, TooManyOpenFiles

T = TypeVar("T")


class _AsStorageErrors:
    """The context manager that `as_storage_errors` returns. It is a class because a class is five times
    faster than a `contextmanager` function."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(error) from error


_AS_STORAGE_ERRORS = _AsStorageErrors()


def storage_error(error: OSError, failure: str = "the registry's storage failed") -> StorageFull | StorageFailed:
    """Returns the error of `storage.errors` for an OSError: StorageFull, TooManyOpenFiles or StorageFailed. `failure`
    says what failed; the message of a StorageFailed begins with it."""
    if error.errno in DISK_FULL_ERRNOS:
        return StorageFull()
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFiles()
    return StorageFailed(f"{failure}: {error.strerror or error}")


def as_storage_errors() -> AbstractContextManager[None]:
    """Returns a context manager that turns an OSError inside its `with` block into the error of `storage_error`."""
    return _AS_STORAGE_ERRORS


class UncancellableFuture(asyncio.Future[T]):
    """A future for the result of a blocking call. It cannot be cancelled: if the task that awaits it is cancelled, the
    task gets the CancelledError only after the call has ended. A lock that the task holds thus stays locked while the
    call runs."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


async def result_or_close(call: UncancellableFuture[T], close: Callable[[T], object]) -> T:
    """Waits for the end of `call` and returns its result, such as an open file. If the waiting task is cancelled,
    passes the result to `close` and raises CancelledError."""
    try:
        return await call
    except asyncio.CancelledError:
        # An `UncancellableFuture` delays the CancelledError until the call has ended; `done()` is only a safeguard.
        if call.done() and call.exception() is None:
            close(call.result())
        raise


async def wait_for_call(call: asyncio.Future[T]) -> T:
    """Waits for the end of `call` and returns its result. If the waiting task is cancelled, the wait ends immediately,
    and the call continues."""
    return call.result() if call.done() else await asyncio.shield(call)


def run_in_thread(threads: Executor, call: Callable[[], T]) -> UncancellableFuture[T]:
    """Runs `call` in a thread of `threads` and returns a future for its result. If `call` raises OSError, the future
    gets the error of `storage_error`."""
    loop = asyncio.get_running_loop()
    result: UncancellableFuture[T] = UncancellableFuture(loop=loop)

    def run_call() -> None:
        try:
            with as_storage_errors():
                set_outcome: Callable[[], None] = partial(result.set_result, call())
        except BaseException as error:
            set_outcome = partial(result.set_exception, error)
        loop.call_soon_threadsafe(set_outcome)

    threads.submit(run_call)
    return result


class ThreadPool(ThreadPoolExecutor):
    """A ThreadPoolExecutor for machines that limit the number of threads, for example by `docker run --pids-limit` or
    by `TasksMax` of systemd.

    `submit` differs from that of ThreadPoolExecutor only if it cannot start a thread:

    - If another thread of the pool is running, `submit` raises no error, and a running thread makes the call.
    - If no thread of the pool is running, `submit` raises RuntimeError, and the call is never made.

    In both cases, `ThreadPoolExecutor.submit` raises RuntimeError but leaves the call in its queue.
    """

    def _adjust_thread_count(self) -> None:
        """Starts a thread, if one is needed, for the call that `submit` has just put into the queue. If the start
        fails and no thread is running, removes all calls from the queue and raises RuntimeError. `submit` holds
        the pool's lock when it calls this method."""
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if self._threads:
                return
            with suppress(queue.Empty):
                while True:
                    self._work_queue.get_nowait()
            raise

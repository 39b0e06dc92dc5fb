"""Runs blocking calls in a thread pool (`ThreadPool`), and turns an OSError that they raise into an error of
`storage.errors`.

`run_in_thread` replaces asyncio's `shield(run_in_executor(…))`: `run_in_thread` takes two iterations of the event loop
per call, and asyncio's takes seven. In the push of a small blob, passing calls to threads and results back takes more
than half of the time.
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
    """The context manager that `as_storage_errors` returns. It is a class because each read of a small blob uses it,
    and a class is five times faster than a `contextmanager` function."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(error) from error


_AS_STORAGE_ERRORS = _AsStorageErrors()


def storage_error(error: OSError, failure: str = "the registry's storage failed") -> StorageFull | StorageFailed:
    """Returns the registry error for an error of the operating system: StorageFull, TooManyOpenFiles or StorageFailed.
    `failure`: the first part of the message, which says what failed."""
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
    task gets the CancelledError only after the call has ended. If the task holds a lock during the call, it therefore
    does not release the lock while the call runs."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


async def result_or_close(call: UncancellableFuture[T], close: Callable[[T], object]) -> T:
    """Waits for the end of `call` and returns its result, such as an open file. If the waiting task is cancelled,
    passes the result to `close` and raises CancelledError."""
    try:
        return await call
    except asyncio.CancelledError:
        # The call has ended, because an `UncancellableFuture` delays the CancelledError until then. `done()` is only a
        # safeguard: `exception()` raises an error if the future is not done.
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

    `ThreadPoolExecutor.submit` puts the call into its queue, and then starts a thread. If it cannot start a thread, it
    raises RuntimeError, but leaves the call in the queue. A running thread can make the call later, and nobody gets the
    result. If `submit` of this class cannot start a thread, there are two cases:

    - Another thread of the pool is running: `submit` does not raise, and the running thread makes the call.
    - No thread of the pool is running: `submit` raises RuntimeError, and the call is never made.
    """

    def _adjust_thread_count(self) -> None:
        """Starts a thread, if one is needed, for the call that `submit` has just put into the queue. If the start
        fails and no thread is running, removes all calls from the queue and raises RuntimeError. `submit` holds the
        pool's lock when it calls this method."""
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if self._threads:
                return
            with suppress(queue.Empty):
                while True:
                    self._work_queue.get_nowait()
            raise

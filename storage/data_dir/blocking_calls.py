"""Blocking steps in threads, with as little as can be between a step's end and who waits for it.

`run_in_executor` under `shield` in a task takes the event loop seven turns for one step, this two: an upload waits for
a step each mebibyte, and a small blob's push is hardly more than waiting for steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from storage.data_dir.durable_files import as_storage_errors

T = TypeVar("T")


class UncancellableFuture(asyncio.Future[T]):
    """What a step comes to. It cannot be cancelled: a task that is cancelled while it waits here learns of it once the
    step has ended, so that a lock held around it is never let go while it still works."""

    def cancel(self, msg: Any | None = None) -> bool:
        return False


async def wait_for_call(work: asyncio.Future[T]) -> T:
    """What `work` comes to. Cancelled: this ends at once, and the work goes on."""
    return work.result() if work.done() else await asyncio.shield(work)


def run_in_thread(threads: Executor, call: Callable[[], T]) -> UncancellableFuture[T]:
    """Runs `call` in a thread. Errors of the disk become StorageFull and StorageFailed."""
    loop = asyncio.get_running_loop()
    step: UncancellableFuture[T] = UncancellableFuture(loop=loop)

    def work() -> None:
        try:
            with as_storage_errors():
                end: Callable[[], None] = partial(step.set_result, call())
        except BaseException as error:
            end = partial(step.set_exception, error)
        loop.call_soon_threadsafe(end)

    threads.submit(work)
    return step

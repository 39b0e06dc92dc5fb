"""Runs one function on many items, several at a time, and reads blocking iterators in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

from registry.single_flight import cancel_and_wait

T = TypeVar("T")
_BATCH: Final = 200
"""Number of items that one call in a thread reads."""


async def run_workers(items: AsyncIterator[T], handle: Callable[[T], Awaitable[None]], worker_count: int) -> None:
    """Calls `handle` for every item. Runs at most `worker_count` calls at the same time. Reads an item only when the
    call for it can start. After the first error, cancels the other calls and raises the error."""
    reading = asyncio.Lock()
    ended = False

    async def work() -> None:
        nonlocal ended
        while True:
            async with reading:
                if ended:
                    return
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    ended = True
                    return
            await handle(item)

    tasks = [asyncio.create_task(work()) for _ in range(worker_count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel_and_wait(tasks)


async def read_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """Yields the items of an iterator that blocks, such as one that reads directories."""
    while batch := await asyncio.to_thread(lambda: list(islice(items, _BATCH))):
        for item in batch:
            yield item


async def as_async_iterator(items: Iterable[T]) -> AsyncIterator[T]:
    """Yields the items of an iterable that does not block."""
    for item in items:
        yield item

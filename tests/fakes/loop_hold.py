"""Measures for how long a task blocks the event loop."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

MAX_SECONDS = 0.1
"""Longest time for which a task may block the event loop, in seconds of CPU time. The value leaves room for a slow
machine. The faults that these tests look for would block the loop for whole seconds."""


class LoopHold:
    """The result of a measurement. A task calls `tick` every millisecond, unless other tasks block the event loop.
    `longest`: the longest CPU time, in seconds, that this thread has used between two calls of `tick`. CPU time does
    not include the time in which other processes have the CPU."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = time.thread_time()

    def tick(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._last)
        self._last = now


@asynccontextmanager
async def watch_loop() -> AsyncIterator[LoopHold]:
    """Measures the event loop until the block ends. Freezes all existing objects first (`gc.freeze`), as the server
    does when it starts. Otherwise, one garbage collection in a process with thousands of tests would take a second and
    spoil the measurement."""
    gc.freeze()
    hold = LoopHold()

    async def watch() -> None:
        while True:
            hold.tick()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield hold
    finally:
        hold.tick()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

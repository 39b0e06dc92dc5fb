"""Measures how long one turn of the event loop takes."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

MAX_SECONDS = 0.1
"""Largest allowed turn of the event loop, in seconds of processor time. The value is large, because the machine may be
busy. The errors that these tests prevent took whole seconds."""


class LoopHold:
    """`longest`: the longest processor time in seconds of this thread between two steps of a task that is always ready
    to run. It is not wall-clock time, so it does not depend on how busy the machine is."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = time.thread_time()

    def tick(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._last)
        self._last = now


@asynccontextmanager
async def watch_loop() -> AsyncIterator[LoopHold]:
    """Measures the loop while the block runs. The objects that exist before stay frozen from then on, as in the server,
    which freezes what it inherits. Otherwise a full garbage collection of a process with thousands of tests would take
    a second and spoil the measurement."""
    gc.freeze()
    held = LoopHold()

    async def watch() -> None:
        while True:
            held.tick()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        yield held
    finally:
        held.tick()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

"""How long one turn of the event loop takes."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

MAX_SECONDS = 0.1
"""Seconds of processor time: generous, since this machine may be busy. What was mended took whole seconds."""


class LoopHold:
    """`longest`: seconds of this thread's processor time between two turns of a task that always wants the next one.
    It is not the time on the clock, so that it is the same on a machine that is busy with other things."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = time.thread_time()

    def tick(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._last)
        self._last = now


@asynccontextmanager
async def watch_loop() -> AsyncIterator[LoopHold]:
    """Watches the loop while the block runs. The objects that exist before stay frozen from then on, as the server
    freezes what it inherits: a full collection of all that a process with thousands of tests holds takes a second, and
    is not what is measured."""
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

"""The gate before password hashing, which is slow and takes much memory on purpose.

Two hashings at once over all workers, in threads that give way to everything else, and a bounded queue before them. So
any number of people who try to log in leave the processor and the memory to those who push and pull.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

from storage.errors import TooManyRequests
from storage.interface import Turns

T = TypeVar("T")

SLOT: Final = "password"
AT_ONCE: Final = 2
"""Hashings at once, all workers together: 38 MiB and two cores at the most."""
WAITING: Final = 64
"""That wait in one worker: at 30 ms each, about a second until the last of them has its turn."""
RETRY_AFTER: Final = 2
"""Seconds: the queue is empty again by then."""
NICENESS: Final = 10


class Hashing:
    """For one process and its event loop."""

    def __init__(self, turns: Turns, *, waiting: int = WAITING) -> None:
        self._turns = turns
        self._most = waiting
        self._inside = 0
        self._threads = ThreadPoolExecutor(AT_ONCE, "hashing", _give_way)

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, called in a thread when it is its turn. Raises TooManyRequests when too many wait, and
        what `work` raises. A cancellation ends the waiting at once; what is being hashed is waited for: it holds its
        slot until it is done."""
        if self._inside >= self._most + AT_ONCE:
            raise TooManyRequests("too many people are logging in; try again in a moment", retry_after=RETRY_AFTER)
        self._inside += 1
        try:
            async with self._turns.slot(SLOT, AT_ONCE):
                hashed = asyncio.get_running_loop().run_in_executor(self._threads, work)
                try:
                    return await asyncio.shield(hashed)
                finally:
                    if not hashed.done():
                        await asyncio.wait({hashed})
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Waits for what is being hashed."""
        self._threads.shutdown()


def _give_way() -> None:
    """Lowers the priority of the calling thread: on Linux each has one of its own (setpriority(2))."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

"""Returns freed memory to the system.

malloc by itself keeps what lies between blocks in use, so a worker would stay as large as it once was.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
import sys
from collections.abc import Sized

TRIM_BYTES = 32 * 1024 * 1024
"""Growth over its smallest size after which a worker returns memory."""
TRIM_PAUSES = (5.0, 600.0)
"""Shortest and longest pause in seconds before the next attempt. Pauses grow while attempts do not help."""
FEW_CONNECTIONS = 256
"""Up to so many connections a full garbage collection is cheap."""


class FreeMemory:
    """Watches the size of this process, and returns memory when it has grown."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: Sized) -> None:
        self._loop = loop
        self._connections = connections
        self._least = self._size = resident_bytes()
        self._pause = TRIM_PAUSES[0]
        self._due = 0.0

    def check(self, now: float) -> None:
        """Returns memory if it is time for that. To be called once a second; `now` is in seconds."""
        before, self._size = self._size, resident_bytes()
        self._least = min(self._least, self._size)
        if abs(self._size - before) > TRIM_BYTES // 4:  # memory comes and goes, so some may be free
            self._pause = TRIM_PAUSES[0]
            self._due = min(self._due, now + self._pause)
        if self._size <= self._least + TRIM_BYTES:
            self._pause = TRIM_PAUSES[0]
        elif now >= self._due:
            self._collect_garbage()
            self._loop.run_in_executor(None, trim_memory)
            self._due = now + self._pause
            self._pause = min(2 * self._pause, TRIM_PAUSES[1])

    def _collect_garbage(self) -> None:
        """Frees cycles of references, as connections over TLS are. A full collection takes some milliseconds, since the
        objects made at the start are frozen, but 100 with thousands of connections: then only new objects are
        examined."""
        gc.collect(2 if len(self._connections) <= FEW_CONNECTIONS else 1)


def resident_bytes() -> int:
    """Returns how many bytes of memory this process uses; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def trim_memory() -> None:
    """Returns free memory to the system. Takes some milliseconds: to be called in a thread. See malloc_trim(3)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)

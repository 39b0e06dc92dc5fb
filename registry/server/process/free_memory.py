"""Gives free memory of a worker process back to the system.

Without this module, a worker could stay as large as at its peak: malloc does not give freed memory back to the system
if the memory lies between blocks that are still in use. Garbage collection here means Python's garbage collection, not
that of the registry's blobs.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Sized

TRIM_BYTES = 32 * 1024 * 1024
"""A process gives free memory back if it is larger than its smallest size so far by more than this many bytes."""
TRIM_PAUSES = (5.0, 600.0)
"""Shortest and longest pause between two attempts to give memory back, in seconds. Each attempt doubles the pause.
The pause becomes the shortest pause again in two cases:

- The size of the process has changed by more than a quarter of `TRIM_BYTES` in a second.
- The process is larger than its smallest size so far by at most `TRIM_BYTES`.
"""
FEW_CONNECTIONS = 256
"""Largest number of open connections at which an attempt to give memory back may make a full garbage collection."""
MAX_FULL_COLLECTION_SHARE = 0.001
"""Largest share of the process's time that the full garbage collections of all attempts may take. A full collection
stops the process, usually for 3 to 20 ms, sometimes for up to 150 ms."""
FULL_COLLECTION_THRESHOLD = 100
"""Number of collections of the middle generation after which Python makes an automatic full collection. With Python's
default of 10, a few requests for lists of 10,000 tags would cause a full collection."""


class MemoryTrimmer:
    """Watches how much memory this process uses. When the process has grown, gives free memory back to the system."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: Sized) -> None:
        """`connections` are the worker's open connections; only their number is used."""
        self._loop = loop
        self._connections = connections
        self._min_bytes = self._current_bytes = resident_bytes()  # smallest and latest size of the process
        self._pause_seconds = TRIM_PAUSES[0]
        self._next_attempt_at = 0.0  # earliest time of the next attempt
        self._next_full_collection_at = 0.0  # earliest time of the next full garbage collection

    def trim_if_due(self, now: float) -> None:
        """Attempts to give memory back if the process has grown and the pause after the last attempt is over. Call this
        method once a second. `now`: seconds of a monotonic clock."""
        bytes_before, self._current_bytes = self._current_bytes, resident_bytes()
        self._min_bytes = min(self._min_bytes, self._current_bytes)
        # A process that has shrunk has just freed much memory. A process that has grown may soon free much memory. In
        # both cases, the next attempt comes soon.
        if abs(self._current_bytes - bytes_before) > TRIM_BYTES // 4:
            self._pause_seconds = TRIM_PAUSES[0]
            self._next_attempt_at = min(self._next_attempt_at, now + self._pause_seconds)
        if self._current_bytes <= self._min_bytes + TRIM_BYTES:
            self._pause_seconds = TRIM_PAUSES[0]
        elif now >= self._next_attempt_at:
            self._collect_garbage(now)
            self._loop.run_in_executor(None, trim_memory)
            self._next_attempt_at = now + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, TRIM_PAUSES[1])

    def _collect_garbage(self, now: float) -> None:
        """Frees unused objects that refer to each other in cycles, such as the parts of a TLS connection. Usually makes
        a full collection. Collects only the two younger generations in two cases:

        - Full collections have taken their share of the time (`MAX_FULL_COLLECTION_SHARE`).
        - More than `FEW_CONNECTIONS` connections are open, so that a full collection could take 100 ms.
        """
        if len(self._connections) > FEW_CONNECTIONS or now < self._next_full_collection_at:
            gc.collect(1)
            return
        started_at = time.perf_counter()
        gc.collect()
        self._next_full_collection_at = now + (time.perf_counter() - started_at) / MAX_FULL_COLLECTION_SHARE


def make_full_collections_rare() -> None:
    """Excludes all existing objects from later garbage collections, and makes Python's automatic full collections rare.
    Unused objects in cycles may then stay in memory longer, until `MemoryTrimmer` makes a full collection."""
    gc.collect()
    gc.freeze()  # otherwise each full collection would spend 50 ms on these objects
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_THRESHOLD)


def resident_bytes(pid: int | None = None) -> int:
    """Returns how many bytes of memory a process uses (its resident set size). Returns 0 if the process has ended, or
    if the system has no /proc. `pid`: the process; None: this process."""
    try:
        with open(f"/proc/{'self' if pid is None else pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def trim_memory() -> None:
    """Gives free memory of this process back to the system. See malloc_trim(3). Takes some milliseconds, so do not call
    it in the event loop's thread. Does nothing on systems other than Linux, or if the C library has no malloc_trim."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the C library musl does not have it
        if trim is not None:
            trim(0)

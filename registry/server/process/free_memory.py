"""Returns free memory of a worker process to the system.

By default malloc keeps freed memory that lies between blocks in use, so a worker would stay as large as at its peak. In
this module, garbage collection means Python's, not that of the registry's blobs.
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
"""A process returns free memory if it is more than this many bytes larger than its smallest size so far."""
TRIM_PAUSES = (5.0, 600.0)
"""Shortest and longest pause between two attempts to return memory, in seconds. The pause doubles after each attempt.
The pause is set back to the shortest pause in two cases:

- The size of the process has changed by more than a quarter of `TRIM_BYTES` in a second.
- The size of the process is at most `TRIM_BYTES` above its smallest size so far.
"""
FEW_CONNECTIONS = 256
"""An attempt to return memory may include a full garbage collection only if at most this many connections are open."""
MAX_FULL_COLLECTION_SHARE = 0.001
"""Largest share of the process's time that the full garbage collections of all attempts may take. The process does
nothing else during a full collection. It usually takes 3 to 20 ms, but up to 150 ms if few objects are in the caches of
the CPU."""
MIDDLE_COLLECTIONS_PER_FULL_ONE = 100
"""Python makes an automatic full collection after this number of collections of the middle generation. With Python's
default of 10, reading a few lists of 10,000 tags would cause a full collection."""


class MemoryTrimmer:
    """Watches how much memory this process uses, and returns free memory to the system when the process has grown."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connections: Sized) -> None:
        """`connections` are the worker's open connections; only their number is used."""
        self._loop = loop
        self._connections = connections
        self._min_bytes = self._current_bytes = resident_bytes()  # smallest and latest size of the process
        self._pause_seconds = TRIM_PAUSES[0]
        self._next_attempt_at = 0.0  # earliest time of the next attempt
        self._next_full_collection_at = 0.0  # earliest time of the next full garbage collection

    def release_if_due(self, now: float) -> None:
        """Attempts to return memory if the process has grown and the pause after the last attempt is over. Call this
        method once a second. `now` is in seconds of any steady clock."""
        bytes_before, self._current_bytes = self._current_bytes, resident_bytes()
        self._min_bytes = min(self._min_bytes, self._current_bytes)
        # A process that has shrunk has just freed much memory. A process that has grown may soon free much memory.
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
        """Frees objects that refer to each other in cycles, such as the parts of a TLS connection. Examines only the
        two younger generations in two cases:

        - A full collection would exceed `MAX_FULL_COLLECTION_SHARE`.
        - More than `FEW_CONNECTIONS` connections are open. With thousands of connections, a full collection takes
          100 ms.
        """
        if len(self._connections) > FEW_CONNECTIONS or now < self._next_full_collection_at:
            gc.collect(1)
            return
        started_at = time.perf_counter()
        gc.collect()
        self._next_full_collection_at = now + (time.perf_counter() - started_at) / MAX_FULL_COLLECTION_SHARE


def make_full_collections_rare() -> None:
    """Excludes all existing objects from later garbage collections, and makes Python's automatic full collections rare.
    The only disadvantage is that memory is freed later. `MemoryTrimmer` makes a full collection when the process has
    grown."""
    gc.collect()
    gc.freeze()  # otherwise each full collection would spend 50 ms on these objects
    gc.set_threshold(*gc.get_threshold()[:2], MIDDLE_COLLECTIONS_PER_FULL_ONE)


def resident_bytes(pid: int | None = None) -> int:
    """Returns how many bytes of memory a process uses (its resident set size). Returns 0 if the process has ended, or
    if the system has no /proc. `pid`: the process; None: this process."""
    try:
        with open(f"/proc/{'self' if pid is None else pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def trim_memory() -> None:
    """Returns free memory to the system. See malloc_trim(3). Takes some milliseconds, so do not call it in the event
    loop's thread. Does nothing on systems other than Linux, or if the C library has no malloc_trim."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the C library musl does not have it
        if trim is not None:
            trim(0)

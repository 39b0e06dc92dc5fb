"""Counters and rate limits that all workers share, without locks, in anonymous memory mapped before the fork.

Both tables are count-min sketches. A key has one cell in each of two rows, chosen by its hash, and the smaller of the
two values counts: other keys can only have increased it, and rarely in both rows. So no keys are stored, claimed,
evicted or cleaned up. Python's `hash` of a string is keyed with a secret of this process and its forks (unless
PYTHONHASHSEED is set), so a client cannot choose a key that collides with another one's.

Cells are aligned and have 4 or 8 bytes, which processors read and write at once: no reader sees half a value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap

_SLOTS = 8192
_MASK = _SLOTS - 1
_APART = 24
"""Distance in bits between the two parts of a hash that choose a key's cells."""


def _cells_of(key: str) -> tuple[int, int]:
    number = hash(key)
    return number & _MASK, _SLOTS + ((number >> _APART) & _MASK)


class SharedCounters:
    """Counts keys over all processes. Each process counts in its own column, which no other writes to, so no count is
    lost; the sum of the columns is the result.

    A sum that is read while other processes count may be of different moments. That is harmless: `add` counts before it
    reads, so of several callers at the same time none gets a sum below its place; at worst a sum is too high.
    """

    def __init__(self, columns: int) -> None:
        """To be made before the fork. `columns` is the most processes at the same time."""
        self.columns = columns
        self._height = 2 * _SLOTS
        self._memory = mmap(-1, 4 * self._height * columns)
        self._cells = memoryview(self._memory).cast("I")

    def clear(self, column: int) -> None:
        """Sets all counts of a column to 0."""
        size = 4 * self._height
        self._memory[column * size : (column + 1) * size] = bytes(size)

    def add(self, column: int, key: str) -> int:
        """Counts one more in a column. Returns the sum of all columns."""
        base = column * self._height
        most = []
        for cell in _cells_of(key):
            self._cells[base + cell] += 1
            most.append(sum(self._cells[cell :: self._height]))
        return min(most)

    def remove(self, column: int, key: str) -> None:
        """Counts one less in a column."""
        base = column * self._height
        for cell in _cells_of(key):
            self._cells[base + cell] -= 1


class SharedRateLimiter:
    """Limits the rate of each key over all workers to `per_second`, with bursts of `burst` (GCRA, the leaky bucket as a
    meter: ITU-T I.371). A cell holds the time from which its keys' requests so far are within the rate.

    If two workers take for the same key at the same moment, both may read the same value, and the later write hides the
    earlier: at most one request for each further worker is not counted, and none is refused wrongly. A worker that dies
    leaves nothing to clean up.
    """

    def __init__(self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """To be made before the fork. `clock` is in seconds, and the same in all processes."""
        if per_second <= 0 or burst < 1:
            raise ValueError("a pace needs a rate above 0 and a burst of 1 at least")
        self._step = 1 / per_second
        self._slack = (burst - 1) * self._step
        self._clock = clock
        self._cells = memoryview(mmap(-1, 8 * 2 * _SLOTS)).cast("d")

    def take(self, key: str) -> float:
        """Counts one request of `key` and returns 0.0; if it is beyond the rate, counts nothing and returns how many
        seconds to wait."""
        now = self._clock()
        number = hash(key)  # as in `_cells_of`: this is called for every request
        one, other = number & _MASK, _SLOTS + ((number >> _APART) & _MASK)
        cells = self._cells
        first, second = cells[one], cells[other]
        due = first if first < second else second
        if due < now:
            due = now
        elif (wait := due - now - self._slack) > 0:
            return wait
        due += self._step
        if first < due:
            cells[one] = due
        if second < due:
            cells[other] = due
        return 0.0

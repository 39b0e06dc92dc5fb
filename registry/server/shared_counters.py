"""Counters and rate limits that all worker processes share, in anonymous memory that is mapped before the fork.

Keys are strings, such as client addresses. Each table is a count-min sketch with two rows: the hash of a key chooses
one cell in each row. A cell can be too high because keys with the same cell add to it, so the smaller of the two values
is used. Keys are not stored, so there is nothing to evict or clean up.

Python's `hash` of a string depends on a secret that only this process and its forks know (unless PYTHONHASHSEED is
set). So a client cannot choose a key that shares the cells of another client's key.

There are no locks. A cell is an aligned number of 4 or 8 bytes. Processors read and write such a number as a whole, so
no process sees half of a value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap

_ROW_CELLS = 8192
"""Cells in one row; a power of two."""
_MASK = _ROW_CELLS - 1
_SHIFT_BITS = 24
"""The lowest bits of a key's hash choose its cell in the first row. The bits from this one on choose its cell in the
second row."""


def _cells_of(key: str) -> tuple[int, int]:
    """Returns the index of the key's cell in each row. The second row follows the first in memory."""
    number = hash(key)
    return number & _MASK, _ROW_CELLS + ((number >> _SHIFT_BITS) & _MASK)


class SharedCounters:
    """Counts keys over all processes. Each process has a *column*: a table of its own, to which no other process
    writes. So no count is lost. The count of a key is the sum over all columns.

    Other processes may count while the sum is computed, so the sum may be slightly too high. It always includes what
    was counted before the call. `add` counts first and computes the sum afterwards, so two processes that reach a limit
    at the same moment cannot both get a sum within it.
    """

    def __init__(self, columns: int) -> None:
        """Create it before the fork. `columns` is how many processes may count at the same time."""
        self.columns = columns
        self._column_cells = 2 * _ROW_CELLS
        self._memory = mmap(-1, 4 * self._column_cells * columns)
        self._cells = memoryview(self._memory).cast("I")

    def clear(self, column: int) -> None:
        """Sets all counts of one column to 0."""
        size = 4 * self._column_cells
        self._memory[column * size : (column + 1) * size] = bytes(size)

    def add(self, column: int, key: str) -> int:
        """Increases the key's count in one column by 1. Returns the key's count over all columns."""
        base = column * self._column_cells
        sums = []
        for cell in _cells_of(key):
            self._cells[base + cell] += 1
            sums.append(sum(self._cells[cell :: self._column_cells]))
        return min(sums)

    def remove(self, column: int, key: str) -> None:
        """Decreases the key's count in one column by 1."""
        base = column * self._column_cells
        for cell in _cells_of(key):
            self._cells[base + cell] -= 1


class SharedRateLimiter:
    """Limits the rate of requests of each key, over all workers, with the generic cell rate algorithm (GCRA: the leaky
    bucket as a meter, ITU-T I.371). A cell holds the algorithm's theoretical arrival time: when the next request is due
    if the key's requests came exactly at the allowed rate.

    There is one race: if several workers count a request of the same key at the same moment, only one of the requests
    may be counted, so the key exceeds its rate by the others. No request is refused wrongly. A worker that dies leaves
    nothing to clean up.
    """

    def __init__(self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Create it before the fork. Each key may have `per_second` requests in the long run, and `burst` requests at
        once. `clock` is in seconds, and must be the same in all processes. Raises ValueError for a rate of 0 or less,
        or a burst below 1."""
        if per_second <= 0 or burst < 1:
            raise ValueError("a rate limit needs a rate above 0 and a burst of 1 at least")
        self._step_seconds = 1 / per_second
        self._tolerance_seconds = (burst - 1) * self._step_seconds
        self._clock = clock
        self._cells = memoryview(mmap(-1, 8 * 2 * _ROW_CELLS)).cast("d")

    def take(self, key: str) -> float:
        """Counts one request of `key` and returns 0.0. If the request exceeds the rate, counts nothing and returns how
        many seconds to wait."""
        now = self._clock()
        number = hash(key)  # the code of `_cells_of`, repeated because a call would cost time in every request
        first_cell, second_cell = number & _MASK, _ROW_CELLS + ((number >> _SHIFT_BITS) & _MASK)
        cells = self._cells
        first_due, second_due = cells[first_cell], cells[second_cell]
        due = first_due if first_due < second_due else second_due
        if due < now:
            due = now
        elif (wait := due - now - self._tolerance_seconds) > 0:
            return wait
        due += self._step_seconds
        if first_due < due:
            cells[first_cell] = due
        if second_due < due:
            cells[second_cell] = due
        return 0.0

"""Counters and rate limits that all worker processes share, in anonymous memory that is mapped before the fork.

A key is a string, such as a client address. A table holds a number for each key. The table is a count-min sketch with
two rows: the hash of a key chooses one cell in each row. Several keys can share a cell, which makes its number too high
for each of them. So a key's number is the smaller number of its two cells, which can still be too high.

Python's `hash` of a string depends on a random secret that only this process and its forks know. So no client can find
a key that shares its cells with the key of another client. PYTHONHASHSEED must not be set: it replaces the secret.

There are no locks. A cell is an aligned number of 4 or 8 bytes. Processors read and write such a number as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap

_ROW_CELLS = 8192
"""Cells in one row; a power of two."""
_MASK = _ROW_CELLS - 1
_SHIFT_BITS = 24
"""A key's hash is shifted right by this number of bits before it chooses the cell in the second row. The hash itself
chooses the cell in the first row. Each choice uses only the lowest bits (`_MASK`)."""


def _cells_of(key: str) -> tuple[int, int]:
    """Returns the index of the key's cell in each of the two rows. The second row follows the first one in memory."""
    key_hash = hash(key)
    return key_hash & _MASK, _ROW_CELLS + ((key_hash >> _SHIFT_BITS) & _MASK)


class SharedCounters:
    """A count for each key, over all processes. Each process writes only to its own table, its *column*, so no change
    is lost. The count of a key is the sum of its counts in all columns.

    `add` increases the key's cells before it computes the sum. So if several processes call `add` at the same moment
    and together exceed a limit, at least one of them gets a count above the limit.
    """

    def __init__(self, columns: int) -> None:
        """Allocates the shared memory, so call it before the fork. `columns`: the number of columns, which is the
        largest number of processes that can count at the same time."""
        self.columns = columns
        self._column_cells = 2 * _ROW_CELLS  # number of cells in one column
        self._memory = mmap(-1, 4 * self._column_cells * columns)
        self._cells = memoryview(self._memory).cast("I")

    def clear(self, column: int) -> None:
        """Sets all counts of one column to 0. Call it only while no process writes to the column."""
        size = 4 * self._column_cells
        self._memory[column * size : (column + 1) * size] = bytes(size)

    def add(self, column: int, key: str) -> int:
        """Adds 1 to the key's count in `column`, the caller's own column. Returns the key's count over all columns."""
        base = column * self._column_cells
        cells = _cells_of(key)
        for cell in cells:
            self._cells[base + cell] += 1
        # The slice contains the numbers of this cell in all columns.
        return min(sum(self._cells[cell :: self._column_cells]) for cell in cells)

    def remove(self, column: int, key: str) -> None:
        """Subtracts 1 from the key's count in `column`, the caller's own column."""
        base = column * self._column_cells
        for cell in _cells_of(key):
            self._cells[base + cell] -= 1


def allocate_limiter_cells() -> memoryview[float]:
    """Allocates the memory in which a `SharedRateLimiter` counts. Call this before the fork, so that all processes
    share the memory."""
    return memoryview(mmap(-1, 8 * 2 * _ROW_CELLS)).cast("d")


class SharedRateLimiter:
    """Limits the rate of requests of each key, over all processes, with the generic cell rate algorithm (GCRA: the
    leaky bucket as a meter, ITU-T I.371). A cell holds the algorithm's theoretical arrival time: the time at which the
    next request of the key would arrive if its requests arrived exactly at the allowed rate.

    If several processes count requests of one key at the same moment, some of these requests may stay uncounted. The
    key can then exceed its rate by the number of uncounted requests. This never leads to the refusal of a request that
    is within the rate.

    After the death of a process, nothing has to be cleaned up.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        cells: memoryview[float] | None = None,
    ) -> None:
        """Each key is allowed `per_second` requests on average, and `burst` requests at the same moment. `clock`
        returns seconds, and must be the same in all processes. Raises ValueError if `per_second` is 0 or less, or
        `burst` is below 1.

        `cells`: the memory that `allocate_limiter_cells` returned before the fork. After a change of the rate, a new
        limiter can use the memory of the old limiter. If `cells` is None, this constructor allocates the memory, so
        call it before the fork."""
        if per_second <= 0 or burst < 1:
            raise ValueError("a rate limit needs a rate above 0 and a burst of at least 1")
        self._step_seconds = 1 / per_second
        self._tolerance_seconds = (burst - 1) * self._step_seconds
        self._clock = clock
        self._cells = allocate_limiter_cells() if cells is None else cells

    def take(self, key: str) -> float:
        """If a request of `key` is within the rate now, counts it and returns 0.0. Otherwise counts nothing, and
        returns the number of seconds until a request of the key will be within the rate: at most `1 / per_second`."""
        now = self._clock()
        key_hash = hash(key)  # `_cells_of` without the cost of a function call in every request
        first_cell, second_cell = key_hash & _MASK, _ROW_CELLS + ((key_hash >> _SHIFT_BITS) & _MASK)
        cells = self._cells
        first_due, second_due = cells[first_cell], cells[second_cell]
        due = first_due if first_due < second_due else second_due
        if due < now:
            due = now
        elif (wait := due - now - self._tolerance_seconds) > 0:
            if wait > self._step_seconds:  # an old limiter with other limits has stored these times
                wait = self._step_seconds
                cells[first_cell] = cells[second_cell] = now + self._tolerance_seconds + wait
            return wait
        due += self._step_seconds
        if first_due < due:
            cells[first_cell] = due
        if second_due < due:
            cells[second_cell] = due
        return 0.0

"""Counts and paces that all workers share: a few anonymous pages, mapped before the fork. No locks.

Both tables are sketches. A key has one cell in each of two rows, by its hash, and of what the two say the smaller
counts: other keys can only have added to it, and hardly ever to both. So there are no keys to store, nothing to claim,
to evict or to clean up. `hash` of a string is keyed with a secret of this process and its forks (unless PYTHONHASHSEED
says otherwise), so nobody outside can aim at another's cells.

Cells have 4 or 8 bytes at addresses divisible by that, which the processors in use read and write as one: what is read
was written by somebody, never half of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap

_SLOTS = 8192
_MASK = _SLOTS - 1
_APART = 24
"""Bits between the two parts of a hash that name a key's cells."""


def _cells_of(key: str) -> tuple[int, int]:
    number = hash(key)
    return number & _MASK, _SLOTS + ((number >> _APART) & _MASK)


class SharedCounters:
    """How often each key is there now, in all processes together. Each process counts in a column of its own, which
    nobody else writes to, so no count is ever lost; a look adds the columns up.

    A process that looks while others count may see a moment that never was. That is harmless: `enter` counts first and
    looks then, so of those that come at the same time none is let in above the limit; at worst one too many is refused.
    """

    def __init__(self, columns: int) -> None:
        """To be made before the fork. `columns`: for that many processes at the same time."""
        self.columns = columns
        self._height = 2 * _SLOTS
        self._memory = mmap(-1, 4 * self._height * columns)
        self._cells = memoryview(self._memory).cast("I")

    def clear(self, column: int) -> None:
        """Whoever counted there is gone."""
        size = 4 * self._height
        self._memory[column * size : (column + 1) * size] = bytes(size)

    def add(self, column: int, key: str) -> int:
        """Counts one more in that column; how many there are now, in all of them."""
        base = column * self._height
        most = []
        for cell in _cells_of(key):
            self._cells[base + cell] += 1
            most.append(sum(self._cells[cell :: self._height]))
        return min(most)

    def remove(self, column: int, key: str) -> None:
        """One that was added there is gone."""
        base = column * self._height
        for cell in _cells_of(key):
            self._cells[base + cell] -= 1


class SharedRateLimiter:
    """How fast each of many may go on, over all workers: `per_second`, and `burst` at once (GCRA, the leaky bucket as a
    meter: ITU-T I.371). A cell holds when its keys' requests so far will have been paid for.

    Two workers that take for the same key at the same moment may both read what stood there before, and the later
    write hides the earlier: a request is had for nothing, at most one for each further worker, and nobody is refused
    who should not be. A worker that dies leaves nothing behind but the time it last wrote.
    """

    def __init__(self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """To be made before the fork. `clock` is in seconds and the same for all processes of the machine."""
        if per_second <= 0 or burst < 1:
            raise ValueError("a pace needs a rate above 0 and a burst of 1 at least")
        self._step = 1 / per_second
        self._slack = (burst - 1) * self._step
        self._clock = clock
        self._cells = memoryview(mmap(-1, 8 * 2 * _SLOTS)).cast("d")

    def take(self, key: str) -> float:
        """Takes one request of `key`. 0.0: it may go on; else how many seconds to wait, and nothing was taken."""
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

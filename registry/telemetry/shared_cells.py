"""Numbers that all processes of a server add up, in anonymous memory that is mapped before the fork (`SharedCells`).

A *cell* holds one number. Each process writes to cells of its own, called a *column*, so that an addition needs no lock
and none is lost. The total of a cell is the sum over all columns. A process that ends, however it ends, leaves its
column as it is, and the next process that claims the column goes on adding to it. So the totals include the processes
that have died.

A process claims a column by a lock on one byte of a file without a name. The kernel frees the lock when the process
ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections.abc import Sequence
from mmap import mmap

_NAME_BYTES = 256
"""Space for one name in `SharedNames`: its length in one byte, and up to 255 bytes of text."""


class SharedCells:
    """`size` cells, with one column for each of up to `columns` processes at a time. Create it before the fork.

    `own` is the column that this process writes to: `cells.own[number] += 1`. Until `claim_column` is called, and if
    all columns are taken, it is memory of this process alone, which no total includes. All methods return at once."""

    def __init__(self, size: int, columns: int) -> None:
        self._size = size
        self._columns = columns
        self._cells = memoryview(mmap(-1, max(8 * size * columns, 1))).cast("d")
        self._locks = _open_lock_file(self)
        self.own: memoryview[float] = self._private_column()

    def claim_column(self) -> bool:
        """Makes `own` a column that no other running process writes to. Returns False if all columns are taken. Call it
        once in each process that writes: a process has the `own` of its parent until then."""
        for column in range(self._columns):
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, column)
            except OSError:
                continue
            self.own = self._column(column)
            return True
        self.own = self._private_column()
        return False

    def totals(self) -> list[float]:
        """Returns the total of each cell. While other processes write, each number is one that was right at some moment
        during the call."""
        return list(map(sum, zip(*(self._column(column) for column in range(self._columns)), strict=True)))

    def _private_column(self) -> memoryview[float]:
        return memoryview(bytearray(8 * self._size)).cast("d")

    def _column(self, column: int) -> memoryview[float]:
        return self._cells[column * self._size : (column + 1) * self._size]


class SharedNames:
    """A list of names that all processes share, in which each name keeps its number. Create it before the fork.

    Metrics have cells by number, for things whose names are known only from the settings, such as upstreams. Names that
    a changed configuration brings are added while the processes run."""

    def __init__(self, names: Sequence[str], capacity: int) -> None:
        """`names` get the numbers from 0 on. The list has room for `capacity` names, of up to 255 bytes each."""
        self._capacity = capacity
        self._memory = mmap(-1, _NAME_BYTES * capacity)
        self._locks = _open_lock_file(self)
        for name in names:
            self.number(name)

    def number(self, name: str) -> int | None:
        """Returns the number of a name, and adds a name that is not in the list. Returns None if the list is full."""
        known = self.names()
        if name in known:
            return known.index(name)
        fcntl.lockf(self._locks, fcntl.LOCK_EX)
        try:
            known = self.names()  # another process may have added the name meanwhile
            if name in known:
                return known.index(name)
            if len(known) == self._capacity:
                return None
            text = name.encode()[: _NAME_BYTES - 1]
            start = len(known) * _NAME_BYTES
            self._memory[start + 1 : start + 1 + len(text)] = text
            self._memory[start] = len(text)  # last, because it makes the name visible
            return len(known)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN)

    def names(self) -> list[str]:
        """Returns all names, in the order of their numbers."""
        found = []
        for start in range(0, self._capacity * _NAME_BYTES, _NAME_BYTES):
            length = self._memory[start]
            if not length:
                break
            found.append(self._memory[start + 1 : start + 1 + length].decode())
        return found


def _open_lock_file(owner: object) -> int:
    """Returns the descriptor of a file without a name, which stays open as long as `owner` exists."""
    with tempfile.TemporaryFile() as file:
        descriptor = os.dup(file.fileno())
    weakref.finalize(owner, os.close, descriptor)
    return descriptor

"""Counts of all processes of a server (`SharedCells`), and numbered lists of names (`SharedNames`). Both are in memory
that is mapped before the fork (`SharedMemory`). A new version of the program that takes over maps the same memory.

A *cell* holds one number of one process. The cells of a process are its *column*, and no other process writes to them,
so an addition needs no lock and is never lost. A total is the sum of the cells with one index over all columns. When a
process ends, even if it is killed, its column keeps the numbers. The next process that claims the column adds to these
numbers, so the totals include the processes that have died.

A process claims a column by a lock on one byte of the memory's file. The kernel frees the lock when the process ends.

A *gauge* is a cell whose number can fall, such as the number of open connections. `live_totals` does not count what a
dead process has left in its gauges. The next process that claims the column sets the gauges to 0.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from mmap import mmap

_NAME_BYTES = 256
"""Space for one name in `SharedNames`: its length in one byte, and up to 255 bytes of text."""
_NAMES_LOCK = 1 << 20
"""Number of the file's byte that is locked while a name is added. The lock of column N is the byte N, which comes
before this byte."""


class SharedMemory:
    """Memory that a process shares with its forks (`bytes`), and an open file without a name, whose bytes can be locked
    (`descriptor`). On Linux the memory is the content of this file. The file is closed when this object is deleted."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        """`size`: in bytes. `descriptor`: the file descriptor of another `SharedMemory` with at least `size` bytes, to
        map its memory; None: makes new memory, all 0. Raises OSError."""
        if descriptor is not None:
            self.descriptor, self.bytes = descriptor, mmap(descriptor, size)
        elif hasattr(os, "memfd_create"):  # needs no disk, which may be full
            self.descriptor = os.memfd_create("entrepot-metrics")
            os.ftruncate(self.descriptor, size)
            self.bytes = mmap(self.descriptor, size)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
            # The memory is not the content of the file, because the file could not grow on a full disk. The file is
            # only for locks.
            self.bytes = mmap(-1, size)
        weakref.finalize(self, os.close, self.descriptor)


class SharedCells:
    """`columns` columns of `size` cells each. Each process that counts claims one column. Create this object before the
    fork. No method blocks.

    `own` has the cells of this process, by their indexes: `cells.own[index] += 1`. Before the first call of
    `claim_column`, and if all columns are taken, `own` is memory outside the columns, which no total includes."""

    def __init__(self, size: int, columns: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """`memory`: the memory that has the cells; None: new memory. `start`: the position of the first cell in the
        memory, in bytes; must be a multiple of 8."""
        self._size = size
        self._columns = columns
        self._memory = memory or SharedMemory(start + self.needed_bytes(size, columns))
        end = start + self.needed_bytes(size, columns)
        self._cells = memoryview(self._memory.bytes)[start:end].cast("d")  # each column ends with its process's id
        self._own_column_number: int | None = None
        self._lock_file = self._memory.descriptor  # byte N of this file is the lock of column N
        self.own: memoryview[float] = self._private_column()

    @staticmethod
    def needed_bytes(size: int, columns: int) -> int:
        """Returns the size in bytes of the memory for `columns` columns of `size` cells each."""
        return 8 * (size + 1) * columns

    def claim_column(self, gauges: Iterable[int] = ()) -> bool:
        """Makes `own` a column that no other running process writes to. Sets `gauges`, the indexes of the gauges, to 0
        in this column. Returns False if all columns are taken. Call this method once in each process that writes: until
        then, a forked process has the `own` of its parent."""
        for column in range(self._columns):
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, column)
            except OSError:
                continue
            self.own, self._own_column_number = self._column(column), column
            for cell in gauges:
                self.own[cell] = 0
            self._cells[column * (self._size + 1) + self._size] = os.getpid()
            return True
        self.own = self._private_column()
        return False

    @property
    def own_column_number(self) -> int | None:
        """The number of the column that this process has claimed; None: the process has claimed no column."""
        return self._own_column_number

    def totals(self) -> list[float]:
        """Returns the totals over all columns that were ever claimed, by the index of the cell. An addition that
        another process makes during the call may be missing."""
        columns = [self._column(column) for column in range(self._columns) if self._process_of(column)]
        if len(columns) <= 1:
            return list(columns[0]) if columns else [0.0] * self._size
        return list(map(sum, zip(*columns, strict=True)))

    def live_totals(self, cells: Iterable[int]) -> dict[int, float]:
        """Returns the totals for these indexes of cells over the columns of the processes that are running."""
        columns = [self._column(column) for column in self._live_columns()]
        return {cell: sum(column[cell] for column in columns) for cell in cells}

    def processes(self) -> list[tuple[int, int]]:
        """Returns a column number and a process id for each running process that has claimed a column."""
        return [(column, self._process_of(column)) for column in self._live_columns()]

    def _process_of(self, column: int) -> int:
        """Returns the id of the last process that has claimed the column; 0 if none has."""
        return int(self._cells[column * (self._size + 1) + self._size])

    def _live_columns(self) -> list[int]:
        """Returns the numbers of the columns that running processes have locked. To find them, this method locks each
        free column for a moment. A process that calls `claim_column` at that moment takes another column. There is
        always another one, because there are more columns than processes."""
        live_columns = []
        for column in range(self._columns):
            if column == self._own_column_number:  # to lock and unlock it here would free this process's own lock
                live_columns.append(column)
                continue
            try:
                # A shared lock, so that two processes that run this method at the same time do not take each other's
                # locks for those of claimed columns.
                fcntl.lockf(self._lock_file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, column)
            except OSError:
                if self._process_of(column):
                    live_columns.append(column)
            else:
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, column)
        return live_columns

    def _private_column(self) -> memoryview[float]:
        return memoryview(bytearray(8 * self._size)).cast("d")

    def _column(self, column: int) -> memoryview[float]:
        start = column * (self._size + 1)
        return self._cells[start : start + self._size]


class SharedNames:
    """A list of names that all processes share, in which each name keeps its number. Create it before the fork.

    Some metrics count by upstream or by webhook. Their cells are fixed before the fork, but a changed configuration can
    add names of upstreams and webhooks while the processes run. The label of such a metric therefore has a number as
    its value, and this list says which name has which number."""

    def __init__(self, names: Sequence[str], capacity: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """Adds those of `names` that are not in the list yet. Numbers begin with 0. The list has space for `capacity`
        names of up to 255 bytes each. `memory`: the memory that has the list; None: new memory. `start`: the position
        of the list in the memory, in bytes."""
        self._capacity = capacity
        self._label_values: dict[str, str] = {}
        self._memory = memory or SharedMemory(start + self.needed_bytes(capacity))
        self._list_bytes = memoryview(self._memory.bytes)[start : start + self.needed_bytes(capacity)]
        self._lock_file = self._memory.descriptor
        for name in names:
            self.number(name)

    @staticmethod
    def needed_bytes(capacity: int) -> int:
        """Returns the size in bytes of the memory for a list of up to `capacity` names."""
        return _NAME_BYTES * capacity

    @staticmethod
    def all_label_values(capacity: int) -> list[str]:
        """Returns every value that `label_value` can return, for a list with space for `capacity` names."""
        return [str(number) for number in range(capacity)]

    def number(self, name: str) -> int | None:
        """Returns the number of a name, and adds a name that is not in the list. Returns None if the list is full."""
        known_names = self.names()
        if name in known_names:
            return known_names.index(name)
        fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1, _NAMES_LOCK)
        try:
            known_names = self.names()  # another process may have added the name meanwhile
            if name in known_names:
                return known_names.index(name)
            if len(known_names) == self._capacity:
                return None
            encoded_name = name.encode()[: _NAME_BYTES - 1]
            start = len(known_names) * _NAME_BYTES
            self._list_bytes[start + 1 : start + 1 + len(encoded_name)] = encoded_name
            self._list_bytes[start] = len(encoded_name)  # written last, because a length makes the name visible
            return len(known_names)
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, _NAMES_LOCK)

    def label_value(self, name: str) -> str:
        """Returns the number of a name as a text, for the label of a metric. Adds a name that is not in the list. If
        the list is full, returns the number of the last name instead."""
        value = self._label_values.get(name)
        if value is None:
            number = self.number(name)
            value = self._label_values[name] = str(self._capacity - 1 if number is None else number)
        return value

    def names(self) -> list[str]:
        """Returns all names, in the order of their numbers."""
        names = []
        for start in range(0, self._capacity * _NAME_BYTES, _NAME_BYTES):
            length = self._list_bytes[start]
            if not length:
                break
            names.append(bytes(self._list_bytes[start + 1 : start + 1 + length]).decode())
        return names

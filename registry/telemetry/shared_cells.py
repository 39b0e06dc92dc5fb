"""`SharedCells` holds the counts of all processes of a server. `SharedNames` is a list of names with numbers. Both are
in memory that all processes share (`SharedMemory`). The memory is mapped before the fork. When a new version of the
program takes over, the new version maps the same memory.

A *cell* holds one number. A *column* contains the cells of one process. No other process writes to the column, so an
addition needs no lock. A total is the sum of the cells with the same index over all columns. When a process dies, its
column keeps the numbers, and the next process that claims the column adds to these numbers. So the totals include the
processes that have died.

A process claims a column by a lock on one byte of the memory's file. The kernel frees the lock when the process ends.

A *gauge* is a cell whose number can fall, such as the number of open connections. `live_totals` leaves out the gauges
of dead processes. The next process that claims the column sets the gauges to 0.
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
"""While a name is added, the byte at this offset in the memory's file is locked. The offset must be larger than every
column number, because the byte at offset N is the lock of column N."""


class SharedMemory:
    """Memory that a process shares with its forks, and a file for locks.

    - `bytes`: the memory.
    - `descriptor`: the descriptor of the file, which has no name. On Linux, the memory is the content of this file. The
      file is closed when this object is deleted."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        """`size`: size of the memory in bytes. `descriptor`: the file descriptor of an existing `SharedMemory` with at
        least `size` bytes, whose memory is mapped; None: creates new memory, in which all bytes are 0. Raises
        OSError."""
        if descriptor is not None:
            self.descriptor, self.bytes = descriptor, mmap(descriptor, size)
        elif hasattr(os, "memfd_create"):  # works even if the disk is full
            self.descriptor = os.memfd_create("entrepot-metrics")
            os.ftruncate(self.descriptor, size)
            self.bytes = mmap(self.descriptor, size)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
            # This file is only for locks. Memory in this file would need space on the disk, which may be full.
            self.bytes = mmap(-1, size)
        weakref.finalize(self, os.close, self.descriptor)


class SharedCells:
    """`columns` columns of `size` cells each. Each process that counts must claim one column. Create this object before
    the fork. No method blocks.

    `own`: the cells of this process, by index: `cells.own[index] += 1`. While this process has no column, `own` is
    memory outside all columns, and no total includes it."""

    def __init__(self, size: int, columns: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """`memory`: the memory for the cells; None: creates new memory. `start`: the offset of the first cell in the
        memory, in bytes; must be a multiple of 8."""
        self._size = size
        self._columns = columns
        self._memory = memory or SharedMemory(start + self.needed_bytes(size, columns))
        end = start + self.needed_bytes(size, columns)
        self._cells = memoryview(self._memory.bytes)[start:end].cast("d")  # each column ends with a process id
        self._own_column_number: int | None = None
        self._lock_file = self._memory.descriptor
        self.own: memoryview[float] = self._private_column()

    @staticmethod
    def needed_bytes(size: int, columns: int) -> int:
        """Returns the size in bytes of the memory for `columns` columns of `size` cells each."""
        return 8 * (size + 1) * columns

    def claim_column(self, gauges: Iterable[int] = ()) -> bool:
        """Claims a free column, makes it `own`, and sets its gauges to 0. `gauges`: the indexes of the gauges. Returns
        False if all columns are taken. Call this method once in each process that counts, after the fork: until this
        call, a forked process writes to the `own` of its parent."""
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
        """The number of the column that this process has claimed; None if this process has claimed no column."""
        return self._own_column_number

    def totals(self) -> list[float]:
        """Returns the totals over all columns, by the index of the cell. May miss additions that other processes make
        during the call."""
        columns = [self._column(column) for column in range(self._columns) if self._process_of(column)]
        if len(columns) <= 1:
            return list(columns[0]) if columns else [0.0] * self._size
        return list(map(sum, zip(*columns, strict=True)))

    def live_totals(self, cells: Iterable[int]) -> dict[int, float]:
        """Returns the totals over the columns of the running processes, by the index of the cell. `cells`: the indexes
        of the cells to add up."""
        columns = [self._column(column) for column in self._live_columns()]
        return {cell: sum(column[cell] for column in columns) for cell in cells}

    def processes(self) -> list[tuple[int, int]]:
        """Returns the column number and the process id of each running process that has claimed a column."""
        return [(column, self._process_of(column)) for column in self._live_columns()]

    def _process_of(self, column: int) -> int:
        """Returns the id of the last process that claimed the column; 0 if no process has claimed the column."""
        return int(self._cells[column * (self._size + 1) + self._size])

    def _live_columns(self) -> list[int]:
        """Returns the numbers of the columns that running processes have locked. Locks each free column for a moment,
        during which `claim_column` in another process skips this column. There must be more columns than processes, so
        that `claim_column` still finds a free column."""
        live_columns = []
        for column in range(self._columns):
            if column == self._own_column_number:  # locking and unlocking it here would free this process's own lock
                live_columns.append(column)
                continue
            try:
                # Several processes may run this method at the same time. With exclusive locks, one process could find
                # a free column locked by another, and would count the column as claimed. Shared locks do not conflict.
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
    """A list of names that all processes share, in which each name keeps its number. Create this object before the
    fork.

    The cells of a metric are fixed before the fork, but a reload of the configuration can add upstreams and webhooks.
    So the label `upstream` or `webhook` of a cell is a number, and this list has the name for each number."""

    def __init__(self, names: Sequence[str], capacity: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """Adds each name of `names` that is not in the list yet. Numbers begin with 0. The list has space for
        `capacity` names of up to 255 bytes each. `memory`: the memory for the list; None: creates new memory. `start`:
        the offset of the list in the memory, in bytes."""
        self._capacity = capacity
        self._label_values: dict[str, str] = {}
        self._memory = memory or SharedMemory(start + self.needed_bytes(capacity))
        self._list_bytes = memoryview(self._memory.bytes)[start : start + self.needed_bytes(capacity)]
        self._lock_file = self._memory.descriptor
        for name in names:
            self.find_or_add(name)

    @staticmethod
    def needed_bytes(capacity: int) -> int:
        """Returns the size in bytes of the memory for a list of up to `capacity` names."""
        return _NAME_BYTES * capacity

    @staticmethod
    def all_label_values(capacity: int) -> list[str]:
        """Returns every value that `label_value` can return, for a list with space for `capacity` names."""
        return [str(number) for number in range(capacity)]

    def find_or_add(self, name: str) -> int | None:
        """Returns the number of a name. Adds the name if the list does not have it. Returns None if the list is full
        and does not have the name."""
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
        """Returns the number of a name as a text, for the label of a metric. Adds the name if the list does not have
        it. If the list is full and does not have the name, returns the number of the last name in the list."""
        value = self._label_values.get(name)
        if value is None:
            number = self.find_or_add(name)
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

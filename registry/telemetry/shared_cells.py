"""Numbers that all processes of a server add up (`SharedCells`), in memory that is mapped before the fork
(`SharedMemory`). A new version of the program that takes over maps the same memory again.

A *cell* holds one number. Each process writes only to its own cells, its *column*. So an addition needs no lock, and no
addition is lost. The total of a cell is the sum over all columns. When a process ends, even if it is killed, its column
stays as it is. The next process that claims the column adds to the numbers that are in it. So the totals include the
processes that have died.

A process claims a column by a lock on one byte of the memory's file. The kernel frees the lock when the process ends.
Some cells hold numbers that shrink again, such as the number of open connections. `live_totals` does not count what a
dead process has left in such cells. The next process that claims the column sets these cells to 0.
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
"""The byte that is locked while a name is added. The bytes of columns, numbered from 0, come before it."""


class SharedMemory:
    """Memory that a process shares with its forks, and an open file without a name, whose bytes can be locked. On Linux
    the memory is the content of this file. The file stays open as long as this object exists."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        """Makes memory of `size` bytes, all 0. With `descriptor`, maps existing memory instead: `descriptor` is that of
        another `SharedMemory` with at least `size` bytes. Raises OSError."""
        if descriptor is not None:
            self.descriptor, self.bytes = descriptor, mmap(descriptor, size)
        elif hasattr(os, "memfd_create"):  # needs no directory, which may be on a full disk
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
    """`columns` columns of `size` cells each. Each process that counts claims one column. Create it before the fork.

    `own` is the column that this process writes to: `cells.own[number] += 1`. Before the first call of `claim_column`,
    and if all columns are taken, `own` is memory outside the columns, and no total includes it. No method blocks."""

    def __init__(self, size: int, columns: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """`memory`: where the cells are, from the byte `start` on; None: in memory of their own. `start` must be a
        multiple of 8."""
        self._size = size
        self._columns = columns
        self._memory = memory or SharedMemory(start + self.needed_bytes(size, columns))
        end = start + self.needed_bytes(size, columns)
        self._cells = memoryview(self._memory.bytes)[start:end].cast("d")  # each column ends with its process's id
        self._own_number: int | None = None
        self._locks = self._memory.descriptor  # the file whose byte number N is the lock of the column N
        self.own: memoryview[float] = self._private_column()

    @staticmethod
    def needed_bytes(size: int, columns: int) -> int:
        """Returns the size in bytes of the memory for `columns` columns of `size` cells each."""
        return 8 * (size + 1) * columns

    def claim_column(self, gauges: Iterable[int] = ()) -> bool:
        """Makes `own` a column that no other running process writes to. `gauges`: the cells whose numbers shrink again;
        this method sets them to 0. Returns False if all columns are taken. Call it once in each process that writes:
        until then, a forked process has the `own` of its parent."""
        for column in range(self._columns):
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, column)
            except OSError:
                continue
            self.own, self._own_number = self._column(column), column
            for cell in gauges:
                self.own[cell] = 0
            self._cells[column * (self._size + 1) + self._size] = os.getpid()
            return True
        self.own = self._private_column()
        return False

    @property
    def own_column(self) -> int | None:
        """The number of the column that this process has claimed; None: it has none."""
        return self._own_number

    def totals(self) -> list[float]:
        """Returns the total of each cell, over all columns that were ever claimed. An addition that another process
        makes during the call may be missing."""
        columns = [self._column(column) for column in range(self._columns) if self._process_of(column)]
        if len(columns) <= 1:
            return list(columns[0]) if columns else [0.0] * self._size
        return list(map(sum, zip(*columns, strict=True)))

    def live_totals(self, cells: Iterable[int]) -> dict[int, float]:
        """Returns the total of each of the `cells` over the columns of the processes that are running."""
        columns = [self._column(column) for column in self._live_columns()]
        return {cell: sum(column[cell] for column in columns) for cell in cells}

    def processes(self) -> list[tuple[int, int]]:
        """Returns the column and the process id of each running process that has claimed one."""
        return [(column, self._process_of(column)) for column in self._live_columns()]

    def _process_of(self, column: int) -> int:
        """Returns the id of the last process that has claimed the column; 0 if none has."""
        return int(self._cells[column * (self._size + 1) + self._size])

    def _live_columns(self) -> list[int]:
        """Returns the columns of running processes: those that are locked. This method locks other columns for a
        moment. A process that claims a column at that moment takes the next one instead. This does no harm, because
        there are more columns than processes."""
        live_columns = []
        for column in range(self._columns):
            if column == self._own_number:  # a process does not see its own lock, and would remove it here
                live_columns.append(column)
                continue
            try:
                # The lock is a shared one, so that two processes that call this method at the same time do not see each
                # other's locks.
                fcntl.lockf(self._locks, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, column)
            except OSError:
                if self._process_of(column):
                    live_columns.append(column)
            else:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, column)
        return live_columns

    def _private_column(self) -> memoryview[float]:
        return memoryview(bytearray(8 * self._size)).cast("d")

    def _column(self, column: int) -> memoryview[float]:
        start = column * (self._size + 1)
        return self._cells[start : start + self._size]


class SharedNames:
    """A list of names that all processes share, in which each name keeps its number. Create it before the fork.

    Some metrics have one cell for each upstream, or one for each webhook. The names of upstreams and webhooks are known
    only from the settings, and this list gives each name the number of its cell. If a changed configuration has new
    names, they are added while the processes run."""

    def __init__(self, names: Sequence[str], capacity: int, memory: SharedMemory | None = None, start: int = 0) -> None:
        """`names` get the numbers from 0 on, unless they are in the list already. The list can have up to `capacity`
        names, of up to 255 bytes each. `memory`: where the list is, from the byte `start` on; None: in memory of its
        own."""
        self._capacity = capacity
        self._labels: dict[str, str] = {}
        self._shared = memory or SharedMemory(start + self.needed_bytes(capacity))
        self._memory = memoryview(self._shared.bytes)[start : start + self.needed_bytes(capacity)]
        self._locks = self._shared.descriptor
        for name in names:
            self.number(name)

    @staticmethod
    def needed_bytes(capacity: int) -> int:
        """Returns the size in bytes of the memory for a list of up to `capacity` names."""
        return _NAME_BYTES * capacity

    @staticmethod
    def labels(capacity: int) -> list[str]:
        """Returns every text that `label` can return, for a list with space for `capacity` names."""
        return [str(number) for number in range(capacity)]

    def number(self, name: str) -> int | None:
        """Returns the number of a name, and adds a name that is not in the list. Returns None if the list is full."""
        known_names = self.names()
        if name in known_names:
            return known_names.index(name)
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, _NAMES_LOCK)
        try:
            known_names = self.names()  # another process may have added the name meanwhile
            if name in known_names:
                return known_names.index(name)
            if len(known_names) == self._capacity:
                return None
            encoded_name = name.encode()[: _NAME_BYTES - 1]
            start = len(known_names) * _NAME_BYTES
            self._memory[start + 1 : start + 1 + len(encoded_name)] = encoded_name
            self._memory[start] = len(encoded_name)  # last, because it makes the name visible
            return len(known_names)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _NAMES_LOCK)

    def label(self, name: str) -> str:
        """Returns the number of a name as a text, for the label of a metric. Adds a name that is not in the list; if
        the list is full, returns the number of the last name."""
        label = self._labels.get(name)
        if label is None:
            number = self.number(name)
            label = self._labels[name] = str(self._capacity - 1 if number is None else number)
        return label

    def names(self) -> list[str]:
        """Returns all names, in the order of their numbers."""
        names = []
        for start in range(0, self._capacity * _NAME_BYTES, _NAME_BYTES):
            length = self._memory[start]
            if not length:
                break
            names.append(bytes(self._memory[start + 1 : start + 1 + length]).decode())
        return names

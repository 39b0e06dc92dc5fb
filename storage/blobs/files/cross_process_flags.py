"""Two flags of a partial blob that all processes see: "a client waits for it" and "its download has started"
(`CrossProcessFlags`).

A *partial blob* is a blob that is still being downloaded; its *owner* is the process that downloads it. A flag is set
while any process holds a lock on a certain byte of the blob's state file. So setting a flag writes nothing to the disk,
and the kernel clears the flags of a process that dies.
"""

from __future__ import annotations

from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, lock_byte_shared, try_lock_byte, unlock_byte

WAITERS_BYTE = 1
"""Offset of the byte on which each process that has waiters holds a shared lock."""
STARTED_BYTE = 2
"""Offset of the byte that the owner locks when it starts to request bytes. (The lock on the byte at offset 0 makes a
process the owner.)"""


class CrossProcessFlags:
    """The flags of one partial blob, in one process. There is one object for each partial blob that the process has
    open. The methods take microseconds, and raise StorageFailed unless their docstring says otherwise. Call them only
    while the state file is open."""

    def __init__(self, state_fd: int) -> None:
        """`state_fd`: descriptor of the open state file."""
        self._state_fd = state_fd
        self._waiters: set[object] = set()
        """The waiters of this process."""
        self._has_started_here = False
        """Whether this process holds the lock on `STARTED_BYTE`, and so has set the flag."""

    def add_waiter(self, waiter: object) -> None:
        """Registers that `waiter` waits for the blob, and sets the flag "a client waits". `waiter`: any hashable
        object."""
        if not self._waiters:
            with as_storage_errors():
                lock_byte_shared(self._state_fd, WAITERS_BYTE)
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: object) -> None:
        """Removes `waiter` if it was registered. When the last waiter of this process is removed, releases the lock by
        which this process has set the flag. Raises nothing."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            if not self._waiters:
                with suppress(OSError):
                    unlock_byte(self._state_fd, WAITERS_BYTE)

    def has_waiter_besides(self, waiter: object) -> bool:
        """Returns whether any other waiter than `waiter` is registered, in this or another process."""
        # `is_byte_locked` does not see the lock of this process, so this process's waiters are looked up in memory.
        with as_storage_errors():
            return bool(self._waiters - {waiter}) or is_byte_locked(self._state_fd, WAITERS_BYTE)

    def mark_started(self) -> None:
        """Sets the flag "the owner has started to request bytes". Only for the process that is the owner."""
        if not self._has_started_here:
            with as_storage_errors():
                self._has_started_here = try_lock_byte(self._state_fd, STARTED_BYTE)

    def clear_started(self) -> None:
        """Clears the flag if this process has set it with `mark_started`. Raises nothing."""
        if self._has_started_here:
            self._has_started_here = False
            with suppress(OSError):
                unlock_byte(self._state_fd, STARTED_BYTE)

    def has_started(self) -> bool:
        """Returns whether the owner, in this or another process, has started to request bytes."""
        with as_storage_errors():
            return self._has_started_here or is_byte_locked(self._state_fd, STARTED_BYTE)

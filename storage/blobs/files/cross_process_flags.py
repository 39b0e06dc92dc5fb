"""Two flags of a partial blob that all processes see: "a client waits for it" and "its download has started".

A *partial blob* is a blob that is still being downloaded; its *owner* is the process that downloads it. Each flag is a
lock on one byte of the blob's state file. Setting a flag writes nothing to the disk, and the kernel clears the flags of
a process when the process dies.
"""

from __future__ import annotations

from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, share_lock_byte, try_lock_byte, unlock_byte

WAITERS_BYTE = 1
"""Offset of the byte that each process with waiters locks, shared."""
STARTED_BYTE = 2
"""Offset of the byte that an owner locks once it has started to request bytes. The byte at offset 0 is the lock that
makes a process the owner."""


class CrossProcessFlags:
    """The flags of one partial blob, set and read through one open state file, which all users of the blob in this
    process share. The methods take microseconds and raise StorageFailed. None may be called after the file is
    closed."""

    def __init__(self, state_fd: int) -> None:
        self._state_fd = state_fd
        self._waiters: set[object] = set()
        """Waiters in this process."""
        self._has_started_here = False
        """Whether this process holds the lock on `STARTED_BYTE`."""

    def add_waiter(self, waiter: object) -> None:
        """Registers that `waiter`, any object, waits for the blob."""
        if not self._waiters:
            with as_storage_errors():
                share_lock_byte(self._state_fd, WAITERS_BYTE)
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: object) -> None:
        """Removes `waiter` if it was registered. Raises nothing."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            if not self._waiters:
                with suppress(OSError):
                    unlock_byte(self._state_fd, WAITERS_BYTE)

    def has_waiter_besides(self, user: object) -> bool:
        """Returns whether anything but `user` waits for the blob, in this or another process."""
        with as_storage_errors():
            return bool(self._waiters - {user}) or is_byte_locked(self._state_fd, WAITERS_BYTE)

    def mark_started(self) -> None:
        """Sets the flag that says that the owner, which is in this process, has started to request bytes."""
        if not self._has_started_here:
            with as_storage_errors():
                self._has_started_here = try_lock_byte(self._state_fd, STARTED_BYTE)

    def clear_started(self) -> None:
        """Clears the flag that `mark_started` set. Raises nothing."""
        if self._has_started_here:
            self._has_started_here = False
            with suppress(OSError):
                unlock_byte(self._state_fd, STARTED_BYTE)

    def has_started(self) -> bool:
        """Returns whether the owner, in this or another process, has started to request bytes."""
        with as_storage_errors():
            return self._has_started_here or is_byte_locked(self._state_fd, STARTED_BYTE)

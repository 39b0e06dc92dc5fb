"""Flags of a partial blob that all processes see: "a client waits for it", "its download has started", "its download
has started from this repository", and "the upstream has started to send" (`CrossProcessFlags`).

A *partial blob* is a blob that is still being downloaded; its *owner* is the process that downloads it. Its *state
file* says which bytes are stored. Each flag has a byte of this file, and is set while any process holds a lock on the
byte. So setting a flag writes nothing to the disk, and the kernel clears the flags of a process that dies.
"""

from __future__ import annotations

import zlib
from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, lock_byte_shared, try_lock_byte, unlock_byte
from storage.names import RepositoryName

WAITERS_BYTE = 1
"""Offset of the byte on which each process that has waiters holds a shared lock."""
UPSTREAM_REQUEST_BYTE = 2
"""Offset of the byte that the owner locks when it starts to request bytes. (The lock on the byte at offset 0 makes a
process the owner.)"""
RESPONSE_BYTE = 3
"""Offset of the byte that the owner locks when the upstream starts to send."""
FIRST_REPOSITORY_BYTE = 1 << 32
"""The owner also locks the byte at this offset plus the CRC-32 of the name of the repository from which it requests
bytes. Two names can have the same CRC-32. Then `has_upstream_request_to` can wrongly return True. The only effect is
that a process waits longer for the owner."""


class CrossProcessFlags:
    """The flags of one partial blob, in one process. There is one object for each partial blob that the process has
    open. The methods take microseconds, and raise StorageFailed unless their docstring says otherwise. Call them only
    while the state file is open."""

    def __init__(self, state_fd: int) -> None:
        """`state_fd`: descriptor of the open state file."""
        self._state_fd = state_fd
        self._waiters: set[object] = set()
        """The waiters of this process."""
        self._owner_bytes: set[int] = set()
        """Offsets of `UPSTREAM_REQUEST_BYTE`, `RESPONSE_BYTE` and the repositories' bytes that this process has locked
        as the owner, to set their flags."""

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

    def mark_upstream_request(self, repo: RepositoryName) -> None:
        """Sets the flags "the owner has started to request bytes" and "from the repository `repo`". Only for the
        process that is the owner."""
        self._set(_repository_byte(repo))
        self._set(UPSTREAM_REQUEST_BYTE)

    def mark_response(self) -> None:
        """Sets the flag "the upstream has started to send to the owner". Only for the process that is the owner."""
        self._set(RESPONSE_BYTE)

    def clear_owner_flags(self) -> None:
        """Clears the flags that this process has set with `mark_upstream_request` and `mark_response`. Raises
        nothing."""
        while self._owner_bytes:
            with suppress(OSError):
                unlock_byte(self._state_fd, self._owner_bytes.pop())

    def has_upstream_request(self) -> bool:
        """Returns whether the owner, in this or another process, has started to request bytes."""
        return self._is_set(UPSTREAM_REQUEST_BYTE)

    def has_upstream_request_to(self, repo: RepositoryName) -> bool:
        """Returns whether the owner, in this or another process, has started to request bytes from the repository."""
        return self._is_set(_repository_byte(repo))

    def has_response(self) -> bool:
        """Returns whether the upstream has started to send to the owner, in this or another process."""
        return self._is_set(RESPONSE_BYTE)

    def _set(self, offset: int) -> None:
        """Sets the flag of the byte at `offset`, as the owner."""
        if offset not in self._owner_bytes:
            with as_storage_errors():
                if try_lock_byte(self._state_fd, offset):
                    self._owner_bytes.add(offset)

    def _is_set(self, offset: int) -> bool:
        """Returns whether this or another process has set the flag of the byte at `offset`."""
        with as_storage_errors():
            return offset in self._owner_bytes or is_byte_locked(self._state_fd, offset)


def _repository_byte(repo: RepositoryName) -> int:
    """Returns the offset of the byte that the owner locks when it requests bytes from the repository."""
    return FIRST_REPOSITORY_BYTE + zlib.crc32(repo.encode())

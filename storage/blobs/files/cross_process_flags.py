"""Flags of a partial blob that all processes see (`CrossProcessFlags`).

A *partial blob* is a blob that a process is downloading from an upstream registry. This process is the *owner* of the
partial blob. The *state file* of the partial blob says which bytes are stored. The flags are:

- a client waits for the blob
- the owner has started to request bytes
- the owner has started to request bytes from a certain repository (one flag for each repository)
- the upstream has started to send

Each flag belongs to the byte at a certain offset of the state file, which may lie beyond the end of the file. The flag
is set while any process holds a lock on this byte. Setting a flag therefore writes nothing to the disk. When a process
dies, the kernel releases its locks.
"""

from __future__ import annotations

import zlib
from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, lock_byte_shared, try_lock_byte, unlock_byte
from storage.names import RepositoryName

# Offsets of the bytes in the state file. The lock on the byte at offset 0 makes a process the owner.

WAITERS_OFFSET = 1
"""Each process with a waiting client holds a shared lock on this byte."""
UPSTREAM_REQUEST_OFFSET = 2
"""The owner locks this byte when it starts to request bytes."""
RESPONSE_OFFSET = 3
"""The owner locks this byte when the upstream starts to send."""
FIRST_REPOSITORY_OFFSET = 1 << 32
"""When the owner starts to request bytes from a repository, it locks the byte at this offset plus the CRC-32 of the
repository's name. If two names have the same CRC-32, `has_upstream_request_to` can wrongly return True. A process then
only waits longer for the owner."""


class CrossProcessFlags:
    """Sets and reads the flags of one partial blob. A process has one `CrossProcessFlags` for each partial blob that it
    has open. Call the methods only while the state file is open. The methods take microseconds. They may raise
    StorageFailed, except where their docstring says that they raise nothing."""

    def __init__(self, state_fd: int) -> None:
        """`state_fd`: the file descriptor of the open state file."""
        self._state_fd = state_fd
        self._waiters: set[object] = set()
        """The waiters that are registered in this process."""
        self._owner_offsets: set[int] = set()
        """Offsets of the bytes that this process, as the owner, has locked to set flags."""

    def add_waiter(self, waiter: object) -> None:
        """Registers a *waiter* and sets the flag "a client waits for the blob". A waiter is a hashable object that
        stands for one waiting client."""
        if not self._waiters:
            with as_storage_errors():
                lock_byte_shared(self._state_fd, WAITERS_OFFSET)
        self._waiters.add(waiter)

    def remove_waiter(self, waiter: object) -> None:
        """Removes `waiter` if it is registered. If it was the last waiter of this process, also releases this process's
        lock for the flag "a client waits for the blob". Raises nothing."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            if not self._waiters:
                with suppress(OSError):
                    unlock_byte(self._state_fd, WAITERS_OFFSET)

    def has_waiter_besides(self, waiter: object) -> bool:
        """Returns whether a waiter other than `waiter` is registered in any process."""
        # `is_byte_locked` reports only locks of other processes. The waiters of this process are in `_waiters`.
        with as_storage_errors():
            return bool(self._waiters - {waiter}) or is_byte_locked(self._state_fd, WAITERS_OFFSET)

    def mark_upstream_request(self, repo: RepositoryName) -> None:
        """Sets two flags: "the owner has started to request bytes" and "the owner has started to request bytes from
        `repo`". Only for the owner."""
        self._set(_repository_offset(repo))
        self._set(UPSTREAM_REQUEST_OFFSET)

    def mark_response(self) -> None:
        """Sets the flag "the upstream has started to send". Only for the owner."""
        self._set(RESPONSE_OFFSET)

    def clear_owner_flags(self) -> None:
        """Clears the flags that this process has set with `mark_upstream_request` and `mark_response`. Raises
        nothing."""
        while self._owner_offsets:
            with suppress(OSError):
                unlock_byte(self._state_fd, self._owner_offsets.pop())

    def has_upstream_request(self) -> bool:
        """Returns whether the owner, which is this or another process, has started to request bytes."""
        return self._is_set(UPSTREAM_REQUEST_OFFSET)

    def has_upstream_request_to(self, repo: RepositoryName) -> bool:
        """Returns whether the owner, which is this or another process, has started to request bytes from `repo`."""
        return self._is_set(_repository_offset(repo))

    def has_response(self) -> bool:
        """Returns whether the upstream has started to send to the owner, which is this or another process."""
        return self._is_set(RESPONSE_OFFSET)

    def _set(self, offset: int) -> None:
        """Sets the flag whose byte is at `offset`. Only for the owner."""
        if offset not in self._owner_offsets:
            with as_storage_errors():
                if try_lock_byte(self._state_fd, offset):
                    self._owner_offsets.add(offset)

    def _is_set(self, offset: int) -> bool:
        """Returns whether the flag whose byte is at `offset` is set, by this or another process."""
        with as_storage_errors():
            return offset in self._owner_offsets or is_byte_locked(self._state_fd, offset)


def _repository_offset(repo: RepositoryName) -> int:
    """Returns the offset of the byte for the flag "the owner has started to request bytes from `repo`"."""
    return FIRST_REPOSITORY_OFFSET + zlib.crc32(repo.encode())

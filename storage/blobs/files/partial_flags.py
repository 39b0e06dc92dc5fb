"""Flags of a partial blob that all processes see: byte locks on its state file.

Nothing is written for them, and the flags of a process vanish when it dies.
"""

from __future__ import annotations

from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, share_lock_byte, try_lock_byte, unlock_byte

WANTED, BEGUN = 1, 2
"""Bytes of the state file: locked by waiters, and by an owner that has started. Byte 0 is the owner's lock."""


class PartialFlags:
    """Flags over one opening of a state file, shared by all users of the partial in this process. The calls take
    microseconds and raise StorageFailed. Do not call any once the file is closed."""

    def __init__(self, state: int) -> None:
        self._state = state
        self._wanting: set[object] = set()
        self._begun = False

    def want(self, who: object) -> None:
        """Registers the waiter `who`."""
        if not self._wanting:
            with as_storage_errors():
                share_lock_byte(self._state, WANTED)
        self._wanting.add(who)

    def stop_waiting(self, who: object) -> None:
        """Removes the waiter `who`. Raises nothing."""
        if who in self._wanting:
            self._wanting.remove(who)
            if not self._wanting:
                with suppress(OSError):
                    unlock_byte(self._state, WANTED)

    def wanted(self, who: object) -> bool:
        """Returns whether there is another waiter than `who`, in any process."""
        with as_storage_errors():
            return bool(self._wanting - {who}) or is_byte_locked(self._state, WANTED)

    def begin(self) -> None:
        """Marks that the owner has started to request bytes."""
        if not self._begun:
            with as_storage_errors():
                self._begun = try_lock_byte(self._state, BEGUN)

    def end(self) -> None:
        """Removes the owner's mark. Raises nothing."""
        if self._begun:
            self._begun = False
            with suppress(OSError):
                unlock_byte(self._state, BEGUN)

    def begun(self) -> bool:
        """Returns whether the owner, in any process, has started to request bytes."""
        with as_storage_errors():
            return self._begun or is_byte_locked(self._state, BEGUN)

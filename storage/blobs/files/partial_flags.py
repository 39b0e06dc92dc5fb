"""What those who have a partial blob open in several processes tell each other beside its state: byte locks on the
state file. Nothing is written for it, and whatever a process says falls when it dies.
"""

from __future__ import annotations

from contextlib import suppress

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import is_byte_locked, share_lock_byte, try_lock_byte, unlock_byte

WANTED, BEGUN = 1, 2
"""Bytes of the state file; byte 0 is the owner's."""


class PartialFlags:
    """On one opening of a state file, shared by all who have the partial open in this process. The calls take
    microseconds and raise StorageFailed; none may come once the file is closed."""

    def __init__(self, state: int) -> None:
        self._state = state
        self._wanting: set[object] = set()
        self._begun = False

    def want(self, who: object) -> None:
        """`who` waits for it."""
        if not self._wanting:
            with as_storage_errors():
                share_lock_byte(self._state, WANTED)
        self._wanting.add(who)

    def stop_waiting(self, who: object) -> None:
        """`who` waits no more. Raises nothing."""
        if who in self._wanting:
            self._wanting.remove(who)
            if not self._wanting:
                with suppress(OSError):
                    unlock_byte(self._state, WANTED)

    def wanted(self, who: object) -> bool:
        """Whether anybody but `who` waits for it, here or elsewhere."""
        with as_storage_errors():
            return bool(self._wanting - {who}) or is_byte_locked(self._state, WANTED)

    def begin(self) -> None:
        """The owner asks for bytes from now on."""
        if not self._begun:
            with as_storage_errors():
                self._begun = try_lock_byte(self._state, BEGUN)

    def end(self) -> None:
        """There is no owner here any more. Raises nothing."""
        if self._begun:
            self._begun = False
            with suppress(OSError):
                unlock_byte(self._state, BEGUN)

    def begun(self) -> bool:
        """Whether the owner, in whatever process, has asked for bytes."""
        with as_storage_errors():
            return self._begun or is_byte_locked(self._state, BEGUN)

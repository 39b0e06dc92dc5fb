"""Leases and slots across processes: implements `storage.leases.Leases` with locks on single bytes of one empty file.

- A *lease* is the exclusive right to do some work. A task holds the lease by a lock on one byte of the file. A hash of
  the lease's key gives the offset of the byte.
- A *slot* is one of a limited number of permits with a common name, like a permit of a semaphore. Each name has a range
  of `BYTES_PER_SLOT_NAME` bytes. A hash of the name gives the offset of the range. A task holds a slot by a lock on one
  byte of the range.

Offsets go up to 2^62, so two keys practically never share a byte.

A task that has waited long enough for a slot becomes *urgent*. While an urgent task waits, its process holds a shared
lock on the last byte of the range. Tasks that are not urgent see this lock and take no slot of the range.

Each process opens the file once. The byte locks exclude other processes; `_held_bytes` excludes the other tasks of this
process. Waiting tasks poll, because a system call that waits for a lock would block a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from math import inf
from pathlib import Path

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import PollBackOff, is_byte_locked, lock_byte_shared, try_lock_byte, unlock_byte
from storage.data_dir.system import System
from storage.keyed_locks import KeyedLocks

FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.01
"""First and longest pause between two polls."""
BYTES_PER_SLOT_NAME = 1 << 16
"""Number of bytes in the range of a slot name. The last byte is for urgent tasks; all other bytes can be slots."""
_LEASE_KIND = "turn"
"""The argument `kind` of `_byte_offset` for leases. Do not change the text: processes of all versions must use the same
bytes."""


class FileLeases:
    """The leases and slots that the tasks of one process hold. Use it on the event loop. All leases and slots become
    free when the process dies."""

    def __init__(self, path: Path, system: System) -> None:
        """Opens the file at `path`, or creates it. Raises StorageFull, StorageFailed."""
        with as_storage_errors():
            self._fd = system.open(path, os.O_RDWR | os.O_CREAT)
        self._queues = KeyedLocks[tuple[int, int, float]]()
        """Queues of the waiting tasks of this process. Only the first task of each queue polls. The key of a queue has
        three parts: the offset of the lease's byte or of the slots' range, `keep_free` (0 for a lease), and
        `urgent_after` (infinity for a lease)."""
        self._held_bytes: set[int] = set()
        """Offsets of the bytes that this process has locked exclusively."""
        self._urgent_waits = Counter[int]()
        """Number of urgent tasks of this process that poll for a slot of a range. The key is the range's offset."""

    def close(self) -> None:
        """Releases all leases and slots of this process."""
        os.close(self._fd)
        self._fd = -1

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[bool]:
        """Waits for the lease of `key` and holds it inside the `async with` block. Tasks of this process get the lease
        in the order of their calls. If a waiting task is cancelled, the others continue to wait. Yields whether the
        call had to wait. Raises StorageFailed."""
        offset = _byte_offset(_LEASE_KIND, key)
        queue = (offset, 0, inf)
        has_waited = self._queues.is_used(queue)
        async with self._queues.hold(queue):
            if not self._try_lock(offset):
                has_waited = True
                await _poll_until(lambda: self._try_lock(offset))
            try:
                yield has_waited
            finally:
                self._unlock(offset)

    @asynccontextmanager
    async def slot(
        self, name: str, count: int, keep_free: int = 0, *, urgent_after: float = inf
    ) -> AsyncIterator[None]:
        """Waits for one of the `count` slots of `name` and holds it inside the `async with` block. Takes a slot only if
        at least `keep_free` other slots are free. `urgent_after`: seconds of waiting after which the task is urgent.
        Tasks of this process that pass the same `keep_free` and `urgent_after` get slots in the order of their calls.
        Raises StorageFailed."""
        range_offset = _byte_offset("slots", name, size=BYTES_PER_SLOT_NAME)
        clock = asyncio.get_running_loop().time
        urgent_at = clock() + urgent_after
        async with self._queues.hold((range_offset, keep_free, urgent_after)):
            with ExitStack() as exit_stack:
                is_announced, back_off = False, PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                while (
                    offset := self._lock_free_slot(range_offset, count, keep_free, is_urgent=clock() >= urgent_at)
                ) is None:
                    if clock() >= urgent_at and not is_announced:
                        exit_stack.enter_context(self._announce_urgent_task(range_offset))
                        is_announced = True
                    await back_off.pause()
        try:
            yield
        finally:
            self._unlock(offset)

    @asynccontextmanager
    async def try_slot(self, name: str, count: int, keep_free: int = 0) -> AsyncIterator[bool]:
        """Takes a slot as `slot` does, but never waits. Yields whether the `async with` block holds a slot. Raises
        StorageFailed."""
        range_offset = _byte_offset("slots", name, size=BYTES_PER_SLOT_NAME)
        offset = self._lock_free_slot(range_offset, count, keep_free, is_urgent=False)
        try:
            yield offset is not None
        finally:
            if offset is not None:
                self._unlock(offset)

    def is_any_slot_held(self, name: str, count: int) -> bool:
        """Returns whether a task, in any process, holds one of the `count` slots of `name`. Locks no byte. Raises
        StorageFailed."""
        range_offset = _byte_offset("slots", name, size=BYTES_PER_SLOT_NAME)
        return any(self._is_locked(offset) for offset in range(range_offset, range_offset + count))

    @contextmanager
    def _announce_urgent_task(self, range_offset: int) -> Iterator[None]:
        """Tells all processes, inside the `with` block, that an urgent task waits for a slot of the range. Raises
        StorageFailed."""
        if not self._urgent_waits[range_offset]:
            with as_storage_errors():
                lock_byte_shared(self._fd, _urgent_byte(range_offset))
        self._urgent_waits[range_offset] += 1
        try:
            yield
        finally:
            self._urgent_waits[range_offset] -= 1
            if not self._urgent_waits[range_offset]:
                del self._urgent_waits[range_offset]
                with suppress(OSError):  # `close` has unlocked all bytes
                    unlock_byte(self._fd, _urgent_byte(range_offset))

    def _is_urgent_task_waiting(self, range_offset: int) -> bool:
        """Returns whether an urgent task of any process waits for a slot of the range. Raises StorageFailed."""
        with as_storage_errors():
            return range_offset in self._urgent_waits or is_byte_locked(self._fd, _urgent_byte(range_offset))

    def _lock_free_slot(self, range_offset: int, count: int, keep_free: int, *, is_urgent: bool) -> int | None:
        """Locks the byte of a free slot and returns the offset of the byte. `is_urgent`: whether this task is urgent.
        Raises StorageFailed. Returns None if

        - no slot is free,
        - fewer than `keep_free` other slots are free, or
        - another task is urgent and this task is not urgent."""
        if not is_urgent and self._is_urgent_task_waiting(range_offset):
            return None
        offsets = range(range_offset, range_offset + count)
        for offset in offsets:
            if self._try_lock(offset):
                free_slots = sum(not self._is_locked(other_offset) for other_offset in offsets) if keep_free else 0
                if free_slots >= keep_free:
                    return offset
                self._unlock(offset)
                return None
        return None

    def _try_lock(self, offset: int) -> bool:
        """Locks the byte and returns True. Returns False if another task, in any process, has locked the byte. Raises
        StorageFailed."""
        if offset in self._held_bytes:
            return False
        with as_storage_errors():
            if not try_lock_byte(self._fd, offset):
                return False
        self._held_bytes.add(offset)
        return True

    def _is_locked(self, offset: int) -> bool:
        """Returns whether a task, in any process, has locked the byte. Raises StorageFailed."""
        with as_storage_errors():
            return offset in self._held_bytes or is_byte_locked(self._fd, offset)

    def _unlock(self, offset: int) -> None:
        """Unlocks the byte, unless `close` has already unlocked all bytes."""
        self._held_bytes.discard(offset)
        if self._fd >= 0:
            unlock_byte(self._fd, offset)


async def _poll_until(attempt: Callable[[], bool]) -> None:
    """Calls `attempt` again and again, with growing pauses, until it returns True."""
    back_off = PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
    while not attempt():
        await back_off.pause()


def _urgent_byte(range_offset: int) -> int:
    """Returns the offset of the byte that has a shared lock while an urgent task waits for a slot of the range."""
    return range_offset + BYTES_PER_SLOT_NAME - 1


def _byte_offset(kind: str, name: str, size: int = 1) -> int:
    """Returns the offset of the `size` bytes that belong to `name`; it is the same in every process. `name`: the key of
    a lease or the name of slots. `kind`: `_LEASE_KIND` or "slots", so that a lease and slots with the same name use
    different bytes."""
    digest = hashlib.blake2b(f"{kind} {name}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) // size * size

"""An *eviction for free space* evicts cached images while the disk has too little free space. `FreeSpaceGoal` decides
when the eviction ends. `EvictionPause` pauses the automatic evictions after an eviction without effect.

The bytes of an evicted image do not always become free space. A backup on the same file system may have hard links to
the files, and a snapshot of the file system keeps the blocks. Some file systems, such as btrfs and ZFS, free blocks
only after some seconds. So that an eviction does not empty the whole cache in these cases, it ends when it has evicted
as many bytes as the disk lacks. If the free space has not grown, the next eviction follows only after a pause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from storage.human_text import size_text
from storage.leases import Leases
from storage.upkeep.collector import Collector

PAUSE_SLOT: Final = "pause of evictions for free space"
"""Name of a slot (a permit that one process at a time can hold). The process that has begun a pause holds the slot
until the pause ends. While the slot is held, `Evictor.check` does not evict for free space in any process."""
EFFECTIVE_FRACTION: Final = 0.25
"""If the free space grows by less than this fraction of the evicted bytes, the eviction had no effect. The fraction is
less than 1, because clients and mirrors write to the disk at the same time."""
SETTLE_SECONDS: Final = 60.0
"""Time after which a file system has freed the blocks of removed files. btrfs frees them with its next commit, which
happens every 30 s (btrfs(5), "commit")."""
FIRST_PAUSE_SECONDS: Final = 300.0
LONGEST_PAUSE_SECONDS: Final = 86_400.0
PAUSE_FACTOR: Final = 4
"""Each pause is longer than the previous pause by this factor, up to `LONGEST_PAUSE_SECONDS`. So evictions without an
effect remove only a small part of the cache each day. An eviction with an effect resets the next pause to
`FIRST_PAUSE_SECONDS`."""
log = logging.getLogger("storage.eviction")


class FreeSpaceGoal:
    """The goal of one eviction for free space. The eviction ends in any of these cases:

    - `target` bytes of the disk are free.
    - The eviction has evicted as many bytes as were lacking at its start.
    - A backup prevents the removal of blobs."""

    def __init__(self, collector: Collector, free_bytes: Callable[[], int | None], target: int) -> None:
        """`free_bytes`: returns the number of free bytes of the disk, or None if the number is not known."""
        self._collector = collector
        self._free_bytes = free_bytes
        self._target = target
        self._free_at_start = self._free_bytes_or_target()
        self._freed_bytes = 0
        """The number of bytes by which the free space has grown during the calls of `free_blobs`."""
        self.evicted_bytes = 0
        """Size of the blobs that this eviction has removed from their last repository."""
        self.is_blocked = False
        """Whether a backup prevented the removal of blobs at the last call of `is_reached`."""

    async def is_reached(self) -> bool:
        """Returns whether the eviction must end, and sets `is_blocked`."""
        self.is_blocked = not await self._collector.may_remove_blobs()
        lacking_bytes = self._target - self._free_at_start
        return self.is_blocked or self.evicted_bytes >= lacking_bytes or self._free_bytes_or_target() >= self._target

    async def free_blobs(self, size: int) -> None:
        """Frees the blobs that no repository has any more. Adds their total size, `size` bytes, to `evicted_bytes`."""
        free_before = self._free_bytes_or_target()
        await self._collector.free_unlinked_blobs()
        self._freed_bytes += max(0, self._free_bytes_or_target() - free_before)
        self.evicted_bytes += size

    @property
    def gained_bytes(self) -> int:
        """The number of bytes by which the free space has grown. This is the larger of two numbers: the growth since
        the start of the eviction, and the total growth during the calls of `free_blobs`."""
        return max(self._freed_bytes, self._free_bytes_or_target() - self._free_at_start)

    @property
    def has_effect(self) -> bool:
        """Whether the free space has grown by at least `EFFECTIVE_FRACTION` of the evicted bytes. True if nothing was
        evicted."""
        return self.gained_bytes >= self.evicted_bytes * EFFECTIVE_FRACTION

    def _free_bytes_or_target(self) -> int:
        """Returns the number of free bytes. If this number is not known, returns the target, so that the eviction
        ends."""
        free_bytes = self._free_bytes()
        return self._target if free_bytes is None else free_bytes


class EvictionPause:
    """A pause of the automatic evictions for free space (`Evictor.check`), in all processes. It begins after an
    eviction that had no effect, and ends early if the free space grows. `Evictor.evict` ignores it."""

    def __init__(self, leases: Leases, monotonic: Callable[[], float]) -> None:
        """`monotonic`: returns seconds of a clock that is never set back."""
        self._leases = leases
        self._monotonic = monotonic
        self._slot = AsyncExitStack()
        self._goal: FreeSpaceGoal | None = None
        """The goal of the eviction that had no effect; None: this process has not begun a pause."""
        self._begun_at = 0.0  # when this process began the pause, in seconds of `monotonic`
        self._pause_seconds = FIRST_PAUSE_SECONDS  # length of the current or next pause
        self._is_logged = False

    def is_running(self) -> bool:
        """Returns whether any process has begun a pause that has not ended. Raises StorageFailed."""
        return self._leases.is_any_slot_held(PAUSE_SLOT, 1)

    async def note_eviction(self, goal: FreeSpaceGoal) -> None:
        """Call this when the eviction with this goal has ended. If the eviction had no effect, begins a pause. If the
        eviction had an effect, resets the length of the next pause. If a backup ended the eviction, does nothing."""
        if goal.is_blocked:
            return
        if not goal.has_effect:
            await self._slot.enter_async_context(self._leases.try_slot(PAUSE_SLOT, 1))
            self._goal, self._begun_at, self._is_logged = goal, self._monotonic(), False
        elif goal.evicted_bytes:
            self._pause_seconds = FIRST_PAUSE_SECONDS

    async def update(self) -> None:
        """Ends the pause that this process has begun, if the pause has lasted long enough or the free space has grown.
        In each pause, logs once after `SETTLE_SECONDS` that the eviction had no effect."""
        if self._goal is None:
            return
        if self._goal.has_effect:
            self._pause_seconds = FIRST_PAUSE_SECONDS
            await self.aclose()
            return
        elapsed_seconds = self._monotonic() - self._begun_at
        if elapsed_seconds >= SETTLE_SECONDS and not self._is_logged:
            self._is_logged = True
            self._log(self._goal)
        if elapsed_seconds >= self._pause_seconds:
            self._pause_seconds = min(self._pause_seconds * PAUSE_FACTOR, LONGEST_PAUSE_SECONDS)
            await self.aclose()

    async def aclose(self) -> None:
        """Ends the pause that this process has begun. Does nothing if this process has not begun a pause."""
        self._goal = None
        await self._slot.aclose()

    def _log(self, goal: FreeSpaceGoal) -> None:
        log.warning(
            "%s were evicted from the cache, but the free space of the disk has grown by only %s: probably a backup on "
            "the same file system or a snapshot of the file system still has the bytes; delete old backups and "
            "snapshots, or keep them on another disk. The cache is not evicted for free space in the next %.0f minutes "
            "unless the free space grows",
            size_text(goal.evicted_bytes),
            size_text(max(0, goal.gained_bytes)),
            (self._pause_seconds - SETTLE_SECONDS) / 60,
        )

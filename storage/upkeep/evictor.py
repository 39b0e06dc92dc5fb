"""Keeps the cache of mirrored content within its limits: evicts the least recently pulled images first.

An *upstream* is a registry that this registry mirrors. There are two kinds of limits:

- *Budgets*: a budget is the largest number of bytes that the content of one upstream, or of all together, may have.
- *Marks* of the disk's free space: if the free space falls below the low mark, the evictor evicts images until the free
  space reaches the high mark (module `storage.upkeep.eviction_for_space`).

A *link* is the right of a repository to serve a blob. An eviction also removes the blobs that have no link any more,
except while a backup runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from storage.background_rounds import log_round_error
from storage.cached_images import CachedImages, Cooldowns, EvictedImage, EvictionRules, IsKept
from storage.content import Actor
from storage.human_text import size_text
from storage.leases import Leases
from storage.names import Digest
from storage.upkeep.collector import Collector
from storage.upkeep.eviction_for_space import EvictionPause, FreeSpaceGoal
from storage.usage import ScopeUsage, Usage

EVICTION_ACTOR: Final = Actor(name="entrepot eviction")
"""The actor that the audit log names for evictions."""
EVICTION_SLOT: Final = "cache eviction"
"""Name of the slot (a permit that one process at a time can hold) that a process holds while it evicts."""
TARGET_FRACTION: Final = 0.95
"""An eviction for a budget ends when at most this fraction of the budget is used. The rest is room for new blobs:
with 1, almost every new blob would cause an eviction."""
INCOMPLETE_SECONDS: Final = 600.0
"""An image that lacks blobs is kept for this time after its last pull, because a client may still be pulling it."""
UNUSED_SECONDS: Final = 60.0
"""A link is *unused* if no manifest of the repository refers to the blob, and no client has used the blob for this
time. An eviction removes unused links when it finds no further image to evict."""
CHECK_SECONDS: Final = 2.0
"""The evictor waits for this time before each check of the limits. A call of `Evictor.check_soon` ends the wait early.

In these cases, the evictor first sleeps for the same time, and then begins the wait:

- The last check failed.
- The last check had to evict images but evicted none.

No call ends the sleep early."""
WARNING_SECONDS: Final = 600.0
"""Shortest time between two warnings for the same reason."""
IMAGES_PER_ROUND: Final = 20
"""Largest number of images that are evicted before the list of running downloads is read again."""
NOTHING_EVICTABLE: Final = (
    "the cache exceeds its limits, but no image in it may be evicted: each is kept by a pattern in cache.keep, a "
    "frozen tag or a cooldown, or is being pulled"
)
BLOCKED_BY_BACKUP: Final = (
    "the disk has less free space than cache.min_free, but no image is evicted for it while a backup runs, because the "
    "backup holds back the removal of blobs; wait until the backup ends, or stop it with `entrepot jobs stop`"
)
log = logging.getLogger("storage.eviction")


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest number of bytes (`max_bytes`) of a *scope*: a set of repositories whose bytes are counted together.

    - `scope`: the name of the scope.
    - `upstreams`: the names of the upstreams whose mirrored repositories form the scope."""

    scope: str
    upstreams: tuple[str, ...]
    max_bytes: int


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """All limits of the cache.

    - `upstreams`: the names of all upstreams.
    - `low_free`, `high_free`: the low and the high mark of the disk's free space, in bytes. If `low_free` is 0, the
      free space is not limited.
    - `is_kept`: returns True for a repository whose images are never evicted.
    - `cooldowns`: the periods in which clients still get the older image of a tag that has moved at the upstream. The
      older image is not evicted in this period. None: there are no cooldowns."""

    upstreams: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()
    low_free: int = 0
    high_free: int = 0
    is_kept: IsKept = field(default=lambda _: False)
    cooldowns: Cooldowns | None = None

    def __bool__(self) -> bool:
        return bool(self.budgets or self.low_free)


OnEvicted = Callable[[EvictedImage], Awaitable[None]]
"""A function that is called with each evicted image. If the function raises an error, the eviction ends. The images
that were evicted before the error stay evicted."""


async def ignore_evicted(_: EvictedImage) -> None:
    """An `OnEvicted` that does nothing."""


OnEvictionEnd = Callable[[Sequence[EvictedImage]], None]
"""A function that is called at the end of each eviction, with all images that were evicted, possibly none. Must return
at once and raise nothing."""


def ignore_eviction_end(_: Sequence[EvictedImage]) -> None:
    """An `OnEvictionEnd` that does nothing."""


class Evictor:
    """Evicts images of mirrored content. Only one process at a time evicts, and the others wait."""

    def __init__(
        self,
        images: CachedImages,
        usage: Usage,
        collector: Collector,
        leases: Leases,
        limits: CacheLimits,
        *,
        list_downloads: Callable[[], Awaitable[Set[Digest]]],
        free_bytes: Callable[[], int | None],
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
        on_eviction_end: OnEvictionEnd = ignore_eviction_end,
    ) -> None:
        """`list_downloads` returns the digests of the blobs that this process or another one is downloading.
        `free_bytes` returns the number of free bytes of the disk, or None if the number is not known. `clock` returns
        seconds since 1970. `monotonic` returns seconds of a clock that is never set back."""
        self.limits = limits
        self._images = images
        self._usage = usage
        self._collector = collector
        self._leases = leases
        self._list_downloads = list_downloads
        self._free_bytes = free_bytes
        self._clock = clock
        self._monotonic = monotonic
        self._on_eviction_end = on_eviction_end
        self._wake_up = asyncio.Event()
        self._pause = EvictionPause(leases, monotonic)
        self._warned_at: dict[str, float] = {}  # warning -> when it was last logged, by `monotonic`
        self._no_unused_links_until = float("-inf")
        """Before this time of `monotonic`, `_drop_unused_links` does nothing."""

    def check_soon(self) -> None:
        """Tells `run` that content was stored, so that `run` checks the limits soon."""
        self._wake_up.set()

    async def run(self) -> None:
        """Keeps the cache within its limits until the task is cancelled. Logs errors and tries again later."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_SECONDS):
                        await self._wake_up.wait()
                self._wake_up.clear()
                try:
                    if not await self.check():
                        # Without this wait, each stored blob would cause another useless check.
                        await asyncio.sleep(CHECK_SECONDS)
                except Exception as error:
                    log_round_error(log, "eviction stopped with an error", error)
                    await asyncio.sleep(CHECK_SECONDS)
        finally:
            await self._pause.aclose()

    async def check(self) -> bool:
        """Evicts images if a budget is exceeded or the disk lacks free space. Returns False if images had to be evicted
        but none could be, otherwise True. If an eviction for free space hardly increases the free space, an
        `EvictionPause` begins. During the pause, `check` evicts no images for free space, in any process. Raises
        StorageFull, StorageFailed."""
        await self._pause.update()
        if not (self._must_free_space() or await self._is_any_budget_exceeded()):
            return True
        async with self._leases.slot(EVICTION_SLOT, count=1):
            count = await self._evict_to_budgets(ignore_evicted)
            if self._must_free_space():
                goal, count_for_space = await self._evict_for_space(ignore_evicted)
                await self._pause.note_eviction(goal)
                count += count_for_space
            return count > 0

    async def evict(self, on_evicted: OnEvicted = ignore_evicted) -> int:
        """Evicts images until no budget is exceeded, and then until the disk has enough free space. Ends early if no
        further image may be evicted. Two more rules hold for the eviction for free space:

        - It evicts no image while a backup runs.
        - It ends when it has evicted as many bytes as the disk lacked at its start.

        Ignores an `EvictionPause`. Returns the number of evicted images. Raises StorageFull, StorageFailed, and the
        errors of `on_evicted`."""
        async with self._leases.slot(EVICTION_SLOT, count=1):
            count = await self._evict_to_budgets(on_evicted)
            if self._is_disk_low():
                _, count_for_space = await self._evict_for_space(on_evicted)
                count += count_for_space
            return count

    async def evict_to(self, budget: Budget, on_evicted: OnEvicted = ignore_evicted) -> int:
        """Evicts images until the scope has at most `budget.max_bytes` bytes. Ends early if no further image may be
        evicted. Returns the number of evicted images. Raises the same errors as `evict`."""
        async with self._leases.slot(EVICTION_SLOT, count=1):
            return await self._evict_until(
                lambda: self._has_at_most(budget, budget.max_bytes), budget.upstreams, on_evicted
            )

    async def plan(self, budget: Budget) -> list[EvictedImage]:
        """Returns the images that `evict_to` would evict."""
        scope_usage = await self._usage.scope(budget.scope)
        excess = 0 if scope_usage is None else scope_usage.bytes - budget.max_bytes
        if excess <= 0:
            return []
        return await self._images.plan(budget.upstreams, await self._rules(), excess, budget.scope)

    async def plan_for_budgets(self) -> list[EvictedImage]:
        """Returns the images that `evict` would evict because a budget is exceeded. Leaves out images that `evict`
        would evict for free space."""
        planned_images: dict[tuple[str, Digest], EvictedImage] = {}
        for budget in self.limits.budgets:
            if await self._is_exceeded(budget):
                target = Budget(budget.scope, budget.upstreams, int(budget.max_bytes * TARGET_FRACTION))
                planned_images |= {(image.repository, image.digest): image for image in await self.plan(target)}
        return list(planned_images.values())

    async def _is_any_budget_exceeded(self) -> bool:
        """Returns whether any budget is exceeded."""
        return any([await self._is_exceeded(budget) for budget in self.limits.budgets])

    async def _is_exceeded(self, budget: Budget) -> bool:
        return not await self._has_at_most(budget, budget.max_bytes)

    async def _has_at_most(self, budget: Budget, size: int) -> bool:
        """Returns whether the scope of `budget` has at most `size` bytes. While its bytes are still being counted,
        compares the bytes counted so far. Returns True if there is no such scope."""
        scope_usage: ScopeUsage | None = await self._usage.scope(budget.scope)
        return scope_usage is None or scope_usage.bytes <= size

    def _is_disk_low(self) -> bool:
        free_bytes = self._free_bytes() if self.limits.low_free else None
        return free_bytes is not None and free_bytes < self.limits.low_free

    def _must_free_space(self) -> bool:
        """Returns whether the disk lacks free space and no `EvictionPause` is running."""
        return self._is_disk_low() and not self._pause.is_running()

    async def _evict_to_budgets(self, on_evicted: OnEvicted) -> int:
        """For each exceeded budget, evicts images of the budget's upstreams. Returns the number of evicted images."""
        count = 0
        for budget in self.limits.budgets:
            if await self._is_exceeded(budget):
                target = int(budget.max_bytes * TARGET_FRACTION)
                is_reached = partial(self._has_at_most, budget, target)
                count += await self._evict_until(is_reached, budget.upstreams, on_evicted)
        if await self._is_any_budget_exceeded():
            self._warn(NOTHING_EVICTABLE)
        return count

    async def _evict_for_space(self, on_evicted: OnEvicted) -> tuple[FreeSpaceGoal, int]:
        """Evicts images until the goal for free space is reached. Evicts none while a backup runs. Returns the goal and
        the number of evicted images."""
        await self._collector.free_unlinked_blobs()  # after a backup, this may free enough space
        goal = FreeSpaceGoal(self._collector, self._free_bytes, max(self.limits.low_free, self.limits.high_free))
        count = await self._evict_until(goal.is_reached, self.limits.upstreams, on_evicted, goal.free_blobs)
        if goal.is_blocked:
            self._warn(BLOCKED_BY_BACKUP)
        elif self._is_disk_low() and not await goal.is_reached():
            self._warn(NOTHING_EVICTABLE)
        return goal, count

    async def _free_blobs(self, _: int) -> None:
        await self._collector.free_unlinked_blobs()

    async def _evict_until(
        self,
        is_reached: Callable[[], Awaitable[bool]],
        upstreams: Sequence[str],
        on_evicted: OnEvicted,
        free_blobs: Callable[[int], Awaitable[None]] | None = None,
    ) -> int:
        """Evicts images of the upstreams until `is_reached` returns True or no further image may be evicted. Returns
        the number of evicted images. `free_blobs` is called after each eviction, with the size in bytes of the blobs
        that have lost their last link, and removes these blobs. None: `_free_blobs`."""
        free_blobs = free_blobs or self._free_blobs
        evicted: list[EvictedImage] = []
        started = self._clock()
        try:
            while not await is_reached():
                rules = await self._rules()
                # What `evict_next` returns: an image that it has evicted; True if it has evicted none, but images may
                # be left to check; False if no image is left to check.
                outcome: EvictedImage | bool = True
                for _ in range(IMAGES_PER_ROUND):
                    outcome = await self._images.evict_next(upstreams, rules, started, EVICTION_ACTOR)
                    if isinstance(outcome, EvictedImage):
                        evicted.append(outcome)
                        await free_blobs(outcome.bytes)
                        await on_evicted(outcome)
                    if not outcome or await is_reached():
                        break
                if not outcome and not await self._drop_unused_links(upstreams, free_blobs):
                    break
        finally:
            self._on_eviction_end(evicted)
            self._log(evicted)
        return len(evicted)

    async def _drop_unused_links(self, upstreams: Sequence[str], free_blobs: Callable[[int], Awaitable[None]]) -> int:
        """Removes unused links (`UNUSED_SECONDS`), and the blobs that then have no link. Returns the number of removed
        links. A search for unused links is slow. After a search that found none, this method does nothing for
        `UNUSED_SECONDS`."""
        if self._monotonic() < self._no_unused_links_until:
            return 0
        dropped = await self._images.drop_unused_links(upstreams, self._clock() - UNUSED_SECONDS)
        if dropped.links:
            await free_blobs(dropped.bytes)
        else:
            self._no_unused_links_until = self._monotonic() + UNUSED_SECONDS
        return dropped.links

    async def _rules(self) -> EvictionRules:
        return EvictionRules(
            self.limits.is_kept,
            await self._list_downloads(),
            recent_pull_after=self._clock() - INCOMPLETE_SECONDS,
            cooldowns=self.limits.cooldowns,
        )

    def _log(self, evicted: Sequence[EvictedImage]) -> None:
        if evicted:
            log.info(
                "evicted %d images from the cache, which frees %s; the first was %s, last pulled %.0f s ago",
                len(evicted),
                size_text(sum(image.bytes for image in evicted)),
                f"{evicted[0].repository}@{evicted[0].digest}",
                max(0.0, self._clock() - evicted[0].last_pulled),
            )

    def _warn(self, text: str) -> None:
        """Logs `text` as a warning, unless this method has logged the same text within `WARNING_SECONDS`."""
        now = self._monotonic()
        if now - self._warned_at.get(text, float("-inf")) >= WARNING_SECONDS:
            self._warned_at[text] = now
            log.warning(text)

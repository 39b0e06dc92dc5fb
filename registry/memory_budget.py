"""A memory budget over all requests of a worker, for bodies that are held whole, received or sent.

Each request holds a share of the budget while its bytes are in memory. Without room it waits a few seconds, in the
order of arrival, and is then refused with 429 and Retry-After. Three rules keep one client from blocking the others:
the last quarter is for small shares of up to 64 KiB, which hold nearly all manifests and forms; while a large share
waits, the small ones together get no more than a quarter; and while a share waits, the oldest bodies are cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from storage.errors import TooManyRequests

MIB: Final = 1024 * 1024
SMALL_SHARE_BYTES: Final = 64 * 1024
"""Shares up to this size may use the whole budget."""
WAIT_SECONDS: Final = 8.0
"""Seconds that a share waits before it is refused. Many clients repeat a request at once after a 429, so refusing
earlier would save nothing."""
SLOW_SECONDS: Final = 5.0
"""While a share waits, bodies that have held memory for longer than this are cut off."""
CUT_INTERVAL_SECONDS: Final = 0.25
"""Seconds between two searches for such bodies, while a share waits."""
MAX_WAITING: Final = 256
"""Small shares that may wait, and large ones; more are refused at once."""


class Share:
    """The memory that one request holds. `on_cut`, where it is set, is called to end the request when other requests
    need its memory."""

    __slots__ = ("_budget", "key", "on_cut", "since", "size")

    def __init__(self, budget: MemoryBudget, key: Hashable | None) -> None:
        self._budget = budget
        self.key = key
        self.size = 0
        self.since = 0.0  # the loop's clock when it first held something
        self.on_cut: Callable[[], None] | None = None

    def try_grow(self, size: int) -> bool:
        """Grows by `size` bytes and returns True, if there is room."""
        return self._budget.try_add(self, size)

    async def grow(self, size: int) -> None:
        """Grows by `size` bytes. Raises TooManyRequests when no room becomes free for a while. Cancelled: keeps its
        size."""
        if not self._budget.try_add(self, size):
            await self._budget.add(self, size)

    def close(self) -> None:
        """Gives all its memory back. Idempotent."""
        self._budget.drop(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    share: Share
    size: int
    granted: asyncio.Future[None]


class MemoryBudget:
    """`size` bytes over all shares. Used from one event loop."""

    def __init__(
        self, size: int, what: str, *, wait_seconds: float = WAIT_SECONDS, slow_seconds: float = SLOW_SECONDS
    ) -> None:
        """`what` names the things that are held, for the text of a refusal."""
        self.size = size
        self.used = 0
        self._what = what
        self._wait_seconds = wait_seconds
        self._slow_seconds = slow_seconds
        self._for_large = size - size // 4
        self._in_small = 0  # bytes that small shares hold
        self._shares: set[Share] = set()
        self._keys: dict[Hashable, int] = {}
        self._small: dict[_Waiter, None] = {}  # in the order of arrival
        self._large: dict[_Waiter, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def share(self, key: Hashable | None = None) -> Share:
        """Returns a new, empty share. Shares with the same `key` hold the same bytes and count once."""
        return Share(self, key)

    def try_add(self, share: Share, size: int) -> bool:
        """See `Share.try_grow`. Shares that wait go first."""
        if self._queue(share, size) and not self._is_held(share):
            return False
        return self._add_if_room(share, size)

    async def add(self, share: Share, size: int) -> None:
        """See `Share.grow`."""
        queue = self._queue(share, size)
        if len(queue) >= MAX_WAITING:
            raise self._refusal()
        waiter = _Waiter(share, size, asyncio.get_running_loop().create_future())
        queue[waiter] = None
        if self._timer is None:
            self._cut_slow()
        try:
            async with asyncio.timeout(self._wait_seconds):
                await waiter.granted
        except TimeoutError:
            if waiter.granted.cancelled():
                raise self._refusal() from None
        finally:
            if waiter in queue:
                first = next(iter(queue)) is waiter
                del queue[waiter]
                if first:
                    self._grant()  # the shares behind it may need less

    def drop(self, share: Share) -> None:
        """See `Share.close`."""
        self._shares.discard(share)
        size, share.size = share.size, 0
        if not size:
            return
        if share.key is not None:
            self._keys[share.key] -= 1
            if self._keys[share.key]:
                return
            del self._keys[share.key]
        self._count(size, 0)
        self._grant()

    def _refusal(self) -> TooManyRequests:
        return TooManyRequests(
            f"the server holds as many {self._what} in memory as it may; try again in a few seconds",
            retry_after=max(1, round(self._wait_seconds)),
        )

    def _queue(self, share: Share, size: int) -> dict[_Waiter, None]:
        """Returns the queue in which a share waits to grow by `size`."""
        return self._small if share.size + size <= SMALL_SHARE_BYTES else self._large

    def _is_held(self, share: Share) -> bool:
        """Returns whether another share holds the same bytes."""
        return share.key is not None and share.key in self._keys

    def _count(self, before: int, after: int) -> None:
        """Counts a share that had `before` bytes and now has `after`."""
        self.used += after - before
        self._in_small += (after if after <= SMALL_SHARE_BYTES else 0) - (before if before <= SMALL_SHARE_BYTES else 0)

    def _missing(self, share: Share, size: int) -> int:
        """Returns the bytes that other shares have to give back before this one can grow by `size`."""
        if self.used <= share.size:  # alone, a share may have any size
            return 0
        if share.size + size > SMALL_SHARE_BYTES:
            return self.used + size - self._for_large
        missing = self.used + size - self.size
        if self._large:
            missing = max(missing, self._in_small + size - self.size // 4)
        return missing

    def _add_if_room(self, share: Share, size: int) -> bool:
        if not self._is_held(share) or share.size:
            if self._missing(share, size) > 0:
                return False
            self._count(share.size, share.size + size)
        if share.key is not None and not share.size:
            self._keys[share.key] = self._keys.get(share.key, 0) + 1
        if not share.size:
            share.since = asyncio.get_running_loop().time()
        share.size += size
        self._shares.add(share)
        return True

    def _grant(self) -> None:
        """Grants waiting shares their memory: large ones first, since small ones have a part of their own."""
        for queue in (self._large, self._small):
            while queue and self._add_if_room((waiter := next(iter(queue))).share, waiter.size):
                del queue[waiter]
                waiter.granted.set_result(None)

    def _cut_slow(self) -> None:
        """While shares wait, cuts off bodies that have held memory for too long: the oldest first, as many as the
        waiting shares need."""
        self._timer = None
        queue = self._large or self._small
        if not queue:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(CUT_INTERVAL_SECONDS, self._cut_slow)
        until = loop.time() - self._slow_seconds
        slow = [share for share in self._shares if share.on_cut is not None and share.since < until]
        first = next(iter(queue))
        missing = self._missing(first.share, first.size) + sum(waiter.size for waiter in queue) - first.size
        keys: set[Hashable] = set()
        for share in sorted(slow, key=lambda share: share.since):
            if share.key not in keys:  # all shares that hold the same bytes are cut off
                if missing <= 0:
                    continue
                missing -= share.size
                if share.key is not None:
                    keys.add(share.key)
            if share.on_cut is not None:
                on_cut, share.on_cut = share.on_cut, None
                on_cut()


class ShareScope:
    """A context manager that holds the shares it is given until its block ends. Work that outlives the block keeps no
    memory: a share that comes after the end is closed at once."""

    def __init__(self) -> None:
        self._shares: list[Share] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for share in self._shares:
            share.close()
        self._shares.clear()

    def hold(self, share: Share) -> None:
        if self._closed:
            share.close()
        else:
            self._shares.append(share)

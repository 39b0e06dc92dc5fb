"""A budget of memory over all requests of a worker: for bodies that are held whole, coming in or going out.

Each request holds a share of the budget while its bytes are in memory. Where there is no room it waits a few seconds,
in the order of asking, then it is refused with 429 and Retry-After. Three rules keep one client from locking others
out. The last quarter is for small shares of up to 64 KiB, which is what nearly all manifests and forms have. While a
large share waits, small ones together get no more than a quarter. And while somebody waits, the bodies that have been
coming in for longest are cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from storage.errors import TooManyRequests

MIB: Final = 1024 * 1024
SMALL_SHARE_BYTES: Final = 64 * 1024
"""Bytes of a share that may use all of the budget."""
WAIT_SECONDS: Final = 8.0
"""How long a request waits for room before it is refused. Many clients repeat a 429 at once, so an early one saves
nothing."""
SLOW_SECONDS: Final = 5.0
"""While somebody waits for room, a body that has been coming in for longer than this is cut off."""
CUT_INTERVAL_SECONDS: Final = 0.25
"""How often the budget looks for such bodies, while somebody waits."""
MAX_WAITING: Final = 256
"""Requests that wait for room, of those with small shares and of those with large ones; more are refused at once."""


class Share:
    """What one request holds. `cut`, where it is set, ends the request when its memory is needed."""

    __slots__ = ("_budget", "cut", "key", "since", "size")

    def __init__(self, budget: MemoryBudget, key: Hashable | None) -> None:
        self._budget = budget
        self.key = key
        self.size = 0
        self.since = 0.0  # by the loop's clock, once it holds something
        self.cut: Callable[[], None] | None = None

    def try_grow(self, size: int) -> bool:
        """Holds `size` bytes more, if there is room for them."""
        return self._budget.try_add(self, size)

    async def grow(self, size: int) -> None:
        """Holds `size` bytes more. Raises TooManyRequests when there is no room for them for a while. Cancelled: holds
        what it held."""
        if not self._budget.try_add(self, size):
            await self._budget.add(self, size)

    def close(self) -> None:
        """Holds nothing from here on. May come again."""
        self._budget.drop(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    share: Share
    size: int
    granted: asyncio.Future[None]


class MemoryBudget:
    """`size` bytes over all shares. Used from one event loop."""

    def __init__(self, size: int, what: str, *, wait: float = WAIT_SECONDS, slow: float = SLOW_SECONDS) -> None:
        """`what` is held, for the sentence that a refusal has."""
        self.size = size
        self.used = 0
        self._what = what
        self._wait = wait
        self._slow = slow
        self._for_large = size - size // 4
        self._in_small = 0  # bytes that small shares hold
        self._shares: set[Share] = set()
        self._keys: dict[Hashable, int] = {}
        self._small: dict[_Waiter, None] = {}  # in the order of asking
        self._large: dict[_Waiter, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def share(self, key: Hashable | None = None) -> Share:
        """A new share, of nothing yet. Those with the same `key` hold the same bytes: they count once."""
        return Share(self, key)

    def try_add(self, share: Share, size: int) -> bool:
        """See `Share.try_grow`. Those who wait for room go first."""
        if self._queue(share, size) and not self._is_there(share):
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
            self._look()
        try:
            async with asyncio.timeout(self._wait):
                await waiter.granted
        except TimeoutError:
            if waiter.granted.cancelled():
                raise self._refusal() from None
        finally:
            if waiter in queue:
                first = next(iter(queue)) is waiter
                del queue[waiter]
                if first:
                    self._grant()  # those behind it may need less

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
            retry_after=max(1, round(self._wait)),
        )

    def _queue(self, share: Share, size: int) -> dict[_Waiter, None]:
        """Where a share waits to grow by `size`."""
        return self._small if share.size + size <= SMALL_SHARE_BYTES else self._large

    def _is_there(self, share: Share) -> bool:
        """Somebody else holds the same bytes."""
        return share.key is not None and share.key in self._keys

    def _count(self, before: int, after: int) -> None:
        """A share had `before` bytes, and now has `after`."""
        self.used += after - before
        self._in_small += (after if after <= SMALL_SHARE_BYTES else 0) - (before if before <= SMALL_SHARE_BYTES else 0)

    def _missing(self, share: Share, size: int) -> int:
        """Bytes that others have to give back before `share` can grow by `size`."""
        if self.used <= share.size:  # alone, a share may be as large as it likes
            return 0
        if share.size + size > SMALL_SHARE_BYTES:
            return self.used + size - self._for_large
        missing = self.used + size - self.size
        if self._large:
            missing = max(missing, self._in_small + size - self.size // 4)
        return missing

    def _add_if_room(self, share: Share, size: int) -> bool:
        if not self._is_there(share) or share.size:
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
        """Lets in who waits: large shares first, since small ones have a part of their own."""
        for queue in (self._large, self._small):
            while queue and self._add_if_room((waiter := next(iter(queue))).share, waiter.size):
                del queue[waiter]
                waiter.granted.set_result(None)

    def _look(self) -> None:
        """While somebody waits, cuts off bodies that have been coming in for too long: the oldest first, as many as
        those that wait need."""
        self._timer = None
        queue = self._large or self._small
        if not queue:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(CUT_INTERVAL_SECONDS, self._look)
        until = loop.time() - self._slow
        slow = [share for share in self._shares if share.cut is not None and share.since < until]
        first = next(iter(queue))
        missing = self._missing(first.share, first.size) + sum(waiter.size for waiter in queue) - first.size
        keys: set[Hashable] = set()
        for share in sorted(slow, key=lambda share: share.since):
            if share.key not in keys:  # of those that hold the same bytes, all are cut off
                if missing <= 0:
                    continue
                missing -= share.size
                if share.key is not None:
                    keys.add(share.key)
            if share.cut is not None:
                cut, share.cut = share.cut, None
                cut()


class _ShareScope:
    """What a block holds. Tasks begun in the block have it too, and may go on after its end."""

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for share in self.shares:
            share.close()
        self.shares.clear()


_SHARE_SCOPE: ContextVar[_ShareScope | None] = ContextVar("held_in_scope", default=None)


@asynccontextmanager
async def share_scope() -> AsyncIterator[None]:
    """What is `keep_share`t inside the block, by whatever it calls, stays held until the block ends."""
    scope = _ShareScope()
    token = _SHARE_SCOPE.set(scope)
    try:
        yield
    finally:
        _SHARE_SCOPE.reset(token)
        scope.close()


def keep_share(share: Share) -> None:
    """Leaves `share` to the block it is in (`share_scope`); without one, or after its end, it is closed."""
    scope = _SHARE_SCOPE.get()
    if scope is None or scope.closed:
        share.close()
    else:
        scope.shares.append(share)

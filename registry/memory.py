"""A budget of memory over all requests of a worker: for bodies that are held whole, coming in or going out.

Each request holds a share of the budget while its bytes are in memory. Where there is no room it waits a few seconds,
in the order of asking, then it is refused with 429 and Retry-After. Two rules keep one client from locking others out.
The last quarter is for shares of up to 64 KiB, which is what nearly all manifests and forms have. And while somebody
waits, a body that has been coming in for longer than the others is cut off.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from storage.errors import TooManyRequests

MIB: Final = 1024 * 1024
SMALL: Final = 64 * 1024
"""Bytes of a share that may use all of the budget."""
WAIT_SECONDS: Final = 8.0
"""How long a request waits for room before it is refused. Many clients repeat a 429 at once, so an early one saves
nothing."""
SLOW_SECONDS: Final = 5.0
"""While somebody waits for room, a body that has been coming in for longer than this is cut off."""
LOOK_SECONDS: Final = 0.25
"""How often somebody who waits looks for such a body."""


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


@dataclass(slots=True)
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
        self._shares: set[Share] = set()
        self._keys: dict[Hashable, int] = {}
        self._waiting: deque[_Waiter] = deque()

    def share(self, key: Hashable | None = None) -> Share:
        """A new share, of nothing yet. Those with the same `key` hold the same bytes: they count once."""
        return Share(self, key)

    def try_add(self, share: Share, size: int) -> bool:
        """See `Share.try_grow`. Those who wait for room go first, but do not hold up small shares."""
        large = share.size + size > SMALL
        if large and self._waiting and not self._is_there(share):
            return False
        return self._add_if_room(share, size)

    async def add(self, share: Share, size: int) -> None:
        """See `Share.grow`."""
        waiter = _Waiter(share, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._wait):
                while not waiter.granted.done():
                    self._cut_slowest(share)
                    await asyncio.wait([waiter.granted], timeout=LOOK_SECONDS)
        except TimeoutError:
            if not waiter.granted.done():
                raise TooManyRequests(
                    f"the server holds as many {self._what} in memory as it may; try again in a few seconds",
                    retry_after=max(1, round(self._wait)),
                ) from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
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
        self.used -= size
        self._grant()

    def _is_there(self, share: Share) -> bool:
        """Somebody else holds the same bytes."""
        return share.key is not None and share.key in self._keys

    def _add_if_room(self, share: Share, size: int) -> bool:
        if not self._is_there(share) or share.size:
            most = self.size if share.size + size <= SMALL else self._for_large
            if self.used + size > most and self.used > share.size:  # alone, a share may be as large as it likes
                return False
            self.used += size
        if share.key is not None and not share.size:
            self._keys[share.key] = self._keys.get(share.key, 0) + 1
        if not share.size:
            share.since = asyncio.get_running_loop().time()
        share.size += size
        self._shares.add(share)
        return True

    def _grant(self) -> None:
        """Lets in who waits, in order. Small shares pass large ones, which may not use all of the budget."""
        blocked = False
        for waiter in list(self._waiting):
            large = waiter.share.size + waiter.size > SMALL
            if blocked and large:
                continue
            if self._add_if_room(waiter.share, waiter.size):
                self._waiting.remove(waiter)
                waiter.granted.set_result(None)
            else:
                blocked = True

    def _cut_slowest(self, waiting: Share) -> None:
        """Cuts off the body that has been coming in for longest, if that is too long."""
        slow = [share for share in self._shares if share.cut is not None and share is not waiting]
        if not slow:
            return
        slowest = min(slow, key=lambda share: share.since)
        if slowest.cut is not None and asyncio.get_running_loop().time() - slowest.since > self._slow:
            cut, slowest.cut = slowest.cut, None
            cut()


class _Scope:
    """What a block holds. Tasks begun in the block have it too, and may go on after its end."""

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for share in self.shares:
            share.close()
        self.shares.clear()


_SCOPE: ContextVar[_Scope | None] = ContextVar("held_in_scope", default=None)


@asynccontextmanager
async def holding() -> AsyncIterator[None]:
    """What is `keep`t inside the block, by whatever it calls, stays held until the block ends."""
    scope = _Scope()
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)
        scope.close()


def keep(share: Share) -> None:
    """Leaves `share` to the block it is in (`holding`); without one, or after its end, it is closed."""
    scope = _SCOPE.get()
    if scope is None or scope.closed:
        share.close()
    else:
        scope.shares.append(share)

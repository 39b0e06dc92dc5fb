"""`MemoryBudget` limits the total memory of request or response bodies in a worker. The budget counts only bodies that
have to be in memory as a whole, such as manifests.

Each request has a `Share` of the budget: the number of bytes of its body that are in memory now. The share has to grow
before more bytes get into memory. If the budget has too few free bytes, the share waits. If too few bytes become free
within a few seconds, the request is refused with 429 and Retry-After. Small and large shares wait in separate queues,
and each queue is served in the order of arrival. Four rules keep one client from blocking the others:

- Only small shares (up to 64 KiB) may use the last quarter of the budget.
- While a large share waits, small shares together get at most a quarter of the budget.
- While any share waits, requests without progress for several seconds are *cut off*: they end with an error.
- If a client has several shares, they may together have at most a quarter of the budget. The bytes that they wait for
  count as well. Shares without a `client` have no such limit.
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
"""Largest size of a small share. Every larger share is a large share. Nearly all manifests and forms are small."""
WAIT_SECONDS: Final = 8.0
"""Longest time that a share waits. An earlier refusal would save nothing, because many clients repeat a request
immediately after a 429."""
SLOW_SECONDS: Final = 5.0
"""While a share waits, requests are cut off if their last progress is longer ago than this."""
CUT_INTERVAL_SECONDS: Final = 0.25
"""While a share waits, the budget looks for requests to cut off at this interval."""
MAX_CUT_AT_ONCE: Final = 100
"""Largest number of requests that are cut off at once. This blocks the event loop for a few milliseconds."""
MAX_WAITING: Final = 256
"""Largest number of shares in each of the two queues, one for small and one for large shares. If a queue is full, a
request whose share would have to wait in it is refused immediately."""
MIN_CLIENT_BYTES: Final = 16 * 1024
"""A share that is smaller than this counts as this many bytes for the limit of its client. So no client can fill a
queue with tiny shares."""


class Share:
    """The share of one request in a `MemoryBudget`.

    - `size`: the number of bytes that the request holds in memory.
    - `key`: identifies the object in memory that has the bytes, such as a cached manifest. Shares with the same key
      hold the same object, and the budget counts the object only once. Each request must grow its own share to the size
      of the object, even if another share holds the object already. None: no other share holds the object.
    - `client`: the client that sends or receives the bytes. None: no limit for a client applies.
    - `counted_for_client`: the number of bytes that the share counts for the limit of its client, including the bytes
      that the share waits for.
    - `last_progress_at`: the time of the last progress, in seconds of the event loop's clock. The budget sets the time
      when the share begins to hold bytes. After that, the request may set the time.
    - `on_cut`: the function that the budget calls to cut off the request. It must not raise. None: the request cannot
      be cut off now."""

    __slots__ = ("_budget", "client", "counted_for_client", "key", "last_progress_at", "on_cut", "size")

    def __init__(self, budget: MemoryBudget, key: Hashable | None, client: str | None) -> None:
        self._budget = budget
        self.key = key
        self.client = client
        self.size = 0
        self.counted_for_client = 0
        self.last_progress_at = 0.0
        self.on_cut: Callable[[], None] | None = None

    def try_grow(self, added_bytes: int) -> bool:
        """Grows by `added_bytes` and returns True. If the share would have to wait, or the client would exceed its
        limit, changes nothing and returns False."""
        return self._budget.try_grow(self, added_bytes)

    async def grow(self, added_bytes: int) -> None:
        """Grows by `added_bytes`. Waits if the budget has too few free bytes. Raises TooManyRequests if too few bytes
        become free in time, too many shares wait, or the client would exceed its limit. If the call is cancelled, the
        share may have grown, so the caller must close the share."""
        if not self._budget.try_grow(self, added_bytes):
            await self._budget.wait_and_grow(self, added_bytes)

    def close(self) -> None:
        """Gives all bytes back to the budget. Idempotent."""
        self._budget.release(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A share that waits to grow by `added_bytes`. `granted` gets its result when the share has grown."""

    share: Share
    added_bytes: int
    granted: asyncio.Future[None]


class MemoryBudget:
    """A budget of `size` bytes for all its shares together. `used` is the number of bytes that the shares hold now.
    Call all methods in one event loop."""

    def __init__(
        self,
        size: int,
        content: str,
        *,
        wait_seconds: float = WAIT_SECONDS,
        slow_seconds: float = SLOW_SECONDS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """- `content`: what the shares hold, such as "request bodies". The error message contains this text.
        - `wait_seconds`: the longest time that a share waits.
        - `slow_seconds`: while a share waits, requests are cut off if their last progress is longer ago than this.
        - `max_waiting`: the largest number of shares in each of the two queues."""
        self.size = size
        self.used = 0
        self._content = content
        self._wait_seconds = wait_seconds
        self._slow_seconds = slow_seconds
        self._max_waiting = max_waiting
        self._limit_for_large = size - size // 4  # a large share must not make `used` larger than this
        self._used_by_small = 0
        self._shares: set[Share] = set()  # the shares that hold bytes
        self._client_bytes: dict[str, int] = {}  # by client: the sum of `counted_for_client`
        self._share_counts: dict[Hashable, int] = {}  # by key: the number of shares with that key that hold bytes
        self._small_waiters: dict[_Waiter, None] = {}  # a queue, in the order of arrival
        self._large_waiters: dict[_Waiter, None] = {}
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_cut_off_slow_requests`

    def new_share(self, key: Hashable | None = None, *, client: str | None = None) -> Share:
        """Returns a new share of size 0. `key` and `client`: see `Share`."""
        return Share(self, key, client)

    def try_grow(self, share: Share, added_bytes: int) -> bool:
        """Implements `Share.try_grow`. Returns False while other shares wait in the queue that `share` would join. But
        if another share already holds the same object (`key`), `share` needs no free bytes, and grows at once."""
        if not self._client_limit_allows(share, added_bytes):
            return False
        if self._queue_for(share, added_bytes) and not self._is_object_counted(share):
            return False
        if not self._grow_if_free(share, added_bytes):
            return False
        self._count_for_client(share, share.size)
        return True

    async def wait_and_grow(self, share: Share, added_bytes: int) -> None:
        """Waits until `share` has grown by `added_bytes`. Raises TooManyRequests if too few bytes become free in time,
        the queue is full, or the client would exceed its limit."""
        if not self._client_limit_allows(share, added_bytes):
            raise self._refusal(" of this client")
        queue = self._queue_for(share, added_bytes)
        if len(queue) >= self._max_waiting:
            raise self._refusal()
        waiter = _Waiter(share, added_bytes, asyncio.get_running_loop().create_future())
        queue[waiter] = None
        self._count_for_client(share, share.size + added_bytes)
        try:
            if self._timer is None:
                self._cut_off_slow_requests()
            async with asyncio.timeout(self._wait_seconds):
                await waiter.granted
        except TimeoutError:
            if waiter.granted.cancelled():  # otherwise the share has grown just before the timeout
                raise self._refusal() from None
        finally:
            self._count_for_client(share, share.size)  # no longer counts bytes that `share` waited for in vain
            if waiter in queue:
                was_first = next(iter(queue)) is waiter
                del queue[waiter]
                if was_first:
                    self._grant_to_waiters()  # the next share may need fewer bytes than `share`

    def release(self, share: Share) -> None:
        """Sets the size of `share` to 0 and gives its bytes to waiting shares. Idempotent."""
        self._shares.discard(share)
        self._count_for_client(share, 0)
        size, share.size = share.size, 0
        if not size:
            return
        if share.key is not None:
            self._share_counts[share.key] -= 1
            if self._share_counts[share.key]:
                return  # another share still holds the same bytes
            del self._share_counts[share.key]
        self._update_totals(size, 0)
        self._grant_to_waiters()

    def _refusal(self, whose: str = "") -> TooManyRequests:
        return TooManyRequests(
            f"the memory for {self._content}{whose} is in use; try again in a few seconds",
            retry_after=max(1, round(self._wait_seconds)),
        )

    def _client_limit_allows(self, share: Share, added_bytes: int) -> bool:
        """Returns whether `share` can grow by `added_bytes` within the limit of its client. Returns True if `share` has
        no client, or if the client has no other share."""
        if share.client is None:
            return True
        others = self._client_bytes.get(share.client, 0) - share.counted_for_client
        return not others or others + max(share.size + added_bytes, MIN_CLIENT_BYTES) <= self.size // 4

    def _count_for_client(self, share: Share, size: int) -> None:
        """Sets the number of bytes that `share` counts for the limit of its client: `size`, or MIN_CLIENT_BYTES if
        `size` is smaller. A share without bytes counts 0."""
        if share.client is None:
            return
        counted = max(size, MIN_CLIENT_BYTES) if size else 0
        total = self._client_bytes.get(share.client, 0) + counted - share.counted_for_client
        share.counted_for_client = counted
        if total:
            self._client_bytes[share.client] = total
        else:
            self._client_bytes.pop(share.client, None)

    def _queue_for(self, share: Share, added_bytes: int) -> dict[_Waiter, None]:
        """Returns the queue in which `share` waits to grow by `added_bytes`. The size after the growth decides between
        the two queues."""
        return self._small_waiters if share.size + added_bytes <= SMALL_SHARE_BYTES else self._large_waiters

    def _is_object_counted(self, share: Share) -> bool:
        """Returns whether `used` includes the object that the key of `share` identifies. Returns False for a share
        without a key."""
        return share.key is not None and share.key in self._share_counts

    def _update_totals(self, before: int, after: int) -> None:
        """Updates `used` and `_used_by_small` when the size of a share changes from `before` to `after`."""
        self.used += after - before
        small_before = before if before <= SMALL_SHARE_BYTES else 0
        small_after = after if after <= SMALL_SHARE_BYTES else 0
        self._used_by_small += small_after - small_before

    def _missing_bytes(self, share: Share, added_bytes: int) -> int:
        """Returns how many bytes other shares have to release before `share` can grow by `added_bytes`. If the result
        is 0 or negative, `share` can grow now."""
        if self.used <= share.size:  # no other share holds memory, so `share` may have any size
            return 0
        if share.size + added_bytes > SMALL_SHARE_BYTES:  # a large share
            return self.used + added_bytes - self._limit_for_large
        missing = self.used + added_bytes - self.size
        if self._large_waiters:  # then small shares together get at most a quarter of the budget
            missing = max(missing, self._used_by_small + added_bytes - self.size // 4)
        return missing

    def _grow_if_free(self, share: Share, added_bytes: int) -> bool:
        """Grows `share` and returns True if the budget has enough free bytes, even if other shares wait in the queue.
        Otherwise changes nothing and returns False."""
        # If `used` already includes the object of `share`, the first growth of `share` needs no free bytes.
        if not self._is_object_counted(share) or share.size:
            if self._missing_bytes(share, added_bytes) > 0:
                return False
            self._update_totals(share.size, share.size + added_bytes)
        if share.key is not None and not share.size:
            self._share_counts[share.key] = self._share_counts.get(share.key, 0) + 1
        if not share.size:
            share.last_progress_at = asyncio.get_running_loop().time()
        share.size += added_bytes
        self._shares.add(share)
        return True

    def _grant_to_waiters(self) -> None:
        """Grows waiting shares while the budget has enough free bytes. Starts with the large shares, which always leave
        a quarter of the budget for the small shares."""
        for queue in (self._large_waiters, self._small_waiters):
            while queue:
                waiter = next(iter(queue))
                # After a cancellation or timeout, `granted` is done, but the waiter stays in the queue until its task
                # runs again.
                if not waiter.granted.done():
                    if not self._grow_if_free(waiter.share, waiter.added_bytes):
                        break
                    waiter.granted.set_result(None)
                del queue[waiter]

    def _cut_off_slow_requests(self) -> None:
        """Cuts off requests whose last progress is more than `slow_seconds` ago, beginning with the earliest progress.
        The bytes are for the queue of the large shares if a large share waits, otherwise for the queue of the small
        shares. Stops when the requests that this call has cut off hold enough bytes for all shares of that queue, or
        when this call has cut off `MAX_CUT_AT_ONCE` requests.

        While a share waits, the event loop calls this again every `CUT_INTERVAL_SECONDS`."""
        self._timer = None
        queue = self._large_waiters or self._small_waiters
        if not queue:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(CUT_INTERVAL_SECONDS, self._cut_off_slow_requests)
        slow_before = loop.time() - self._slow_seconds
        slow = [share for share in self._shares if share.on_cut is not None and share.last_progress_at < slow_before]
        first_waiter = next(iter(queue))
        bytes_for_other_waiters = sum(waiter.added_bytes for waiter in queue) - first_waiter.added_bytes
        missing = self._missing_bytes(first_waiter.share, first_waiter.added_bytes) + bytes_for_other_waiters
        # An object becomes free only when all its shares are closed. So all slow shares with the same key are cut off
        # together, and `missing` decreases only once for them.
        keys: set[Hashable] = set()  # the keys of the shares that were cut off
        cut_count = 0
        for share in sorted(slow, key=lambda share: share.last_progress_at):
            if share.key not in keys:
                if missing <= 0:
                    continue
                missing -= share.size
                if share.key is not None:
                    keys.add(share.key)
            if cut_count >= MAX_CUT_AT_ONCE:
                break
            cut_count += 1
            if share.on_cut is not None:  # an earlier call in this loop may have set it to None
                on_cut, share.on_cut = share.on_cut, None
                on_cut()


class ShareScope:
    """A context manager that closes shares when its block ends."""

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
        """Keeps `share` open until the block ends. If the block has ended already, closes `share` immediately."""
        if self._closed:
            share.close()
        else:
            self._shares.append(share)

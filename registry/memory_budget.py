"""`MemoryBudget`: limits the memory that all requests of a worker use together for bodies that have to be in memory as
a whole, such as manifests. A body is a request body or a response body.

Each request has a `Share` of the budget: the number of bytes of its body that are in memory now. If too little of the
budget is free for the body, the share waits. If too little becomes free within a few seconds, the request is refused
with 429 and Retry-After. Small and large shares wait in separate queues, and each queue is served in the order of
arrival. Four rules keep one client from blocking the others:

- Only small shares, of up to 64 KiB, may use the last quarter of the budget. Nearly all manifests and forms are small.
- While a large share waits, small shares together get at most a quarter of the budget.
- While any share waits, requests that have held memory for too long are *cut off*: they end with an error. The oldest
  are cut off first.
- All shares of one client together, including those that wait, may have at most a quarter of the budget. But if a
  client has only one share, this share may be larger. Shares that are created without a `client` have no such limit.
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
"""Largest size of a small share. Every larger share is a large one."""
WAIT_SECONDS: Final = 8.0
"""Seconds that a share waits before it is refused. An earlier refusal would save nothing, because many clients repeat a
request immediately after a 429."""
SLOW_SECONDS: Final = 5.0
"""While a share waits, requests that have held memory for longer than this are cut off."""
CUT_INTERVAL_SECONDS: Final = 0.25
"""Seconds between two searches for requests to cut off, while a share waits."""
MAX_CUT_AT_ONCE: Final = 100
"""Largest number of requests that are cut off at once. Closing this many connections takes a few milliseconds, in which
the server answers no other request."""
MAX_WAITING: Final = 256
"""Largest number of shares in each of the two queues, one for small and one for large shares. If a queue is full, a
share that has to wait in it is refused immediately."""
MIN_CLIENT_BYTES: Final = 16 * 1024
"""For the limit of its client, a share counts as at least this many bytes. Otherwise one client could fill a queue with
shares of a few bytes."""


class Share:
    """The number of bytes that one request holds in memory, as part of a `MemoryBudget`.

    - `size`: the number of bytes.
    - `key`: names the object in memory that the bytes belong to. Shares with the same key hold the same object, so the
      budget counts its bytes only once. All of them must grow to the size of the object. The key is None if no other
      share holds these bytes.
    - `client`: the client that sends or receives the bytes. If it is None, the limit for each client does not apply.
    - `counted_for_client`: the number of bytes that count for the limit of the client. This includes the bytes that the
      share waits for.
    - `last_progress_at`: a time in seconds of the event loop's clock. The budget sets it to the time at which the share
      first held bytes. The request may set a later time when its client makes progress. The budget may cut off the
      request if this time is long ago.
    - `on_cut`: the function that the budget calls to cut off the request when other requests need the memory. It must
      not raise. It is None while the request cannot be cut off."""

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
        """Grows by `added_bytes` and returns True if that many bytes of the budget are free now. Otherwise changes
        nothing and returns False."""
        return self._budget.try_grow(self, added_bytes)

    async def grow(self, added_bytes: int) -> None:
        """Grows by `added_bytes`. Waits if too little of the budget is free. Raises TooManyRequests if too little
        becomes free in time, if too many shares wait, or if the client would exceed its limit. If the call is
        cancelled, the share may have grown, so the caller must close it."""
        if not self._budget.try_grow(self, added_bytes):
            await self._budget.wait_and_grow(self, added_bytes)

    def close(self) -> None:
        """Gives all bytes back to the budget. Idempotent."""
        self._budget.release(self)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A share that waits to grow by `added_bytes`. `granted` is done when the share has grown."""

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
        """- `content`: what the shares hold, such as "request bodies". The error text names it.
        - `wait_seconds`: the time that a share waits for free memory before it is refused.
        - `slow_seconds`: while a share waits, requests that have held memory for longer than this are cut off.
        - `max_waiting`: the largest number of shares in each of the two queues."""
        self.size = size
        self.used = 0
        self._content = content
        self._wait_seconds = wait_seconds
        self._slow_seconds = slow_seconds
        self._max_waiting = max_waiting
        self._limit_for_large = size - size // 4  # a large share must not make `used` larger than this
        self._used_by_small = 0
        self._shares: set[Share] = set()  # those that have grown and are not released yet
        self._client_bytes: dict[str, int] = {}  # by client: the sum of `counted_for_client`
        self._share_counts: dict[Hashable, int] = {}  # by key: the number of shares with that key that hold bytes
        self._small_waiters: dict[_Waiter, None] = {}  # a queue, in the order of arrival
        self._large_waiters: dict[_Waiter, None] = {}
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_cut_slow`

    def new_share(self, key: Hashable | None = None, *, client: str | None = None) -> Share:
        """Returns a new share of size 0. `key` and `client`: see `Share`."""
        return Share(self, key, client)

    def try_grow(self, share: Share, added_bytes: int) -> bool:
        """Does what `Share.try_grow` does. While other shares wait in the queue that `share` would join, returns False
        even if enough of the budget is free. This does not apply if another share with the key of `share` holds the
        object already, because then `share` needs no more memory."""
        if not self._may_client_use(share, added_bytes):
            return False
        if self._queue_for(share, added_bytes) and not self._is_key_counted(share):
            return False
        if not self._grow_if_free(share, added_bytes):
            return False
        self._count_for_client(share, share.size)
        return True

    async def wait_and_grow(self, share: Share, added_bytes: int) -> None:
        """Waits until `share` has grown by `added_bytes`. Raises TooManyRequests if too little of the budget becomes
        free in time, if the queue is full, or if the client would exceed its limit."""
        if not self._may_client_use(share, added_bytes):
            raise self._refusal(" of this client")
        queue = self._queue_for(share, added_bytes)
        if len(queue) >= self._max_waiting:
            raise self._refusal()
        waiter = _Waiter(share, added_bytes, asyncio.get_running_loop().create_future())
        queue[waiter] = None
        self._count_for_client(share, share.size + added_bytes)
        try:
            if self._timer is None:
                self._cut_slow()
            async with asyncio.timeout(self._wait_seconds):
                await waiter.granted
        except TimeoutError:
            if waiter.granted.cancelled():  # otherwise the share has grown just before the timeout
                raise self._refusal() from None
        finally:
            self._count_for_client(share, share.size)  # without the bytes that `share` did not get
            if waiter in queue:
                was_first = next(iter(queue)) is waiter
                del queue[waiter]
                if was_first:
                    self._grant_to_waiters()  # the next share may need less than `share`, and fit now

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
            f"the server holds as many {self._content}{whose} in memory as it may; try again in a few seconds",
            retry_after=max(1, round(self._wait_seconds)),
        )

    def _may_client_use(self, share: Share, added_bytes: int) -> bool:
        """Returns whether the limit for each client allows `share` to grow by `added_bytes`: `share` has no client, its
        client has no other share, or all shares of the client then have at most a quarter of the budget."""
        if share.client is None:
            return True
        others = self._client_bytes.get(share.client, 0) - share.counted_for_client
        return not others or others + max(share.size + added_bytes, MIN_CLIENT_BYTES) <= self.size // 4

    def _count_for_client(self, share: Share, size: int) -> None:
        """Counts `share` as `size` bytes for the limit of its client, in place of the size that was counted before."""
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
        """Returns the queue in which `share` waits to grow by `added_bytes`. The size after the growth decides whether
        this is the queue for small or for large shares."""
        return self._small_waiters if share.size + added_bytes <= SMALL_SHARE_BYTES else self._large_waiters

    def _is_key_counted(self, share: Share) -> bool:
        """Returns whether a share with the key of `share` holds bytes, so that `used` includes them. Returns False for
        a share without a key."""
        return share.key is not None and share.key in self._share_counts

    def _update_totals(self, before: int, after: int) -> None:
        """Updates `used` and the total of the small shares for a share whose size changes from `before` to `after`."""
        self.used += after - before
        small_before = before if before <= SMALL_SHARE_BYTES else 0
        small_after = after if after <= SMALL_SHARE_BYTES else 0
        self._used_by_small += small_after - small_before

    def _missing_bytes(self, share: Share, added_bytes: int) -> int:
        """Returns how many bytes other shares have to release before `share` can grow by `added_bytes`. Zero or less
        means that enough of the budget is free."""
        if self.used <= share.size:  # no other share holds memory, so `share` may have any size
            return 0
        if share.size + added_bytes > SMALL_SHARE_BYTES:  # a large share
            return self.used + added_bytes - self._limit_for_large
        missing = self.used + added_bytes - self.size
        if self._large_waiters:  # then small shares together get at most a quarter of the budget
            missing = max(missing, self._used_by_small + added_bytes - self.size // 4)
        return missing

    def _grow_if_free(self, share: Share, added_bytes: int) -> bool:
        """Grows `share` and returns True if enough of the budget is free. Otherwise changes nothing and returns False.
        Ignores the queues."""
        # If `share` holds no bytes yet and another share with its key holds the object already, `share` needs no free
        # memory, because `used` includes the bytes of the object. In every other case, the added bytes must be free.
        if not self._is_key_counted(share) or share.size:
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
        """Grows waiting shares while enough of the budget is free. Starts with the large shares, which leave a quarter
        of the budget free for the small shares."""
        for queue in (self._large_waiters, self._small_waiters):
            while queue:
                waiter = next(iter(queue))
                # If `granted` is done here, the wait was cancelled or timed out, and the waiting task has not run
                # since. Such a waiter is only removed from the queue.
                if not waiter.granted.done():
                    if not self._grow_if_free(waiter.share, waiter.added_bytes):
                        break
                    waiter.granted.set_result(None)
                del queue[waiter]

    def _cut_slow(self) -> None:
        """Cuts off requests whose `last_progress_at` is more than `slow_seconds` ago, the oldest first. This frees
        memory for one queue: that of the large shares or, if no large share waits, that of the small shares. Stops when
        the requests that are cut off release enough memory for all shares in this queue together, or after
        `MAX_CUT_AT_ONCE` requests. Is called again every `CUT_INTERVAL_SECONDS` while a share waits."""
        self._timer = None
        queue = self._large_waiters or self._small_waiters
        if not queue:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(CUT_INTERVAL_SECONDS, self._cut_slow)
        slow_before = loop.time() - self._slow_seconds
        slow = [share for share in self._shares if share.on_cut is not None and share.last_progress_at < slow_before]
        first_waiter = next(iter(queue))
        bytes_for_other_waiters = sum(waiter.added_bytes for waiter in queue) - first_waiter.added_bytes
        missing = self._missing_bytes(first_waiter.share, first_waiter.added_bytes) + bytes_for_other_waiters
        # Bytes that several shares hold become free when the last of these shares is closed. So if a share is cut off,
        # all slow shares with its key are cut off as well. Their bytes are subtracted from `missing` only once.
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
            if share.on_cut is not None:  # another share's `on_cut`, called in this loop, may have set it to None
                on_cut, share.on_cut = share.on_cut, None
                on_cut()


class ShareScope:
    """A context manager that closes shares when its block ends, so that the budget counts their bytes until then.

    A share that is added after the block has ended is closed immediately. So a background task that outlives the block
    cannot keep a share open."""

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
        """Closes `share` when the block ends, or now if it has ended."""
        if self._closed:
            share.close()
        else:
            self._shares.append(share)

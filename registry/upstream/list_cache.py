"""Caches complete lists that were read from an upstream registry (`ListCache`), and returns single pages of them
(`cut_page`).

A client requests a list page by page, but the whole list is read from the upstream at once. The cache keeps the list
for the requests that follow. Reading one list may take hundreds of upstream requests, so the cache limits how many
lists are read at a time.
"""

from __future__ import annotations

import asyncio
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from registry.single_flight import SingleFlight
from registry.upstream.request_limits import MIB, hold_slot, time_limit
from storage.content import Page

T = TypeVar("T")

LIST_TIMEOUT_SECONDS = 25.0
"""Time limit for reading a complete list. It includes the time in which the read waits for other reads to end
(MAX_CONCURRENT_LISTS)."""
MAX_CONCURRENT_LISTS = 4
"""Largest number of lists of one kind (tags or referrers) that are read from one upstream at a time."""
LIST_CACHED_SECONDS = 30.0
"""Longest time for which a cached list is used."""
LIST_CACHE_BYTES = 16 * MIB
"""Approximate limit of the memory of one `ListCache`. The list that was read last stays in the cache even if this list
alone exceeds the limit."""
LIST_OVERHEAD_BYTES = 1024
"""Memory that each cached list counts in addition to its items and its key, so that the number of empty lists is
limited."""


@dataclass(frozen=True, slots=True)
class CompleteList(Generic[T]):
    """All items of a list of an upstream."""

    items: Sequence[T]
    request_count: int
    """The number of upstream requests that were needed to read the list."""
    size_bytes: int
    """The approximate size of `items` in memory."""


@dataclass(frozen=True, slots=True)
class _CachedList(Generic[T]):
    """A complete list in the cache."""

    complete_list: CompleteList[T]
    read_at: float
    """When the list was read, in seconds of the cache's clock."""


class ListCache(Generic[T]):
    """Caches the complete lists of one kind (tags or referrers) from one upstream. The caller chooses a key for each
    list."""

    def __init__(self, upstream_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._upstream_name = upstream_name
        self._clock = clock
        self._running_reads: SingleFlight[CompleteList[T]] = SingleFlight()
        self._read_slots = asyncio.Semaphore(MAX_CONCURRENT_LISTS)
        self._cached_lists: dict[str, _CachedList[T]] = {}
        """The cached lists by their keys, in the order in which they were read."""
        self._cached_bytes = 0

    async def get(
        self, key: str, read_list: Callable[[], Coroutine[Any, Any, CompleteList[T]]], *, is_first_page: bool
    ) -> Sequence[T]:
        """Returns the items of the list `key`, from the cache or from `read_list`. `is_first_page`: whether the client
        requests the first page. If so, a cached list that took only one upstream request is not used: the list may have
        changed, and reading it costs little.

        Concurrent callers with the same key share one call of `read_list`. When all these callers have been
        cancelled, the call is cancelled too if it waits to send its first upstream request. In all other cases, the
        call continues when callers are cancelled. Raises the errors of `read_list`, and UpstreamTimeout after
        LIST_TIMEOUT_SECONDS."""
        cached = self._cached_lists.get(key)
        if (
            cached is not None
            and self._clock() - cached.read_at <= LIST_CACHED_SECONDS
            and (not is_first_page or cached.complete_list.request_count > 1)
        ):
            return cached.complete_list.items
        complete_list = await self._running_reads.run(key, lambda: self._read(key, read_list))
        return complete_list.items

    async def aclose(self) -> None:
        """Cancels all running reads. Callers of `get` that wait for a read get UpstreamUnavailable."""
        await self._running_reads.aclose()

    async def _read(self, key: str, read_list: Callable[[], Coroutine[Any, Any, CompleteList[T]]]) -> CompleteList[T]:
        """Reads the list, caches it and returns it. Evicts the lists that were read longest ago while the cache exceeds
        LIST_CACHE_BYTES."""
        async with (
            time_limit(LIST_TIMEOUT_SECONDS, f"the upstream registry {self._upstream_name}"),
            hold_slot(self._read_slots),
        ):
            complete_list = await read_list()
        self._evict(key)
        self._cached_lists[key] = _CachedList(complete_list, self._clock())
        self._cached_bytes += _size_bytes(key, complete_list)
        while self._cached_bytes > LIST_CACHE_BYTES and len(self._cached_lists) > 1:
            self._evict(next(iter(self._cached_lists)))
        return complete_list

    def _evict(self, key: str) -> None:
        """Removes the list `key` from the cache. Does nothing if the cache does not have it."""
        cached = self._cached_lists.pop(key, None)
        if cached is not None:
            self._cached_bytes -= _size_bytes(key, cached.complete_list)


def _size_bytes(key: str, complete_list: CompleteList[T]) -> int:
    """Returns the approximate memory of a cached list, in bytes. The result includes the key, because a client can make
    the key long: the key of a list of referrers contains the artifact type in the request."""
    return complete_list.size_bytes + sys.getsizeof(key) + LIST_OVERHEAD_BYTES


def cut_page(items: Sequence[T], sort_key: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Returns a page with at most `limit` items: the first items whose sort key is greater than `after`, or the first
    items of the list if `after` is None. `sort_key` returns the sort key of an item. `items` must be sorted by the
    UTF-8 bytes of their sort keys. `after` may be any text."""
    start = 0
    if after is not None:  # a client may send text that UTF-8 cannot encode
        start = bisect_right(items, after.encode(errors="surrogatepass"), key=lambda item: sort_key(item).encode())
    return Page(items[start : start + limit], len(items) > start + limit)

"""Cache of complete lists of an upstream (`ListCache`), and a function that returns one page of a complete list
(`cut_page`).

A client that pages through a list sends one request for each page, but the list is read from the upstream as a whole.
The cache keeps the list, so that it is not read again for the client's later pages and for other clients. Reading one
list may take hundreds of upstream requests, so the cache limits how many lists are read at a time.
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
"""Time limit for reading all pages of a list. It includes the wait while MAX_CONCURRENT_LISTS other lists are read."""
MAX_CONCURRENT_LISTS = 4
"""Largest number of lists of one kind (tags or referrers) that are read from one upstream at a time."""
LIST_CACHED_SECONDS = 30.0
"""Longest time for which a cached list is used. `ListCache.get` may read the list again earlier."""
LIST_CACHE_BYTES = 16 * MIB
"""Approximate limit of the memory for cached lists of one kind. The list that was read last is cached even if it is
larger than this."""
LIST_OVERHEAD_BYTES = 1024
"""Memory that is counted for each cached list in addition to its items and its key, so that empty lists are limited as
well."""


@dataclass(frozen=True, slots=True)
class CompleteList(Generic[T]):
    """All items of a list of an upstream."""

    items: Sequence[T]
    request_count: int
    """The number of upstream requests that it took to read the list."""
    size_bytes: int
    """The approximate size in memory."""


@dataclass(frozen=True, slots=True)
class _CachedList(Generic[T]):
    """A complete list in the cache."""

    complete_list: CompleteList[T]
    read_at: float
    """When the list was read, in seconds of the cache's clock."""


class ListCache(Generic[T]):
    """Caches complete lists of one upstream and one kind (tags or referrers). The caller chooses the key of each
    list."""

    def __init__(self, upstream_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._upstream_name = upstream_name
        self._clock = clock
        self._running_reads: SingleFlight[CompleteList[T]] = SingleFlight()
        self._read_slots = asyncio.Semaphore(MAX_CONCURRENT_LISTS)
        self._cached: dict[str, _CachedList[T]] = {}
        """The cached lists by their keys. The list that was read longest ago comes first, and is evicted first."""
        self._cached_bytes = 0

    async def get(
        self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]], *, is_first_page: bool
    ) -> Sequence[T]:
        """Returns the items of the list `key`, from the cache or from `read`. `is_first_page`: whether the client has
        requested the first page. If so, a cached list that took only one upstream request is read again, because the
        list may have changed, and reading it costs little.

        Concurrent callers with the same key share one call of `read`. If a caller is cancelled, the call continues,
        unless all callers are cancelled before `read` has sent a request. Raises the errors of `read`, and
        UpstreamTimeout after LIST_TIMEOUT_SECONDS."""
        cached = self._cached.get(key)
        if (
            cached is not None
            and self._clock() - cached.read_at <= LIST_CACHED_SECONDS
            and (not is_first_page or cached.complete_list.request_count > 1)
        ):
            return cached.complete_list.items
        complete_list = await self._running_reads.run(key, lambda: self._read(key, read))
        return complete_list.items

    async def aclose(self) -> None:
        """Cancels running calls of `read`. Callers that wait for one get UpstreamUnavailable."""
        await self._running_reads.aclose()

    async def _read(self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]]) -> CompleteList[T]:
        """Reads the list, caches it and returns it. Evicts the lists that were read longest ago, until the cache is
        within LIST_CACHE_BYTES."""
        async with (
            time_limit(LIST_TIMEOUT_SECONDS, f"the upstream registry {self._upstream_name}"),
            hold_slot(self._read_slots),
        ):
            complete_list = await read()
        self._evict(key)
        self._cached[key] = _CachedList(complete_list, self._clock())
        self._cached_bytes += _size_bytes(key, complete_list)
        while self._cached_bytes > LIST_CACHE_BYTES and len(self._cached) > 1:
            self._evict(next(iter(self._cached)))
        return complete_list

    def _evict(self, key: str) -> None:
        """Removes the list `key` from the cache. Does nothing if the cache does not have it."""
        cached = self._cached.pop(key, None)
        if cached is not None:
            self._cached_bytes -= _size_bytes(key, cached.complete_list)


def _size_bytes(key: str, complete_list: CompleteList[T]) -> int:
    """Returns how much memory a cached list takes. This includes the key, which may be long: the key of a list of
    referrers contains the artifact type that the client requests."""
    return complete_list.size_bytes + sys.getsizeof(key) + LIST_OVERHEAD_BYTES


def cut_page(items: Sequence[T], sort_key: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Returns a page with at most `limit` items: those whose key follows `after`, or the first ones if `after` is None.
    `sort_key` returns an item's key. `items` must be sorted by these keys in byte order. `after` need not be the key of
    an item."""
    start = 0
    if after is not None:  # a client may send text that UTF-8 cannot encode
        start = bisect_right(items, after.encode(errors="surrogatepass"), key=lambda item: sort_key(item).encode())
    return Page(items[start : start + limit], len(items) > start + limit)

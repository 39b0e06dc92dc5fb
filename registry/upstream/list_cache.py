"""Cache of complete lists of an upstream (`ListCache`), and the cutting of a page out of a complete list (`cut_page`).

A client that pages through a list sends one request a page, but the upstream's list is read as a whole. The cache
serves the later pages of a client, and the same list for other clients, from one reading. One client request can cause
hundreds of upstream requests, so the cache also limits how many lists are read at a time.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from registry.single_flight import SingleFlight
from registry.upstream.request_limits import MIB, time_limit
from storage.content import Page

T = TypeVar("T")

LIST_TIMEOUT_SECONDS = 25.0
"""Time limit for reading all pages of a list, including the wait until fewer than MAX_CONCURRENT_LISTS are read."""
MAX_CONCURRENT_LISTS = 4
"""Lists of one kind (tags or referrers) that are read from one upstream at a time."""
LIST_CACHED_SECONDS = 30.0
"""Time for which a cached list is served: for the pages after the first, and for first pages if reading the list took
several upstream requests."""
LIST_CACHE_BYTES = 16 * MIB
"""Approximate limit of memory for cached lists of one kind. The list read last is cached even if it is larger."""
LIST_OVERHEAD_BYTES = 1024
"""Bytes added to the size of each cached list, so that empty lists count, too."""


@dataclass(frozen=True, slots=True)
class CompleteList(Generic[T]):
    """All items of a list, the number of upstream requests that reading it took, and its approximate size in memory."""

    items: Sequence[T]
    request_count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _CachedList(Generic[T]):
    """A complete list, and the clock's time when it was read."""

    complete: CompleteList[T]
    read_at: float


class ListCache(Generic[T]):
    """The complete lists of one upstream and one kind (tags or referrers), each under a key that its caller chooses."""

    def __init__(self, upstream_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._upstream_name = upstream_name
        self._clock = clock
        self._running_reads: SingleFlight[CompleteList[T]] = SingleFlight()
        self._read_slots = asyncio.Semaphore(MAX_CONCURRENT_LISTS)
        self._cached: dict[str, _CachedList[T]] = {}
        """By key. The list read first comes first, and is evicted first."""
        self._cached_bytes = 0

    async def get(
        self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]], *, is_first_page: bool
    ) -> Sequence[T]:
        """Returns the items of the list `key`, from the cache or from `read`. A request for the first page
        (`is_first_page`) reads a list of one upstream request again, because the list may have changed. Raises what
        `read` raises, and UpstreamTimeout. When the caller is cancelled, the reading continues for other callers."""
        cached = self._cached.get(key)
        if (
            cached is not None
            and self._clock() - cached.read_at <= LIST_CACHED_SECONDS
            and (not is_first_page or cached.complete.request_count > 1)
        ):
            return cached.complete.items
        complete = await self._running_reads.run(key, lambda: self._read(key, read))
        return complete.items

    async def aclose(self) -> None:
        """Cancels running readings."""
        await self._running_reads.aclose()

    async def _read(self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]]) -> CompleteList[T]:
        """Reads the list, caches it, and evicts the lists read first until the cache is within its limit."""
        async with time_limit(LIST_TIMEOUT_SECONDS, f"the upstream registry {self._upstream_name}"), self._read_slots:
            complete = await read()
        self._evict(key)
        self._cached[key] = _CachedList(complete, self._clock())
        self._cached_bytes += complete.size_bytes + LIST_OVERHEAD_BYTES
        while self._cached_bytes > LIST_CACHE_BYTES and len(self._cached) > 1:
            self._evict(next(iter(self._cached)))
        return complete

    def _evict(self, key: str) -> None:
        """Removes the list `key` from the cache if the cache has it."""
        cached = self._cached.pop(key, None)
        if cached is not None:
            self._cached_bytes -= cached.complete.size_bytes + LIST_OVERHEAD_BYTES


def cut_page(items: Sequence[T], sort_key: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Returns the page of at most `limit` items that follow the key `after`; None: from the first item. `items` must be
    sorted by `sort_key` in byte order. An `after` that is no item's key is allowed."""
    start = 0
    if after is not None:
        start = bisect_right(items, after.encode(errors="surrogatepass"), key=lambda item: sort_key(item).encode())
    return Page(items[start : start + limit], len(items) > start + limit)

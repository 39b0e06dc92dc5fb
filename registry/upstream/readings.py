"""Lists that are read whole: once for all who want the same one meanwhile, a few at a time, and kept for a moment.

One request of a client can make hundreds of requests upstream, so no client can make it do that as often as it likes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from registry.upstream.waiting import Flights, within

T = TypeVar("T")

READ_SECONDS = 25.0
"""For all pages of a list, and the wait for its turn."""
AT_ONCE = 4
"""Lists that are read at a time."""
KEPT_SECONDS = 30.0
"""For how long a list serves the pages after the first; and first pages, where reading it took several requests."""
KEPT_SIZE = 16 << 20
"""Bytes of memory for the lists that are kept, about. The last one is, whatever its size."""
ENTRY_SIZE = 1024
"""What an empty list counts for."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """A whole list: how many requests it took, and how many bytes of memory it takes, about."""

    items: Sequence[T]
    requests: int
    size: int


_NONE = (0.0, None)


class Readings(Generic[T]):
    """One upstream's lists of one sort."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._flights = Flights()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._kept: dict[str, tuple[float, Reading[T]]] = {}  # the one read last is last
        self._size = 0

    async def items(self, key: str, read: Callable[[], Coroutine[Any, Any, Reading[T]]], *, first: bool) -> Sequence[T]:
        """The list of that key. `first`: for a first page, which is asked for anew where that is one request, since
        somebody may just have added to it. Raises what `read` raises, and UpstreamTimeout. Cancelled: the reading goes
        on for the others."""
        read_at, kept = self._kept.get(key, _NONE)
        if kept is not None and self._clock() - read_at <= KEPT_SECONDS and (not first or kept.requests > 1):
            return kept.items
        reading: Reading[T] = await self._flights.share(key, lambda: self._read(key, read))
        return reading.items

    async def aclose(self) -> None:
        """Ends what is being read."""
        await self._flights.aclose()

    async def _read(self, key: str, read: Callable[[], Coroutine[Any, Any, Reading[T]]]) -> Reading[T]:
        async with within(READ_SECONDS, f"the upstream registry {self._name}"), self._turns:
            reading = await read()
        self._forget(key)
        self._kept[key] = self._clock(), reading
        self._size += reading.size + ENTRY_SIZE
        while self._size > KEPT_SIZE and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))
        return reading

    def _forget(self, key: str) -> None:
        _, kept = self._kept.pop(key, _NONE)
        if kept is not None:
            self._size -= kept.size + ENTRY_SIZE

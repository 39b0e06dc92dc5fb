"""A document of another service that this process fetches when it is needed, and caches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from registry.single_flight import SingleFlight

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """How long a document counts, in seconds.

    - `fresh`: from this age on it is fetched again while it is being used.
    - `stale`: after this age it is not used any more.
    - `retry`: the pause after a fetch that failed.
    - `pause`: the pause after a fetch that succeeded.
    """

    fresh: float
    stale: float
    retry: float
    pause: float


class FetchedDocument(Generic[T]):
    """Fetches a document with one request at a time. `fetch` returns the document, or None if it failed; it raises
    nothing. `clock` is monotonic, in seconds. Making one contacts nobody."""

    def __init__(self, fetch: Callable[[], Awaitable[T | None]], times: FetchTimes, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._times = times
        self._clock = clock
        self._document: T | None = None
        self._fetched_at = -times.stale
        self._next_fetch = -times.stale
        self._flights = SingleFlight[None]()
        self._closed = False

    @property
    def current(self) -> T | None:
        """The document, or None if there is none or it is stale."""
        return self._document if self._age <= self._times.stale else None

    @property
    def is_fresh(self) -> bool:
        return self._age < self._times.fresh

    async def refresh(self) -> None:
        """Fetches the document, or waits for a fetch that is under way. Does nothing during a pause or after `aclose`.
        Cancelled: the fetch goes on."""
        if self._is_due:
            await self._flights.settle(None, self._run)

    def start_refresh(self) -> None:
        """Does what `refresh` does, without waiting."""
        if self._is_due:
            self._flights.start(None, self._run)

    async def aclose(self) -> None:
        """Cancels a fetch that is under way, and allows no further one."""
        self._closed = True
        await self._flights.aclose()

    @property
    def _age(self) -> float:
        return self._clock() - self._fetched_at

    @property
    def _is_due(self) -> bool:
        return not self._closed and (len(self._flights) > 0 or self._clock() >= self._next_fetch)

    async def _run(self) -> None:
        pause = self._times.retry
        try:
            document = await self._fetch()
            if document is not None:
                self._document, self._fetched_at, pause = document, self._clock(), self._times.pause
        finally:
            self._next_fetch = self._clock() + pause

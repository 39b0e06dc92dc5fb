"""A cached document of another service, such as the keys of a token issuer. It is fetched when it is first needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from registry.single_flight import SingleFlight

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """When a document is fetched again, and how long it is used. All values are in seconds.

    - `refresh_age`: from this age on, the document should be fetched again, but may still be used.
    - `max_age`: above this age, the document is not used any more.
    - `pause_after_failure`: the shortest time between a failed fetch and the next fetch.
    - `pause_after_success`: the shortest time between a successful fetch and the next fetch.
    """

    refresh_age: float
    max_age: float
    pause_after_failure: float
    pause_after_success: float


class FetchedDocument(Generic[T]):
    """A document that is fetched with one request at a time. The constructor fetches nothing.

    `fetch` must return the document, or None after a failure, and raise nothing. `clock` returns monotonic seconds.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T | None]], times: FetchTimes, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._times = times
        self._clock = clock
        self._document: T | None = None
        # Before the first fetch, the age is at least `max_age`, and no pause applies.
        self._fetched_at = -times.max_age
        self._next_fetch_at = -times.max_age
        self._fetches = SingleFlight[None]()
        self._closed = False

    @property
    def current(self) -> T | None:
        """The document, or None if none was fetched or it is too old."""
        return self._document if self._age <= self._times.max_age else None

    @property
    def is_fresh(self) -> bool:
        """Whether the document is so new that it need not be fetched again."""
        return self._age < self._times.refresh_age

    async def refresh(self) -> None:
        """Fetches the document and waits for the end of the fetch, or of the fetch that already runs. Does nothing
        during the pause after a fetch, or after `aclose`. If the caller is cancelled, the fetch continues."""
        if self._may_fetch:
            await self._fetches.settle(None, self._run)

    def start_refresh(self) -> None:
        """Starts a fetch like `refresh`, but does not wait for its end."""
        if self._may_fetch:
            self._fetches.start(None, self._run)

    async def aclose(self) -> None:
        """Cancels a running fetch. No fetch starts afterwards."""
        self._closed = True
        await self._fetches.aclose()

    @property
    def _age(self) -> float:
        return self._clock() - self._fetched_at

    @property
    def _may_fetch(self) -> bool:
        """Whether a fetch is running, or one may start now."""
        return not self._closed and (len(self._fetches) > 0 or self._clock() >= self._next_fetch_at)

    async def _run(self) -> None:
        pause = self._times.pause_after_failure
        try:
            document = await self._fetch()
            if document is not None:
                self._document, self._fetched_at, pause = document, self._clock(), self._times.pause_after_success
        finally:
            self._next_fetch_at = self._clock() + pause

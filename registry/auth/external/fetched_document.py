"""`FetchedDocument`: a cached document of another service, such as the public keys of a token issuer.

The document is fetched only when a caller calls `refresh` or `start_refresh`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from registry.single_flight import SingleFlight

T = TypeVar("T")

_FETCH_KEY: Final = "fetch"
"""The only key in `FetchedDocument._fetches`, which runs at most one task for each key, so at most one fetch runs."""


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """The times that control when a document is fetched again, and how long it may be used. All values are in seconds.
    The age of a document is the time since it was fetched.

    - `refresh_age`: a document of this age or older should be fetched again. The old document may be used until the
      fetch succeeds.
    - `max_age`: a document older than this must not be used.
    - `pause_after_failure`: the shortest time from the end of a failed fetch to the start of the next fetch.
    - `pause_after_success`: the shortest time from the end of a successful fetch to the start of the next fetch.
    """

    refresh_age: float
    max_age: float
    pause_after_failure: float
    pause_after_success: float


class FetchedDocument(Generic[T]):
    """A document that `fetch` gets from another service. Concurrent callers of `refresh` share one fetch.

    `fetch` must return the document, or None after a failure. It must not raise errors. `clock` returns monotonic
    seconds.
    """

    def __init__(self, fetch: Callable[[], Awaitable[T | None]], times: FetchTimes, clock: Callable[[], float]) -> None:
        self._fetch = fetch
        self._times = times
        self._clock = clock
        self._document: T | None = None
        # Both times are in the past, so that `is_fresh` is False at first, and no pause delays the first fetch.
        self._fetched_at = -times.max_age
        self._next_fetch_at = -times.max_age
        self.last_fetch_failed = False
        """True if the last completed fetch returned no document."""
        self._fetches = SingleFlight[None]()
        self._closed = False

    @property
    def current(self) -> T | None:
        """The document of the last successful fetch. None if no fetch has succeeded, or if the document is older than
        `max_age`."""
        return self._document if self._age <= self._times.max_age else None

    @property
    def is_fresh(self) -> bool:
        """Whether the document is younger than `refresh_age`, so that it need not be fetched again."""
        return self._age < self._times.refresh_age

    async def refresh(self) -> None:
        """Fetches the document and waits until the fetch has ended. If a fetch is running already, waits for the
        running fetch and starts none. Does nothing during the pause after a fetch, or after `aclose`. If the caller is
        cancelled, the fetch continues."""
        if self._can_refresh:
            await self._fetches.settle(_FETCH_KEY, work=self._fetch_and_store)

    def start_refresh(self) -> None:
        """Starts a fetch as `refresh` does, but does not wait until the fetch has ended."""
        if self._can_refresh:
            self._fetches.start(_FETCH_KEY, work=self._fetch_and_store)

    async def aclose(self) -> None:
        """Cancels a running fetch and waits until it has ended. No fetch starts afterwards."""
        self._closed = True
        await self._fetches.aclose()

    @property
    def _age(self) -> float:
        return self._clock() - self._fetched_at

    @property
    def _can_refresh(self) -> bool:
        """Whether `refresh` can join a running fetch, or start one now. False after `aclose`."""
        return not self._closed and (len(self._fetches) > 0 or self._clock() >= self._next_fetch_at)

    async def _fetch_and_store(self) -> None:
        """Fetches the document once, stores it after a success, and starts the pause until the next fetch."""
        pause = self._times.pause_after_failure
        try:
            document = await self._fetch()
            self.last_fetch_failed = document is None
            if document is not None:
                self._document, self._fetched_at, pause = document, self._clock(), self._times.pause_after_success
        finally:
            self._next_fetch_at = self._clock() + pause

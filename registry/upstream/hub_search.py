"""Passes searches on to an upstream that has a search of its own, such as Docker Hub (`UpstreamSearch`).

The search is that of Docker's first API: `GET /v1/search?q=&n=&page=`. Answers are cached. If the upstream does not
answer, a search waits at most `TIMEOUT_SECONDS`. After that, no search is passed on for `PAUSE_SECONDS`. A search that
fails only because too many others run does not cause this pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from registry.config import Upstream
from registry.memory_budget import MIB, MemoryBudget
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.destinations import AddressPolicy
from registry.upstream.transport import OutboundProxies, TrustStore
from storage.errors import RegistryError, UpstreamUnavailable
from storage.json_bounds import load_bounded
from storage.names import MAX_NAME_LENGTH

TIMEOUT_SECONDS: Final = 3.0
"""Longest time for which a search waits for the upstream."""
PAUSE_SECONDS: Final = 30.0
"""Time after a failed search for which no search is passed on."""
CACHED_SECONDS: Final = 600.0
MAX_CACHED: Final = 256
"""How long an answer is used again, and the number of answers that a process keeps."""
MAX_AT_ONCE: Final = 2
"""Largest number of searches that a process passes on at the same time. Others wait for their turn, at most
`TIMEOUT_SECONDS`, and find nothing if it does not come."""
MAX_WAITING: Final = 20
"""Number of searches that may wait. Further searches find nothing, without waiting."""
REFUSED_SEARCHES: Final = frozenset({400, 414, 422})
"""Statuses by which an upstream refuses one search. They do not mean that the search of the upstream does not work."""
MAX_BYTES: Final = MIB
"""Largest answer in bytes."""
MAX_DESCRIPTION: Final = 300
"""Largest number of characters of a description. A longer one is cut."""
log = logging.getLogger("registry.upstream")


@dataclass(frozen=True, slots=True)
class UpstreamResult:
    """A repository that the upstream has found. `name`: as the upstream writes it, not checked."""

    name: str
    description: str
    stars: int
    is_official: bool


class UpstreamSearch:
    """The search of one upstream. Used from one event loop."""

    def __init__(self, upstream: Upstream, api: ApiClient, clock: Callable[[], float]) -> None:
        """`upstream`: its setting `search` is the URL of the search. `api` sends the requests, and `aclose` closes it.
        `clock` returns seconds, and never goes back."""
        assert upstream.search is not None
        self.upstream = upstream.name
        self._url = upstream.search
        self._api = api
        self._clock = clock
        self._running: SingleFlight[Sequence[UpstreamResult]] = SingleFlight()
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._waiting = 0
        self._cached: dict[tuple[str, int, int], tuple[float, Sequence[UpstreamResult]]] = {}
        """By the arguments of `find`, oldest first: until when the answer is used, and the answer."""
        self._paused_until = 0.0

    async def find(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Returns a page of what the upstream finds for `text`; nothing if it does not answer, or not in time. The
        first `page` is 1. Raises nothing. A cancellation does not stop the request, whose answer is cached."""
        key = text, count, page
        until, results = self._cached.get(key, (0.0, ()))
        if self._clock() < until:
            return results
        if self._clock() < self._paused_until:
            return ()
        try:
            return await self._running.run(key, lambda: self._ask(text, count, page))
        except RegistryError:
            return ()

    async def _ask(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Asks the upstream when it is this search's turn, and caches the answer. Raises UpstreamUnavailable if the
        upstream fails, after which all searches pause, or if the turn does not come."""
        await self._take_slot()
        try:
            if self._clock() < self._paused_until:
                raise UpstreamUnavailable(f"the search of {self.upstream} does not work")
            results = await self._send(text, count, page)
        finally:
            self._slots.release()
        self._cached.pop((text, count, page), None)
        self._cached[text, count, page] = self._clock() + CACHED_SECONDS, results
        if len(self._cached) > MAX_CACHED:
            del self._cached[next(iter(self._cached))]
        return results

    async def _take_slot(self) -> None:
        """Waits for the turn of a search. Raises UpstreamUnavailable if the turn does not come in time, or if too many
        searches wait."""
        if self._waiting < MAX_WAITING:
            self._waiting += 1
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    await self._slots.acquire()
                    return
            except TimeoutError:
                pass
            finally:
                self._waiting -= 1
        raise UpstreamUnavailable(f"too many searches are passed on to {self.upstream}")

    async def _send(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Returns what the upstream answers. After a failure, makes all searches pause and raises
        UpstreamUnavailable."""
        query = urlencode({"q": text, "n": count, "page": page})
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                response = await self._api.send(
                    "GET", f"{self._url}?{query}", {"accept": "application/json"}, max_bytes=MAX_BYTES
                )
            if response.status in REFUSED_SEARCHES:
                return ()
            if response.status != 200:
                raise UpstreamUnavailable(f"it answers {response.status}")
            return _results(response.body)
        except (TimeoutError, RegistryError, ValueError, RecursionError) as error:
            if self._clock() >= self._paused_until:
                log.warning(
                    "the search of %s does not work: %s", self.upstream, str(error) or "it does not answer in time"
                )
            self._paused_until = self._clock() + PAUSE_SECONDS
            raise UpstreamUnavailable(f"the search of {self.upstream} does not work") from None

    async def aclose(self) -> None:
        """Ends the running searches, which then find nothing, and closes the connections."""
        await self._running.aclose()
        await self._api.aclose()


def open_upstream_search(upstream: Upstream, clock: Callable[[], float]) -> UpstreamSearch:
    """Returns the search of an upstream. Makes no connection yet. The caller closes it."""
    api = ApiClient(
        upstream,
        OutboundProxies(),
        TrustStore(upstream.ca_file),
        AddressPolicy(upstream.name),
        MemoryBudget(4 * MAX_BYTES, f"searches of {upstream.name}"),
    )
    return UpstreamSearch(upstream, api, clock)


def _results(body: bytes) -> list[UpstreamResult]:
    """Returns the results in an answer. Raises ValueError or RecursionError if the answer has no list of results."""
    document = load_bounded(body)
    entries = document.get("results") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it answers with something that is no list of results")
    return [_result(entry) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]


def _result(entry: dict[str, Any]) -> UpstreamResult:
    description, stars = entry.get("description"), entry.get("star_count")
    return UpstreamResult(
        name=entry["name"][: MAX_NAME_LENGTH + 1],
        description=description[:MAX_DESCRIPTION] if isinstance(description, str) else "",
        stars=stars if isinstance(stars, int) and 0 <= stars < 2**31 else 0,
        is_official=entry.get("is_official") is True,
    )

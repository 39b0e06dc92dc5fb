"""Sends searches to an upstream registry that has a search API, such as Docker Hub (`UpstreamSearch`).

The search API is that of Docker's first registry API: `GET /v1/search?q=&n=&page=`. Answers are cached. After the
upstream has failed to answer a search, the process sends it no search for `PAUSE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from registry.config import Upstream
from registry.memory_budget import MIB, MemoryBudget
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.destinations import AddressPolicy
from registry.upstream.sized_cache import SizedCache
from registry.upstream.transport import OutboundProxies, TrustStore
from registry.upstream.upstream_responses import DocumentParser
from storage.errors import RegistryError, UpstreamUnavailable
from storage.json_bounds import load_bounded
from storage.names import MAX_NAME_LENGTH

TIMEOUT_SECONDS: Final = 3.0
"""Longest time for which a search waits for a *slot* (`MAX_CONCURRENT_SEARCHES`). After it has got a slot, the search
waits at most the same time for the upstream's answer."""
PAUSE_SECONDS: Final = 30.0
"""After a failed search, the process sends no search to the upstream for this time."""
CACHED_SECONDS: Final = 600.0
"""Time for which a cached answer is used."""
MAX_CACHED_ANSWERS: Final = 256
"""Largest number of answers of one upstream that a process caches."""
MAX_CACHED_BYTES: Final = 4 * MIB
"""Largest total size of the answers of one upstream that a process caches. A usual answer has about 5 KiB. An answer
with the longest texts has about 250 KiB."""
MAX_CONCURRENT_SEARCHES: Final = 2
"""Number of slots: a process sends at most this many searches to one upstream at the same time. A search that gets no
slot within `TIMEOUT_SECONDS` returns no results."""
MAX_WAITING_SEARCHES: Final = 20
"""Largest number of searches that may wait for a slot. Further searches return no results at once."""
REFUSAL_STATUSES: Final = frozenset({400, 414, 422})
"""Statuses with which an upstream refuses one search. The search then has no results, and causes no pause."""
MAX_ANSWER_BYTES: Final = MIB
"""Largest size of an upstream's answer, in bytes. A larger answer counts as a failure."""
MAX_DESCRIPTION_LENGTH: Final = 300
"""A longer description is cut to this number of characters."""
log = logging.getLogger("registry.upstream")


@dataclass(frozen=True, slots=True)
class UpstreamResult:
    """A repository that the upstream has found. `name`: the name of the repository at the upstream; may be invalid."""

    name: str
    description: str
    stars: int
    is_official: bool


class UpstreamSearch:
    """The search of one upstream. An instance may be used from one event loop only."""

    def __init__(self, upstream: Upstream, api: ApiClient, clock: Callable[[], float]) -> None:
        """The setting `search` of `upstream` is the URL of the search. `api` sends the requests; `aclose`
        closes it. `clock` returns seconds, and never goes back."""
        assert upstream.search is not None
        self.upstream_name = upstream.name
        self._url = upstream.search
        self._api = api
        self._clock = clock
        self._running: SingleFlight[Sequence[UpstreamResult]] = SingleFlight()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_SEARCHES)
        self._waiting_count = 0
        self._parser = DocumentParser()
        self._cached: SizedCache[tuple[str, int, int], tuple[float, Sequence[UpstreamResult]]] = SizedCache(
            MAX_CACHED_ANSWERS, MAX_CACHED_BYTES
        )
        """Maps the arguments of `find` to a pair: the time until which the answer is used, and the answer."""
        self._paused_until = 0.0

    async def find(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Returns a page of at most `count` repositories that the upstream finds for `text`. Returns an empty page if
        the search fails, or is not sent because of a pause or too many other searches. `page`: the number of the page,
        from 1. Raises no errors. If the caller is cancelled, the search continues, and its answer is cached."""
        cached = self.find_cached(text, count, page)
        if cached is not None:
            return cached
        if self._clock() < self._paused_until:
            return ()
        try:
            return await self._running.run((text, count, page), lambda: self._ask(text, count, page))
        except RegistryError:
            return ()

    def find_cached(self, text: str, count: int, page: int) -> Sequence[UpstreamResult] | None:
        """Returns the page for these arguments of `find` if it is cached; otherwise None."""
        cached = self._cached.get((text, count, page))
        return cached[1] if cached is not None and self._clock() < cached[0] else None

    async def _ask(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Waits for a slot, asks the upstream, and caches the answer. Raises UpstreamUnavailable if the search gets no
        slot, if searches are paused, or if the upstream fails."""
        await self._take_slot()
        try:
            if self._clock() < self._paused_until:
                raise UpstreamUnavailable(f"the search of {self.upstream_name} does not work")
            results = await self._send(text, count, page)
        finally:
            self._slots.release()
        answer = self._clock() + CACHED_SECONDS, results
        self._cached.put((text, count, page), answer, sys.getsizeof(text) + sum(map(_size_bytes, results)))
        return results

    async def _take_slot(self) -> None:
        """Waits for a slot and takes it. The caller must release the slot. Raises UpstreamUnavailable if no slot
        becomes free in time, or if too many searches wait already."""
        if self._waiting_count < MAX_WAITING_SEARCHES:
            self._waiting_count += 1
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    await self._slots.acquire()
                    return
            except TimeoutError:
                pass
            finally:
                self._waiting_count -= 1
        raise UpstreamUnavailable(f"too many searches are sent to {self.upstream_name}")

    async def _send(self, text: str, count: int, page: int) -> Sequence[UpstreamResult]:
        """Sends a search to the upstream, and returns the results; none if the upstream refuses this search. If the
        upstream fails, starts a pause of all searches and raises UpstreamUnavailable."""
        query = urlencode({"q": text, "n": count, "page": page})
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                response = await self._api.send(
                    "GET", f"{self._url}?{query}", {"accept": "application/json"}, max_bytes=MAX_ANSWER_BYTES
                )
            if response.status in REFUSAL_STATUSES:
                return ()
            if response.status != 200:
                raise UpstreamUnavailable(f"it answers {response.status}")
            return await self._parser.run(len(response.body), lambda: _parse_results(response.body, count))
        except (TimeoutError, RegistryError, ValueError, RecursionError) as error:
            if self._clock() >= self._paused_until:
                log.warning(
                    "the search of %s does not work: %s", self.upstream_name, str(error) or "it does not answer in time"
                )
            self._paused_until = self._clock() + PAUSE_SECONDS
            raise UpstreamUnavailable(f"the search of {self.upstream_name} does not work") from None

    async def aclose(self) -> None:
        """Ends the running searches, and closes the connections. The ended searches return no results."""
        await self._running.aclose()
        await self._api.aclose()


def open_upstream_search(upstream: Upstream, clock: Callable[[], float]) -> UpstreamSearch:
    """Returns the search of an upstream. Opens no connection. The caller must call `aclose`."""
    api = ApiClient(
        upstream,
        OutboundProxies(),
        TrustStore(upstream.ca_file),
        AddressPolicy(upstream.name),
        MemoryBudget(4 * MAX_ANSWER_BYTES, f"searches of {upstream.name}"),
    )
    return UpstreamSearch(upstream, api, clock)


def _parse_results(body: bytes, count: int) -> list[UpstreamResult]:
    """Returns the first `count` results in the body of an answer, which may have more. Raises ValueError or
    RecursionError if the body has no list of results."""
    document = load_bounded(body)
    entries = document.get("results") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it answers with something that is no list of results")
    named = (entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str))
    return [_parse_entry(entry) for entry in islice(named, count)]


def _parse_entry(entry: dict[str, Any]) -> UpstreamResult:
    description, stars = entry.get("description"), entry.get("star_count")
    return UpstreamResult(
        # A name that is too long is cut, but keeps one character more than a valid name can have. So it stays invalid.
        name=entry["name"][: MAX_NAME_LENGTH + 1],
        description=description[:MAX_DESCRIPTION_LENGTH] if isinstance(description, str) else "",
        stars=stars if isinstance(stars, int) and 0 <= stars < 2**31 else 0,
        is_official=entry.get("is_official") is True,
    )


def _size_bytes(result: UpstreamResult) -> int:
    """Returns the size of a result in memory."""
    return sum(map(sys.getsizeof, (result, result.name, result.description, result.stars)))

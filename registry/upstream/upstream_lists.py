"""Lists of an upstream: tags, and referrers by the API or by the fallback tag.

Registries sort and page their lists in different ways (some by collation, some not at all). Ours are in byte order and
complete, so a list is read whole and cut into pages here. `ListCache` reads a list once for all clients, a few lists at
a time, and keeps it for a moment, so a client that pages through gets all pages from one reading. One client request
can cause hundreds of upstream requests; the cache bounds how often.
"""

from __future__ import annotations

import asyncio
import heapq
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from registry.memory_budget import MemoryBudget, ShareScope
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UnconfirmedNameUnknown
from registry.single_flight import SingleFlight
from registry.upstream.destinations import MAX_URL_LENGTH, loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.quota import RequestKind
from registry.upstream.request_limits import MIB, time_limit
from registry.upstream.requester import UpstreamRequester
from registry.upstream.upstream_responses import DocumentParser, UpstreamResponse
from storage.content import OCI_INDEX, Descriptor, Page
from storage.errors import ManifestUnknown, NameUnknown, TagInvalid, UpstreamUnavailable
from storage.json_bounds import Bounds, OutOfBounds, load_bounded
from storage.names import Digest, RepositoryName, Tag

TAGS_PER_PAGE = 1000
"""Tags per requested page; CNCF Distribution refuses more."""
MAX_PAGE_SIZE = 8 * MIB
"""Largest page, in bytes."""
MAX_LIST_SIZE = 24 * MIB
"""Largest list, in bytes of memory."""
TAG_SIZE, DESCRIPTOR_SIZE = 128, 1024
"""Bytes of memory that a tag and a descriptor take beside their text."""
SORTED_AT_ONCE = 10_000
"""Tags sorted in one call, during which no other thread runs."""
TAG_PAGE_BOUNDS = Bounds(values=300_000, escapes=100_000)
"""Bounds of a page of tags: some registries send all tags in one page."""

_NO_REFERRERS = frozenset({400, 404, 405, 406, 501})
"""Statuses of registries without a referrers API."""


class UpstreamLists:
    """The lists of one upstream."""

    def __init__(self, name: str, requester: UpstreamRequester, parser: DocumentParser, memory: MemoryBudget) -> None:
        self._requester = requester
        self._parser = parser
        self._memory = memory
        self._tags: ListCache[Tag] = ListCache(name)
        self._referrers: ListCache[Descriptor] = ListCache(name)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """See `UpstreamClient.tags`."""

        async def read() -> CompleteList[Tag]:
            return await self._requester.try_endpoints(
                lambda endpoint, attempt: self._all_tags(endpoint, attempt, repo),
                repo,
                RequestKind.LIST,
                seconds=LIST_TIMEOUT_SECONDS,
            )

        return cut_page(await self._tags.get(repo, read, first=after is None), str, after, limit)

    async def aclose(self) -> None:
        """Cancels running readings."""
        await self._tags.aclose()
        await self._referrers.aclose()

    async def _all_tags(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, repo: RepositoryName
    ) -> CompleteList[Tag]:
        found: set[Tag] = set()
        path = f"tags/list?n={TAGS_PER_PAGE}"
        last: UpstreamResponse | None = None
        with closing(_ListMemory(self._memory)) as room:
            for page in range(MAX_PAGES):
                with ShareScope() as memory:
                    answer = await self._tags_page(endpoint, attempt, repo, path, last, memory)
                    tags = await self._parser.run(len(answer.body), partial(_parse_tags, answer))
                    await room.take(answer, len(tags) * TAG_SIZE)
                found.update(tags)
                following = next_page(answer.headers, answer.url) if not answer.is_foreign else None
                if following is None:
                    return CompleteList(await self._sorted(found), page + 1, room.taken)
                path, last = following, replace(answer, body=b"")
        raise UpstreamUnavailable(f"the list of tags of {loggable_origin(endpoint.url)} does not end")

    async def _tags_page(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        path: str,
        last: UpstreamResponse | None,
        memory: ShareScope,
    ) -> UpstreamResponse:
        answer = await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.LIST, "GET", path, NameUnknown()),
            most=MAX_PAGE_SIZE,
            accepted=(400,),
            after=last,
            memory=memory,
        )
        if answer.status != 400:
            return answer
        # The registry does not accept our `n`.
        return await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.LIST, "GET", "tags/list", NameUnknown()),
            most=MAX_PAGE_SIZE,
            memory=memory,
        )

    async def _sorted(self, found: set[Tag]) -> list[Tag]:
        if len(found) <= SORTED_AT_ONCE:
            return sorted(found)
        return await self._parser.run(TAG_SIZE * len(found), lambda: _sorted_in_parts(list(found)))

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """See `UpstreamClient.referrers`."""

        async def read() -> CompleteList[Descriptor]:
            return await self._requester.try_endpoints(
                lambda endpoint, attempt: self._all_referrers(endpoint, attempt, repo, subject, artifact_type),
                repo,
                RequestKind.LIST,
                seconds=LIST_TIMEOUT_SECONDS,
            )

        key = f"{repo} {subject} {artifact_type or ''}"
        try:
            found = await self._referrers.get(key, read, first=after is None)
        except (UnconfirmedNameUnknown, UnconfirmedManifestUnknown):
            raise UnconfirmedNameUnknown from None  # there may be cached referrers to list
        except (NameUnknown, ManifestUnknown):
            return Page([])
        return cut_page(found, lambda each: each.digest, after, limit)

    async def _all_referrers(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        subject: Digest,
        artifact_type: str | None,
    ) -> CompleteList[Descriptor]:
        query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
        path = f"referrers/{subject}{query}"
        found: dict[Digest, Descriptor] = {}
        last: UpstreamResponse | None = None
        with closing(_ListMemory(self._memory)) as room:
            for page in range(MAX_PAGES):
                with ShareScope() as memory:
                    answer = await self._referrers_page(endpoint, attempt, repo, path, last, memory)
                    if answer.status in _NO_REFERRERS:
                        held = _of_type(await self._by_tag(endpoint, attempt, repo, subject, memory), artifact_type)
                        return CompleteList(
                            held, 1, DESCRIPTOR_SIZE * len(held)
                        )  # falls back on the first page only, so at most one list is in memory
                    listed = await self._parser.descriptors(answer)
                    await room.take(answer, len(listed) * DESCRIPTOR_SIZE)
                filtered = "artifacttype" in answer.headers.get("oci-filters-applied", "").lower()
                for each in _of_type(listed, None if filtered else artifact_type):
                    found.setdefault(each.digest, each)
                following = next_page(answer.headers, answer.url) if not answer.is_foreign else None
                if following is None:
                    ordered = sorted(found.values(), key=lambda each: each.digest)
                    return CompleteList(ordered, page + 1, room.taken)
                path, last = following, replace(answer, body=b"")
        raise UpstreamUnavailable(f"the list of referrers of {loggable_origin(endpoint.url)} does not end")

    async def _referrers_page(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        path: str,
        last: UpstreamResponse | None,
        memory: ShareScope,
    ) -> UpstreamResponse:
        return await self._requester.request(
            endpoint,
            attempt,
            repo,
            RequestKind.LIST,
            "GET",
            path,
            NameUnknown(),
            headers={"Accept": OCI_INDEX},
            most=MAX_PAGE_SIZE,
            accepted=_NO_REFERRERS if last is None else (),
            after=last,
            memory=memory,
        )

    async def _by_tag(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        subject: Digest,
        memory: ShareScope,
    ) -> Sequence[Descriptor]:
        """Returns the referrers listed under the fallback tag (OCI distribution spec, "Referrers Tag Schema"): an index
        named after the digest."""
        tag = f"{subject.algorithm[:32]}-{subject.encoded[:64]}"
        answer = await self._requester.request(
            endpoint,
            attempt,
            repo,
            RequestKind.MANIFEST,
            "GET",
            f"manifests/{tag}",
            ManifestUnknown(),
            headers={"Accept": OCI_INDEX},
            most=MAX_PAGE_SIZE,
            memory=memory,
        )
        unique = {each.digest: each for each in await self._parser.descriptors(answer)}
        return [unique[digest] for digest in sorted(unique)]


class _ListMemory:
    """The memory of one list while it is read."""

    def __init__(self, memory: MemoryBudget) -> None:
        self._share = memory.share()

    @property
    def taken(self) -> int:
        return self._share.size

    async def take(self, answer: UpstreamResponse, entries: int) -> None:
        """Counts a page: its text, and `entries` bytes for its entries. Raises UpstreamUnavailable, TooManyRequests."""
        size = len(answer.body) + entries
        if self._share.size + size > MAX_LIST_SIZE:
            raise UpstreamUnavailable(
                f"{loggable_origin(answer.url)} answers with a list of more than {MAX_LIST_SIZE} bytes"
            )
        await self._share.grow(size)

    def close(self) -> None:
        self._share.close()


def _sorted_in_parts(tags: list[Tag]) -> list[Tag]:
    """Returns the tags sorted, in several short calls, so that other threads run in between."""
    parts = [sorted(tags[at : at + SORTED_AT_ONCE]) for at in range(0, len(tags), SORTED_AT_ONCE)]
    return list(heapq.merge(*parts))


def _of_type(found: Sequence[Descriptor], artifact_type: str | None) -> list[Descriptor]:
    return [each for each in found if artifact_type is None or each.artifact_type == artifact_type]


def _parse_tags(answer: UpstreamResponse) -> list[Tag]:
    try:
        document = load_bounded(answer.body, TAG_PAGE_BOUNDS)
        texts = (document.get("tags") or []) if isinstance(document, dict) else None
        if not isinstance(texts, list):
            raise ValueError
    except OutOfBounds as error:
        raise UpstreamUnavailable(
            f"{loggable_origin(answer.url)} answers with a list that is too large: {error}"
        ) from None
    except (ValueError, RecursionError):
        raise UpstreamUnavailable(
            f"{loggable_origin(answer.url)} answers with something that is no list of tags"
        ) from None
    found = []
    for text in texts:
        try:
            found.append(Tag(text))
        except (TagInvalid, TypeError):
            continue  # not a valid tag, so no client could request it
    return found


T = TypeVar("T")

MAX_PAGES = 500
"""Pages read for one list."""

_LINK = re.compile(r"<([^<>]*)>((?:[^<\"]|\"[^\"]*\")*)")
_REL = re.compile(r";\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,]+))", re.IGNORECASE)


def next_page(headers: Mapping[str, str], url: str) -> str | None:
    """Returns the URL of the next page; None: that was the last one. The URL is always on the origin of `url`: a
    registry behind a proxy may name another one, which must not get the token. Raises UpstreamUnavailable if the field
    is too long."""
    if len(headers.get("link", "")) > MAX_URL_LENGTH:
        raise UpstreamUnavailable(
            f"{loggable_origin(url)} answers with a Link of more than {MAX_URL_LENGTH} characters"
        )
    for link in _LINK.finditer(headers.get("link", "")):
        relation = _REL.search(link[2])
        if relation is None or "next" not in (relation[1] or relation[2] or "").lower().split():
            continue
        base = urlsplit(url)
        try:
            found = urlsplit(urljoin(url, link[1].strip()))
        except ValueError:
            return None
        return f"{base.scheme}://{base.netloc}{found.path}" + (f"?{found.query}" if found.query else "")
    return None


def cut_page(items: Sequence[T], key: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """Returns the page strictly after `after` of items sorted by `key`, in byte order."""
    start = 0
    if after is not None:
        start = bisect_right(items, after.encode(errors="surrogatepass"), key=lambda item: key(item).encode())
    return Page(items[start : start + limit], len(items) > start + limit)


LIST_TIMEOUT_SECONDS = 25.0
"""Time limit for all pages of a list, including the wait for a slot."""
LISTS_AT_ONCE = 4
"""Lists read at a time."""
LIST_CACHED_SECONDS = 30.0
"""Time for which a list serves the pages after the first; also first pages, if reading the list took several
requests."""
LIST_CACHE_SIZE = 16 << 20
"""Bytes of memory for cached lists, about. The last list is cached whatever its size."""
LIST_OVERHEAD = 1024
"""Bytes that an empty list counts for."""


@dataclass(frozen=True, slots=True)
class CompleteList(Generic[T]):
    """A whole list: its items, the requests it took, and the bytes of memory it takes, about."""

    items: Sequence[T]
    requests: int
    size: int


_NOT_CACHED = (0.0, None)


class ListCache(Generic[T]):
    """The lists of one upstream and one kind."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._flights: SingleFlight[CompleteList[T]] = SingleFlight()
        self._slots = asyncio.Semaphore(LISTS_AT_ONCE)
        self._kept: dict[str, tuple[float, CompleteList[T]]] = {}
        """Lists with the time they were read; the last one read is last."""
        self._size = 0

    async def get(
        self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]], *, first: bool
    ) -> Sequence[T]:
        """Returns the list for `key`. `first`: for a first page, which is read again if that is one request, since the
        list may have changed. Raises what `read` raises, and UpstreamTimeout. When the caller is cancelled, the reading
        goes on for others."""
        read_at, kept = self._kept.get(key, _NOT_CACHED)
        if kept is not None and self._clock() - read_at <= LIST_CACHED_SECONDS and (not first or kept.requests > 1):
            return kept.items
        reading = await self._flights.run(key, lambda: self._read(key, read))
        return reading.items

    async def aclose(self) -> None:
        """Cancels running readings."""
        await self._flights.aclose()

    async def _read(self, key: str, read: Callable[[], Coroutine[Any, Any, CompleteList[T]]]) -> CompleteList[T]:
        async with time_limit(LIST_TIMEOUT_SECONDS, f"the upstream registry {self._name}"), self._slots:
            reading = await read()
        self._forget(key)
        self._kept[key] = self._clock(), reading
        self._size += reading.size + LIST_OVERHEAD
        while self._size > LIST_CACHE_SIZE and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))
        return reading

    def _forget(self, key: str) -> None:
        _, kept = self._kept.pop(key, _NOT_CACHED)
        if kept is not None:
            self._size -= kept.size + LIST_OVERHEAD

"""Reads lists from an upstream (`UpstreamLists`): the tags of a repository, and the referrers of a manifest.

This registry serves lists in byte order. Other registries sort their lists in different ways, or not at all. Therefore
all pages of the upstream's list are read and sorted, and the page for the client is taken from the result. `ListCache`
caches complete lists for a short time.

The referrers of a manifest are read through the referrers API. In a registry without this API, an index under the
*fallback tag* may list the referrers. The name of the fallback tag is made from the manifest's digest (OCI distribution
spec, "Referrers Tag Schema").

An upstream has one or more endpoints (URLs that serve the same content). In this module, *the errors of a failed
upstream request* are UpstreamUnavailable, UpstreamTimeout, TooManyRequests, Denied and StorageFailed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from urllib.parse import quote

from registry.memory_budget import MemoryBudget, ShareScope
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UnconfirmedNameUnknown
from registry.upstream.destinations import loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.link_header import next_page_url
from registry.upstream.list_cache import LIST_TIMEOUT_SECONDS, CompleteList, ListCache, cut_page
from registry.upstream.rate_limits import RequestKind
from registry.upstream.request_limits import MIB
from registry.upstream.requester import UpstreamRequester
from registry.upstream.upstream_responses import DocumentParser, UpstreamResponse, is_from_registry
from storage.content import OCI_INDEX, Descriptor, Page
from storage.errors import ManifestUnknown, NameUnknown, TagInvalid, UpstreamUnavailable
from storage.json_bounds import Bounds, OutOfBounds, load_bounded
from storage.names import Digest, RepositoryName, Tag

TAGS_PER_REQUEST = 1000
"""Number of tags that are requested in one page (the parameter `n`). CNCF Distribution refuses larger numbers."""
MAX_PAGE_BYTES = 8 * MIB
"""Largest body of a response with one page of a list, or with the index under a fallback tag."""
MAX_LIST_BYTES = 24 * MIB
"""Largest size of a complete list. The size of a list is the bytes of its pages, plus BYTES_PER_TAG or
BYTES_PER_DESCRIPTOR for each entry."""
BYTES_PER_TAG, BYTES_PER_DESCRIPTOR = 128, 1024
"""Approximate memory in bytes of the Python objects of one tag and of one descriptor, without their text."""
TAGS_PER_SORT = 10_000
"""Largest number of tags that are sorted in one call. No other thread of the process can run during such a call, so a
larger list is sorted in parts."""
TAG_PAGE_BOUNDS = Bounds(max_values=300_000, max_backslashes=100_000)
"""Largest numbers of values and of backslashes in the JSON of one page of tags. They are large because some
registries send all tags in one page."""
MAX_PAGES = 500
"""Largest number of pages that are read for one list. A list with more pages is an error, because a faulty registry may
link its pages in a circle."""

_NO_REFERRERS_API = frozenset({400, 404, 405, 406, 501})
"""Statuses with which a registry may respond to a request for referrers if it has no referrers API."""


class UpstreamLists:
    """Reads and caches the lists of one upstream."""

    def __init__(self, name: str, requester: UpstreamRequester, parser: DocumentParser, memory: MemoryBudget) -> None:
        """`name` is the upstream's name in the settings. `memory` is the memory budget for lists while they are
        read."""
        self._requester = requester
        self._parser = parser
        self._memory = memory
        self._tag_lists: ListCache[Tag] = ListCache(name)
        self._referrer_lists: ListCache[Descriptor] = ListCache(name)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns at most `limit` tags of the repository in byte order: those that follow `after`, or the first ones if
        `after` is None. Raises NameUnknown, and the errors of a failed upstream request."""

        async def read() -> CompleteList[Tag]:
            return await self._requester.try_endpoints(
                lambda endpoint, attempt: self._read_all_tags(endpoint, attempt, repo),
                repo,
                RequestKind.LIST,
                timeout_seconds=LIST_TIMEOUT_SECONDS,
            )

        tags = await self._tag_lists.get(repo, read, is_first_page=after is None)
        return cut_page(tags, str, after, limit)

    async def aclose(self) -> None:
        """Cancels the reading of lists. Callers that wait for a list get UpstreamUnavailable."""
        await self._tag_lists.aclose()
        await self._referrer_lists.aclose()

    async def _read_all_tags(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, repo: RepositoryName
    ) -> CompleteList[Tag]:
        """Reads all pages of the tag list from one endpoint. Raises UpstreamUnavailable if there are more than
        MAX_PAGES pages."""
        tags: set[Tag] = set()
        path = f"tags/list?n={TAGS_PER_REQUEST}"
        previous: UpstreamResponse | None = None
        with closing(_ListMemory(self._memory)) as list_memory:
            for page_index in range(MAX_PAGES):
                with ShareScope() as page_memory:
                    response = await self._request_tags(endpoint, attempt, repo, path, previous, page_memory)
                    page_tags = await self._parser.run(len(response.body), partial(_parse_tags, response))
                    await list_memory.add_page(response, len(page_tags) * BYTES_PER_TAG)
                tags.update(page_tags)
                next_url = _next_page_of(response)
                if next_url is None:
                    return CompleteList(await self._sort(tags), page_index + 1, list_memory.size_bytes)
                path, previous = next_url, replace(response, body=b"")  # without the body, to free its memory
        raise UpstreamUnavailable(
            f"the list of tags of {loggable_origin(endpoint.url)} does not end after {MAX_PAGES} pages"
        )

    async def _request_tags(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        path: str,
        previous: UpstreamResponse | None,
        memory: ShareScope,
    ) -> UpstreamResponse:
        """Returns the response with the page of tags at `path`. `previous`: the response that links to this page;
        None: `path` is the first page. `memory`: a scope that the caller has entered. A large body counts against the
        memory budget until the caller leaves the scope."""
        response = await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.LIST, "GET", path),
            not_found_error=NameUnknown(),
            max_bytes=MAX_PAGE_BYTES,
            accepted_statuses=(400,) if previous is None else (),
            linked_from=previous,
            memory=memory,
        )
        if response.status != 400:
            return response
        # A 400 for the first page means that the registry does not accept the parameter `n`.
        return await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.LIST, "GET", "tags/list"),
            not_found_error=NameUnknown(),
            max_bytes=MAX_PAGE_BYTES,
            memory=memory,
        )

    async def _sort(self, tags: set[Tag]) -> list[Tag]:
        """Returns the tags in byte order. Sorts more than TAGS_PER_SORT tags in a thread."""
        if len(tags) <= TAGS_PER_SORT:
            return sorted(tags)
        # `DocumentParser.run` runs `parse`, here the sort, in a thread, because `size_bytes` is large.
        return await self._parser.run(size_bytes=BYTES_PER_TAG * len(tags), parse=lambda: _sort_in_parts(list(tags)))

    async def referrers(
        self,
        repo: RepositoryName,
        subject: Digest,
        artifact_type: str | None,
        after: str | None,
        limit: int,
        *,
        use_fallback_tag: bool = True,
    ) -> Page[Descriptor]:
        """Returns at most `limit` referrers of the manifest `subject` in the order of their digests: those that follow
        the digest `after`, or the first ones if `after` is None. If `artifact_type` is not None, returns only referrers
        of that type. `use_fallback_tag`: whether to read the fallback tag if the upstream may have no referrers API.

        If the registry itself responds with "not found", returns an empty page. If a proxy or firewall in front of the
        registry possibly sent this response, raises UnconfirmedNameUnknown. Raises the errors of a failed upstream
        request."""

        async def read() -> CompleteList[Descriptor]:
            return await self._requester.try_endpoints(
                lambda endpoint, attempt: self._read_all_referrers(
                    endpoint, attempt, repo, subject, artifact_type, use_fallback_tag
                ),
                repo,
                RequestKind.LIST,
                timeout_seconds=LIST_TIMEOUT_SECONDS,
            )

        cache_key = f"{repo} {subject} {artifact_type or ''} {use_fallback_tag}"
        try:
            referrers = await self._referrer_lists.get(cache_key, read, is_first_page=after is None)
        except (UnconfirmedNameUnknown, UnconfirmedManifestUnknown):
            raise UnconfirmedNameUnknown from None  # the mirror can then list the referrers that it has cached
        except (NameUnknown, ManifestUnknown):
            return Page([])
        return cut_page(referrers, lambda descriptor: descriptor.digest, after, limit)

    async def check_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool | None:
        """Returns whether the upstream has the referrers API. `digest`: the digest of any manifest of the repository.

        - True: the upstream returns the referrers.
        - False: the registry itself refuses the request.
        - None: the response has a status of _NO_REFERRERS_API, but no error code of a registry. It may come from a
          registry without the API, such as registry:2, or from a proxy in front of a registry that is restarting.

        Raises the errors of a failed upstream request. Raises UnconfirmedNameUnknown in these cases:

        - The upstream refuses the request with a status that is not in _NO_REFERRERS_API, such as 403, and the response
          does not show that the registry itself refuses it. A firewall may have sent the response, or the repository
          may need a login.
        - No token could be obtained, and the upstream may have hidden the repository from a request without a token."""

        async def ask(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> bool | None:
            with ShareScope() as memory:
                path = f"referrers/{digest}"
                response = await self._request_referrers(endpoint, attempt, repo, path, None, memory)
            if _is_unconfirmed_refusal(response):
                return None
            return response.status not in _NO_REFERRERS_API

        try:
            return await self._requester.try_endpoints(ask, repo, RequestKind.LIST)
        except UnconfirmedNameUnknown:
            raise
        except NameUnknown:
            return False

    async def _read_all_referrers(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        subject: Digest,
        artifact_type: str | None,
        use_fallback_tag: bool,
    ) -> CompleteList[Descriptor]:
        """Reads all pages of the list of referrers from one endpoint. Raises UpstreamUnavailable if there are more than
        MAX_PAGES pages.

        `use_fallback_tag`: what to do if the first response has a status of _NO_REFERRERS_API. True: reads the index
        under the fallback tag. False: raises NameUnknown or UnconfirmedNameUnknown."""
        query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
        path = f"referrers/{subject}{query}"
        by_digest: dict[Digest, Descriptor] = {}
        previous: UpstreamResponse | None = None
        with closing(_ListMemory(self._memory)) as list_memory:
            for page_index in range(MAX_PAGES):
                with ShareScope() as page_memory:
                    response = await self._request_referrers(endpoint, attempt, repo, path, previous, page_memory)
                    if response.status in _NO_REFERRERS_API:
                        if not use_fallback_tag:
                            raise UnconfirmedNameUnknown if _is_unconfirmed_refusal(response) else NameUnknown
                        all_referrers = await self._read_fallback_tag(endpoint, attempt, repo, subject, page_memory)
                        referrers = _filter_by_type(all_referrers, artifact_type)
                        # If `request_count` is 1, `ListCache` reads the list again when a client requests the first
                        # page. If `request_count` is larger, `ListCache` may use its cached list. This list took two
                        # requests. But it has to be read again for a first page, because it may have changed.
                        # Therefore `request_count` is 1 here.
                        size_bytes = BYTES_PER_DESCRIPTOR * len(referrers)
                        return CompleteList(referrers, request_count=1, size_bytes=size_bytes)
                    descriptors = await self._parser.parse_descriptors(response)
                    await list_memory.add_page(response, len(descriptors) * BYTES_PER_DESCRIPTOR)
                # Without the header `OCI-Filters-Applied`, the registry may have ignored the parameter `artifactType`.
                is_filtered = "artifacttype" in response.headers.get("oci-filters-applied", "").lower()
                for descriptor in _filter_by_type(descriptors, None if is_filtered else artifact_type):
                    by_digest.setdefault(descriptor.digest, descriptor)
                next_url = _next_page_of(response)
                if next_url is None:
                    referrers = [by_digest[digest] for digest in sorted(by_digest)]
                    return CompleteList(referrers, page_index + 1, list_memory.size_bytes)
                path, previous = next_url, replace(response, body=b"")
        raise UpstreamUnavailable(
            f"the list of referrers of {loggable_origin(endpoint.url)} does not end after {MAX_PAGES} pages"
        )

    async def _request_referrers(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        path: str,
        previous: UpstreamResponse | None,
        memory: ShareScope,
    ) -> UpstreamResponse:
        """Returns the response with the page of referrers at `path`. `previous`: the response that links to this page;
        None: `path` is the first page, and the response may have a status of _NO_REFERRERS_API.
        `memory`: a scope that the caller has entered. A large body counts against the memory budget until the caller
        leaves the scope."""
        return await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.LIST, "GET", path),
            not_found_error=NameUnknown(),
            headers={"Accept": OCI_INDEX},
            max_bytes=MAX_PAGE_BYTES,
            accepted_statuses=_NO_REFERRERS_API if previous is None else (),
            linked_from=previous,
            memory=memory,
        )

    async def _read_fallback_tag(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        subject: Digest,
        memory: ShareScope,
    ) -> Sequence[Descriptor]:
        """Returns the referrers in the index under the fallback tag, in the order of their digests. Raises
        ManifestUnknown if there is no such tag."""
        tag = f"{subject.algorithm[:32]}-{subject.encoded[:64]}"  # the spec cuts both parts to these lengths
        response = await self._requester.request(
            *(endpoint, attempt, repo, RequestKind.MANIFEST, "GET", f"manifests/{tag}"),
            not_found_error=ManifestUnknown(),
            headers={"Accept": OCI_INDEX},
            max_bytes=MAX_PAGE_BYTES,
            memory=memory,
        )
        by_digest = {descriptor.digest: descriptor for descriptor in await self._parser.parse_descriptors(response)}
        return [by_digest[digest] for digest in sorted(by_digest)]


def _is_unconfirmed_refusal(response: UpstreamResponse) -> bool:
    """Returns whether the response has a status of _NO_REFERRERS_API, but possibly comes from a proxy in front of the
    registry."""
    return response.status in _NO_REFERRERS_API and not is_from_registry(response)


class _ListMemory:
    """Counts the memory of one list against a memory budget while the list is read."""

    def __init__(self, memory: MemoryBudget) -> None:
        self._share = memory.new_share()

    @property
    def size_bytes(self) -> int:
        """Bytes counted for the list so far."""
        return self._share.size

    async def add_page(self, response: UpstreamResponse, entries_bytes: int) -> None:
        """Counts one more page: the length of its body, and `entries_bytes` for the objects of its entries. Waits if
        too little of the budget is free. Raises UpstreamUnavailable if the list exceeds MAX_LIST_BYTES, and
        TooManyRequests as `Share.grow` does."""
        page_bytes = len(response.body) + entries_bytes
        if self._share.size + page_bytes > MAX_LIST_BYTES:
            raise UpstreamUnavailable(
                f"{loggable_origin(response.url)} answers with a list of more than {MAX_LIST_BYTES} bytes"
            )
        await self._share.grow(page_bytes)

    def close(self) -> None:
        """Gives the memory back to the budget."""
        self._share.close()


def _sort_in_parts(tags: list[Tag]) -> list[Tag]:
    """Returns the tags in byte order. Sorts parts of TAGS_PER_SORT tags and merges them, so that other threads can run
    between two parts."""
    parts = [sorted(tags[start : start + TAGS_PER_SORT]) for start in range(0, len(tags), TAGS_PER_SORT)]
    return list(heapq.merge(*parts))


def _filter_by_type(descriptors: Sequence[Descriptor], artifact_type: str | None) -> list[Descriptor]:
    """Returns the descriptors that have this artifact type; all descriptors if `artifact_type` is None."""
    return [
        descriptor for descriptor in descriptors if artifact_type is None or descriptor.artifact_type == artifact_type
    ]


def _parse_tags(response: UpstreamResponse) -> list[Tag]:
    """Returns the valid tags in the body of a response with one page of tags. Raises UpstreamUnavailable if the body is
    not a list of tags, or exceeds TAG_PAGE_BOUNDS."""
    try:
        document = load_bounded(response.body, TAG_PAGE_BOUNDS)
        names = (document.get("tags") or []) if isinstance(document, dict) else None
        if not isinstance(names, list):
            raise ValueError
    except OutOfBounds as error:
        raise UpstreamUnavailable(
            f"{loggable_origin(response.url)} answers with a list that is too large: {error}"
        ) from None
    except (ValueError, RecursionError):
        raise UpstreamUnavailable(
            f"{loggable_origin(response.url)} answers with something that is no list of tags"
        ) from None
    tags = []
    for name in names:
        try:
            tags.append(Tag(name))
        except (TagInvalid, TypeError):
            continue  # no client could request a tag that is not valid
    return tags


def _next_page_of(response: UpstreamResponse) -> str | None:
    """Returns the URL of the next page, from the Link header of `response`. Returns None if `response` has the last
    page, or if it came from another origin after a redirect: links of other origins are not followed."""
    return None if response.is_cross_origin else next_page_url(response.headers, response.url)

"""Reads the list of all repositories of an upstream, page by page (`CatalogReader`). Many registries, such as Docker
Hub, do not offer this list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from registry.memory_budget import ShareScope
from registry.upstream.destinations import loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.link_header import next_page_url
from registry.upstream.rate_limits import RequestKind
from registry.upstream.request_limits import MIB
from registry.upstream.requester import UpstreamRequester
from registry.upstream.upstream_lists import TAG_PAGE_BOUNDS
from registry.upstream.upstream_responses import DocumentParser, UpstreamResponse
from storage.errors import NameUnknown, UpstreamUnavailable
from storage.json_bounds import load_bounded
from storage.names import RepositoryName, shown

NAMES_PER_PAGE: Final = 1000
"""Number of names to request per page. CNCF Distribution refuses larger numbers."""
MAX_PAGE_BYTES: Final = 8 * MIB
"""Largest body of a response with one page of the list."""
PAGE_TIMEOUT_SECONDS: Final = 300.0
"""Time limit for one page. CNCF Distribution walks through its whole storage for each page."""
CATALOG_SCOPE: Final = "registry:catalog:*"
"""The scope of a token that may read the list (token specification of Distribution)."""
_PLACEHOLDER_REPOSITORY: Final = RepositoryName("catalog")
"""A name that stands for the list of repositories. The requester needs a name for each request, because it limits the
concurrent requests per repository."""


@dataclass(frozen=True, slots=True)
class CatalogPage:
    """A page of the list of repositories.

    - `names`: the names as the upstream sent them, not checked.
    - `next_url`: the URL of the next page. None if this page is the last one, or if a redirect to another origin led to
      this page.
    - `response`: the response with this page, but without its body."""

    names: Sequence[str]
    next_url: str | None
    response: UpstreamResponse


class CatalogReader:
    """Reads the list of repositories of one upstream."""

    def __init__(self, requester: UpstreamRequester, parser: DocumentParser) -> None:
        self._requester = requester
        self._parser = parser

    async def page(self, previous: CatalogPage | None) -> CatalogPage:
        """Returns the page after `previous`, or the first page if `previous` is None. Raises ValueError if `previous`
        has no `next_url`, NameUnknown if the upstream offers no list, Denied if the login at the upstream may not read
        the list. Also raises UpstreamUnavailable, UpstreamTimeout, TooManyRequests and StorageFailed."""
        if previous is not None and previous.next_url is None:
            raise ValueError("the previous page is the last one")

        async def read(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> CatalogPage:
            url = f"{endpoint.url}/v2/_catalog?n={NAMES_PER_PAGE}"
            if previous is not None and previous.next_url is not None:
                url = previous.next_url
            # `memory`: a large response counts against the memory budget until this `with` block ends.
            with ShareScope() as memory:
                response = await self._requester.request(
                    *(endpoint, attempt, _PLACEHOLDER_REPOSITORY, RequestKind.LIST, "GET", url),
                    not_found_error=NameUnknown("the registry offers no list of its repositories"),
                    max_bytes=MAX_PAGE_BYTES,
                    accepted_statuses=(405, 501),
                    linked_from=None if previous is None else previous.response,
                    memory=memory,
                    scope=CATALOG_SCOPE,
                )
                if response.status in (405, 501):
                    raise NameUnknown("the registry offers no list of its repositories")
                names = await self._parser.run(len(response.body), partial(_parse_names, response))
            next_url = None if response.is_cross_origin else next_page_url(response.headers, response.url)
            return CatalogPage(names, next_url, replace(response, body=b""))

        return await self._requester.try_endpoints(
            read, _PLACEHOLDER_REPOSITORY, RequestKind.LIST, timeout_seconds=PAGE_TIMEOUT_SECONDS
        )


def _parse_names(response: UpstreamResponse) -> list[str]:
    """Returns the names in the body of a response. Raises UpstreamUnavailable if the body has no list of names."""
    server = loggable_origin(response.url)
    try:
        # Uses the bounds for a page of tags, because a page of repositories is a list of names as well.
        document = load_bounded(response.body, TAG_PAGE_BOUNDS)
        names = document["repositories"] if isinstance(document, dict) else ""
        if names is None:
            return []  # the upstream sends null for an empty list
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError
    except (ValueError, LookupError, RecursionError):
        excerpt = shown(response.body[:80].decode(errors="replace"))
        raise UpstreamUnavailable(
            f"{server} answers with something that is no list of repositories: {excerpt}"
        ) from None
    return names

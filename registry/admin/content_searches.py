"""Searches the stored content and an upstream (`ContentSearches`). Each search runs on behalf of a client (the
*principal*), and finds only content that the principal may pull. A *visitor* is an account, or a network of anonymous
clients.

A repository is *mirrored* if its content comes from another registry (its *upstream*), and *hosted* if clients push its
content to this registry. The *stored name* of a repository is its name in the store. The stored name of a mirrored
repository begins with the name of its upstream. The *candidates* of a name are the stored names that it can mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from registry.admin.pasted_reference import pasted_references
from registry.auth.rights.principal import Principal
from registry.router import Router
from registry.single_flight import start_detached, wait_for_outcome
from registry.visitor_limits import Limits, VisitorLimits
from storage.access import Action
from storage.content_search import DigestMatch, LabelsMatch, SearchPage, TagMatch, search_words
from storage.errors import BlobUnknown, ManifestUnknown, NameInvalid, NameUnknown, TooManyRequests, Unauthorized
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.patterns import NameSet
from storage.store.stored_registry import StoredRegistry

if TYPE_CHECKING:
    from registry.upstream.hub_search import UpstreamResult, UpstreamSearch


STORE_SEARCH_LIMITS: Final = Limits(
    max_running=4, max_running_per_visitor=1, max_pending=1000, max_pending_per_visitor=100
)
"""Limits of one process for searches of the store. A search takes some milliseconds."""
UPSTREAM_SEARCH_LIMITS: Final = Limits(
    max_running=20, max_running_per_visitor=1, max_pending=100, max_pending_per_visitor=10
)
"""Limits of one process for searches of the upstream. A search can take seconds, so only a few searches of one visitor
may wait. Searches whose answer is cached do not count."""


@dataclass(frozen=True, slots=True)
class SearchTarget:
    """The repository, tag, manifest or blob that a pasted text names. `reference`: the tag, or the digest of the
    manifest or blob; None if the text names only a repository. `is_blob`: whether `reference` is a blob's digest."""

    repository: RepositoryName
    reference: Reference | None
    is_blob: bool = False


@dataclass(frozen=True, slots=True)
class Searcher:
    """The client for which a search runs. `address`: the client's IP address; empty if the address is unknown."""

    principal: Principal
    address: str

    @property
    def visitor(self) -> str:
        """The key under which limits count the client."""
        return self.principal.visitor_key_at(self.address)


class ContentSearches:
    """The searches of one process, within `STORE_SEARCH_LIMITS` and `UPSTREAM_SEARCH_LIMITS`. All methods that read the
    store raise StorageFull, StorageFailed.

    `find_repositories`, `find_tags`, `find_by_labels` and `find_by_digest` search for a text that a person has entered.
    They skip the first `offset` results and return a page of at most `limit` results. They raise TooManyRequests if too
    many searches are pending."""

    def __init__(self, store: StoredRegistry, router: Router, upstream_search: UpstreamSearch | None = None) -> None:
        """`upstream_search`: searches an upstream in addition to the store; None: only the store is searched."""
        self._store = store
        self._router = router
        self._upstream_search = upstream_search
        self._store_limits = VisitorLimits(STORE_SEARCH_LIMITS, "searches")
        self._upstream_limits = VisitorLimits(UPSTREAM_SEARCH_LIMITS, "searches")
        self._upstream_tasks: set[asyncio.Task[Sequence[UpstreamResult]]] = set()
        """The running searches of the upstream. The event loop itself holds only weak references to tasks."""

    async def is_indexing(self) -> bool:
        """Returns whether the search index is still being built. An incomplete index misses much of the content."""
        return await self._store.search.is_indexing()

    def check_may_search(self, principal: Principal) -> None:
        """Raises Unauthorized, which asks for a login, if the client is anonymous and may pull nothing."""
        if principal.is_anonymous and not principal.is_registry_open and not _searchable_names(principal).patterns:
            raise Unauthorized("log in to search")

    def upstream_of(self, stored_name: str) -> str | None:
        """Returns the name of the upstream of a mirrored repository; None for a hosted repository."""
        return self._router.naming.upstream_of(stored_name)

    async def find_repositories(
        self, searcher: Searcher, text: str, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        """Finds the repositories whose names contain all words of `text`."""
        searchable = _searchable_names(searcher.principal)
        async with self._store_limits.slot(searcher.visitor):
            return await self._store.search.find_repositories(search_words(text), searchable, offset, limit)

    async def find_tags(self, searcher: Searcher, text: str, offset: int, limit: int) -> SearchPage[TagMatch]:
        """Finds the tags that match the last word of `text`. Each other word must occur in the tag or in the
        repository's name."""
        async with self._store_limits.slot(searcher.visitor):
            return await self._store.search.find_tags(
                search_words(text), _searchable_names(searcher.principal), offset, limit
            )

    async def find_by_labels(self, searcher: Searcher, text: str, offset: int, limit: int) -> SearchPage[LabelsMatch]:
        """Finds the manifests whose labels and annotations contain all words of `text`."""
        async with self._store_limits.slot(searcher.visitor):
            return await self._store.search.find_by_labels(
                search_words(text), _searchable_names(searcher.principal), offset, limit
            )

    async def find_by_digest(self, searcher: Searcher, text: str, offset: int, limit: int) -> SearchPage[DigestMatch]:
        """Finds the manifests and blobs whose digests begin with `text`, with or without the algorithm."""
        async with self._store_limits.slot(searcher.visitor):
            return await self._store.search.find_by_digest(
                text.strip(), _searchable_names(searcher.principal), offset, limit
            )

    async def find_target(self, principal: Principal, text: str) -> SearchTarget | None:
        """Returns the stored target that `text` names and `principal` may pull; None if there is no such target.
        `text`: a pasted image reference, or a pasted command that contains an image reference."""
        for pasted in pasted_references(text):
            try:
                candidates = self._router.naming.candidates(pasted.repository)
            except (NameInvalid, NameUnknown):
                continue
            for stored_name in candidates:
                if principal.may(Action.PULL, stored_name, pasted.repository):
                    match = await self._find_stored(stored_name, pasted.reference)
                    if match is not None:
                        return match
        return None

    async def _find_stored(self, stored_name: RepositoryName, reference: Reference | None) -> SearchTarget | None:
        """Returns the target if the repository and the reference are stored here; None otherwise."""
        metadata = self._store.metadata
        if reference is None:
            page = await metadata.repositories(None, 1, NameSet.of([stored_name]))
            return SearchTarget(stored_name, None) if page.items else None
        with suppress(NameUnknown, ManifestUnknown):
            await metadata.manifest_descriptor(stored_name, reference)
            return SearchTarget(stored_name, reference)
        # Finds no blobs of mirrored repositories: the upstream may first have to confirm that the repository has the
        # blob.
        if isinstance(reference, Digest) and self.upstream_of(stored_name) is None:
            with suppress(NameUnknown, BlobUnknown):
                await metadata.blob(stored_name, reference)
                return SearchTarget(stored_name, reference, is_blob=True)
        return None

    async def list_tags(self, stored_name: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        """Returns the first `limit` tags of a repository, with the digests that they point at. Does not check the right
        to pull. Raises NameUnknown."""
        return await self._store.search.first_tags(stored_name, limit)

    async def search_upstream(
        self, searcher: Searcher, text: str, count: int, page: int
    ) -> Sequence[tuple[RepositoryName, UpstreamResult]]:
        """Searches the upstream. `count`: the largest number of results on a page. `page`: the number of the page,
        beginning with 1. Returns each result with the stored name of its repository, which need not be stored yet.
        Leaves out repositories that the searcher may not pull. Returns no results in these cases:

        - There is no upstream to search, or the upstream fails.
        - The searcher may pull nothing from the upstream.
        - Too many searches of the upstream are pending."""
        principal = searcher.principal
        if self._upstream_search is None or not _may_pull_from(principal, self._upstream_search.upstream_name):
            return []
        named_results, searchable = [], _searchable_names(principal)
        results = self._upstream_search.find_cached(text, count, page)
        if results is None:
            # A search of a disconnected client continues, and counts for the limits until it ends. Otherwise a client
            # that disconnects again and again could run any number of searches.
            search = start_detached(self._ask_upstream(self._upstream_search, searcher.visitor, text, count, page))
            self._upstream_tasks.add(search)
            search.add_done_callback(self._upstream_tasks.discard)
            results = await wait_for_outcome(search)
        for result in results:
            with suppress(NameInvalid, NameUnknown):
                naming, upstream = self._router.naming, self._upstream_search.upstream_name
                # `with_upstream` puts the upstream's name in front, and `mirrored_name` adds `library/` to the names of
                # official images.
                stored_name = naming.mirrored_name(
                    naming.with_upstream(upstream, RepositoryName(result.name)), upstream
                )
                if stored_name in searchable:
                    named_results.append((stored_name, result))
        return named_results

    async def _ask_upstream(
        self, upstream_search: UpstreamSearch, visitor: str, text: str, count: int, page: int
    ) -> Sequence[UpstreamResult]:
        """Searches the upstream. Returns no results if the visitor, or all visitors together, have too many pending
        searches."""
        try:
            async with self._upstream_limits.slot(visitor):
                return await upstream_search.find(text, count, page)
        except TooManyRequests:
            return ()


def _searchable_names(principal: Principal) -> NameSet:
    """Returns the names of the repositories that a search for `principal` may find.

    - If `principal` may list repositories: the names that a list of repositories shows to `principal`.
    - Otherwise, for example if a bearer token does not grant the list: the names that `principal` may pull."""
    return principal.listable_names if principal.may_list else principal.names_allowing(Action.PULL)


def _may_pull_from(principal: Principal, upstream: str) -> bool:
    """Returns whether a search for `principal` may find any repository of the upstream."""
    prefix = f"{upstream}/"
    # `seek` returns a text at or after the prefix, in byte order. No searchable name lies between the prefix and this
    # text. So if the text does not begin with the prefix, no searchable name does.
    return (_searchable_names(principal).seek(prefix) or "").startswith(prefix)

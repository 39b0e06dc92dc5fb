"""The page *Search*: finds repositories, tags, labels and digests. The page has separate lists for *hosted* content,
which clients push to this registry, and for mirrored content. A pasted digest or pull command redirects to the page of
the image."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeVar

from fastapi import APIRouter, Request, Response

from registry.admin.content_searches import ContentSearches, Searcher, SearchTarget
from registry.request import RequestInvalid
from registry.ui.image_page import image_name, path_of
from registry.ui.languages import translatable
from registry.ui.page_route import SlotlessRoute, caller_of, page_response, page_slot, query_of, redirect, visit_of
from registry.ui.repository_pages import REPOSITORIES_PATH
from storage.content_search import DigestMatch, LabelsMatch, SearchPage, TagMatch
from storage.errors import DigestInvalid
from storage.names import Digest, Reference, RepositoryName

SEARCH_PATH: Final = "/ui/search"
KINDS: Final = {
    "repositories": translatable("Repositories"),
    "tags": translatable("Tags"),
    "labels": translatable("Labels and annotations"),
    "digests": translatable("Digests"),
}
"""The kinds of entries that can be searched for, with the titles of their lists."""
FIRST_PAGE_HITS: Final = 8
"""Largest number of entries of each kind on the first page."""
FURTHER_PAGE_HITS: Final = 25
"""Largest number of entries on a further page. A further page continues the list of one kind."""
_MAX_TEXT_CHARACTERS: Final = 1024
FoundT = TypeVar("FoundT")

router = APIRouter(route_class=SlotlessRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry of a list.

    - `upstream`: the upstream from which the entry is mirrored; None: the entry is hosted.
    - `path`: the path of the entry's page. A blob has no page of its own, so `path` is the page of its repository.
    - `text`: the entry's name.
    - `updated`: when the tag was last moved; None: the entry is no tag.
    - `labels`: labels in which a word of the search occurs.
    - `is_blob`: whether the entry is a blob."""

    upstream: str | None
    path: str
    text: str
    digest: Digest | None = None
    updated: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    is_blob: bool = False


@dataclass(frozen=True, slots=True)
class HitList:
    """The entries of one kind that a page shows. `next_offset`: how many entries the next page skips; None: there is no
    next page. `is_complete`: False if the search may have missed some entries."""

    kind: str
    hosted: Sequence[Hit]
    mirrored: Sequence[Hit]
    next_offset: int | None
    is_complete: bool


@router.get(SEARCH_PATH)
async def search(request: Request) -> Response:
    """Shows the entries that match the text `q` of the query and that the visitor may pull. If the query has `kind`, a
    key of `KINDS`, shows a further page: only entries of this kind, without the first `after` entries. Raises
    Unauthorized for an anonymous visitor who may pull nothing, and RequestInvalid."""
    caller, query = caller_of(request), query_of(request)
    searches, principal = caller.content_searches, caller.principal
    searches.check_may_search(principal)
    text = (query.one("q") or "").strip()[:_MAX_TEXT_CHARACTERS]
    kind = query.one("kind") or None
    offset = _offset(query.one("after"), kind)
    target: SearchTarget | None = None  # the image, blob or repository that the text names
    lists: list[HitList] = []
    if text:
        target = None if kind else await searches.find_target(principal, text)
        searcher = caller.searcher
        searched_kinds = [kind] if kind else KINDS
        lists = [await _find_hits(searches, searcher, text, searched, offset) for searched in searched_kinds]
    # While the visitor types, the script htmx requests only the results (`is_partial`). A redirect would interrupt the
    # visitor. A further page (`kind`) does not redirect: if it has one result, the earlier pages have others.
    may_redirect = not visit_of(request).is_partial and kind is None
    if may_redirect and (path := _redirect_path(text, target, lists)) is not None:
        return redirect(path)
    async with page_slot(request):
        return await page_response(
            request,
            "search.html",
            section="search",
            text=text,
            kind=kind,
            kinds=KINDS,
            target=None if target is None else _target_hit(searches, target),
            lists=[hit_list for hit_list in lists if hit_list.hosted or hit_list.mirrored],
            # If true, the page advises the visitor to enter a longer text. A text that names an image, a repository or
            # a whole digest need not be longer.
            may_lack_matches=target is None
            and not _is_digest(text)
            and not all(hit_list.is_complete for hit_list in lists),
            is_indexing=await searches.is_indexing(),
            now=datetime.now(UTC),
        )


def _offset(after: str | None, kind: str | None) -> int:
    """Returns how many entries the page skips: the number in `after`. Raises RequestInvalid if `after` is no such
    number, or if `kind` is unknown."""
    if kind is not None and kind not in KINDS:
        raise RequestInvalid("this cannot be searched for")
    if not after:
        return 0
    if kind is None or not after.isascii() or not after.isdigit() or len(after) > 6:
        raise RequestInvalid("this is no page of a search")
    return int(after)


async def _find_hits(searches: ContentSearches, searcher: Searcher, text: str, kind: str, offset: int) -> HitList:
    """Returns a page of the entries of one kind that match `text`. `offset`: the number of entries to skip; 0 for the
    first page."""
    limit = FURTHER_PAGE_HITS if offset else FIRST_PAGE_HITS

    async def hits_of(
        find: Callable[[Searcher, str, int, int], Awaitable[SearchPage[FoundT]]],
        to_hit: Callable[[ContentSearches, FoundT], Hit],
    ) -> HitList:
        page = await find(searcher, text, offset, limit)
        hits = list(map(partial(to_hit, searches), page.items))
        return HitList(
            kind,
            [hit for hit in hits if hit.upstream is None],
            [hit for hit in hits if hit.upstream is not None],
            offset + len(hits) if page.more else None,
            page.is_complete,
        )

    if kind == "repositories":
        return await hits_of(searches.find_repositories, _repository_hit)
    if kind == "tags":
        return await hits_of(searches.find_tags, _tag_hit)
    if kind == "labels":
        return await hits_of(searches.find_by_labels, _labels_hit)
    return await hits_of(searches.find_by_digest, _digest_hit)


def _redirect_path(text: str, target: SearchTarget | None, lists: Sequence[HitList]) -> str | None:
    """Returns the path of the image or repository to which the search redirects, or None if the search shows its
    results. The search redirects in three cases:

    - The text names an image with its tag or digest.
    - The text has several words, such as a pull command, and names an image or repository.
    - The text is a whole digest that leads to only one image."""
    if target is not None and not target.is_blob and (target.reference is not None or len(text.split()) > 1):
        return _path(target.repository, target.reference)
    if not _is_digest(text):
        return None
    digest_lists = [hit_list for hit_list in lists if hit_list.kind == "digests"]
    hits = [hit for hit_list in digest_lists for hit in (*hit_list.hosted, *hit_list.mirrored)]
    return hits[0].path if len(hits) == 1 and not hits[0].is_blob else None


def _is_digest(text: str) -> bool:
    """Returns whether the text is a whole digest, such as `sha256:` and 64 hexadecimal digits."""
    try:
        Digest(text)
    except DigestInvalid:
        return False
    return True


def _path(name: RepositoryName, reference: Reference | None) -> str:
    return f"{REPOSITORIES_PATH}/{path_of(name, reference)}"


def _target_hit(searches: ContentSearches, target: SearchTarget) -> Hit:
    name, reference = target.repository, target.reference
    path = _path(name, None if target.is_blob else reference)
    return Hit(searches.upstream_of(name), path, image_name(name, reference), is_blob=target.is_blob)


def _repository_hit(searches: ContentSearches, name: RepositoryName) -> Hit:
    return Hit(searches.upstream_of(name), _path(name, None), name)


def _tag_hit(searches: ContentSearches, item: TagMatch) -> Hit:
    name = item.repository
    return Hit(
        searches.upstream_of(name),
        _path(name, item.tag),
        image_name(name, item.tag),
        digest=item.digest,
        updated=datetime.fromtimestamp(item.updated, UTC),
    )


def _labels_hit(searches: ContentSearches, item: LabelsMatch) -> Hit:
    name = item.repository
    path = _path(name, item.tag or item.digest)
    text = image_name(name, item.tag)
    return Hit(searches.upstream_of(name), path, text, digest=item.digest, labels=dict(item.labels))


def _digest_hit(searches: ContentSearches, item: DigestMatch) -> Hit:
    name = item.repository
    path = _path(name, item.digest if item.is_manifest else None)
    text = image_name(name, item.tag)
    return Hit(searches.upstream_of(name), path, text, digest=item.digest, is_blob=not item.is_manifest)

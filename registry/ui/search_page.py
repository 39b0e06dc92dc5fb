"""The page *Search*: finds repositories, tags, labels and digests. Each result is a *hit*. The page has separate lists
for *hosted* content, which clients push to this registry, and for mirrored content. If the visitor enters a digest or a
pull command, the server redirects to the page of the image."""

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
"""The kinds of hits, with the titles of their lists."""
FIRST_PAGE_HITS: Final = 8
"""Largest number of hits of each kind on the first page."""
FURTHER_PAGE_HITS: Final = 25
"""Largest number of hits on a further page. A further page continues the list of one kind."""
_MAX_TEXT_CHARACTERS: Final = 1024
FoundT = TypeVar("FoundT")

# A *slot* is the permit to render a page. The handler of this route runs the searches without a slot. It takes a slot
# only when it renders the page (`page_slot`).
router = APIRouter(route_class=SlotlessRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search.

    - `upstream`: the name of the upstream from which the hit is mirrored; None for hosted content.
    - `path`: the path of the hit's page. For a blob, it is the page of a repository, because blobs have no pages.
    - `text`: the hit's name.
    - `digest`: the digest of the manifest or blob; None: the page shows no digest.
    - `updated`: when the tag was last moved; None if the hit was not found by its tag.
    - `labels`: the labels that contain a word of the search.
    - `is_blob`: whether the hit is a blob."""

    upstream: str | None
    path: str
    text: str
    digest: Digest | None = None
    updated: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    is_blob: bool = False


@dataclass(frozen=True, slots=True)
class HitList:
    """The hits of one kind that a page shows. `next_offset`: how many hits the next page skips; None: there is no next
    page. `is_complete`: False if the search may have missed some hits."""

    kind: str
    hosted: Sequence[Hit]
    mirrored: Sequence[Hit]
    next_offset: int | None
    is_complete: bool


@router.get(SEARCH_PATH)
async def search(request: Request) -> Response:
    """Shows the hits that the visitor may pull. Raises RequestInvalid. Raises Unauthorized if the visitor is anonymous
    and may pull nothing. Fields of the URL's query:

    - `q`: the text to search for.
    - `kind`: a key of `KINDS`. If the query has this field, the page is a further page with hits of this kind.
    - `after`: how many hits of this kind the page skips."""
    caller, query = caller_of(request), query_of(request)
    searches, principal = caller.content_searches, caller.principal
    searches.check_may_search(principal)
    text = (query.one("q") or "").strip()[:_MAX_TEXT_CHARACTERS]
    kind = query.one("kind") or None
    offset = _parse_offset(query.one("after"), kind)
    target: SearchTarget | None = None  # the image, blob or repository that the text names
    lists: list[HitList] = []
    if text:
        target = None if kind else await searches.find_target(principal, text)
        searcher = caller.searcher
        searched_kinds = [kind] if kind else KINDS
        lists = [await _find_hits(searches, searcher, text, searched, offset) for searched in searched_kinds]
    # While the visitor types, the script htmx requests only the results (`is_from_htmx`). A redirect would interrupt
    # the visitor. A further page (`kind`) does not redirect either. The search has more hits than this page shows,
    # because the earlier pages have shown some.
    may_redirect = not visit_of(request).is_from_htmx and kind is None
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
            # If True, the page advises the visitor to enter a longer text. A text that names an image, a repository or
            # a whole digest need not be longer.
            may_lack_matches=target is None
            and not _is_digest(text)
            and not all(hit_list.is_complete for hit_list in lists),
            is_indexing=await searches.is_indexing(),
            now=datetime.now(UTC),
        )


def _parse_offset(after: str | None, kind: str | None) -> int:
    """Returns the number in `after`; 0 if `after` is empty or None. Raises RequestInvalid in these cases:

    - `kind` is no key of `KINDS`.
    - `after` is no number, or has more than six digits.
    - `after` is not empty, and `kind` is None."""
    if kind is not None and kind not in KINDS:
        raise RequestInvalid("the search has no such kind of results")
    if not after:
        return 0
    if kind is None or not after.isascii() or not after.isdigit() or len(after) > 6:
        raise RequestInvalid("the search has no such page")
    return int(after)


async def _find_hits(searches: ContentSearches, searcher: Searcher, text: str, kind: str, offset: int) -> HitList:
    """Returns the hits of one kind for `text`. `offset`: the number of hits to skip; 0 for the first page."""
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
    """Returns the path of the image or repository to which the server redirects. Returns None if the page shows the
    hits. The server redirects in three cases:

    - The text names an image with its tag or digest.
    - The text has several words, such as a pull command, and names an image or a repository.
    - The text is a whole digest, and its only hit is an image."""
    if target is not None and not target.is_blob and (target.reference is not None or len(text.split()) > 1):
        return _path(target.repository, target.reference)
    if not _is_digest(text):
        return None
    digest_lists = [hit_list for hit_list in lists if hit_list.kind == "digests"]
    hits = [hit for hit_list in digest_lists for hit in (*hit_list.hosted, *hit_list.mirrored)]
    return hits[0].path if len(hits) == 1 and not hits[0].is_blob else None


def _is_digest(text: str) -> bool:
    """Returns whether the text is a whole digest, for example `sha256:` with 64 hexadecimal digits."""
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


def _tag_hit(searches: ContentSearches, match: TagMatch) -> Hit:
    name = match.repository
    return Hit(
        searches.upstream_of(name),
        _path(name, match.tag),
        image_name(name, match.tag),
        digest=match.digest,
        updated=datetime.fromtimestamp(match.updated, UTC),
    )


def _labels_hit(searches: ContentSearches, match: LabelsMatch) -> Hit:
    name = match.repository
    path = _path(name, match.tag or match.digest)
    text = image_name(name, match.tag)
    return Hit(searches.upstream_of(name), path, text, digest=match.digest, labels=dict(match.labels))


def _digest_hit(searches: ContentSearches, match: DigestMatch) -> Hit:
    name = match.repository
    path = _path(name, match.digest if match.is_manifest else None)
    text = image_name(name, match.tag)
    return Hit(searches.upstream_of(name), path, text, digest=match.digest, is_blob=not match.is_manifest)

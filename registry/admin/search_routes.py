"""The route `/api/v1/search`. The docstring of the route is the description in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.caller import AnyCaller
from registry.admin.content_searches import ContentSearches, SearchTarget
from registry.admin.management_route import AfterQuery
from registry.admin.management_router import management_router
from registry.request import RequestInvalid
from storage.content_search import DigestMatch, LabelsMatch, SearchPage, TagMatch
from storage.names import Digest, RepositoryName

router = management_router()
ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")
MirroredFrom = Annotated[
    str | None, Field(description="The upstream from which the repository is mirrored; null: it is hosted here")
]


class FoundRepository(BaseModel):
    """A repository whose name contains all words of the search."""

    repository: str
    mirrored_from: MirroredFrom


class FoundTag(BaseModel):
    """A tag that matches the search. The tag, or the text after a `-` or `_` in the tag, begins with the last word of
    the search. The other words occur in the tag or in the name of its repository."""

    repository: str
    mirrored_from: MirroredFrom
    tag: str
    digest: str
    updated: datetime


class FoundLabels(BaseModel):
    """A manifest whose labels and annotations contain all words of the search. `labels`: some of the labels and
    annotations that contain a word. `tag`: a tag that points at the manifest, or at an image index that lists the
    manifest; null: there is no such tag."""

    repository: str
    mirrored_from: MirroredFrom
    digest: str
    tag: str | None
    labels: dict[str, str]


class FoundDigest(BaseModel):
    """A manifest or blob whose digest begins with the text of the search. `tag`: a tag that points at the manifest, or
    at an image index that lists the manifest; null: there is no such tag, or this is a blob."""

    repository: str
    mirrored_from: MirroredFrom
    digest: str
    kind: Literal["manifest", "blob"]
    tag: str | None


class FoundTarget(BaseModel):
    """What a pasted reference or command names. `tag` is null if the text names no tag. `digest` is null if the text
    names no digest."""

    repository: str
    mirrored_from: MirroredFrom
    kind: Literal["repository", "tag", "manifest", "blob"]
    tag: str | None = None
    digest: str | None = None


class FoundList(BaseModel, Generic[ItemT]):
    """A page of the results of one kind. To get the next page, send `next` as the parameter `after`, with the `kind` of
    the list. `next` is null on the last page."""

    items: list[ItemT]
    next: str | None = None
    complete: bool = Field(
        default=True,
        description="False: entries may be missing, because very many entries match, or because the account may see "
        "only some of very many repositories. Search for a longer text to find missing entries",
    )

    @classmethod
    def from_page(cls, page: SearchPage[FoundT], offset: int, to_model: Callable[[FoundT], ItemT]) -> Self:
        """Converts a page that begins after `offset` entries."""
        next_cursor = str(offset + len(page.items)) if page.more else None
        return cls(items=[to_model(item) for item in page.items], next=next_cursor, complete=page.is_complete)


class SearchResponse(BaseModel):
    """What a search has found. Lists of kinds that were not asked for are null."""

    indexing: bool = Field(description="True: the search index is being built, so a search may miss entries")
    target: FoundTarget | None = None
    repositories: FoundList[FoundRepository] | None = None
    tags: FoundList[FoundTag] | None = None
    labels: FoundList[FoundLabels] | None = None
    digests: FoundList[FoundDigest] | None = None


@router.get("/search", tags=["search"])
async def search(
    caller: AnyCaller,
    q: Annotated[str, Query(description="Words, a digest, a reference or a pull command", max_length=1024)] = "",
    kind: Annotated[
        Literal["repositories", "tags", "labels", "digests"] | None,
        Query(description="What to look for. If omitted: all kinds, and the first page of each"),
    ] = None,
    after: AfterQuery = None,
    limit: Annotated[int, Query(description="Maximum number of entries of each kind", ge=1, le=100)] = 20,
) -> SearchResponse:
    """Finds repositories and tags by their names, manifests by their labels and annotations, and manifests and blobs by
    the first digits of their digests. Searches all repositories from which the caller may pull. If the text is a
    reference or a command, such as `docker pull HOST/team/app:v1`, `target` is the content that it names.

    Finds new content about a second after its push. Needs a login, unless everyone may pull from some repository."""
    searches, principal, offset = caller.content_searches, caller.principal, _parse_offset(after, kind)
    searches.check_may_search(principal)

    def repository_fields(name: RepositoryName) -> dict[str, Any]:
        return {"repository": name, "mirrored_from": searches.upstream_of(name)}

    async def search_for(
        result_kind: str, find: Callable[..., Awaitable[SearchPage[FoundT]]], to_model: Callable[[FoundT], ItemT]
    ) -> FoundList[ItemT] | None:
        """Returns the results of one kind; None if the request asks for another kind."""
        if kind not in (None, result_kind):
            return None
        return FoundList[Any].from_page(await find(caller.searcher, q, offset, limit), offset, to_model)

    def repository_model(name: RepositoryName) -> FoundRepository:
        return FoundRepository(**repository_fields(name))

    def tag_model(match: TagMatch) -> FoundTag:
        updated = models.to_datetime(match.updated)
        return FoundTag(**repository_fields(match.repository), tag=match.tag, digest=match.digest, updated=updated)

    def labels_model(match: LabelsMatch) -> FoundLabels:
        fields = repository_fields(match.repository)
        return FoundLabels(**fields, digest=match.digest, tag=match.tag, labels=dict(match.labels))

    def digest_model(match: DigestMatch) -> FoundDigest:
        content_kind: Literal["manifest", "blob"] = "manifest" if match.is_manifest else "blob"
        return FoundDigest(**repository_fields(match.repository), digest=match.digest, kind=content_kind, tag=match.tag)

    return SearchResponse(
        indexing=await searches.is_indexing(),
        target=_target_model(await searches.find_target(principal, q), searches) if offset == 0 else None,
        repositories=await search_for("repositories", searches.find_repositories, repository_model),
        tags=await search_for("tags", searches.find_tags, tag_model),
        labels=await search_for("labels", searches.find_by_labels, labels_model),
        digests=await search_for("digests", searches.find_by_digest, digest_model),
    )


def _target_model(target: SearchTarget | None, searches: ContentSearches) -> FoundTarget | None:
    """Converts the target of a pasted text to its model in the response. Returns None if there is no target."""
    if target is None:
        return None
    name, reference = target.repository, target.reference
    repository_fields: dict[str, Any] = {"repository": name, "mirrored_from": searches.upstream_of(name)}
    if reference is None:
        return FoundTarget(**repository_fields, kind="repository")
    if isinstance(reference, Digest):
        return FoundTarget(**repository_fields, kind="blob" if target.is_blob else "manifest", digest=reference)
    return FoundTarget(**repository_fields, kind="tag", tag=reference)


def _parse_offset(after: str | None, kind: str | None) -> int:
    """Returns the number of entries before the page that `after` requests. Raises RequestInvalid if `after` is not a
    number of at most six digits, or if `after` is given without a `kind`."""
    if after is None:
        return 0
    if kind is None or not after.isascii() or not after.isdigit() or len(after) > 6:
        raise RequestInvalid("`after` has to be the `next` of a page, and needs the `kind` of that page")
    return int(after)

"""Lists the tags of a repository as rows, with details of the images (`TagRows`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from registry.browse.image_overview import MAX_PAGE_PLATFORMS, Overview, OverviewReader
from registry.browse.models import TagRow, TagRowPage, utc_time
from registry.request import RequestInvalid
from storage.names import Digest, RepositoryName
from storage.tag_listing import MAX_PAGE_TAGS, ListedTag, TagCursor, TagListing, TagQuery
from storage.tag_rules import ImmutableTags, IsImmutable
from storage.upstream_tags import UpstreamTags

MAX_TAG_TEXT_CHARACTERS: Final = 128
"""Largest length of a text with which a client filters tags by name. No tag is longer."""


class TagRows:
    """Reads the rows of tags. The caller must check the right to pull from the repository."""

    def __init__(
        self,
        listing: TagListing,
        overviews: OverviewReader,
        upstream_tags: UpstreamTags,
        immutable_tags: ImmutableTags,
    ) -> None:
        self._listing = listing
        self._overviews = overviews
        self._upstream_tags = upstream_tags
        self._immutable_tags = immutable_tags

    async def page(self, repo: RepositoryName, query: TagQuery, after: str | None, limit: int) -> TagRowPage:
        """Returns a page of the tags that match the query. The page has at most `limit` rows and at most
        `MAX_PAGE_TAGS`. `after`: `TagRowPage.next` of the previous page; None for the first page. Raises NameUnknown,
        and RequestInvalid if `after` is not valid."""
        page = await self._listing.page(repo, query, _cursor(after), min(limit, MAX_PAGE_TAGS))
        overviews = await self._overviews.read(repo, (tag.manifest for tag in page.items))
        frozen_tags = await self._upstream_tags.frozen_tags_in(repo)
        frozen_digests: Mapping[str, Digest] = {frozen.tag: frozen.digest for frozen in frozen_tags}
        is_immutable = self._immutable_tags.in_repository(repo)
        rows, remaining_platforms = [], MAX_PAGE_PLATFORMS
        for tag in page.items:
            overview = overviews[tag.manifest.digest]
            rows.append(tag_row(tag, overview, is_immutable, frozen_digests, remaining_platforms))
            remaining_platforms -= len(rows[-1].platforms)
        return TagRowPage(
            items=rows,
            next=None if page.next_after is None else str(page.next_after),
            order=page.order.value,
        )


def tag_row(
    tag: ListedTag,
    overview: Overview,
    is_immutable: IsImmutable,
    frozen_digests: Mapping[str, Digest],
    max_platforms: int,
) -> TagRow:
    """Returns the row of a tag. `frozen_digests`: maps the names of the repository's frozen tags to their digests. A
    *frozen* tag stays at one digest in this registry, even if the upstream moves the tag. `max_platforms`: the largest
    number of platforms in the row."""
    platforms = list(overview.platforms[:max_platforms])
    manifest, summary = tag.manifest, overview.summary
    return TagRow(
        tag=tag.name,
        digest=manifest.digest,
        media_type=manifest.media_type,
        kind=summary.kind,
        artifact_type=manifest.artifact_type if summary.kind == "artifact" else None,
        platforms=platforms,
        more_platforms=overview.more_platforms + len(overview.platforms) - len(platforms),
        stored_bytes=manifest.stored_bytes,
        created=overview.created,
        pushed=utc_time(tag.pushed),
        pushed_by=tag.pushed_by,
        last_pulled=None if manifest.last_pulled is None else utc_time(manifest.last_pulled),
        pulls=manifest.pulls,
        marks=overview.marks,  # whether the image is signed, has an SBOM and has attestations
        immutable=is_immutable(tag.name),
        frozen_at=frozen_digests.get(tag.name),  # the digest at which a frozen tag stays
    )


def _cursor(after: str | None) -> TagCursor | None:
    """Parses the parameter `after` of `TagRows.page`. Raises RequestInvalid if it is not valid."""
    if after is None:
        return None
    try:
        return TagCursor.parse(after)
    except ValueError:
        raise RequestInvalid(
            "`after` is not valid; send the value of `next` from an earlier page of this list"
        ) from None

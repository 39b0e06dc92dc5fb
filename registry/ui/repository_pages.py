"""The page *Repositories*, which lists repositories, and the page *Repository*, which lists the tags of a repository. A
path with a tag or a digest shows the page of an image (`registry.ui.image_page`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.repository_rights import require_readable
from registry.browse.models import DescriptionView
from registry.browse.tag_rows import MAX_TAG_TEXT_CHARACTERS
from registry.request import RequestInvalid
from registry.ui.description_page import TOP_HEADING_LEVEL, description_html
from registry.ui.image_page import image_page, parse_path, path_of
from registry.ui.languages import translatable
from registry.ui.page_route import (
    SlotlessRoute,
    caller_of,
    image_host,
    page_response,
    page_slot,
    query_of,
    redirect_with_query,
)
from registry.ui.pages import PageComponents
from registry.ui.repository_list import list_repositories, visible_upstreams
from registry.ui.visitor_rights import find_visitor_rights
from storage.errors import NameUnknown
from storage.names import RepositoryName
from storage.tag_listing import TagOrder, TagQuery
from storage.tag_removal import MAX_REMOVED_TAGS

REPOSITORIES_PATH: Final = "/ui/repositories"
TAGS_ON_A_PAGE: Final = 25
"""Largest number of tags on a page. It is small, because a page may read a manifest and a config for each tag."""
_MAX_FILTER_CHARACTERS: Final = 255
_ORDERS: Final = {
    TagOrder.NAME: translatable("Name"),
    TagOrder.VERSION: translatable("Version"),
    TagOrder.PUSHED: translatable("Last push"),
    TagOrder.SIZE: translatable("Size"),
}
"""The name of each order of tags, as a page shows it."""

# A `SlotlessRoute` runs its handler without a *slot* (the permit to render a page). The handler reads the content of
# the page, then acquires a slot (`page_slot`) and renders the page.
router = APIRouter(prefix=REPOSITORIES_PATH, route_class=SlotlessRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class SortLink:
    """A link that sorts the tags. `sort`: the query parameter `sort` of the link. `text`: the name of the order.
    `is_current`: whether the page has this order, ascending or descending."""

    sort: str
    text: str
    is_current: bool


@router.get("")
async def repositories(request: Request) -> Response:
    """Lists repositories. The query can have these parameters:

    - `in`: the name of an upstream. Without this parameter, the hosted repositories are listed.
    - `q`: a prefix of the names to list.
    - `after`: the cursor from the link on the previous page.

    Raises NameUnknown, RequestInvalid."""
    components, query = _components(request), query_of(request)
    upstreams = visible_upstreams(components, caller_of(request).principal.listable_names)
    upstream = query.one("in") or None
    if upstream is not None and upstream not in upstreams:
        raise NameUnknown(f"{upstream[:_MAX_FILTER_CHARACTERS]} is not mirrored here")
    prefix = (query.one("q") or "").strip().lower()[:_MAX_FILTER_CHARACTERS]
    page = await list_repositories(components, upstream, prefix, query.one("after") or None)
    async with page_slot(request):
        return await page_response(
            request,
            "repositories.html",
            section="repositories",
            names=page.names,
            next_after=page.next_after,
            upstream=upstream,
            upstreams=upstreams,
            prefix=prefix,
            is_first=query.one("after") is None,
            host=image_host(request),
        )


@router.get("/{path:path}")
async def repository(request: Request, path: str) -> Response:
    """If the path has a tag or a digest, shows the image or artifact (`registry.ui.image_page`). Otherwise, shows the
    description and the tags of the repository. The query can have these parameters for the tags:

    - `q`: lists only tags whose names contain this text.
    - `sort`: a value of `TagOrder`. `-` in front of the value reverses the order.
    - `after`: the cursor from the link on the previous page.

    A mirrored repository can have a short name: `ubuntu` can mean the stored name `docker.io/library/ubuntu`. If the
    path has a short name, redirects to the stored name. Raises Unauthorized, NameUnknown, ManifestUnknown,
    RequestInvalid."""
    name, reference = parse_path(path)
    stored_name = await require_readable(caller_of(request), name)
    if stored_name != name:
        # Only checks that the repository exists; the tags are not used. If the repository does not exist, this call
        # raises NameUnknown with the name that the visitor requested.
        await _components(request).content.tags(name, None, 1)
        parameters = ("q", "sort", "after") if reference is None else ("platform",)
        return redirect_with_query(request, f"{REPOSITORIES_PATH}/{path_of(stored_name, reference)}", *parameters)
    caller = caller_of(request)
    context = caller.context_for(stored_name)
    if reference is not None:
        return await image_page(request, stored_name, reference, _components(request).naming.upstream_of(stored_name))
    description = await caller.repository_browser.rendered_description(context, stored_name, TOP_HEADING_LEVEL)
    return await _tags_page(request, stored_name, description)


async def _tags_page(request: Request, name: RepositoryName, description: DescriptionView) -> Response:
    caller, query = caller_of(request), query_of(request)
    text = (query.one("q") or "").strip()[:MAX_TAG_TEXT_CHARACTERS]
    sort = query.one("sort") or TagOrder.NAME.value
    tag_query, after, context = _tag_query(text, sort), query.one("after") or None, caller.context_for(name)
    page = await caller.repository_browser.tag_page(context, name, tag_query, after, TAGS_ON_A_PAGE)
    async with page_slot(request):
        return await page_response(
            request,
            "repository.html",
            section="repositories",
            name=name,
            upstream=_components(request).naming.upstream_of(name),
            rows=page.items,
            next_after=page.next,
            # False: the repository has too many tags or manifests for the order by size, so `rows` is sorted by name.
            has_requested_order=page.order == tag_query.order,
            text=text,
            sort=sort,
            sort_links=list(_sort_links(tag_query)),
            is_descending=tag_query.is_descending,
            max_removed_tags=MAX_REMOVED_TAGS,
            description=description_html(description.html),
            is_description_fully_formatted=description.formatted,
            host=image_host(request),
            now=datetime.now(UTC),
            rights=await find_visitor_rights(caller, name),
        )


def _tag_query(text: str, sort: str) -> TagQuery:
    """Returns the filter and the order for the list of tags. Raises RequestInvalid for an unknown order."""
    try:
        order = TagOrder(sort.removeprefix("-"))
    except ValueError:
        raise RequestInvalid("`sort` is not an order of tags") from None
    return TagQuery(text, order, is_descending=sort.startswith("-"))


def _sort_links(tag_query: TagQuery) -> Iterator[SortLink]:
    """Yields a link for each order. The link of the current order reverses the order. Each other link sorts in
    descending order, except the link for names, which sorts in ascending order."""
    for order, text in _ORDERS.items():
        is_current = order is tag_query.order
        is_descending = not tag_query.is_descending if is_current else order is not TagOrder.NAME
        yield SortLink(f"{'-' if is_descending else ''}{order.value}", text, is_current)


def _components(request: Request) -> PageComponents:
    components: PageComponents = request.app.service.pages
    return components

"""The pages *Repositories* and *Repository*: the list of repositories, and the tags of one. A path with a tag
or a digest leads to the page of that image (`registry.ui.image_page`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.repository_rights import readable_repository
from registry.browse.models import DescriptionView
from registry.browse.tag_rows import MAX_TEXT_CHARACTERS
from registry.request import RequestInvalid
from registry.ui.description_page import TOP_HEADING, description_html
from registry.ui.image_page import image_page, parse_path, path_of
from registry.ui.languages import translatable
from registry.ui.page_route import (
    WaitingRoute,
    caller_of,
    image_host,
    page_response,
    page_slot,
    query_of,
    redirect_with_query,
)
from registry.ui.pages import PageComponents
from registry.ui.repository_list import list_repositories, visible_upstreams
from registry.ui.visitor_rights import visitor_rights
from storage.errors import NameUnknown
from storage.names import RepositoryName
from storage.tag_listing import TagOrder, TagQuery
from storage.tag_removal import MAX_REMOVED_TAGS

REPOSITORIES_PATH: Final = "/ui/repositories"
TAGS_ON_A_PAGE: Final = 25
"""How many tags a page shows. The number is small, because each tag may require reads of a manifest and a config."""
_MAX_FILTER_CHARACTERS: Final = 255
_ORDERS: Final = {
    TagOrder.NAME: translatable("Name"),
    TagOrder.VERSION: translatable("Version"),
    TagOrder.PUSHED: translatable("Last push"),
    TagOrder.SIZE: translatable("Size"),
}
"""The names of the orders in which tags can be listed."""

# A *slot* is the permit to render a page. A handler of a `WaitingRoute` first reads what the page shows, and holds no
# slot meanwhile. Then it acquires a slot (`page_slot`) and renders the page.
router = APIRouter(prefix=REPOSITORIES_PATH, route_class=WaitingRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class SortLink:
    """A link that sorts the tags. `sort`: the value of the parameter `sort` of the query. `text`: the name of the
    order. `is_current`: whether the page has this order."""

    sort: str
    text: str
    is_current: bool


@router.get("")
async def repositories(request: Request) -> Response:
    """Lists repositories. The query can have these parameters:

    - `in`: the name of an upstream. Without this parameter, the hosted repositories are listed.
    - `q`: a prefix of the names to list.
    - `after`: the cursor of a page."""
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
    """Shows the tags of a repository, and its description. If the path has a tag or a digest, shows the image or
    artifact instead (`registry.ui.image_page`). For the list of tags, the query can have `q`, a text that the names of
    the tags contain; `sort`, an order of tags, with `-` in front for the reverse order; and `after`, the cursor of a
    page. Some mirrored repositories can be requested by a second name: `ubuntu` can mean the stored name
    `docker.io/library/ubuntu`. A request with such a name is redirected to the page of the stored name. Raises
    Unauthorized, NameUnknown, ManifestUnknown."""
    name, reference = parse_path(path)
    stored = await readable_repository(caller_of(request), name)
    if stored != name:
        # Only checks that the repository exists. Otherwise this call raises NameUnknown with `name`, which the visitor
        # knows. After the redirect, the error would have the stored name.
        await _components(request).content.tags(name, None, 1)
        parameters = ("q", "sort", "after") if reference is None else ("platform",)
        return redirect_with_query(request, f"{REPOSITORIES_PATH}/{path_of(stored, reference)}", *parameters)
    caller = caller_of(request)
    # `caller.browser` is a `RepositoryBrowser`: it reads stored content. With `context`, it checks the caller's rights.
    context = caller.request_on(stored)
    if reference is not None:
        return await image_page(request, stored, reference, _components(request).naming.upstream_of(stored))
    description = await caller.browser.description(context, stored, TOP_HEADING)
    return await _tags_page(request, stored, description)


async def _tags_page(request: Request, name: RepositoryName, description: DescriptionView) -> Response:
    caller, query = caller_of(request), query_of(request)
    text = (query.one("q") or "").strip()[:MAX_TEXT_CHARACTERS]
    sort = query.one("sort") or TagOrder.NAME.value
    tag_query, after, context = _tag_query(text, sort), query.one("after") or None, caller.request_on(name)
    page = await caller.browser.tags(context, name, tag_query, after, TAGS_ON_A_PAGE)
    async with page_slot(request):
        return await page_response(
            request,
            "repository.html",
            section="repositories",
            name=name,
            upstream=_components(request).naming.upstream_of(name),
            rows=page.items,
            next_after=page.next,
            # False if there are too many tags or manifests to sort the tags by size: they are then sorted by name.
            has_requested_order=page.order == tag_query.order,
            text=text,
            sort=sort,
            sort_links=list(_sort_links(tag_query)),
            is_descending=tag_query.is_descending,
            max_chosen_tags=MAX_REMOVED_TAGS,  # one removal may name at most this number
            description=description_html(description.html),
            is_description_fully_formatted=description.formatted,
            host=image_host(request),
            now=datetime.now(UTC),
            rights=await visitor_rights(caller, name),
        )


def _tag_query(text: str, sort: str) -> TagQuery:
    """Returns the filter and the order for the list of tags. Raises RequestInvalid for an unknown order."""
    try:
        order = TagOrder(sort.removeprefix("-"))
    except ValueError:
        raise RequestInvalid("tags cannot be sorted by this") from None
    return TagQuery(text, order, is_descending=sort.startswith("-"))


def _sort_links(tags: TagQuery) -> Iterator[SortLink]:
    """Yields a link for each order. The link of the current order reverses the order. Any other link lists the largest
    versions, times or sizes first, but names in ascending order."""
    for order, text in _ORDERS.items():
        is_current = order is tags.order
        is_descending = not tags.is_descending if is_current else order is not TagOrder.NAME
        yield SortLink(f"{'-' if is_descending else ''}{order.value}", text, is_current)


def _components(request: Request) -> PageComponents:
    components: PageComponents = request.app.service.pages
    return components

"""The pages *Repositories* and *Repository*: which repositories there are, and the tags of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from registry.clients.registry_address import RegistryAddress
from registry.ui.page_route import PageRoute, caller_of, cookies_of, page_response, query_of, redirect
from registry.ui.pages import PageComponents
from registry.ui.repository_list import list_repositories, visible_upstreams
from storage.content import INDEXES, Manifest
from storage.errors import ManifestInvalid, ManifestUnknown, NameInvalid, NameUnknown
from storage.names import Digest, RepositoryName, Tag

REPOSITORIES_PATH: Final = "/ui/repositories"
_TAGS_ON_A_PAGE: Final = 25
"""Each tag costs reading its manifest."""
_MAX_FILTER_CHARACTERS: Final = 255

router = APIRouter(prefix=REPOSITORIES_PATH, route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class TagRow:
    """A tag as a row of the page. `size`: bytes of the config and the layers; None: an index, or a manifest that
    cannot be read. `platforms`: those that an index lists."""

    name: Tag
    digest: Digest
    media_type: str
    size: int | None
    platforms: Sequence[str]


@router.get("")
async def repositories(request: Request) -> Response:
    """Lists repositories. The query can have `in`, the name of an upstream (without it, the hosted repositories are
    listed), `q`, the beginning of the names, and `after`, the cursor of a page."""
    components, query = _components(request), query_of(request)
    upstreams = visible_upstreams(components, caller_of(request).principal.listable_names)
    upstream = query.one("in") or None
    if upstream is not None and upstream not in upstreams:
        raise NameUnknown(f"{upstream[:_MAX_FILTER_CHARACTERS]} is not mirrored here")
    prefix = (query.one("q") or "").strip().lower()[:_MAX_FILTER_CHARACTERS]
    page = await list_repositories(components, upstream, prefix, query.one("after") or None)
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
        host=_host(request),
    )


@router.get("/{path:path}")
async def repository(request: Request, path: str) -> Response:
    """Shows the tags of a repository. A name under which clients pull mirrored content, such as `ubuntu`, leads to the
    page of the name under which it is stored."""
    components = _components(request)
    try:
        name = RepositoryName(path)
    except NameInvalid:
        raise NameUnknown("there is no repository with this name") from None
    after, rows = query_of(request).one("after"), []
    page = await components.content.tags(name, after, _TAGS_ON_A_PAGE)
    for tag in page.items:
        try:
            rows.append(_tag_row(tag, await components.content.get_manifest(name, tag)))
        except ManifestUnknown:  # deleted meanwhile
            continue
    # Only after the rights are checked: where a name leads says whether somebody has pushed to it.
    stored = await caller_of(request).upkeep.router.stored_name(name)
    if stored != name:
        return redirect(f"{REPOSITORIES_PATH}/{quote(stored)}")
    next_after = (page.next_after or page.items[-1]) if page.more and page.items else None
    return await page_response(
        request,
        "repository.html",
        section="repositories",
        name=name,
        upstream=components.naming.upstream_of(name),
        rows=rows,
        next_after=next_after,
        is_first=after is None,
        host=_host(request),
    )


def _tag_row(tag: Tag, manifest: Manifest) -> TagRow:
    size: int | None = None
    platforms: tuple[str, ...] = ()
    try:
        if manifest.media_type in INDEXES:
            platforms = tuple(filter(None, (_platform(each.platform) for each in manifest.manifests)))
        else:
            size = sum(blob.size for blob in manifest.blobs)
    except ManifestInvalid:  # an earlier version of this program stored it, and it exceeds the limits of this one
        pass
    return TagRow(tag, manifest.digest, manifest.media_type, size, platforms)


def _platform(platform: object) -> str:
    """Returns a platform as `os/architecture/variant`; an empty string if it is not known, as for attestations."""
    if not isinstance(platform, dict):
        return ""
    parts = [part for key in ("os", "architecture", "variant") if isinstance(part := platform.get(key), str) and part]
    return "" if "unknown" in parts else "/".join(parts)[:100]


def _host(request: Request) -> str:
    """Returns the host with which the names of this registry's images begin."""
    return RegistryAddress(cookies_of(request).origin).host


def _components(request: Request) -> PageComponents:
    components: PageComponents = request.app.service.pages
    return components

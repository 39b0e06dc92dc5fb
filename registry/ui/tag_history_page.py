"""The page *History*: shows the changes of one tag, or of all tags of a repository. Its form restores a tag."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.management_route import audit_denial
from registry.admin.repository_rights import require_pushable, require_readable
from registry.admin.tag_routes import TagRestoreRequest, list_repository_history, list_tag_history, restore_tag
from registry.http.error_statuses import status_of
from registry.ui.image_page import image_name, parse_path, path_of
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    caller_of,
    page_response,
    page_slot,
    query_of,
    redirect,
    redirect_with_query,
    visit_of,
)
from registry.ui.pages import PageComponents
from registry.ui.visitor_rights import find_visitor_rights, receive_repository_form
from storage.errors import Denied, ManifestUnknown, RegistryError
from storage.names import Digest, RepositoryName, Tag

TAG_HISTORY_PATH: Final = "/ui/tag-history"
CHANGES_PER_PAGE: Final = 50

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes of forms. Rendering a page needs a permit, a *slot*. A `FormRoute` runs its handler without a slot, so a
handler that renders a page must acquire a slot (`page_slot`)."""


@router.get(TAG_HISTORY_PATH + "/{path:path}")
async def tag_history(request: Request, path: str) -> Response:
    """Shows the changes of a tag if `path` is `NAME:TAG`, or of all tags of a repository if `path` is `NAME`. The
    newest change is first. The query can have `after`, the cursor of a page. Needs `pull`. Raises Unauthorized,
    NameUnknown, ManifestUnknown, RequestInvalid.

    The *stored name* of a repository is its name in the store. The stored name of a mirrored repository begins with the
    upstream's name. If `NAME` is another name of the repository, redirects to the page of the stored name."""
    name, tag = _parse(path)
    stored_name = await require_readable(caller_of(request), name)
    if stored_name != name:
        # If the repository does not exist, raises NameUnknown with the name that the visitor requested.
        await _components(request).content.tags(name, None, 1)
        return redirect_with_query(request, _history_path(stored_name, tag), "after")
    return await _history_page(request, stored_name, tag, query_of(request).one("after") or None)


@_forms.post(TAG_HISTORY_PATH + "/{path:path}")
async def restore(request: Request, path: str) -> Response:
    """Restores a tag, and redirects to its history. If the form has a `digest`, points the tag at this digest.
    Otherwise, undoes the last change of the tag. If the tag cannot be restored, for example because the tag is
    immutable, shows the history with the reason. Needs `pull` and `push`. Raises Unauthorized, Denied, Unsupported,
    NameUnknown, ManifestUnknown, DigestInvalid and the errors of the store."""
    name, tag = _parse(path)
    caller, stored_name, form = await receive_repository_form(request, name, require_pushable)
    if tag is None:
        raise ManifestUnknown("the path has to end with a tag")
    digest = form.one("digest")
    restore_request = TagRestoreRequest(to=None if digest is None else Digest(digest))
    try:
        await restore_tag(caller, stored_name, tag, restore_request)
    except RegistryError as error:
        if status_of(error) >= 500:
            raise
        if isinstance(error, Denied):
            audit_denial(request, "page")
        async with page_slot(request):
            return await _history_page(request, stored_name, tag, None, error)
    return redirect(_history_path(stored_name, tag))


async def _history_page(
    request: Request, name: RepositoryName, tag: Tag | None, after: str | None, error: RegistryError | None = None
) -> Response:
    """Returns the page. `error`: why a tag was not restored; None if no restoring has failed."""
    caller = caller_of(request)
    newest = None
    if tag is None:
        page = await list_repository_history(caller, name, after, CHANGES_PER_PAGE)
    else:
        page = await list_tag_history(caller, name, tag, after, CHANGES_PER_PAGE)
        first_page = page if after is None else await list_tag_history(caller, name, tag, None, 1)
        if not first_page.items:
            raise ManifestUnknown(f"the repository never had a tag {tag}")
        newest = first_page.items[0]
    return await page_response(
        request,
        "tag_history.html",
        status_code=200 if error is None else status_of(error),
        section="repositories",
        here=visit_of(request).path,  # the path and query of the request
        name=name,
        tag=tag,
        title=image_name(name, tag),
        upstream=_components(request).naming.upstream_of(name),
        newest=newest,
        changes=page.items,
        next_after=page.next,
        is_immutable=tag is not None and caller.repository_browser.is_immutable(name, tag),
        rights=await find_visitor_rights(caller, name),
        problem=None if error is None else error.message,
    )


def _parse(path: str) -> tuple[RepositoryName, Tag | None]:
    """Returns the repository and the tag in a path `NAME` or `NAME:TAG`; the tag is None if the path has none. Raises
    NameUnknown, ManifestUnknown."""
    name, reference = parse_path(path)
    if isinstance(reference, Digest):
        raise ManifestUnknown("a digest has no history")
    return name, reference


def _components(request: Request) -> PageComponents:
    components: PageComponents = request.app.service.pages
    return components


def _history_path(name: RepositoryName, tag: Tag | None) -> str:
    return f"{TAG_HISTORY_PATH}/{path_of(name, tag)}"


router.routes.extend(_forms.routes)

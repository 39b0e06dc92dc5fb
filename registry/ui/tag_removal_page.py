"""The pages that remove several tags at once: a preview, the removal, and the undo of a removal.

`Caller.repository_browser` is the object that reads and changes the content of repositories for the pages and the API
(`registry.browse.repository_browser.RepositoryBrowser`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.repository_rights import require_deletable, require_pushable, require_readable
from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.image_page import path_of, repository_in
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    SlotlessRoute,
    caller_of,
    page_response,
    page_slot,
    query_of,
    redirect,
)
from registry.ui.tag_history_page import TAG_HISTORY_PATH
from registry.ui.visitor_rights import find_visitor_rights, receive_repository_form
from storage.names import Digest, RepositoryName, Tag
from storage.tag_removal import MAX_REMOVED_TAGS

TAG_REMOVAL_PATH: Final = "/ui/tag-removal"
TAG_RESTORATION_PATH: Final = "/ui/tag-restoration"
_MAX_RESTORED_TAGS: Final = 4 * MAX_REMOVED_TAGS
"""Largest number of tags that one form may restore. A removal deletes at most `MAX_REMOVED_TAGS` chosen tags, and at
most three referrer tags (such as `sha256-….sig`) for each chosen tag."""
_MAX_FIELD_BYTES: Final = 128 + 136 + 16
"""Largest size in bytes of one field `TAG@DIGEST` in a form: 128 for the tag, 136 for its digest, and 16 for the name
of the field and separators."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_slotless_routes = APIRouter(route_class=SlotlessRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""A *slot* is the permit to render a page. The handlers of `_slotless_routes` and `_forms` wait for the store or for a
form, so they start without a slot. They acquire one (`page_slot`) before they render a page."""


@_slotless_routes.get(TAG_REMOVAL_PATH + "/{path:path}")
async def preview_tag_removal(request: Request, path: str) -> Response:
    """Shows a preview of a removal. The query has the parameter `tag` once for each tag. Needs the rights `pull` and
    `delete`. Raises Unauthorized, Denied, Unsupported, NameUnknown, RequestInvalid, TagInvalid."""
    caller, name = caller_of(request), repository_in(path)
    await require_readable(caller, name)  # fails for a visitor who may not see the repository
    stored_name = await require_deletable(caller, name)
    tags = [Tag(tag) for tag in dict.fromkeys(query_of(request).all("tag"))]
    _check_count(len(tags), MAX_REMOVED_TAGS)
    plan = (
        await caller.repository_browser.plan_removal(caller.context_for(stored_name), stored_name, tags)
        if tags
        else None
    )
    async with page_slot(request):
        return await page_response(
            request,
            "tag_removal.html",
            section="repositories",
            name=stored_name,
            plan=plan,
            kept_until=_kept_until(caller),
        )


@_forms.post(TAG_REMOVAL_PATH + "/{path:path}")
async def remove_tags(request: Request, path: str) -> Response:
    """Removes the tags that the form names. Each field `tag` of the form is `TAG@DIGEST`: a tag, and the digest that
    the preview showed for it. Keeps a tag whose digest has changed since the preview. Shows the removed tags, with a
    form to undo the removal. Needs the rights `pull` and `delete`. Raises the errors of `preview_tag_removal`, and
    DigestInvalid."""
    caller, stored_name, form = await receive_repository_form(
        request, repository_in(path), require_deletable, MAX_REMOVED_TAGS * _MAX_FIELD_BYTES
    )
    expected = _parse_tags(form, MAX_REMOVED_TAGS)
    removed = await caller.repository_browser.remove_tags(
        caller.context_for(stored_name), stored_name, list(expected), caller.actor, expected
    )
    rights = await find_visitor_rights(caller, stored_name)
    async with page_slot(request):
        return await page_response(
            request,
            "tags_removed.html",
            section="repositories",
            # `here`: the path that the browser loads after the visitor changes the language or logs in.
            here=_repository_path(stored_name),
            name=stored_name,
            result=removed,
            may_push=rights.may_push,
            kept_until=_kept_until(caller),
        )


@router.get(TAG_RESTORATION_PATH + "/{path:path}")
async def redirect_to_tag_history(path: str) -> Response:
    """Redirects to the tag history. Raises NameUnknown.

    A browser gets here if the visitor's session had ended before the visitor sent the form that undoes a removal:

    1. The browser sends the form (`restore_tags`), and is redirected to the login page.
    2. After the login, the browser loads the path of the form with GET, which calls this function."""
    return redirect(f"{TAG_HISTORY_PATH}/{path_of(repository_in(path), None)}")


@_forms.post(TAG_RESTORATION_PATH + "/{path:path}")
async def restore_tags(request: Request, path: str) -> Response:
    """Undoes a removal: sets each tag that the form names to its digest in the form. Each field `tag` of the form is
    `TAG@DIGEST`. Does not change a tag that exists. Needs the rights `pull` and `push`. Raises Unauthorized,
    Denied, Unsupported, NameUnknown, RequestInvalid, TagInvalid, DigestInvalid."""
    caller, stored_name, form = await receive_repository_form(
        request, repository_in(path), require_pushable, _MAX_RESTORED_TAGS * _MAX_FIELD_BYTES
    )
    tags = _parse_tags(form, _MAX_RESTORED_TAGS)
    restored = await caller.repository_browser.restore_tags(stored_name, list(tags.items()), caller.actor)
    async with page_slot(request):
        return await page_response(
            request,
            "tags_restored.html",
            section="repositories",
            # `here`: the path that the browser loads after the visitor changes the language or logs in.
            here=_repository_path(stored_name),
            name=stored_name,
            result=restored,
        )


def _parse_tags(form: Query, limit: int) -> dict[Tag, Digest]:
    """Returns the tags in a form, each with its digest. Raises RequestInvalid if the form has no tag, or more than
    `limit` tags. Raises TagInvalid, DigestInvalid."""
    texts = form.all("tag")
    _check_count(len(texts), limit)
    if not texts:
        raise RequestInvalid("the form names no tag")
    pairs = (text.partition("@") for text in texts)
    return {Tag(tag): Digest(digest) for tag, _, digest in pairs}


def _check_count(count: int, limit: int) -> None:
    """Raises RequestInvalid if `count`, the number of tags in a request, is larger than `limit`."""
    if count > limit:
        raise RequestInvalid(f"{count} tags are too many; choose at most {limit}")


def _kept_until(caller: Caller) -> datetime | None:
    """Returns the time until which tags that are removed now can be restored. Returns None if the next garbage
    collection may delete their manifests."""
    grace = caller.upkeep.settings.gc.grace
    return datetime.now(UTC) + timedelta(seconds=grace) if grace else None


def _repository_path(name: RepositoryName) -> str:
    return f"/ui/repositories/{path_of(name, None)}"


router.routes.extend([*_slotless_routes.routes, *_forms.routes])

"""The pages to delete several tags at once: a preview of what would be deleted, the removal, and the undo of a removal.

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
"""The most tags that one form may restore. The form of a removal names at most `MAX_REMOVED_TAGS` tags. The removal
also deletes the referrer tags of their manifests, such as `sha256-….sig`: at most three times as many."""
_MAX_REFERENCE_BYTES: Final = 128 + 136 + 16
"""The most bytes that one tag takes in a form: 128 for the tag, 136 for its digest, and 16 for the name of the field
and separators."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_slotless_routes = APIRouter(route_class=SlotlessRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The handlers of `_slotless_routes` wait until the store has planned a removal. The handlers of `_forms` wait until a
form has arrived. Both run without a *slot* (the permit to render a page), and acquire one themselves before they render
a page (`page_slot`)."""


@_slotless_routes.get(TAG_REMOVAL_PATH + "/{path:path}")
async def tag_removal(request: Request, path: str) -> Response:
    """Shows what a removal of tags would remove. The query has the parameter `tag` once for each tag. Needs the rights
    `pull` and `delete`. Raises Unauthorized, Denied, Unsupported, NameUnknown, RequestInvalid, TagInvalid."""
    caller, name = caller_of(request), repository_in(path)
    await require_readable(caller, name)  # fails for a visitor who may not see the repository
    stored = await require_deletable(caller, name)
    tags = [Tag(tag) for tag in dict.fromkeys(query_of(request).all("tag"))]
    _check_count(len(tags), MAX_REMOVED_TAGS)
    plan = await caller.repository_browser.plan_removal(caller.context_for(stored), stored, tags) if tags else None
    async with page_slot(request):
        return await page_response(
            request, "tag_removal.html", section="repositories", name=stored, plan=plan, kept_until=_kept_until(caller)
        )


@_forms.post(TAG_REMOVAL_PATH + "/{path:path}")
async def remove_tags(request: Request, path: str) -> Response:
    """Removes the tags that the form names. Each field `tag` of the form is `TAG@DIGEST`: a tag, and the digest that
    the preview showed for it. Does not remove a tag that points at another digest now. Shows what was removed, with a
    form to undo the removal. Needs the rights `pull` and `delete`. Raises the errors of `tag_removal`, and
    DigestInvalid."""
    caller, stored, form = await receive_repository_form(
        request, repository_in(path), require_deletable, MAX_REMOVED_TAGS * _MAX_REFERENCE_BYTES
    )
    expected = _tags_in(form, MAX_REMOVED_TAGS)
    removed = await caller.repository_browser.remove_tags(
        caller.context_for(stored), stored, list(expected), caller.actor, expected
    )
    rights = await find_visitor_rights(caller, stored)
    async with page_slot(request):
        return await page_response(
            request,
            "tags_removed.html",
            section="repositories",
            here=_repository_path(stored),  # the page that is loaded after a change of the language or a login
            name=stored,
            result=removed,
            may_push=rights.may_push,
            kept_until=_kept_until(caller),
        )


@router.get(TAG_RESTORATION_PATH + "/{path:path}")
async def tag_restoration(path: str) -> Response:
    """Redirects to the tag history. A visitor whose session has ended gets the login page when they undo a removal. The
    login then redirects the browser to this path with GET. Raises NameUnknown."""
    return redirect(f"{TAG_HISTORY_PATH}/{path_of(repository_in(path), None)}")


@_forms.post(TAG_RESTORATION_PATH + "/{path:path}")
async def restore_tags(request: Request, path: str) -> Response:
    """Undoes a removal: sets the tags that the form names to their digests again. Each field `tag` of the form is
    `TAG@DIGEST`. Does not change a tag that exists again. Needs the rights `pull` and `push`. Raises Unauthorized,
    Denied, Unsupported, NameUnknown, RequestInvalid, TagInvalid, DigestInvalid."""
    caller, stored, form = await receive_repository_form(
        request, repository_in(path), require_pushable, _MAX_RESTORED_TAGS * _MAX_REFERENCE_BYTES
    )
    tags = _tags_in(form, _MAX_RESTORED_TAGS)
    restored = await caller.repository_browser.restore_tags(stored, list(tags.items()), caller.actor)
    async with page_slot(request):
        return await page_response(
            request,
            "tags_restored.html",
            section="repositories",
            here=_repository_path(stored),  # the page that is loaded after a change of the language or a login
            name=stored,
            result=restored,
        )


def _tags_in(form: Query, limit: int) -> dict[Tag, Digest]:
    """Returns the tags that a form names, with their digests. Raises RequestInvalid, TagInvalid, DigestInvalid."""
    texts = form.all("tag")
    _check_count(len(texts), limit)
    if not texts:
        raise RequestInvalid("the form names no tag")
    pairs = (text.partition("@") for text in texts)
    return {Tag(tag): Digest(digest) for tag, _, digest in pairs}


def _check_count(count: int, limit: int) -> None:
    """Raises RequestInvalid if the number of tags is larger than `limit`."""
    if count > limit:
        raise RequestInvalid(f"{count} tags are too many; choose at most {limit}")


def _kept_until(caller: Caller) -> datetime | None:
    """Returns the time until which the registry keeps content that is removed now, so that it can be restored. Returns
    None if the next garbage collection may delete it."""
    grace = caller.upkeep.settings.gc.grace
    return datetime.now(UTC) + timedelta(seconds=grace) if grace else None


def _repository_path(name: RepositoryName) -> str:
    return f"/ui/repositories/{path_of(name, None)}"


router.routes.extend([*_slotless_routes.routes, *_forms.routes])

"""The routes of `/api/v1/repositories/{name}/tags`, which show the history of tags, and move or restore a tag. The
docstrings of the routes are the descriptions in the OpenAPI document.

The repository name in the path may contain slashes, and even `/tags/`. The method and the end of the path select the
route: `/tags/TAG/history`, `/tag-history`, `/tags/TAG/restore` or `/tags/TAG`.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path
from pydantic import Field

from registry.admin import models
from registry.admin.body_model import BodyModel
from registry.admin.caller import AnyCaller, Caller
from registry.admin.management_route import AfterQuery, LimitQuery
from registry.admin.management_router import management_router
from registry.admin.repository_body_routes import PushRoute
from registry.admin.repository_rights import require_pushable, require_readable
from registry.admin.tag_models import TagChangeResponse, TagMoveResponse
from registry.http.query import parse_number
from registry.request import RequestInvalid
from storage.access import Action
from storage.names import Digest, RepositoryName, Tag, as_reference
from storage.upkeep.tag_changes import TagChanger

router = management_router()
_push_router = management_router(PushRoute)
"""The router of the routes that change a tag. They need `push` and `pull` on the repository."""


async def path_repository(name: Annotated[str, Path(examples=["team/app"])]) -> RepositoryName:
    """Returns the name of the repository in the path. Raises NameInvalid."""
    return RepositoryName(name)


async def path_tag(tag: Annotated[str, Path(examples=["v1"])]) -> Tag:
    """Returns the tag in the path. Raises TagInvalid."""
    return Tag(tag)


PathRepository = Annotated[RepositoryName, Depends(path_repository)]
PathTag = Annotated[Tag, Depends(path_tag)]


class TagMoveRequest(BodyModel):
    """The manifest that the tag is to point at. Only an admin may set `force`."""

    digest: str = Field(
        description="The digest of the manifest, or a tag that points at it", max_length=200, examples=["v1"]
    )
    force: bool = Field(default=False, description="Move the tag even if it is immutable")


class TagRestoreRequest(BodyModel):
    """The manifest that the tag is to point at again. Only an admin may set `force`.

    - `to`: the manifest with this digest.
    - `at`: the manifest that the tag pointed at then.
    - Both are null: the manifest that the tag pointed at before its last change.
    """

    to: str | None = Field(default=None, description="The digest of a manifest", max_length=200)
    at: models.UtcTime | None = None
    force: bool = Field(default=False, description="Move the tag even if it is immutable")


@router.get("/repositories/{name:path}/tags/{tag}/history", tags=["tags"])
async def list_tag_history(
    caller: AnyCaller, name: PathRepository, tag: PathTag, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.ListPage[TagChangeResponse]:
    """Lists the changes of a tag, newest first: pushes, moves and deletes. The list is empty for a tag that never
    existed. Needs `pull` on the repository."""
    return await _changes_page(caller, name, tag, after, limit)


@router.get("/repositories/{name:path}/tag-history", tags=["tags"])
async def list_repository_history(
    caller: AnyCaller, name: PathRepository, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.ListPage[TagChangeResponse]:
    """Lists the changes of all tags of a repository, including deleted tags, newest first. Needs `pull` on the
    repository."""
    return await _changes_page(caller, name, None, after, limit)


@_push_router.post("/repositories/{name:path}/tags/{tag}/restore", tags=["tags"])
async def restore_tag(
    caller: AnyCaller, name: PathRepository, tag: PathTag, body: TagRestoreRequest
) -> TagMoveResponse:
    """Points a tag at an earlier manifest again. Creates the tag again if it was deleted. Puts the manifest back if it
    was deleted and garbage collection has not removed it yet. Needs `push` and `pull` on the repository."""
    stored_name = await require_pushable(caller, name)
    _check_force(caller, body.force)
    if body.to is not None and body.at is not None:
        raise RequestInvalid("`to` and `at` contradict each other; send one of them")
    move = await _tag_changer(caller).restore(
        stored_name,
        tag,
        to=None if body.to is None else Digest(body.to),
        at=None if body.at is None else body.at.timestamp(),
        by=caller.actor,
        force=body.force,
    )
    return TagMoveResponse.from_stored(name, move)


@_push_router.put("/repositories/{name:path}/tags/{tag}", tags=["tags"])
async def move_tag(caller: AnyCaller, name: PathRepository, tag: PathTag, body: TagMoveRequest) -> TagMoveResponse:
    """Points a tag at a manifest of the repository. Creates the tag if it does not exist. Puts the manifest back if it
    was deleted and garbage collection has not removed it yet. Needs `push` and `pull` on the repository."""
    stored_name = await require_pushable(caller, name)
    _check_force(caller, body.force)
    move = await _tag_changer(caller).move(
        stored_name, tag, as_reference(body.digest), by=caller.actor, force=body.force
    )
    return TagMoveResponse.from_stored(name, move)


async def _changes_page(
    caller: Caller, name: RepositoryName, tag: Tag | None, after: str | None, limit: int
) -> models.ListPage[TagChangeResponse]:
    """Returns a page of the changes of `tag`; None: of all tags. `name`: the repository's name as the client wrote it.
    Raises Unauthorized, NameUnknown, RequestInvalid."""
    # The repository's name in the store, which can differ from `name`. A bearer token may contain either name.
    stored_name = await require_readable(caller, name)
    page = await caller.upkeep.store.tag_history.changes(stored_name, tag, _entry_id_or_none(after), limit)
    may_see_clients = caller.principal.may(Action.PUSH, stored_name, name)
    return models.list_page(
        page,
        lambda change: TagChangeResponse.from_stored(change, with_client=may_see_clients),
        lambda change: str(change.id),
    )


def _tag_changer(caller: Caller) -> TagChanger:
    store = caller.upkeep.store
    return TagChanger(store.tag_history, store.immutable_tags)


def _check_force(caller: Caller, force: bool) -> None:
    """If `force` is set, checks that the caller is an admin. Raises Denied; Unauthorized if the caller has no
    account."""
    if force:
        caller.rights.check_admin()


def _entry_id_or_none(after: str | None) -> int | None:
    """Returns the id in the query parameter `after`. Raises RequestInvalid if the parameter is not a number."""
    return None if after is None else parse_number(after, f"{after!r} is not from the field `next` of an earlier page")


router.routes.extend(_push_router.routes)

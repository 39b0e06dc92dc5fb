"""The routes of `/api/v1/mirror/frozen`. A frozen tag is a mirrored tag that stays at one digest, even when
the upstream moves the tag. The docstrings of the routes are the descriptions in the OpenAPI document. They address the
caller (the account that sends the request) as "you"."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import Query
from pydantic import Field

from registry.admin import models
from registry.admin.body_model import BodyModel
from registry.admin.caller import Caller, LoggedInCaller
from registry.admin.management_route import LimitQuery
from registry.admin.management_router import management_router
from registry.admin.tag_models import FrozenTagResponse
from registry.upkeep.frozen_tags import freeze_tag, parse_tag_reference, unfreeze_tag
from storage.access import Action
from storage.content import Page
from storage.errors import Denied
from storage.names import RepositoryName
from storage.upstream_tags import FrozenTag

_BATCH_SIZE: Final = 100
"""Number of frozen tags to read at a time. After each batch, the event loop may run other requests."""
MAX_REFERENCE_CHARACTERS: Final = 600
"""Maximum length of a reference in a request. A reference with the longest possible repository name, tag and
digest is shorter."""
ReferenceQuery = Annotated[
    str,
    Query(description="NAME:TAG, as in `docker pull`", max_length=MAX_REFERENCE_CHARACTERS, examples=["ubuntu:24.04"]),
]

router = management_router()


class TagToFreeze(BodyModel):
    """A tag, and optionally the digest at which it is to be frozen."""

    reference: str = Field(
        description="`NAME:TAG` freezes the tag at the digest that a pull would get now. `NAME:TAG@DIGEST` freezes the "
        "tag at DIGEST",
        max_length=MAX_REFERENCE_CHARACTERS,
        examples=["ubuntu:24.04"],
    )


@router.get("/mirror/frozen", tags=["mirror"])
async def list_frozen_tags(
    caller: LoggedInCaller,
    after: Annotated[
        str | None, Query(description="The field `next` of the previous page", max_length=MAX_REFERENCE_CHARACTERS)
    ] = None,
    limit: LimitQuery = 100,
) -> models.ListPage[FrozenTagResponse]:
    """Lists the frozen tags, sorted by repository and tag. An admin sees all of them. If you are not an admin, you see
    the frozen tags of the repositories on which you have the action `admin`."""
    return models.list_page(await _visible_page(caller, after, limit), FrozenTagResponse.from_stored, str)


@router.put("/mirror/frozen", tags=["mirror"])
async def freeze(caller: LoggedInCaller, body: TagToFreeze) -> FrozenTagResponse:
    """Freezes a mirrored tag: the tag stays at one digest, and the registry no longer asks the upstream for the tag.
    You have to be an admin, or have the action `admin` on the repository."""
    tag_reference = parse_tag_reference(body.reference)
    await check_may_manage(caller, tag_reference.repository)
    upkeep = caller.upkeep
    result = await freeze_tag(upkeep.router, upkeep.store.upstream_tags, tag_reference, by=caller.actor)
    return FrozenTagResponse.from_stored(result.frozen_tag)


@router.delete("/mirror/frozen", tags=["mirror"], status_code=204)
async def unfreeze(caller: LoggedInCaller, reference: ReferenceQuery) -> None:
    """Unfreezes a tag: the tag follows the upstream again. The setting `cooldown` of the upstream, which delays new
    digests of a tag, applies again. You have to be an admin, or have the action `admin` on the repository."""
    tag_reference = parse_tag_reference(reference)
    await check_may_manage(caller, tag_reference.repository)
    await unfreeze_tag(caller.upkeep.router, caller.upkeep.store.upstream_tags, tag_reference, by=caller.actor)


async def check_may_manage(caller: Caller, repository: RepositoryName) -> None:
    """Raises Denied unless the caller is an admin or has the action `admin` on the repository. The repository need not
    exist."""
    if caller.rights.admin:
        return
    # The repository's name in the store, such as `docker.io/library/ubuntu`. `repository` is the name that the client
    # used, such as `ubuntu`.
    stored_name = await caller.upkeep.router.stored_name(repository)
    if not caller.principal.may(Action.ADMIN, stored_name, repository):
        raise Denied(f"{caller.rights.account_name} does not have the action admin on {repository}")


async def _visible_page(caller: Caller, after: str | None, limit: int) -> Page[FrozenTag]:
    """Returns at most `limit` of the frozen tags that the caller may see, sorted by repository and tag. `after`: the
    last tag before the page, in the form `REPOSITORY:TAG`; None for the first page."""
    upstream_tags = caller.upkeep.store.upstream_tags
    if caller.rights.admin:
        return await upstream_tags.frozen_tags(after, limit)
    managed_names = caller.principal.names_allowing(Action.ADMIN)
    visible: list[FrozenTag] = []
    while True:
        batch = await upstream_tags.frozen_tags(after, _BATCH_SIZE)
        for frozen in batch.items:
            if frozen.repository in managed_names:
                if len(visible) == limit:
                    return Page(visible, more=True)
                visible.append(frozen)
            after = str(frozen)
        if not batch.more:
            return Page(visible)
        await asyncio.sleep(0)  # lets the event loop run other requests

"""Routes of `/api/v1/groups` and `/api/v1/grants`.

A *grant* allows a *subject* some actions on the repositories whose names match a *pattern*. The subject is an account,
a group, `authenticated` (all accounts) or `everyone` (even without a login). The docstrings of the routes are the
descriptions in the OpenAPI document; "you" is the caller, the account that sends the request.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import Query

from registry.admin import models
from registry.admin.caller import AdminCaller, Caller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery, PathMember, PathName
from registry.admin.management_router import management_router
from registry.auth.administration import parse_pattern
from registry.auth.rights.sealed_cursors import SEALED_LENGTH, CursorKind
from storage.access import AccountInvalid, AccountName, Grant, Grantee
from storage.content import Page

_BATCH_SIZE: Final = 100
"""Number of grants that are read and filtered at once. The event loop runs other requests between two batches."""
_MAX_BATCHES: Final = 100
"""Largest number of batches that are read for one page. Without this limit, a request of a caller who may see only few
grants could read all grants in the store."""
SubjectQuery = Annotated[str, Query(description="The subject of the grant", max_length=80, examples=["group:dev"])]
PatternQuery = Annotated[str, Query(max_length=255, examples=["team/**"])]

router = management_router()


@router.get("/groups", tags=["groups"])
async def list_groups(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.ListPage[models.GroupResponse]:
    """Lists groups with their members, sorted by the groups' names."""
    page = caller.accounts.groups(after, limit)
    return models.list_page(page, models.GroupResponse.from_stored, lambda name_and_members: name_and_members[0])


@router.post("/groups", status_code=201, tags=["groups"])
async def add_group(caller: AdminCaller, body: models.NewGroup) -> models.GroupResponse:
    """Adds a group without members."""
    name = AccountName(body.name)
    await caller.accounts.add_group(name, by=caller.actor)
    return models.GroupResponse(name=name, members=[])


@router.get("/groups/{name}", tags=["groups"])
async def get_group(caller: AdminCaller, name: PathName) -> models.GroupResponse:
    """Shows a group and its members."""
    return models.GroupResponse.from_stored(caller.administration.group(name))


@router.delete("/groups/{name}", status_code=204, tags=["groups"])
async def remove_group(caller: AdminCaller, name: PathName) -> None:
    """Removes a group and the grants to the group. The accounts of its members stay."""
    await caller.accounts.remove_group(name, by=caller.actor)


@router.put("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def join_group(caller: AdminCaller, name: PathName, member: PathMember) -> None:
    """Adds a member to a group. The member need not have an account in the store: it may be an account in an htpasswd
    file."""
    await caller.accounts.add_member(name, member, by=caller.actor)


@router.delete("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def leave_group(caller: AdminCaller, name: PathName, member: PathMember) -> None:
    """Removes a member from a group."""
    await caller.accounts.remove_member(name, member, by=caller.actor)


@router.get("/grants", tags=["grants"])
async def list_grants(
    caller: LoggedInCaller,
    subject: Annotated[str | None, Query(description="Only grants to this subject", max_length=80)] = None,
    account: Annotated[
        str | None, Query(alias="for", description="All grants that apply to this account", max_length=80)
    ] = None,
    after: Annotated[
        str | None, Query(description="The field `next` of the previous page", max_length=SEALED_LENGTH)
    ] = None,
    limit: LimitQuery = 100,
) -> models.ListPage[models.GrantResponse]:
    """Lists grants. An admin sees all grants. If you are not an admin, you see a grant if you have the action `admin`
    on everything that its pattern matches. With `for` and your own name, you see all grants that apply to you. A page
    may have fewer than `limit` grants although more pages follow. Only the last page has a null `next`."""
    after = await caller.cursors.read(CursorKind.GRANTS, after)
    page = await _visible_page(caller, _subjects(caller, subject, account), after, limit, show_all=account is not None)
    response = models.list_page(page, models.GrantResponse.from_stored, _grant_key)
    if page.next_after is not None:  # encrypted, because it can be the key of a grant that the caller may not see
        response.next = await caller.cursors.seal(CursorKind.GRANTS, page.next_after)
    return response


def _subjects(caller: Caller, subject: str | None, account: str | None) -> list[Grantee] | None:
    """Returns the subjects whose grants the caller asks for: `subject`, or all subjects whose grants apply to `account`
    (the query parameter `for`). Returns None, which means all subjects, if both parameters are None. Raises
    AccountInvalid if neither is None, and AccountHidden if the caller may not see the account."""
    if account is None:
        return None if subject is None else [Grantee.parse(subject)]
    if subject is not None:
        raise AccountInvalid("the query parameters `subject` and `for` contradict each other; give one of them")
    name = AccountName(account)
    caller.rights.check_may_see(name)
    return caller.administration.subjects_of(name)


async def _visible_page(
    caller: Caller, subjects: list[Grantee] | None, after: str | None, limit: int, *, show_all: bool
) -> Page[Grant]:
    """Returns a page of the grants to `subjects`; None means all subjects. If `show_all` is True or the caller is an
    admin, leaves out no grant.

    Otherwise, leaves out the grants that the caller may not see, and reads at most `_MAX_BATCHES` batches. If this
    limit ends the page, its `next_after` is the key of the last grant that was read, even if the caller may not see
    that grant."""
    if show_all or caller.rights.admin:
        return caller.accounts.grant_page(subjects, after, limit)
    visible: list[Grant] = []
    for _ in range(_MAX_BATCHES):
        batch = caller.accounts.grant_page(subjects, after, _BATCH_SIZE)
        for grant in batch.items:
            if caller.rights.may_grant(grant.pattern):
                if len(visible) == limit:
                    return Page(visible, more=True)
                visible.append(grant)
            after = _grant_key(grant)
        if not batch.more:
            return Page(visible)
        await asyncio.sleep(0)  # lets the event loop run other requests
    return Page(visible, more=True, next_after=after)


def _grant_key(grant: Grant) -> str:
    """Returns the key by which the store sorts grants."""
    return f"{grant.subject} {grant.pattern}"


@router.put("/grants", tags=["grants"])
async def put_grant(caller: LoggedInCaller, body: models.NewGrant) -> models.GrantResponse:
    """Grants a subject some actions on the repositories that a pattern matches. Replaces an earlier grant to the
    subject for the same pattern. You have to be an admin, or have the action `admin` on everything that the pattern
    matches."""
    pattern = parse_pattern(body.pattern)
    caller.rights.check_may_grant(pattern)
    grant = Grant(Grantee.parse(body.subject), pattern, models.parse_action_words(body.actions))
    await caller.administration.put_grants([grant], by=caller.actor)
    return models.GrantResponse.from_stored(grant)


@router.delete("/grants", status_code=204, tags=["grants"])
async def remove_grant(caller: LoggedInCaller, subject: SubjectQuery, pattern: PatternQuery) -> None:
    """Removes the grant to the subject for the pattern. You have to be an admin, or have the action `admin` on
    everything that the pattern matches."""
    parsed_pattern = parse_pattern(pattern)
    caller.rights.check_may_grant(parsed_pattern)
    await caller.administration.remove_grant(Grantee.parse(subject), parsed_pattern, by=caller.actor)

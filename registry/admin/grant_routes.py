"""`/api/v1/groups` and `/api/v1/grants`: groups, and grants on repositories."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Query

from registry.admin import models
from registry.admin.caller import AdminCaller, Caller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery, ManagementRoute, PathMember, PathName
from registry.auth.administration import parse_pattern
from registry.auth.rights.sealed_cursors import SEALED_LENGTH, CursorKind
from storage.access import AccountInvalid, AccountName, Grant, Grantee
from storage.content import Page

_BATCH_GRANTS: Final = 100
"""Grants that are compared before other requests get their turn."""
_MOST_BATCHES: Final = 100
"""Batches that one page reads at most."""
SubjectQuery = Annotated[str, Query(description="As in a grant", max_length=80, examples=["group:dev"])]
PatternQuery = Annotated[str, Query(max_length=255, examples=["team/**"])]

router = APIRouter(route_class=ManagementRoute)


@router.get("/groups", tags=["groups"])
async def list_groups(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Group]:
    """Lists groups with their members, in the order of their names."""
    return models.listed(caller.accounts.groups(after, limit), models.Group.of, lambda group: group[0])


@router.post("/groups", status_code=201, tags=["groups"])
async def add_group(caller: AdminCaller, body: models.NewGroup) -> models.Group:
    """Adds a group without members."""
    name = AccountName(body.name)
    await caller.accounts.add_group(name, by=caller.actor)
    return models.Group(name=name, members=[])


@router.get("/groups/{name}", tags=["groups"])
async def get_group(caller: AdminCaller, name: PathName) -> models.Group:
    """Shows a group and its members."""
    return models.Group.of(caller.administration.group(name))


@router.delete("/groups/{name}", status_code=204, tags=["groups"])
async def remove_group(caller: AdminCaller, name: PathName) -> None:
    """Removes a group and its grants. Its members stay."""
    await caller.accounts.remove_group(name, by=caller.actor)


@router.put("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def join_group(caller: AdminCaller, name: PathName, member: PathMember) -> None:
    """Adds a member to a group. The member may be an account that only an htpasswd file or an issuer knows."""
    await caller.accounts.add_member(name, member, by=caller.actor)


@router.delete("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def leave_group(caller: AdminCaller, name: PathName, member: PathMember) -> None:
    """Removes a member from a group."""
    await caller.accounts.remove_member(name, member, by=caller.actor)


@router.get("/grants", tags=["grants"])
async def list_grants(
    caller: LoggedInCaller,
    subject: Annotated[str | None, Query(description="Only of this subject", max_length=80)] = None,
    account: Annotated[
        str | None, Query(alias="for", description="All that count for this account", max_length=80)
    ] = None,
    after: Annotated[str | None, Query(description="`next` of the page before", max_length=SEALED_LENGTH)] = None,
    limit: LimitQuery = 100,
) -> models.Listed[models.Grant]:
    """Lists grants. An admin sees all; others see the grants on patterns on which they may grant themselves, and with
    `for` those that count for their own account. A page may hold fewer than `limit`."""
    after = await caller.cursors.read(CursorKind.GRANTS, after)
    page = await _page(caller, _subjects(caller, subject, account), after, limit, own=account is not None)
    following = models.listed(page, models.Grant.of, _key)
    if page.next_after is not None:
        following.next = await caller.cursors.seal(CursorKind.GRANTS, page.next_after)
    return following


def _subjects(caller: Caller, subject: str | None, account: str | None) -> list[Grantee] | None:
    """Returns the subjects whose grants the query asks for, or None for all."""
    if account is None:
        return None if subject is None else [Grantee.parse(subject)]
    if subject is not None:
        raise AccountInvalid("subject and for contradict each other")
    name = AccountName(account)
    caller.rights.check_may_see(name)
    return caller.administration.subjects_of(name)


async def _page(
    caller: Caller, subjects: list[Grantee] | None, after: str | None, limit: int, *, own: bool
) -> Page[Grant]:
    """Returns a page of the grants that the caller may see. If the page stopped
    before it was full, its `place` is the last grant that was compared, which the caller may be unable to see."""
    if own or caller.rights.admin:
        return caller.accounts.grant_page(subjects, after, limit)
    found: list[Grant] = []
    for _ in range(_MOST_BATCHES):
        batch = caller.accounts.grant_page(subjects, after, _BATCH_GRANTS)
        for grant in batch.items:
            if caller.rights.may_grant(grant.pattern):
                if len(found) == limit:
                    return Page(found, more=True)
                found.append(grant)
            after = _key(grant)
        if not batch.more:
            return Page(found)
        await asyncio.sleep(0)
    return Page(found, more=True, next_after=after)


def _key(grant: Grant) -> str:
    return f"{grant.subject} {grant.pattern}"


@router.put("/grants", tags=["grants"])
async def put_grant(caller: LoggedInCaller, body: models.NewGrant) -> models.Grant:
    """Grants actions on a pattern, in place of what the subject had for that pattern. The caller has to be an admin, or
    to have the action `admin` on everything that the pattern matches."""
    pattern = parse_pattern(body.pattern)
    caller.rights.check_grant(pattern)
    grant = Grant(Grantee.parse(body.subject), pattern, models.parse_action_words(body.actions))
    await caller.administration.put_grants([grant], by=caller.actor)
    return models.Grant.of(grant)


@router.delete("/grants", status_code=204, tags=["grants"])
async def remove_grant(caller: LoggedInCaller, subject: SubjectQuery, pattern: PatternQuery) -> None:
    """Removes what the subject was granted for that pattern."""
    names = parse_pattern(pattern)
    caller.rights.check_grant(names)
    await caller.administration.remove_grant(Grantee.parse(subject), names, by=caller.actor)

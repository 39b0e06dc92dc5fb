"""`/api/v1/groups` and `/api/v1/grants`: who may do what."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Query

from registry.admin import models
from registry.admin.account_routes import AfterQuery, LimitQuery, NamePath
from registry.admin.caller import AdminCaller, Caller, LoggedInCaller
from registry.admin.management_route import ManagementRoute
from registry.auth.administration import parse_actions, parse_pattern
from registry.auth.rights.sealed_cursors import SEALED_LENGTH, CursorKind
from storage.access import AccountInvalid, AccountName, Grant, Grantee
from storage.content import Page

router = APIRouter(route_class=ManagementRoute)

SubjectQuery = Annotated[str, Query(description="As in a grant", max_length=80, examples=["group:dev"])]
_BATCH_GRANTS: Final = 100
"""Grants that are compared before others get their turn."""
_MOST_BATCHES: Final = 100
"""Batches that are looked at for a page."""
PatternQuery = Annotated[str, Query(max_length=255, examples=["team/**"])]


@router.get("/groups", tags=["groups"])
async def list_groups(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Group]:
    """Groups and their members, in the order of their names."""
    page = caller.administration.accounts.groups(after, limit)
    return models.listed(page, models.Group.of, lambda group: group[0])


@router.post("/groups", status_code=201, tags=["groups"])
async def add_group(caller: AdminCaller, body: models.NewGroup) -> models.Group:
    """Adds a group without members."""
    name = AccountName(body.name)
    await caller.administration.accounts.add_group(name, by=caller.actor)
    return models.Group(name=name, members=[])


@router.get("/groups/{name}", tags=["groups"])
async def get_group(caller: AdminCaller, name: NamePath) -> models.Group:
    """A group and its members."""
    return models.Group.of(caller.administration.group(AccountName(name)))


@router.delete("/groups/{name}", status_code=204, tags=["groups"])
async def remove_group(caller: AdminCaller, name: NamePath) -> None:
    """Removes a group, and what was granted to it. Its members stay."""
    await caller.administration.accounts.remove_group(AccountName(name), by=caller.actor)


@router.put("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def join_group(caller: AdminCaller, name: NamePath, member: NamePath) -> None:
    """Makes an account a member. It may be one that is known from htpasswd or an issuer alone."""
    await caller.administration.accounts.add_member(AccountName(name), AccountName(member), by=caller.actor)


@router.delete("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def leave_group(caller: AdminCaller, name: NamePath, member: NamePath) -> None:
    """Takes a member out."""
    await caller.administration.accounts.remove_member(AccountName(name), AccountName(member), by=caller.actor)


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
    """An admin sees all; others what they may grant themselves, and with `for` what counts for their own account.
    A page may be shorter than asked for."""
    after = await caller.cursors.read(CursorKind.GRANTS, after)
    page = await _page(caller, _subjects(caller, subject, account), after, limit, own=account is not None)
    following = models.listed(page, models.Grant.of, _key)
    if page.place is not None:
        following.next = await caller.cursors.seal(CursorKind.GRANTS, page.place)
    return following


def _subjects(caller: Caller, subject: str | None, account: str | None) -> list[Grantee] | None:
    if account is None:
        return None if subject is None else [Grantee.parse(subject)]
    if subject is not None:
        raise AccountInvalid("subject and for contradict each other")
    name = AccountName(account)
    caller.authority.check_may_see(name)
    return caller.administration.subjects_of(name)


async def _page(
    caller: Caller, subjects: list[Grantee] | None, after: str | None, limit: int, *, own: bool
) -> Page[Grant]:
    """`place`: of a page that ends at a grant which is not shown."""
    accounts, authority = caller.administration.accounts, caller.authority
    if own or authority.admin:
        return accounts.grant_page(subjects, after, limit)
    found: list[Grant] = []
    begun = after
    for _ in range(_MOST_BATCHES):
        batch = accounts.grant_page(subjects, after, _BATCH_GRANTS)
        for grant in batch.items:
            shown = authority.may_grant(grant.pattern)
            if shown and len(found) == limit:
                return Page(found, more=True)
            if authority.exhausted and after != begun:  # whether this one is shown is for the next page to find out
                return Page(found, more=True, place=after)
            found += [grant] if shown else []
            after = _key(grant)
        if not batch.more:
            return Page(found)
        await asyncio.sleep(0)
    return Page(found, more=True, place=after)


def _key(grant: Grant) -> str:
    return f"{grant.subject} {grant.pattern}"


@router.put("/grants", tags=["grants"])
async def put_grant(caller: LoggedInCaller, body: models.NewGrant) -> models.Grant:
    """Grants, in place of what the subject had for that pattern. For admins, and for who holds the action `admin` on
    all that the pattern matches."""
    pattern = parse_pattern(body.pattern)
    caller.authority.check_grant(pattern)
    grant = Grant(Grantee.parse(body.subject), pattern, parse_actions(",".join(body.actions)))
    await caller.administration.put_grants([grant], by=caller.actor)
    return models.Grant.of(grant)


@router.delete("/grants", status_code=204, tags=["grants"])
async def remove_grant(caller: LoggedInCaller, subject: SubjectQuery, pattern: PatternQuery) -> None:
    """Takes back what the subject was granted for that pattern."""
    names = parse_pattern(pattern)
    caller.authority.check_grant(names)
    await caller.administration.remove_grant(Grantee.parse(subject), names, by=caller.actor)

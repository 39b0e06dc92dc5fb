"""`/api/v1/groups` and `/api/v1/grants`: who may do what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from registry.admin import models
from registry.admin.bodies import ManagementRoute
from registry.admin.calling import Admin, Caller, Somebody
from registry.admin.users import After, Limit, NamePath
from registry.auth.reading import read_actions, read_pattern
from storage.access import AccountInvalid, AccountName, Grant, Subject
from storage.content import Page

router = APIRouter(route_class=ManagementRoute)

WhomQuery = Annotated[str, Query(description="As in a grant", max_length=80, examples=["group:dev"])]
PatternQuery = Annotated[str, Query(max_length=255, examples=["team/**"])]


@router.get("/groups", tags=["groups"])
async def list_groups(caller: Admin, after: After = None, limit: Limit = 100) -> models.Listed[models.Group]:
    """Groups and their members, in the order of their names."""
    page = caller.administration.accounts.groups(after, limit)
    return models.listed(page, models.Group.of, lambda group: group[0])


@router.post("/groups", status_code=201, tags=["groups"])
async def add_group(caller: Admin, body: models.NewGroup) -> models.Group:
    """Adds a group without members."""
    name = AccountName(body.name)
    await caller.administration.accounts.add_group(name, by=caller.actor)
    return models.Group(name=name, members=[])


@router.get("/groups/{name}", tags=["groups"])
async def get_group(caller: Admin, name: NamePath) -> models.Group:
    """A group and its members."""
    return models.Group.of(caller.administration.group(AccountName(name)))


@router.delete("/groups/{name}", status_code=204, tags=["groups"])
async def remove_group(caller: Admin, name: NamePath) -> None:
    """Removes a group, and what was granted to it. Its members stay."""
    await caller.administration.accounts.remove_group(AccountName(name), by=caller.actor)


@router.put("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def join_group(caller: Admin, name: NamePath, member: NamePath) -> None:
    """Makes an account a member. It may be one that is known from htpasswd or an issuer alone."""
    await caller.administration.accounts.add_member(AccountName(name), AccountName(member), by=caller.actor)


@router.delete("/groups/{name}/members/{member}", status_code=204, tags=["groups"])
async def leave_group(caller: Admin, name: NamePath, member: NamePath) -> None:
    """Takes a member out."""
    await caller.administration.accounts.remove_member(AccountName(name), AccountName(member), by=caller.actor)


@router.get("/grants", tags=["grants"])
async def list_grants(
    caller: Somebody,
    subject: Annotated[str | None, Query(description="Only of this subject", max_length=80)] = None,
    account: Annotated[
        str | None, Query(alias="for", description="All that count for this account", max_length=80)
    ] = None,
    after: Annotated[str | None, Query(description="`next` of the page before", max_length=400)] = None,
    limit: Limit = 100,
) -> models.Listed[models.Grant]:
    """An admin sees all; others what they may grant themselves, and with `for` what counts for their own account."""
    page = _page(_chosen(caller, subject, account), after, limit)
    return models.listed(page, models.Grant.of, _key)


def _chosen(caller: Caller, subject: str | None, account: str | None) -> list[Grant]:
    if account is not None:
        if subject is not None:
            raise AccountInvalid("subject and for contradict each other")
        name = AccountName(account)
        caller.authority.check_sees(name)
        return caller.administration.grants_for(name)
    subjects = None if subject is None else [Subject.parse(subject)]
    grants = caller.administration.accounts.grants(subjects)
    return [grant for grant in grants if caller.authority.may_grant(grant.pattern)]


def _page(grants: list[Grant], after: str | None, limit: int) -> Page[Grant]:
    rest = sorted((grant for grant in grants if after is None or _key(grant) > after), key=_key)
    return Page(rest[:limit], len(rest) > limit)


def _key(grant: Grant) -> str:
    return f"{grant.subject} {grant.pattern}"


@router.put("/grants", tags=["grants"])
async def put_grant(caller: Somebody, body: models.NewGrant) -> models.Grant:
    """Grants, in place of what the subject had for that pattern. For admins, and for who holds the action `admin` on
    all that the pattern matches."""
    pattern = read_pattern(body.pattern)
    caller.authority.check_grant(pattern)
    grant = Grant(Subject.parse(body.subject), pattern, read_actions(",".join(body.actions)))
    await caller.administration.put_grants([grant], by=caller.actor)
    return models.Grant.of(grant)


@router.delete("/grants", status_code=204, tags=["grants"])
async def remove_grant(caller: Somebody, subject: WhomQuery, pattern: PatternQuery) -> None:
    """Takes back what the subject was granted for that pattern."""
    names = read_pattern(pattern)
    caller.authority.check_grant(names)
    await caller.administration.remove_grant(Subject.parse(subject), names, by=caller.actor)

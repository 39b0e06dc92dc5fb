"""`/api/v1/users`, `/api/v1/robots` and `/api/v1/me`: accounts."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query

from registry.admin import models
from registry.admin.caller import AdminCaller, AnyCaller, Caller, LoggedInCaller
from registry.admin.management_route import ManagementRoute
from registry.auth.rights.management_rights import management_rights_of
from storage.access import AccountInvalid, AccountKind, AccountName, Grant
from storage.content import Page
from storage.errors import Denied, Unauthorized

router = APIRouter(route_class=ManagementRoute)

AfterQuery = Annotated[str | None, Query(description="`next` of the page before", max_length=80)]
LimitQuery = Annotated[int, Query(description="Entries at the most", ge=1, le=1000)]
_MOST_GRANTS: Final = 200
"""Grants that are shown with an account, at the most."""
NamePath = Annotated[str, Path(examples=["alice"])]


@router.get("/me", tags=["me"])
async def get_me(caller: AnyCaller) -> models.Me:
    """Who asks, and what they may do. 401 for nobody, unless there are no accounts yet."""
    if not caller.open and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    proof = caller.principal.identity
    grants: Page[Grant] = Page([]) if proof.name is None else _grants(caller, proof.name, proof.groups)
    account = None
    if proof.name is not None and proof.version is not None:
        account = models.Account.of(caller.administration.accounts.account(AccountName(proof.name)))
    return models.Me(
        name=proof.name,
        account=account,
        admin=caller.authority.admin,
        open=caller.open,
        grants=[models.Grant.of(grant) for grant in grants.items],
        more_grants=grants.more,
    )


@router.get("/users", tags=["users"])
async def list_users(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Account]:
    """People, in the order of their names."""
    page = caller.administration.accounts.accounts(AccountKind.USER, after, limit)
    return models.listed(page, models.Account.of, lambda account: account.name)


@router.post("/users", status_code=201, tags=["users"])
async def add_user(caller: AdminCaller, body: models.NewUser) -> models.AddedUser:
    """Adds a person. The first account closes the registry for good, and has to be an admin; while there is none, this
    is taken from the registry's own machine alone."""
    if caller.open and not body.admin:
        raise AccountInvalid("the first account has to be an admin: nobody else could go on from there")
    password = None if body.password is None else body.password.get_secret_value()
    added = await caller.administration.add_user(
        AccountName(body.name), password, admin=body.admin, note=body.note, by=caller.actor
    )
    return models.AddedUser(**models.Account.of(added.account).model_dump(), password=added.password)


@router.get("/users/{name}", tags=["users"])
async def get_user(caller: LoggedInCaller, name: NamePath) -> models.ShownAccount:
    """A person, and all that they may do. For one's own account, or an admin; else 404."""
    return _account_with_grants(caller, AccountName(name), AccountKind.USER)


@router.patch("/users/{name}", tags=["users"])
async def change_user(caller: AdminCaller, name: NamePath, body: models.UserChange) -> models.Account:
    """Disables or enables, makes an admin or no longer. It holds at that person's next request. 409 where no admin
    would be left who is enabled."""
    account = AccountName(name)
    if body.admin is not None:
        await caller.administration.set_admin(account, body.admin, by=caller.actor)
    if body.enabled is not None:
        await caller.administration.set_enabled(account, AccountKind.USER, body.enabled, by=caller.actor)
    return models.Account.of(caller.administration.find(account, AccountKind.USER))


@router.put("/users/{name}/password", tags=["users"])
async def set_password(caller: LoggedInCaller, name: NamePath, body: models.NewPassword) -> models.Password:
    """Sets one's own password (with the old one), or anybody's as an admin. What was logged in with the one before ends
    at once."""
    account = AccountName(name)
    caller.authority.check_may_add_credential(account)
    if account == caller.principal.name:
        await _check_old_password(caller, account, body)
    new = None if body.new is None else body.new.get_secret_value()
    return models.Password(password=await caller.administration.set_password(account, new, by=caller.actor))


async def _check_old_password(caller: Caller, account: AccountName, body: models.NewPassword) -> None:
    """As a login, so that guessing is slowed like any other. Raises Denied, TooManyRequests."""
    old = "" if body.old is None else body.old.get_secret_value()
    credentials = base64.b64encode(f"{account}:{old}".encode())
    try:
        shown = await caller.authenticator.authenticate([(b"authorization", b"Basic " + credentials)], caller.actor)
    except Unauthorized:
        raise Denied("the old password is not right") from None
    if shown.name != account or not management_rights_of(shown).person:
        raise Denied("the old password is not right")


@router.delete("/users/{name}", status_code=204, tags=["users"])
async def remove_user(caller: AdminCaller, name: NamePath) -> None:
    """Removes a person, with their API tokens, memberships and grants. 409 where no admin would be left."""
    await caller.administration.remove(AccountName(name), AccountKind.USER, by=caller.actor)


@router.get("/robots", tags=["robots"])
async def list_robots(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Account]:
    """Robots, in the order of their names."""
    page = caller.administration.accounts.accounts(AccountKind.ROBOT, after, limit)
    return models.listed(page, models.Account.of, lambda account: account.name)


@router.post("/robots", status_code=201, tags=["robots"])
async def add_robot(caller: AdminCaller, body: models.NewRobot) -> models.Account:
    """Adds a robot. It may do nothing until something is granted to it, and logs in with API tokens alone."""
    if caller.open:
        raise AccountInvalid("the first account has to be an admin: nobody else could go on from there")
    added = await caller.administration.add_robot(AccountName(body.name), note=body.note, by=caller.actor)
    return models.Account.of(added.account)


@router.get("/robots/{name}", tags=["robots"])
async def get_robot(caller: LoggedInCaller, name: NamePath) -> models.ShownAccount:
    """A robot, and all that it may do. For itself, or an admin; else 404."""
    return _account_with_grants(caller, AccountName(name), AccountKind.ROBOT)


@router.patch("/robots/{name}", tags=["robots"])
async def change_robot(caller: AdminCaller, name: NamePath, body: models.RobotChange) -> models.Account:
    """Disables or enables it, from its next request on."""
    account = AccountName(name)
    await caller.administration.set_enabled(account, AccountKind.ROBOT, body.enabled, by=caller.actor)
    return models.Account.of(caller.administration.find(account, AccountKind.ROBOT))


@router.delete("/robots/{name}", status_code=204, tags=["robots"])
async def remove_robot(caller: AdminCaller, name: NamePath) -> None:
    """Removes a robot, with its API tokens, memberships and grants."""
    await caller.administration.remove(AccountName(name), AccountKind.ROBOT, by=caller.actor)


def _account_with_grants(caller: Caller, name: AccountName, kind: AccountKind) -> models.ShownAccount:
    caller.authority.check_may_see(name)
    account = caller.administration.find(name, kind)
    return models.ShownAccount.of_both(account, _grants(caller, name))


def _grants(caller: Caller, name: str, groups: Iterable[str] = ()) -> Page[Grant]:
    """The first of those that count for an account."""
    subjects = caller.administration.subjects_of(name, groups)
    return caller.administration.accounts.grant_page(subjects, None, _MOST_GRANTS)

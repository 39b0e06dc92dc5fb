"""`/api/v1/users`, `/api/v1/robots` and `/api/v1/me`: accounts."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Final

from fastapi import APIRouter

from registry.admin import models
from registry.admin.caller import AdminCaller, AnyCaller, Caller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery, ManagementRoute, PathName
from registry.auth.rights.management_rights import management_rights_of
from storage.access import AccountInvalid, AccountKind, AccountName, Grant
from storage.content import Page
from storage.errors import Denied, Unauthorized

_MOST_GRANTS: Final = 200
"""The most grants that an answer shows with an account."""
_FIRST_IS_ADMIN: Final = "the first account has to be an admin: nobody else could go on from there"

router = APIRouter(route_class=ManagementRoute)


@router.get("/me", tags=["me"])
async def get_me(caller: AnyCaller) -> models.Me:
    """Shows your account and what you may do. Answers 401 without a login, unless there are no accounts yet."""
    if not caller.is_open and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    identity = caller.principal.identity
    grants: Page[Grant] = Page([]) if identity.name is None else _grants(caller, identity.name, identity.groups)
    account = None
    if identity.name is not None and identity.version is not None:
        account = models.Account.of(caller.accounts.account(AccountName(identity.name)))
    return models.Me(
        name=identity.name,
        account=account,
        admin=caller.rights.admin,
        open=caller.is_open,
        grants=[models.Grant.of(grant) for grant in grants.items],
        more_grants=grants.more,
    )


@router.get("/users", tags=["users"])
async def list_users(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Account]:
    """Lists people, in the order of their names."""
    return _list(caller, AccountKind.USER, after, limit)


@router.post("/users", status_code=201, tags=["users"])
async def add_user(caller: AdminCaller, body: models.NewUser) -> models.AddedUser:
    """Adds a person. The first account closes the registry for good and has to be an admin. While there are no
    accounts, only the registry's own machine may add one."""
    if caller.is_open and not body.admin:
        raise AccountInvalid(_FIRST_IS_ADMIN)
    password = None if body.password is None else body.password.get_secret_value()
    added = await caller.administration.add_user(
        AccountName(body.name), password, admin=body.admin, note=body.note, by=caller.actor
    )
    return models.AddedUser(**models.Account.of(added.account).model_dump(), password=added.password)


@router.get("/users/{name}", tags=["users"])
async def get_user(caller: LoggedInCaller, name: PathName) -> models.ShownAccount:
    """Shows a person and all grants that count for them: your own account, or any as an admin. Answers 404 for
    others."""
    return _account_with_grants(caller, name, AccountKind.USER)


@router.patch("/users/{name}", tags=["users"])
async def change_user(caller: AdminCaller, name: PathName, body: models.UserChange) -> models.Account:
    """Disables or enables a person, or changes whether they are an admin. The change holds from their next request on.
    Answers 409 if no enabled admin would be left."""
    if body.admin is not None:
        await caller.administration.set_admin(name, body.admin, by=caller.actor)
    return await _set_enabled(caller, name, AccountKind.USER, body.enabled)


@router.put("/users/{name}/password", tags=["users"])
async def set_password(caller: LoggedInCaller, name: PathName, body: models.NewPassword) -> models.Password:
    """Sets your own password (send the old one as well), or anyone's as an admin. Everything that was logged in with
    the old password ends at once."""
    caller.rights.check_may_add_credential(name)
    if name == caller.principal.name:
        await _check_old_password(caller, name, body)
    new = None if body.new is None else body.new.get_secret_value()
    return models.Password(password=await caller.administration.set_password(name, new, by=caller.actor))


async def _check_old_password(caller: Caller, account: AccountName, body: models.NewPassword) -> None:
    """Checks the old password like a login, so that guesses are throttled like any other. Raises Denied,
    TooManyRequests."""
    old = "" if body.old is None else body.old.get_secret_value()
    credentials = base64.b64encode(f"{account}:{old}".encode())
    try:
        shown = await caller.authenticator.authenticate([(b"authorization", b"Basic " + credentials)], caller.actor)
    except Unauthorized:
        raise Denied("the old password is not right") from None
    if shown.name != account or not management_rights_of(shown).is_person:
        raise Denied("the old password is not right")


@router.delete("/users/{name}", status_code=204, tags=["users"])
async def remove_user(caller: AdminCaller, name: PathName) -> None:
    """Removes a person with their API tokens, memberships and grants. Answers 409 if no enabled admin would be left."""
    await caller.administration.remove(name, AccountKind.USER, by=caller.actor)


@router.get("/robots", tags=["robots"])
async def list_robots(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.Listed[models.Account]:
    """Lists robots, in the order of their names."""
    return _list(caller, AccountKind.ROBOT, after, limit)


@router.post("/robots", status_code=201, tags=["robots"])
async def add_robot(caller: AdminCaller, body: models.NewRobot) -> models.Account:
    """Adds a robot. It may do nothing until it gets a grant, and it logs in with API tokens only."""
    if caller.is_open:
        raise AccountInvalid(_FIRST_IS_ADMIN)
    added = await caller.administration.add_robot(AccountName(body.name), note=body.note, by=caller.actor)
    return models.Account.of(added.account)


@router.get("/robots/{name}", tags=["robots"])
async def get_robot(caller: LoggedInCaller, name: PathName) -> models.ShownAccount:
    """Shows a robot and all grants that count for it: to itself, or to an admin. Answers 404 to others."""
    return _account_with_grants(caller, name, AccountKind.ROBOT)


@router.patch("/robots/{name}", tags=["robots"])
async def change_robot(caller: AdminCaller, name: PathName, body: models.RobotChange) -> models.Account:
    """Disables or enables a robot, from its next request on."""
    return await _set_enabled(caller, name, AccountKind.ROBOT, body.enabled)


@router.delete("/robots/{name}", status_code=204, tags=["robots"])
async def remove_robot(caller: AdminCaller, name: PathName) -> None:
    """Removes a robot with its API tokens, memberships and grants."""
    await caller.administration.remove(name, AccountKind.ROBOT, by=caller.actor)


def _list(caller: Caller, kind: AccountKind, after: str | None, limit: int) -> models.Listed[models.Account]:
    page = caller.accounts.accounts(kind, after, limit)
    return models.listed(page, models.Account.of, lambda account: account.name)


async def _set_enabled(caller: Caller, name: AccountName, kind: AccountKind, enabled: bool | None) -> models.Account:
    """Enables or disables an account, unless `enabled` is None. Returns the account as it is then."""
    if enabled is not None:
        await caller.administration.set_enabled(name, kind, enabled, by=caller.actor)
    return models.Account.of(caller.administration.find(name, kind))


def _account_with_grants(caller: Caller, name: AccountName, kind: AccountKind) -> models.ShownAccount:
    caller.rights.check_may_see(name)
    account = caller.administration.find(name, kind)
    return models.ShownAccount.of_both(account, _grants(caller, name))


def _grants(caller: Caller, name: str, groups: Iterable[str] = ()) -> Page[Grant]:
    """Returns the first grants that count for an account."""
    subjects = caller.administration.subjects_of(name, groups)
    return caller.accounts.grant_page(subjects, None, _MOST_GRANTS)

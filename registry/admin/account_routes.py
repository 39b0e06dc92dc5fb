"""Routes of `/api/v1/users`, `/api/v1/robots` and `/api/v1/me`: the accounts of people and programs.

The docstrings of the routes are the descriptions in the OpenAPI document; "you" is the caller, the account that sends
the request. `Caller.is_registry_open` is true if the registry has no accounts yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from registry.admin import models
from registry.admin.caller import AdminCaller, AnyCaller, Caller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery, PathName
from registry.admin.management_router import management_router
from registry.admin.password_change import change_password
from storage.access import AccountInvalid, AccountKind, AccountName, Grant
from storage.content import Page
from storage.errors import Unauthorized

_MAX_GRANTS: Final = 200
"""Maximum number of grants in the response for one account. `/api/v1/grants?for=NAME` lists all grants, in pages."""
_FIRST_ACCOUNT_NOT_ADMIN: Final = "the first account has to be an admin, because only an admin can add accounts"

router = management_router()


@router.get("/me", tags=["me"])
async def get_me(caller: AnyCaller) -> models.CallerResponse:
    """Shows your account and its rights. If the registry has accounts, answers 401 to a request without a login."""
    if not caller.is_registry_open and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    identity = caller.principal.identity
    grants: Page[Grant] = Page([]) if identity.name is None else _grant_page(caller, identity.name, identity.groups)
    account = None
    # `identity.version`: the version of the account in the store. None: the store has no such account, for example
    # because the account is only in an htpasswd file.
    if identity.name is not None and identity.version is not None:
        account = models.AccountResponse.from_stored(caller.accounts.account(AccountName(identity.name)))
    return models.CallerResponse(
        name=identity.name,
        account=account,
        admin=caller.rights.admin,
        open=caller.is_registry_open,
        grants=[models.GrantResponse.from_stored(grant) for grant in grants.items],
        more_grants=grants.more,
    )


@router.get("/users", tags=["users"])
async def list_users(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.ListPage[models.AccountResponse]:
    """Lists people, in the order of their names."""
    return _list_accounts(caller, AccountKind.USER, after, limit)


@router.post("/users", status_code=201, tags=["users"])
async def add_user(caller: AdminCaller, body: models.NewUser) -> models.AddedUser:
    """Adds a person. The first account of the registry has to be an admin. Only a request from the registry's own
    machine may add the first account. Once there is an account, a client without a login may do only what is granted
    to `everyone`."""
    if caller.is_registry_open and not body.admin:
        raise AccountInvalid(_FIRST_ACCOUNT_NOT_ADMIN)
    password = None if body.password is None else body.password.get_secret_value()
    added = await caller.administration.add_user(
        AccountName(body.name), password, admin=body.admin, note=body.note, by=caller.actor
    )
    # `body.note` is the admin's text about the account. The response's `notes` are hints for the admin.
    fields = models.AccountResponse.from_stored(added.account).model_dump()
    return models.AddedUser(**fields, notes=list(added.hints), password=added.password)


@router.get("/users/{name}", tags=["users"])
async def get_user(caller: LoggedInCaller, name: PathName) -> models.AccountWithGrants:
    """Shows a person and the grants that apply to them. You may see your own account; an admin may see every account.
    Answers 404 for an account that you may not see."""
    return _account_with_grants(caller, name, AccountKind.USER)


@router.patch("/users/{name}", tags=["users"])
async def change_user(caller: AdminCaller, name: PathName, body: models.UserChange) -> models.AccountResponse:
    """Disables or enables a person, or changes whether the person is an admin. The change takes effect with the
    person's next request. Answers 409 if no enabled admin would be left."""
    await caller.administration.change_user(name, admin=body.admin, enabled=body.enabled, by=caller.actor)
    return models.AccountResponse.from_stored(caller.administration.find_account(name, AccountKind.USER))


@router.put("/users/{name}/password", tags=["users"])
async def set_password(caller: LoggedInCaller, name: PathName, body: models.NewPassword) -> models.GeneratedPassword:
    """Sets the password of a person. To set your own password, you have to send the old password as well. An admin may
    set another person's password without the old password. The person's browser sessions end. Tokens that `/token` has
    issued to the person become invalid. API tokens of the person stay valid."""
    old = "" if body.old is None else body.old.get_secret_value()
    new = None if body.new is None else body.new.get_secret_value()
    return models.GeneratedPassword(password=await change_password(caller, name, old, new))


@router.delete("/users/{name}", status_code=204, tags=["users"])
async def remove_user(caller: AdminCaller, name: PathName) -> None:
    """Removes a person with their API tokens, memberships and grants. Answers 409 if no enabled admin would be left."""
    await caller.administration.remove(name, AccountKind.USER, by=caller.actor)


@router.get("/robots", tags=["robots"])
async def list_robots(
    caller: AdminCaller, after: AfterQuery = None, limit: LimitQuery = 100
) -> models.ListPage[models.AccountResponse]:
    """Lists robots, in the order of their names."""
    return _list_accounts(caller, AccountKind.ROBOT, after, limit)


@router.post("/robots", status_code=201, tags=["robots"])
async def add_robot(caller: AdminCaller, body: models.NewRobot) -> models.AddedAccount:
    """Adds a robot, the account of a program. A robot has no rights until it gets a grant. It has no password. It logs
    in with API tokens, or with tokens of an outside service (setting `issuer`). The first account of the registry
    cannot be a robot."""
    if caller.is_registry_open:
        raise AccountInvalid(_FIRST_ACCOUNT_NOT_ADMIN)
    added = await caller.administration.add_robot(AccountName(body.name), note=body.note, by=caller.actor)
    fields = models.AccountResponse.from_stored(added.account).model_dump()
    return models.AddedAccount(**fields, notes=list(added.hints))


@router.get("/robots/{name}", tags=["robots"])
async def get_robot(caller: LoggedInCaller, name: PathName) -> models.AccountWithGrants:
    """Shows a robot and the grants that apply to it. Only the robot itself and admins may see it; other accounts get
    404."""
    return _account_with_grants(caller, name, AccountKind.ROBOT)


@router.patch("/robots/{name}", tags=["robots"])
async def change_robot(caller: AdminCaller, name: PathName, body: models.RobotChange) -> models.AccountResponse:
    """Disables or enables a robot. The change takes effect with the robot's next request."""
    await caller.administration.set_enabled(name, AccountKind.ROBOT, body.enabled, by=caller.actor)
    return models.AccountResponse.from_stored(caller.administration.find_account(name, AccountKind.ROBOT))


@router.delete("/robots/{name}", status_code=204, tags=["robots"])
async def remove_robot(caller: AdminCaller, name: PathName) -> None:
    """Removes a robot with its API tokens, memberships and grants."""
    await caller.administration.remove(name, AccountKind.ROBOT, by=caller.actor)


def _list_accounts(
    caller: Caller, kind: AccountKind, after: str | None, limit: int
) -> models.ListPage[models.AccountResponse]:
    page = caller.accounts.accounts(kind, after, limit)
    return models.list_page(page, models.AccountResponse.from_stored, lambda account: account.name)


def _account_with_grants(caller: Caller, name: AccountName, kind: AccountKind) -> models.AccountWithGrants:
    """Returns an account with the first page of the grants that apply to it. Raises AccountUnknown if there is no
    account of this name and kind, or if the caller may not see the account."""
    caller.rights.check_may_see(name)
    account = caller.administration.find_account(name, kind)
    return models.AccountWithGrants.from_stored_with_grants(account, _grant_page(caller, name))


def _grant_page(caller: Caller, name: str, groups: Iterable[str] = ()) -> Page[Grant]:
    """Returns the first page of the grants that apply to the account `name`: the grants to the account itself, to its
    groups, to `authenticated` and to `everyone`. `groups`: further groups of the account. The OpenID provider or the
    token issuer has named these groups. The account's groups in the store are always included."""
    subjects = caller.administration.subjects_of(name, groups)
    return caller.accounts.grant_page(subjects, None, _MAX_GRANTS)  # None: begin at the first grant

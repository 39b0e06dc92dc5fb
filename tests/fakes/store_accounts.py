"""Adds accounts and grants to a real store, and makes calls on behalf of an account."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.auth.rights.principal import Identity, Principal
from registry.request import RequestContext, enter_request, leave_request
from storage.access import AccountKind, AccountName, Action, Grant, Grantee, TokenLimit
from storage.accounts import Accounts
from storage.content import Actor
from storage.patterns import NamePattern

BY = Actor("operator")


async def add_account(accounts: Accounts, name: str, *, admin: bool = False, robot: bool = False) -> Identity:
    """Adds an account. Returns the identity of a client that has logged in with it."""
    kind = AccountKind.ROBOT if robot else AccountKind.USER
    account = await accounts.add_account(AccountName(name), kind, password_hash=None, admin=admin, by=BY)
    return Identity(name, robot=robot, version=account.version)


async def add_grant(accounts: Accounts, subject: str, pattern: str, actions: str) -> None:
    """Adds a grant, such as `add_grant(accounts, "group:dev", "team/**", "pull,push")`."""
    await accounts.put_grant(Grant(Grantee.parse(subject), NamePattern(pattern), Action.parse(actions)), by=BY)


def limit(pattern: str, actions: str) -> TokenLimit:
    return TokenLimit(NamePattern(pattern), Action.parse(actions))


@contextmanager
def acting_as(principal: Principal, requested_name: str = "", address: str = "") -> Iterator[None]:
    """Makes `principal` the caller of all calls in the block. `requested_name`: the repository name that the
    request used. `address`: the client's IP address."""
    token = enter_request(RequestContext(principal, requested_name, address))
    try:
        yield
    finally:
        leave_request(token)

"""Accounts and grants in a real store, and calls made as somebody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.auth.principal import ASKED, PRINCIPAL, Principal
from registry.auth.proof import Proof
from storage.access import AccountName, Action, Grant, Kind, Limit, Subject
from storage.accounts import Accounts
from storage.content import Actor
from storage.patterns import NamePattern

BY = Actor("operator")


async def add(accounts: Accounts, name: str, *, admin: bool = False, robot: bool = False) -> Proof:
    """A new account; what its credentials prove."""
    kind = Kind.ROBOT if robot else Kind.USER
    account = await accounts.add_account(AccountName(name), kind, password_hash=None, admin=admin, by=BY)
    return Proof(name, robot=robot, version=account.version)


async def grant(accounts: Accounts, subject: str, pattern: str, actions: str) -> None:
    """`grant(accounts, "group:dev", "team/**", "pull,push")`."""
    await accounts.put_grant(Grant(Subject.parse(subject), NamePattern(pattern), Action.parse(actions)), by=BY)


def limit(pattern: str, actions: str) -> Limit:
    return Limit(NamePattern(pattern), Action.parse(actions))


@contextmanager
def acting(principal: Principal, asked: str = "") -> Iterator[None]:
    """Inside the block the calls are made by `principal`, who asked by that name."""
    who, name = PRINCIPAL.set(principal), ASKED.set(asked)
    try:
        yield
    finally:
        PRINCIPAL.reset(who)
        ASKED.reset(name)

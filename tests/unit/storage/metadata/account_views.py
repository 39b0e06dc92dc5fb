"""Helpers for tests of accounts: two workers over one data directory, and functions that make accounts, grants, tokens
and keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.access import (
    AccountKind,
    AccountName,
    Action,
    ApiToken,
    AuditQuery,
    Grant,
    Grantee,
    SigningKey,
    TokenLimit,
)
from storage.accounts import Accounts
from storage.composition import open_accounts
from storage.content import Actor
from storage.patterns import NamePattern

BY_ROOT = Actor("root", "192.0.2.7", "request", "curl/8")
ALICE, BOB, CI, DEV = map(AccountName, ("alice", "bob", "ci", "dev"))


class AccountsClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class TwoWorkers:
    """Two workers over one database, each with its own connections. The *epoch* is a number in the database that grows
    with each change of rights."""

    def __init__(self, first: Accounts, second: Accounts, clock: AccountsClock) -> None:
        self.first = first
        self.second = second
        self.clock = clock
        self._last_epoch = first.epoch()

    def epoch_changed(self) -> bool:
        """Returns whether the epoch has changed since the last call of this method or of `note_epoch`. Checks that both
        workers have the same epoch."""
        epoch = self.first.epoch()
        assert self.second.epoch() == epoch
        epoch_before, self._last_epoch = self._last_epoch, epoch
        return epoch != epoch_before

    def note_epoch(self) -> None:
        """Makes the present epoch the one with which the next call of `epoch_changed` compares."""
        self.epoch_changed()

    def audit_entries(self, **query: str | float) -> list[tuple[str, str]]:
        """Returns the action and the target of each entry of the audit log, oldest first."""
        page = self.second.audit(AuditQuery(**query), 1000)  # type: ignore[arg-type]
        return [(entry.action, entry.target) for entry in reversed(page.items)]


@asynccontextmanager
async def two_workers(data: Path) -> AsyncIterator[TwoWorkers]:
    clock = AccountsClock()
    async with open_accounts(data, clock=clock) as first, open_accounts(data, clock=clock) as second:
        yield TwoWorkers(first, second, clock)


async def add_people(accounts: Accounts) -> None:
    """Adds the admin alice, the user bob, the robot ci, and the group dev with the member bob."""
    await accounts.add_account(ALICE, AccountKind.USER, password_hash="$alice", admin=True, by=BY_ROOT)
    await accounts.add_account(BOB, AccountKind.USER, password_hash="$bob", by=BY_ROOT)
    await accounts.add_account(CI, AccountKind.ROBOT, password_hash=None, by=BY_ROOT)
    await accounts.add_group(DEV, by=BY_ROOT)
    await accounts.add_member(DEV, BOB, by=BY_ROOT)


def grant(subject: str, pattern: str, actions: str) -> Grant:
    return Grant(Grantee.parse(subject), NamePattern(pattern), Action.parse(actions))


def api_token(
    token_id: str,
    account: AccountName = CI,
    *,
    login: bool = False,
    expires: float | None = None,
    limits: tuple[TokenLimit, ...] | None = None,
) -> ApiToken:
    return ApiToken(token_id, account, "login" if login else "personal", "laptop", 1_000_000.0, expires, limits)


def signing_key(key_id: str) -> SigningKey:
    return SigningKey(key_id, f"secret of {key_id}".encode(), 1_000_000.0)

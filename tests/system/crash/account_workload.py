"""The account part of the workload of the crash tests: a fixed list of changes to accounts and rights, and the facts
that hold after each change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from storage.access import AccountKind, AccountName, Action, ApiToken, AuditQuery, Grant, Grantee, SigningKey
from storage.accounts import Accounts
from storage.content import Actor
from storage.patterns import NamePattern

BY = Actor(name="root")
"""The account that makes all changes."""
ALICE, DEV = AccountName("alice"), AccountName("dev")
GRANT = Grant(Grantee.parse("group:dev"), NamePattern("team/**"), Action.PULL)

Fact = tuple[str, ...]
"""A fact about the accounts. `("account", "alice")`: this account exists. `("line", "group.add")`: the audit log has an
entry for this action. `("closed",)`: an account was added at some time, so anonymous clients no longer have all
rights."""


@dataclass(frozen=True)
class AccountStep:
    """A change of the accounts. After the change, the facts in `makes` are true, and the facts in `ends` are false."""

    change: Callable[[Accounts], Awaitable[object]]
    makes: frozenset[Fact] = frozenset()
    ends: frozenset[Fact] = frozenset()


def _key(key_id: str) -> SigningKey:
    return SigningKey(key_id, key_id.encode(), 1.0)


LOGIN = ApiToken("login", ALICE, "login", "", 1.0)
STEPS = {
    "key.make": AccountStep(lambda a: a.ensure_key(lambda: _key("k1"), by=BY), frozenset({("signs", "k1")})),
    "account.add": AccountStep(
        lambda a: a.add_account(ALICE, AccountKind.USER, password_hash="first", by=BY),
        frozenset({("account", "alice"), ("password", "first"), ("closed",)}),
    ),
    "group.add": AccountStep(lambda a: a.add_group(DEV, by=BY), frozenset({("group", "dev")})),
    "member.add": AccountStep(lambda a: a.add_member(DEV, ALICE, by=BY), frozenset({("member", "alice")})),
    "grant.put": AccountStep(lambda a: a.put_grant(GRANT, by=BY), frozenset({("grant", "group:dev")})),
    "token.add": AccountStep(lambda a: a.add_token(LOGIN, b"", by=BY), frozenset({("token", "login")})),
    "account.password": AccountStep(
        lambda a: a.set_password(ALICE, "second", by=BY),
        frozenset({("password", "second")}),
        frozenset({("password", "first"), ("token", "login")}),
    ),
    "key.rotate": AccountStep(
        lambda a: a.rotate_key(_key("k2"), keep_seconds=1e9, by=BY),
        frozenset({("signs", "k2")}),
        frozenset({("signs", "k1")}),
    ),
    "account.remove": AccountStep(
        lambda a: a.remove_account(ALICE, by=BY),
        ends=frozenset({("account", "alice"), ("password", "first"), ("password", "second"), ("member", "alice")}),
    ),
    "group.remove": AccountStep(
        lambda a: a.remove_group(DEV, by=BY),
        ends=frozenset({("group", "dev"), ("member", "alice"), ("grant", "group:dev")}),
    ),
}
"""The steps in their order. The key is the action in the audit log's entry for the step."""


def after(before: frozenset[Fact], name: str) -> frozenset[Fact]:
    """Returns the facts that are true after the step `name`, if the facts `before` were true before the step. They
    include the entry of the step in the audit log."""
    step = STEPS[name]
    return (before - step.ends) | step.makes | {("line", name)}


def facts(accounts: Accounts) -> frozenset[Fact]:
    """Returns the facts that are true of the stored accounts now."""
    found: set[Fact] = {("closed",)} if accounts.has_had_account() else set()
    for account in accounts.accounts(None, None, 10).items:
        found |= {("account", account.name), ("password", str(accounts.password_hash(account.name)))}
    for name, members in accounts.groups(None, 10).items:
        found |= {("group", name), *(("member", member) for member in members)}
    found |= {("grant", str(grant.subject)) for grant in accounts.grants()}
    found |= {("token", token.id) for token in accounts.tokens(None, None, 10).items}
    found |= {("signs", key.id) for key in accounts.signing_keys() if key.retired is None}
    found |= {("line", entry.action) for entry in accounts.audit(AuditQuery(actor=BY.name), 100).items}
    return frozenset(found)

"""Who may do what, as the store keeps it (`Accounts`). The words are those of `storage.access`.

Reads take microseconds and run inline. Changes return when they are durable; the line of the audit log that tells of
one is written in its own transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from storage.access import (
    Account,
    AccountKind,
    AccountName,
    Action,
    ApiToken,
    AuditEntry,
    AuditQuery,
    Grant,
    Grantee,
    SigningKey,
)
from storage.content import Actor, Page
from storage.patterns import NamePattern


class Accounts(Protocol):
    """All changes take `by`, which goes to the audit log, and make it known to every process: `epoch` differs after
    them. What is so already is not changed, and has no line. Raises of changes: AccountInvalid, AccountUnknown,
    AccountExists, StorageFull, StorageFailed. Cancelled: they are made or not, never half."""

    # What every request asks

    def epoch(self) -> int:
        """A number that differs whenever anything has changed of which a principal's rights are made: accounts, groups,
        grants, tokens revoked, keys. Every process sees another one from the change's commit on. Takes about two
        microseconds."""
        ...

    def closed(self) -> bool:
        """Whether there was ever an account. Until then everything is open."""
        ...

    def instance(self) -> str:
        """This store's own random name: the issuer of its tokens."""
        ...

    # Accounts

    def account(self, name: AccountName) -> Account:
        """Raises AccountUnknown."""
        ...

    def password_hash(self, name: AccountName) -> str | None:
        """None: there is no such account, or it has no password."""
        ...

    def accounts(self, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
        """A page may end before `limit` when it grows large."""
        ...

    async def add_account(
        self,
        name: AccountName,
        kind: AccountKind,
        *,
        password_hash: str | None,
        admin: bool = False,
        note: str = "",
        by: Actor,
    ) -> Account:
        """The first one closes the registry for good."""
        ...

    async def set_password(self, name: AccountName, password_hash: str | None, *, by: Actor) -> None:
        """Ends what was proved with the one before: its refresh tokens and those of `/token`. Raises AccountInvalid for
        a robot."""
        ...

    async def improve_hash(self, name: AccountName, old: str, new: str) -> None:
        """The same password, hashed anew with other parameters; nothing else changes."""
        ...

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """`keep_admin`: raises LastAdmin where no admin who is enabled would be left."""
        ...

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """`keep_admin`: as `set_enabled` has it."""
        ...

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        """Its tokens, memberships and grants go as well, so that nobody inherits them who takes the name later.
        `keep_admin`: as `set_enabled` has it."""
        ...

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        """Groups and their members. A page may end before `limit` when it grows large."""
        ...

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        """A group and its members. Raises AccountUnknown."""
        ...

    def known_groups(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are groups here."""
        ...

    def groups_of(self, member: str) -> tuple[AccountName, ...]:
        """`member` need not be in the store."""
        ...

    async def add_group(self, name: AccountName, *, by: Actor) -> None: ...

    async def remove_group(self, name: AccountName, *, by: Actor) -> None: ...

    async def add_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """`member` need not be in the store. Raises AccountInvalid: it is a group."""
        ...

    async def remove_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None: ...

    # Rights

    def grants(self, subjects: Sequence[Grantee] | None = None) -> list[Grant]:
        """Those of the subjects; None: all."""
        ...

    def grant_page(self, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
        """The same, page by page, in the order of their keys: `group:dev team/**`."""
        ...

    def granted(self, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
        """The same in short: the patterns that the subjects together were granted the same actions for. Takes a
        microsecond for each grant."""
        ...

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        """In place of what the subject had for that pattern. Raises AccountUnknown: no such group or robot;
        AccountInvalid: `user:ci` where ci is a robot, and the like; more than a subject can have."""
        ...

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None: ...

    # API tokens

    def token(self, token_id: str) -> tuple[ApiToken, bytes]:
        """With the hash of its secret. Raises AccountUnknown: never made, revoked, or expired."""
        ...

    def tokens(self, account: AccountName | None, after: str | None, limit: int) -> Page[ApiToken]:
        """A page may end before `limit` when it grows large."""
        ...

    async def add_token(self, token: ApiToken, secret_hash: bytes, *, by: Actor) -> None:
        """Of an account in the store. `epoch` stays: nobody can have remembered anything of it."""
        ...

    async def revoke_token(self, token_id: str, *, by: Actor) -> None: ...

    async def note_use(self, token_id: str, at: float) -> None:
        """Not durable, and no change of `epoch`."""
        ...

    # Keys

    def signing_keys(self) -> list[SigningKey]:
        """Those that count, the one that signs first."""
        ...

    async def ensure_key(self, make: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """The key that signs. Where there is none yet, `make` (called in another thread) gives the first; of several
        processes that find none, all get the same."""
        ...

    async def rotate_key(self, key: SigningKey, *, keep: float, by: Actor) -> None:
        """`key` signs from now on. The one before is retired, and taken for `keep` seconds more; 0.0: not at all, for a
        key that others have come to know."""
        ...

    # Pace of attempts to log in, held for all processes

    def pace(self, key: str) -> float:
        """Until when (seconds since 1970) the failures counted under `key` have been paid for; 0.0: there are none."""
        ...

    async def note_failure(self, keys: Mapping[str, float]) -> None:
        """One more failed attempt under each key, which costs that many seconds (GCRA: `max(now, pace) + seconds`).
        Not durable."""
        ...

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Failures under these keys count no more. Not durable."""
        ...

    # Audit

    async def note(self, entries: Sequence[AuditEntry]) -> None:
        """Logins and denials, gathered by the caller. Not durable."""
        ...

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Newest first. Changes of content, accounts and rights, logins, denials; tags as well, of which `tag_history`
        keeps the lines. Raises AccountInvalid for a `before` that is no line's id."""
        ...

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """As `audit`, without holding up the event loop: conditions may match few lines of many."""
        ...

    async def prune_audit(self, before: float) -> int:
        """Drops lines older than `before` (seconds since 1970); how many. The history of tags stays."""
        ...

"""The store of accounts, groups, grants, API tokens, keys and the audit log (`Accounts`). Types: `storage.access`.

Reads take microseconds and run on the event loop. Changes return when they are durable. The audit log line of a change
is written in its transaction.
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
    """Changes take `by`, the actor for the audit log, and increment `epoch`, so that every process notices them. A
    change that changes nothing does neither. Changes raise AccountInvalid, AccountUnknown, AccountExists, StorageFull,
    StorageFailed. Cancelled: a change is made or not, never half."""

    # Read by every request

    def epoch(self) -> int:
        """Returns a number that every change of rights increments: of accounts, groups, grants, keys, and revoked
        tokens. Every process sees the new number from the change's commit on. Takes about two microseconds."""
        ...

    def closed(self) -> bool:
        """Returns whether there ever was an account. Until then, everybody may do everything."""
        ...

    def instance(self) -> str:
        """Returns this store's random name, the issuer of its tokens."""
        ...

    # Accounts

    def account(self, name: AccountName) -> Account:
        """Returns the account. Raises AccountUnknown."""
        ...

    def password_hash(self, name: AccountName) -> str | None:
        """Returns the hash of the password; None if there is no such account or it has no password."""
        ...

    def accounts(self, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
        """Returns accounts in the order of their names. A page may end before `limit` when it grows large."""
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
        """Adds an account. The first one ever closes the registry to anonymous clients for good."""
        ...

    async def set_password(self, name: AccountName, password_hash: str | None, *, by: Actor) -> None:
        """Sets or removes the password, and invalidates refresh tokens and bearer tokens that were issued before.
        Raises AccountInvalid for a robot."""
        ...

    async def improve_hash(self, name: AccountName, old: str, new: str) -> None:
        """Replaces the hash `old` with `new`, of the same password with other parameters. Changes nothing else."""
        ...

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Enables or disables the account. `keep_admin`: raises LastAdmin if no enabled admin would be left."""
        ...

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Makes the account an admin or not. `keep_admin`: as in `set_enabled`."""
        ...

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        """Removes the account with its tokens, memberships and grants, so that a later account of the same name does
        not get them. `keep_admin`: as in `set_enabled`."""
        ...

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        """Returns groups and their members. A page may end before `limit` when it grows large."""
        ...

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        """Returns a group and its members. Raises AccountUnknown."""
        ...

    def known_groups(self, names: Iterable[str]) -> set[str]:
        """Returns those of `names` that are groups."""
        ...

    def groups_of(self, member: str) -> tuple[AccountName, ...]:
        """Returns the groups of `member`, which need not have an account here."""
        ...

    async def add_group(self, name: AccountName, *, by: Actor) -> None: ...

    async def remove_group(self, name: AccountName, *, by: Actor) -> None: ...

    async def add_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """Adds `member`, which need not have an account here. Raises AccountInvalid if it is a group."""
        ...

    async def remove_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None: ...

    # Rights

    def grants(self, subjects: Sequence[Grantee] | None = None) -> list[Grant]:
        """Returns the grants of the subjects; None: all grants."""
        ...

    def grant_page(self, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
        """Returns the same in pages, in the order of keys such as `group:dev team/**`."""
        ...

    def granted(self, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
        """Returns the same, combined: for each set of actions, the patterns for which any of the subjects has it. Takes
        a microsecond per grant."""
        ...

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        """Sets the subject's actions for the pattern. Raises AccountUnknown (no such group or robot), AccountInvalid (a
        wrong kind, such as `user:ci` for a robot, or too many grants)."""
        ...

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None: ...

    # API tokens

    def token(self, token_id: str) -> tuple[ApiToken, bytes]:
        """Returns the token and the hash of its secret. Raises AccountUnknown, also if it was revoked or has
        expired."""
        ...

    def tokens(self, account: AccountName | None, after: str | None, limit: int) -> Page[ApiToken]:
        """Returns the tokens of an account; None: all. A page may end before `limit` when it grows large."""
        ...

    async def add_token(self, token: ApiToken, secret_hash: bytes, *, by: Actor) -> None:
        """Adds a token of an account. Does not increment `epoch`, since no process can have cached anything about
        it."""
        ...

    async def revoke_token(self, token_id: str, *, by: Actor) -> None: ...

    async def note_use(self, token_id: str, at: float) -> None:
        """Stores when the token was last used. Not durable; does not increment `epoch`."""
        ...

    # Keys

    def signing_keys(self) -> list[SigningKey]:
        """Returns the valid keys; the one that signs comes first."""
        ...

    async def ensure_key(self, make: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """Returns the key that signs. If there is none, `make` (called in another thread) makes the first; of several
        processes that find none, all get the same."""
        ...

    async def rotate_key(self, key: SigningKey, *, keep: float, by: Actor) -> None:
        """Makes `key` the one that signs. The key before stays valid for `keep` seconds more; 0.0, for a leaked key,
        invalidates it at once."""
        ...

    # Throttling of logins, for all processes

    def pace(self, key: str) -> float:
        """Returns until when `key` is throttled (seconds since 1970); 0.0: it is not."""
        ...

    async def note_failure(self, keys: Mapping[str, float]) -> None:
        """Adds a failed attempt under each key, which throttles it by so many seconds more (GCRA: `max(now, pace) +
        seconds`). Not durable."""
        ...

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Ends the throttling of the keys. Not durable."""
        ...

    # Audit

    async def note(self, entries: Sequence[AuditEntry]) -> None:
        """Stores lines for logins and denials, which the caller has collected. Not durable."""
        ...

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns lines, newest first: changes of content, tags, accounts and rights, logins, denials. Raises
        AccountInvalid for a `before` that is no line's id."""
        ...

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns the same without blocking the event loop, for conditions that may match few lines of many."""
        ...

    async def prune_audit(self, before: float) -> int:
        """Deletes lines older than `before` (seconds since 1970), and returns their number. The history of tags
        stays."""
        ...

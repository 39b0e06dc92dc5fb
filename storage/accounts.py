"""The interface of the store of accounts, groups, grants, API tokens, signing keys and the audit log (`Accounts`).

`storage.access` has the types. Methods that only read take microseconds and are called on the event loop. A change
returns when it is durable. The line of the audit log about a change is written in the transaction of the change.
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
    """The store. Processes cache what they read from it, and drop their caches when the *epoch* grows: a counter in the
    store that every change of rights increments.

    Changes take `by`, the actor that the audit log names. A change that has no effect, such as adding a member twice,
    writes no line in the audit log and does not increment the epoch. Changes raise AccountInvalid, AccountUnknown,
    AccountExists, StorageFull, StorageFailed. A cancelled change has either happened completely or not at all. Lists
    come in pages that start with the first item after `after` and have at most `limit` items; if a page would grow
    large in bytes, it has fewer."""

    # State that every request reads

    def epoch(self) -> int:
        """Returns the epoch: the counter that every change of accounts, groups, grants and signing keys increments, and
        every revocation of a token. All processes see the new number as soon as the change is committed. Takes about
        two microseconds."""
        ...

    def has_had_account(self) -> bool:
        """Returns whether there ever was an account. Before the first account is added, every client may do
        everything."""
        ...

    def instance_id(self) -> str:
        """Returns the random id of this store, which its bearer tokens name as their issuer."""
        ...

    # Accounts

    def account(self, name: AccountName) -> Account:
        """Returns the account. Raises AccountUnknown."""
        ...

    def password_hash(self, name: AccountName) -> str | None:
        """Returns the hash of the account's password; None if the account does not exist or has no password."""
        ...

    def accounts(self, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
        """Returns a page of the accounts of this kind (None: of both kinds), in the order of their names."""
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
        """Adds an account and returns it. After the first account ever, anonymous clients have only the rights that
        grants give them, for good. `password_hash`: None for an account without a password. `note`: free text."""
        ...

    async def set_password(self, name: AccountName, password_hash: str | None, *, by: Actor) -> None:
        """Sets the password, or removes it if `password_hash` is None. Refresh tokens and bearer tokens that were
        issued to the account before become invalid. Raises AccountInvalid for a robot."""
        ...

    async def replace_hash(self, name: AccountName, old: str, new: str) -> None:
        """Replaces the hash `old` by `new`, a hash of the same password with stronger parameters. Does nothing if the
        account's hash is not `old` any more. Tokens stay valid."""
        ...

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Enables or disables the account. With `keep_admin`, raises LastAdmin if no enabled admin would be left."""
        ...

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Sets whether the account is an admin. With `keep_admin`, raises LastAdmin if no enabled admin would be
        left."""
        ...

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        """Removes the account with its tokens, group memberships and grants, so that a later account of the same name
        does not inherit them. With `keep_admin`, raises LastAdmin if no enabled admin would be left."""
        ...

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        """Returns a page of groups, each with the names of its members, in the order of the groups' names."""
        ...

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        """Returns the name of the group and the names of its members. Raises AccountUnknown."""
        ...

    def known_groups(self, names: Iterable[str]) -> set[str]:
        """Returns those of `names` that are names of groups."""
        ...

    def groups_of(self, member: str) -> tuple[AccountName, ...]:
        """Returns the groups that `member` belongs to. A member need not have an account in this store."""
        ...

    async def add_group(self, name: AccountName, *, by: Actor) -> None:
        """Adds a group without members."""
        ...

    async def remove_group(self, name: AccountName, *, by: Actor) -> None:
        """Removes the group with its memberships and grants."""
        ...

    async def add_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """Adds `member` to the group. It need not have an account in this store. Raises AccountInvalid if `member` is a
        group."""
        ...

    async def remove_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """Removes `member` from the group."""
        ...

    # Rights

    def grants(self, subjects: Sequence[Grantee] | None = None) -> list[Grant]:
        """Returns the grants that `subjects` have (None: all grants)."""
        ...

    def grant_page(self, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
        """Returns a page of the grants that `subjects` have (None: of all grants), in the order of texts such as
        `group:dev team/**`. `after` is such a text."""
        ...

    def patterns_by_actions(self, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
        """Returns the grants of all `subjects` together: maps each set of actions to the patterns for which one of the
        subjects has a grant with exactly these actions. Takes a microsecond per grant."""
        ...

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        """Stores the grant. It replaces a grant of the same subject for the same pattern. Raises AccountUnknown if the
        subject is a group or robot that does not exist. Raises AccountInvalid if the subject has another kind (such as
        `user:ci` where `ci` is a robot) or there are too many grants."""
        ...

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes the subject's grant for the pattern."""
        ...

    # API tokens

    def token(self, token_id: str) -> tuple[ApiToken, bytes]:
        """Returns the token and the hash of its secret. Raises AccountUnknown if there is no such token, or if it was
        revoked or has expired."""
        ...

    def tokens(self, account: AccountName | None, after: str | None, limit: int) -> Page[ApiToken]:
        """Returns a page of the tokens of `account` (None: of all accounts)."""
        ...

    async def add_token(self, token: ApiToken, secret_hash: bytes, *, by: Actor) -> None:
        """Adds a token of an account. Does not increment the epoch, because no process can have cached anything about a
        token that did not exist."""
        ...

    async def revoke_token(self, token_id: str, *, by: Actor) -> None:
        """Makes the token invalid for good."""
        ...

    async def save_token_use(self, token_id: str, at: float) -> None:
        """Stores that the token was used at the time `at` (seconds since 1970). The change may be lost in a power cut,
        and does not increment the epoch."""
        ...

    # Keys that sign bearer tokens. One key signs; keys that it replaced still verify tokens for a while.

    def signing_keys(self) -> list[SigningKey]:
        """Returns all keys that verify tokens. The first one is the key that signs."""
        ...

    async def ensure_key(self, make: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """Returns the key that signs. If there is none, stores and returns the key that `make` returns; `make` is
        called in another thread. If several processes do so at once, all of them get the same key."""
        ...

    async def rotate_key(self, key: SigningKey, *, keep: float, by: Actor) -> None:
        """Makes `key` the key that signs. The key that it replaces verifies tokens for `keep` seconds more. With 0.0,
        for a leaked key, its tokens become invalid at once."""
        ...

    # Throttling of logins, shared by all processes. A key is a text that names an account or a client's address.

    def throttled_until(self, key: str) -> float:
        """Returns the time until which `key` is throttled, in seconds since 1970; 0.0 if it is not throttled."""
        ...

    async def add_failures(self, keys: Mapping[str, float]) -> None:
        """Records a failed login under each key. `keys` maps each key to the seconds by which the failure extends its
        throttling: the new end is `max(now, old end) + seconds` (the generic cell rate algorithm). The change may be
        lost in a power cut."""
        ...

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Ends the throttling of the keys. The change may be lost in a power cut."""
        ...

    # Audit log

    async def add_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Writes lines about logins and denied requests. (Lines about changes of the store are written with the
        change.) The lines may be lost in a power cut."""
        ...

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns the first `limit` lines that match `query`, newest first. The log has lines about changes of content,
        tags, accounts and rights, about logins, and about denied requests. Raises AccountInvalid if `query.before` is
        not the id of a line."""
        ...

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Does what `audit` does, but in another thread. Use it for a query that may match few of many lines, because
        the search would block the event loop."""
        ...

    async def prune_audit(self, before: float) -> int:
        """Deletes the lines that are older than `before` (seconds since 1970), and returns their number. The history of
        tags is kept."""
        ...

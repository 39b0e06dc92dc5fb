"""The interface of the store of accounts, groups, grants, API tokens, login sessions, signing keys and the audit log
(`Accounts`).

`storage.access` defines the types. The methods that are not `async` only read; they are fast enough for the event loop.
An `async` method that changes something returns when the change is durable, unless the method's docstring says that a
power cut may lose the change. A change and its line in the audit log are written in one transaction.
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
    FailureCost,
    Grant,
    Grantee,
    LoginSession,
    SigningKey,
    TokenPurpose,
)
from storage.content import Actor, Page
from storage.patterns import NamePattern


class Accounts(Protocol):
    """The store of accounts and rights. Processes cache data that they read from the store. Two counters in the store
    tell a process when to read the data again:

    - The *epoch* (`epoch`) increases with every change of rights.
    - The *grants version* (`grants_version`) increases only with changes of grants. There can be thousands of grants,
      so a process reads them again only if this counter has increased.

    An account has a *version*: a number that increases with each change of its password, of `enabled` and of `admin`.
    Some methods have a parameter `expected_version`: the version that the account had when the caller logged in to it.
    These methods raise Unauthorized if the account has another version now or does not exist. They check nothing if
    `expected_version` is None, which is for callers who did not log in to this account.

    A method that changes something has a parameter `by`: the client that asked for the change, which the audit log
    names as the actor. A call that has no effect, such as adding a member twice, writes no line in the audit log and
    does not increment the epoch. Changes raise AccountInvalid, AccountUnknown, AccountExists, StorageFull,
    StorageFailed. A cancelled change takes effect either completely or not at all, unless the method's docstring says
    otherwise.

    Methods with the parameters `after` and `limit` return a page of a sorted list. The page has at most `limit` items,
    and begins after the sort key `after` (None: at the beginning of the list). A page can have fewer than `limit` items
    although more follow (`Page.more`)."""

    # State that every request reads

    def epoch(self) -> int:
        """Returns the epoch: a number that increases with every change of accounts, groups, grants or signing keys, and
        with every revocation of an API token. All processes see the new number as soon as the change is committed.
        Takes about two microseconds."""
        ...

    def grants_version(self) -> int:
        """Returns the grants version: a number that increases only with changes of grants. All processes see the new
        number as soon as the change is committed. Takes about two microseconds."""
        ...

    def has_had_account(self) -> bool:
        """Returns whether an account was ever added to the store, even if it was removed later. Every client has all
        rights if no account was ever added and the settings name no other source of accounts."""
        ...

    def instance_id(self) -> str:
        """Returns the random id of this store. Bearer tokens of this registry name it as their issuer."""
        ...

    # Accounts

    def account(self, name: AccountName) -> Account:
        """Returns the account. Raises AccountUnknown."""
        ...

    def password_hash(self, name: AccountName) -> str | None:
        """Returns the hash of the account's password; None if the account does not exist or has no password."""
        ...

    def accounts(self, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
        """Returns a page of the accounts of this kind (None: of both kinds), sorted by name."""
        ...

    async def add_account(
        self,
        name: AccountName,
        kind: AccountKind,
        *,
        password_hash: str | None,
        admin: bool = False,
        note: str = "",
        refuse_name_with_rights: bool = False,
        by: Actor,
    ) -> Account:
        """Adds an account and returns it. `password_hash`: None for an account without a password. `note`: free text.
        `refuse_name_with_rights`: True: raises AccountInvalid in these cases, because the new account would get rights
        that may be meant for an account outside this store with the same name, such as one in an htpasswd file:

        - `name` has a grant.
        - `name` is a member of a group."""
        ...

    async def set_password(
        self, name: AccountName, password_hash: str | None, *, expected_version: int | None = None, by: Actor
    ) -> None:
        """Sets the hash of the password; None removes the password. The account's refresh tokens (API tokens of the
        purpose `login`), bearer tokens and browser sessions become invalid; its API tokens of the purpose `personal`
        stay valid. Raises AccountInvalid for a robot. Raises Unauthorized (`expected_version`)."""
        ...

    async def replace_hash(self, name: AccountName, old: str, new: str) -> None:
        """Replaces the hash `old` by `new`, a hash of the same password with stronger parameters. Does nothing if the
        account's hash is not `old` any more. Tokens stay valid. The change may be lost in a power cut."""
        ...

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Enables or disables the account. `keep_admin`: if True, raises LastAdmin instead of disabling the last
        enabled admin."""
        ...

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Makes the account an admin, or an ordinary account. `keep_admin`: if True, raises LastAdmin if no enabled
        admin would be left."""
        ...

    async def change_account(
        self,
        name: AccountName,
        *,
        admin: bool | None = None,
        enabled: bool | None = None,
        keep_admin: bool = False,
        by: Actor,
    ) -> None:
        """Does what `set_admin` and `set_enabled` do, in one transaction: makes both changes or neither. `admin`,
        `enabled`: the new values; None for no change. `keep_admin`: if True, raises LastAdmin if no enabled admin would
        be left."""
        ...

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        """Removes the account with its tokens, group memberships and grants, so that a later account of the same name
        does not get them. `keep_admin`: if True, raises LastAdmin instead of removing the last enabled admin."""
        ...

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        """Returns a page of groups, sorted by name. Each item is the name of a group and the names of its members."""
        ...

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        """Returns the name of the group and the names of its members. Raises AccountUnknown."""
        ...

    def known_groups(self, names: Iterable[str]) -> set[str]:
        """Returns the elements of `names` that are names of groups in this store."""
        ...

    def groups_of(self, member: str) -> tuple[AccountName, ...]:
        """Returns the names of the groups that `member` belongs to. A member need not have an account in this store."""
        ...

    async def add_group(self, name: AccountName, *, by: Actor) -> None:
        """Adds a group without members."""
        ...

    async def remove_group(self, name: AccountName, *, by: Actor) -> None:
        """Removes the group with its memberships and grants."""
        ...

    async def add_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """Adds `member` to the group. The member need not have an account in this store. Raises AccountInvalid if
        `member` is a group, if the group has too many members, or if `member` is in too many groups."""
        ...

    async def add_members(self, group: AccountName, members: Sequence[AccountName], *, by: Actor) -> None:
        """Does what `add_member` does for each of the members, in one transaction: adds all of them or none."""
        ...

    async def remove_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        """Removes `member` from the group."""
        ...

    async def remove_members(self, group: AccountName, members: Sequence[AccountName], *, by: Actor) -> None:
        """Does what `remove_member` does for each of the members, in one transaction: removes all of them or none."""
        ...

    # Rights

    def grants(self, subjects: Sequence[Grantee] | None = None) -> list[Grant]:
        """Returns the grants that `subjects` have (None: all grants)."""
        ...

    def grant_page(self, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
        """Returns a page of the grants that `subjects` have (None: of all grants), sorted by kind of subject, name of
        subject, and pattern. `after`: subject and pattern in one text, such as `group:dev team/**`."""
        ...

    def patterns_by_actions(self, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
        """Returns the patterns of all grants of `subjects`, by the actions that the grants allow. The key of a grant is
        the `Action` with exactly the flags that the grant allows: a grant of pull and push is under `PULL | PUSH`, and
        not under `PULL`. Takes a microsecond per grant."""
        ...

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        """Stores the grant, which replaces an earlier grant of the same subject for the same pattern. Raises
        AccountUnknown if the subject is a group or robot that does not exist. Raises AccountInvalid if the subject
        states a wrong kind (such as `user:ci` for a robot `ci`), if the grant has no action, or if the subject has too
        many grants."""
        ...

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        """Does what `put_grant` does for each of the grants, in one transaction: stores all of them or none."""
        ...

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes the subject's grant for exactly this pattern."""
        ...

    # API tokens

    def token(self, token_id: str) -> tuple[ApiToken, bytes]:
        """Returns the token and the hash of its secret. Raises AccountUnknown if the token does not exist, was revoked,
        or has expired."""
        ...

    def tokens(
        self, account: AccountName | None, after: str | None, limit: int, *, purpose: TokenPurpose | None = None
    ) -> Page[ApiToken]:
        """Returns a page of the tokens of `account` (None: of all accounts), sorted by id. `purpose`: the purpose of
        the returned tokens; None: every purpose. `purpose` has no effect if `account` is None."""
        ...

    async def add_token(
        self, token: ApiToken, secret_hash: bytes, *, expected_version: int | None = None, by: Actor
    ) -> None:
        """Adds a token of an account. Does not increment the epoch for the new token. If the account has too many
        tokens of the purpose `login`, revokes some that are probably not in use. Raises AccountInvalid if the account
        has too many tokens of the purpose `personal`. Raises Unauthorized (`expected_version`)."""
        ...

    async def revoke_token(self, token_id: str, *, by: Actor) -> None:
        """Makes the token invalid. This cannot be undone."""
        ...

    async def save_token_use(self, token_id: str, at: float) -> None:
        """Stores that the token was used at the time `at` (seconds since 1970). Does not increment the epoch. The
        change may be lost in a power cut."""
        ...

    # Sessions of people who logged in with a browser

    def login_session(self, session_id: str) -> tuple[LoginSession, bytes]:
        """Returns the session and the hash of its secret. Raises AccountUnknown if the session does not exist, was
        ended, or has expired. Takes about ten microseconds."""
        ...

    def login_sessions(self, account: AccountName) -> list[LoginSession]:
        """Returns the sessions of the account, the newest first. Their number is limited."""
        ...

    async def add_login_session(self, session: LoginSession, secret_hash: bytes, *, by: Actor) -> None:
        """Adds a session. If the account has too many sessions, ends the least recently used one. Raises Unauthorized
        if `session.version` is not None, and the account has another version."""
        ...

    async def end_login_session(self, session_id: str, *, by: Actor) -> None:
        """Makes the session invalid. This cannot be undone. Raises AccountUnknown if there is no such session."""
        ...

    async def end_login_sessions(self, account: AccountName, *, except_id: str | None = None, by: Actor) -> int:
        """Makes all sessions of the account invalid, except the session with the id `except_id`. Returns the number of
        ended sessions."""
        ...

    async def save_session_use(self, session_id: str, at: float) -> None:
        """Stores that a request with the session came at the time `at` (seconds since 1970). The change may be lost in
        a power cut."""
        ...

    # Signing keys of bearer tokens. One key signs new tokens. Older keys still verify the tokens that they have signed.

    def signing_keys(self) -> list[SigningKey]:
        """Returns the key that signs new tokens, if there is one, and after it the older keys that still verify
        tokens."""
        ...

    async def ensure_key(self, make_key: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """Returns the key that signs new tokens. If there is none, calls `make_key` in another thread, and stores and
        returns the result. Calls in several processes at the same time return the same key."""
        ...

    async def rotate_key(self, key: SigningKey, *, keep_seconds: float, by: Actor) -> None:
        """Makes `key` the key that signs new tokens. Older keys verify tokens for at most `keep_seconds` more. Pass 0.0
        if a key has leaked: the tokens of all older keys then become invalid immediately."""
        ...

    # Throttling of logins after failed logins, for all processes together. A *throttling key* is a text that stands for
    # an account, for a client's network, or for both. Each key has a time. A failed login moves the times of its keys
    # further into the future (`add_failures`). The caller refuses logins while the time of one of their keys is too far
    # in the future.

    def throttled_until(self, key: str) -> float:
        """Returns the time of the throttling key in seconds since 1970. Returns 0.0 if the key has no time, or if the
        time has passed."""
        ...

    async def add_failures(self, costs: Mapping[str, FailureCost]) -> None:
        """Records a failed login. `costs` maps each throttling key of the login to a cost. The new time of a key is
        `max(now, old time) + seconds` (the generic cell rate algorithm), but at most `now + max_seconds`. If the clock
        was ahead when the old time was stored, the old time can be implausibly far in the future. The old time then
        counts as `now`. The change may be lost in a power cut."""
        ...

    async def mark_once(self, key: str, seconds: float) -> bool:
        """Marks an action that must happen only once in `seconds`, such as the completion of one login at the OpenID
        provider. `key`: a throttling key that stands for the action. Returns whether the caller may do the action:

        - False: the action is marked already, because the time of the key has not passed. This time stays the same.
        - True: the action was not marked. The time of the key is `now + seconds` now.

        If several processes call this at the same moment, only one of them gets True. The change may be lost in a power
        cut."""
        ...

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Deletes the times of the throttling keys, so that logins under them are no longer refused. The change may be
        lost in a power cut."""
        ...

    # Audit log

    async def add_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Adds lines about logins and denied requests. Do not call it for a change: the method that makes the change
        adds the line. The lines may be lost in a power cut."""
        ...

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns the newest `limit` lines that match `query`, the newest first. Raises AccountInvalid if
        `query.before` is not a valid id of a line."""
        ...

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Does what `audit` does, but in another thread. Call it if the search may be long, so that the event loop is
        not blocked: if `query` may match only a few lines of a long log."""
        ...

    async def prune_audit(self, before: float) -> int:
        """Deletes the lines that are older than `before` (seconds since 1970). Keeps lines about changes of tags: they
        are the history of the tags. Returns the number of deleted lines. A cancelled call may have deleted only some
        lines. The deletion may be lost in a power cut."""
        ...

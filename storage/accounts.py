"""The interface of the store of accounts, groups, grants, API tokens, login sessions, signing keys and the audit log
(`Accounts`).

`storage.access` defines the types. The methods that are not `async` only read; they take microseconds and are called on
the event loop. An `async` method that changes something returns when the change is durable, unless its docstring says
that a power cut may lose the change. One transaction makes a change and writes its line in the audit log.
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
    tell them when to read again. Every change of rights increments the *epoch*: when the epoch has increased, a process
    checks its cached data. Only a change of a grant also increments the *grants version*: while the grants version is
    unchanged, a process need not read the grants again. There can be thousands of grants.

    An account has a *version*: a number that increases with each change of its password, of `enabled` and of `admin`.

    The parameter `by` of a change is the client that asked for it; the audit log names this client as the actor. A
    change that has no effect, such as adding a member twice, writes no line in the audit log and does not increment the
    epoch. Changes raise AccountInvalid, AccountUnknown, AccountExists, StorageFull, StorageFailed. If a change is
    cancelled, it takes effect either completely or not at all, unless its docstring says otherwise.

    Methods with the parameters `after` and `limit` return a page of a sorted list. The page has at most `limit` items,
    and begins after the sort key `after` (None: at the beginning of the list). A page of large items can have fewer
    than `limit` items before the end of the list."""

    # State that every request reads

    def epoch(self) -> int:
        """Returns the epoch. Every change of accounts, groups, grants and signing keys and every revocation of an API
        token increments the epoch. All processes see the new number as soon as the change is committed. Takes about
        two microseconds."""
        ...

    def grants_version(self) -> int:
        """Returns the version of the grants: a number that only changes of grants increment. All processes see the new
        number as soon as the change is committed. Grants that were read under the same number are still current. Takes
        about two microseconds."""
        ...

    def has_had_account(self) -> bool:
        """Returns whether an account was ever added. Until the first one is added, every client has all rights."""
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
        """Adds an account and returns it. After the first account was added, clients that have not logged in have only
        the rights that grants give them. Removing the account does not change this. `password_hash`: None for no
        password. `note`: free text. `refuse_name_with_rights`: whether to raise AccountInvalid if `name` already has a
        grant or is a member of a group, because the new account would get these rights. Such a name can belong to an
        account outside this store, for example in an htpasswd file."""
        ...

    async def set_password(
        self, name: AccountName, password_hash: str | None, *, expected_version: int | None = None, by: Actor
    ) -> None:
        """Sets the hash of the password; None removes the password. The account's refresh tokens (API tokens of the
        purpose `login`), bearer tokens and browser sessions become invalid; its API tokens of the purpose `personal`
        stay valid. `expected_version`: the version that the account had when the caller logged in to it; None: the
        caller did not log in to this account. Raises AccountInvalid for a robot. Raises Unauthorized if the account has
        another version than `expected_version`."""
        ...

    async def replace_hash(self, name: AccountName, old: str, new: str) -> None:
        """Replaces the hash `old` by `new`, a hash of the same password with stronger parameters. Does nothing if the
        account's hash is not `old` any more. Tokens stay valid. The change may be lost in a power cut."""
        ...

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Enables or disables the account. `keep_admin`: whether to raise LastAdmin instead of disabling the last
        enabled admin."""
        ...

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        """Sets whether the account is an admin. `keep_admin`: whether to raise LastAdmin instead of taking this right
        from the last enabled admin."""
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
        """Does what `set_admin` and `set_enabled` do, in one transaction: makes both changes or neither. None leaves a
        flag as it is. `keep_admin`: whether to raise LastAdmin instead of leaving no enabled admin."""
        ...

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        """Removes the account with its tokens, group memberships and grants, so that a later account of the same name
        does not get them. `keep_admin`: whether to raise LastAdmin instead of removing the last enabled admin."""
        ...

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        """Returns a page of groups, sorted by name. Each item is the name of a group and the names of its members."""
        ...

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        """Returns the name of the group and the names of its members. Raises AccountUnknown."""
        ...

    def known_groups(self, names: Iterable[str]) -> set[str]:
        """Returns those of the `names` that are names of groups in this store."""
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
        """Returns the patterns for which `subjects` have grants. The result maps each set of actions (an `Action` is a
        set of flags) to the patterns for which at least one subject has a grant of exactly this set. Takes a
        microsecond per grant."""
        ...

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        """Stores the grant. Replaces a grant of the same subject for the same pattern. Raises AccountUnknown if the
        subject is a group or robot that does not exist. Raises AccountInvalid if the subject has another kind (such as
        `user:ci` if `ci` is a robot), if the grant has no action, or if the subject has too many grants."""
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
        """Returns a page of the tokens of `account` (None: of all accounts), sorted by id. `purpose`: returns only
        tokens of this purpose (None: of every purpose); ignored if `account` is None."""
        ...

    async def add_token(
        self, token: ApiToken, secret_hash: bytes, *, expected_version: int | None = None, by: Actor
    ) -> None:
        """Adds a token of an account. The new token does not increment the epoch, because no process has cached
        anything about it. If the account has too many tokens of the purpose `login`, revokes some that are probably not
        in use. `expected_version`: the version that the account had when the caller logged in to it; None: the caller
        did not log in to this account. Raises Unauthorized if the account has another version than `expected_version`.
        Raises AccountInvalid if the account has too many tokens of the purpose `personal`."""
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
        if `session.version` is not None and the account has another version now."""
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

    # Signing keys of bearer tokens. One key signs new tokens; replaced keys still verify their tokens for some time.

    def signing_keys(self) -> list[SigningKey]:
        """Returns all keys that verify tokens. If there is a key that signs new tokens, it is the first."""
        ...

    async def ensure_key(self, make_key: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """Returns the key that signs new tokens. If there is none, calls `make_key` in another thread, and stores and
        returns the key that it made. Calls in several processes at the same time return the same key."""
        ...

    async def rotate_key(self, key: SigningKey, *, keep_seconds: float, by: Actor) -> None:
        """Makes `key` the key that signs new tokens. Older keys verify tokens for at most `keep_seconds` more. With
        0.0, the tokens of the older keys become invalid immediately. Pass 0.0 if a key has leaked."""
        ...

    # Throttling of logins after failed logins, for all processes together. A *throttling key* is a text that stands for
    # an account, for a client's network, or for both. The store has a time for each key. Each failed login moves the
    # times of its keys further into the future (`add_failures`). While the time of a key is too far in the future, the
    # caller of this interface refuses logins under the key. `mark_once` uses throttling keys for another purpose.

    def throttled_until(self, key: str) -> float:
        """Returns the time of the throttling key in seconds since 1970; 0.0 if it has none or the time has passed. The
        caller decides how far in the future the time may be before it refuses logins."""
        ...

    async def add_failures(self, costs: Mapping[str, FailureCost]) -> None:
        """Records a failed login. `costs` maps each throttling key of the login to a cost. The new time of a key is
        `max(now, old time) + seconds` (the generic cell rate algorithm), but at most `now + max_seconds`. An old time
        that is not plausible, because the clock was set back, does not count. The change may be lost in a power
        cut."""
        ...

    async def mark_once(self, key: str, seconds: float) -> bool:
        """Marks something that must happen only once in `seconds`, such as the completion of one login at the OpenID
        provider. `key`: the throttling key that stands for it. If the key has a time that has not passed, changes
        nothing and returns False. Otherwise sets its time to `now + seconds` and returns True. If several processes
        call this at the same moment, only one of them gets True. The change may be lost in a power cut."""
        ...

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Deletes the times of the throttling keys, so that logins under them are no longer refused. The change may be
        lost in a power cut."""
        ...

    # Audit log

    async def add_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Adds lines about logins and denied requests. Not for changes: each method that changes something adds its own
        line. The lines may be lost in a power cut."""
        ...

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns the newest `limit` lines that match `query`, newest first. The log has lines about changes of
        content, tags, accounts and rights, about logins, and about denied requests. Raises AccountInvalid if
        `query.before` is not a valid id of a line."""
        ...

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Does what `audit` does, but in another thread. Call it for a query that may match only a few lines of a long
        log, because `audit` would block the event loop during the long search."""
        ...

    async def prune_audit(self, before: float) -> int:
        """Deletes the lines that are older than `before` (seconds since 1970). Keeps the lines about changes of tags,
        because they are the history of the tags. Returns the number of deleted lines. A cancelled call may have
        deleted only some lines. The deletion may be lost in a power cut."""
        ...

"""Stores accounts, groups, grants, API tokens, login sessions, signing keys and the audit log in the metadata database
(`SqliteAccounts`).

- The *data version* is a value that differs after every commit to the database.
- The *epoch* is a number in the database that increases with every change of rights. When the epoch has changed,
  processes must no longer use the rights that they have cached.
- `by` is the actor (an account or a command) that the audit log names.
- The *reserve* is disk space that is kept for changes that must succeed on a full disk (`ReserveUse`).

After a method has returned, a power cut does not undo its change. A change with `durable=False` can be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import apsw

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
from storage.data_dir.blocking_calls import UncancellableFuture
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.access import (
    account_table,
    api_token_table,
    audit_table,
    grant_table,
    group_table,
    login_session_table,
    login_tables,
)
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.patterns import NamePattern

AUDIT_LINES_PER_PRUNE = 5000
"""Largest number of lines of the audit log that one transaction deletes. Other changes wait during the transaction."""
P = ParamSpec("P")
T = TypeVar("T")


class SqliteAccounts:
    """Implements `storage.accounts.Accounts`, which documents the methods and the errors that they raise. Only one
    event loop may use an instance."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
        data_version: Callable[[], object],
        scans: ScanThread | ImmutableScans,
    ) -> None:
        """`db` is the connection for short lookups, which run on the event loop. `writer` runs changes. `clock` returns
        the time in seconds since 1970. `data_version` returns the data version. `scans` runs long lookups."""
        self._db = db
        self._scans = scans
        self._data_version = data_version
        self._epoch_data_version: object = None
        """Last data version at which `_epoch`, `_grants_version` and `_has_had_account` were known to be current."""
        self._epoch, self._grants_version, self._has_had_account = 0, 0, False
        self._writer = writer
        self._clock = clock

    def _run_using_all_reserve(
        self,
        change: Callable[Concatenate[apsw.Connection, Actor, float, P], T],
        by: Actor,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> UncancellableFuture[T]:
        """Calls `change` in a transaction, with the connection, `by`, the time and the other arguments. On a full disk,
        the change may use all of the reserve. For changes that take rights away, set a password or add a signing
        key."""
        now = self._clock()
        return self._writer.run(lambda db: change(db, by, now, *args, **kwargs), reserve_use=ReserveUse.ALL)

    def _run_using_half_reserve(
        self,
        change: Callable[Concatenate[apsw.Connection, Actor, float, P], T],
        by: Actor,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> UncancellableFuture[T]:
        """Calls `change` in a transaction, with the connection, `by`, the time and the other arguments. On a full disk,
        the change may use half of the reserve. For changes that add something or give rights."""
        now = self._clock()
        return self._writer.run(lambda db: change(db, by, now, *args, **kwargs), reserve_use=ReserveUse.HALF)

    def epoch(self) -> int:
        """Returns the epoch after the last commit of any process. Reads the database only if there was a commit since
        the last call, and this commit may have changed rights (`CommitThread.has_same_rights`)."""
        self._refresh_epoch()
        return self._epoch

    def grants_version(self) -> int:
        """Returns the version of the grants after the last commit of any process. This number increases with every
        change of a grant, but not with other changes of rights. Reads the database only when `epoch` would."""
        self._refresh_epoch()
        return self._grants_version

    def has_had_account(self) -> bool:
        """Returns whether the database has or had an account. Before the first account is added, every client may do
        everything."""
        self._refresh_epoch()
        return self._has_had_account

    def _refresh_epoch(self) -> None:
        """Makes `_epoch`, `_grants_version` and `_has_had_account` current."""
        version = self._data_version()
        if version == self._epoch_data_version:
            return
        if not self._writer.has_same_rights(self._epoch_data_version, version):
            epoch, grants_version, has_had_account = self._db.execute(account_table.SELECT_STATE).get
            self._epoch, self._grants_version, self._has_had_account = epoch, grants_version, bool(has_had_account)
        self._epoch_data_version = version

    def instance_id(self) -> str:
        """Returns the random name of this database. Bearer tokens and sessions name it as their issuer."""
        name: str = self._db.execute(account_table.SELECT_INSTANCE_ID).get
        return name

    # Accounts

    def account(self, name: AccountName) -> Account:
        return account_table.account(self._db, name)

    def password_hash(self, name: AccountName) -> str | None:
        return account_table.password_hash(self._db, name)

    def accounts(self, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
        return account_table.page(self._db, kind, after, limit)

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
        return await self._run_using_half_reserve(
            account_table.add, by, name, kind, password_hash, admin, note, refuse_name_with_rights
        )

    async def set_password(
        self, name: AccountName, password_hash: str | None, *, expected_version: int | None = None, by: Actor
    ) -> None:
        await self._run_using_all_reserve(account_table.set_password, by, name, password_hash, expected_version)

    async def replace_hash(self, name: AccountName, old: str, new: str) -> None:
        """Replaces the hash `old` by `new`, a hash of the same password with stronger parameters. Does nothing if the
        account's hash is no longer `old`."""
        await self._writer.run(lambda db: account_table.replace_hash(db, name, old, new), durable=False)

    async def set_enabled(self, name: AccountName, enabled: bool, *, keep_admin: bool = False, by: Actor) -> None:
        await self.change_account(name, enabled=enabled, keep_admin=keep_admin, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, keep_admin: bool = False, by: Actor) -> None:
        await self.change_account(name, admin=admin, keep_admin=keep_admin, by=by)

    async def change_account(
        self,
        name: AccountName,
        *,
        admin: bool | None = None,
        enabled: bool | None = None,
        keep_admin: bool = False,
        by: Actor,
    ) -> None:
        takes_rights_away = admin is False or enabled is False
        run = self._run_using_all_reserve if takes_rights_away else self._run_using_half_reserve
        await run(account_table.set_flags, by, name, admin, enabled, keep_admin)

    async def remove_account(self, name: AccountName, *, keep_admin: bool = False, by: Actor) -> None:
        await self._run_using_all_reserve(account_table.remove, by, name, keep_admin)

    # Groups

    def groups(self, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
        return group_table.page(self._db, after, limit)

    def group(self, name: AccountName) -> tuple[AccountName, tuple[str, ...]]:
        return group_table.group(self._db, name)

    def known_groups(self, names: Iterable[str]) -> set[str]:
        return group_table.existing_groups(self._db, names)

    def groups_of(self, member: str) -> tuple[AccountName, ...]:
        return group_table.groups_of(self._db, member)

    async def add_group(self, name: AccountName, *, by: Actor) -> None:
        await self._run_using_half_reserve(group_table.add, by, name)

    async def remove_group(self, name: AccountName, *, by: Actor) -> None:
        await self._run_using_all_reserve(group_table.remove, by, name)

    async def add_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        await self.add_members(group, [member], by=by)

    async def add_members(self, group: AccountName, members: Sequence[AccountName], *, by: Actor) -> None:
        await self._run_using_half_reserve(group_table.add_members, by, group, members)

    async def remove_member(self, group: AccountName, member: AccountName, *, by: Actor) -> None:
        await self.remove_members(group, [member], by=by)

    async def remove_members(self, group: AccountName, members: Sequence[AccountName], *, by: Actor) -> None:
        await self._run_using_all_reserve(group_table.remove_members, by, group, members)

    # Rights

    def grants(self, subjects: Sequence[Grantee] | None = None) -> list[Grant]:
        return grant_table.grants(self._db, subjects)

    def grant_page(self, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
        return grant_table.page(self._db, subjects, after, limit)

    def patterns_by_actions(self, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
        """Returns all grants of the subjects as a dictionary. Each key is a set of actions (`Action` is a set of
        flags). The value contains the patterns of all grants of exactly these actions."""
        return grant_table.patterns_by_actions(self._db, subjects)

    async def put_grant(self, grant: Grant, *, by: Actor) -> None:
        await self.put_grants([grant], by=by)

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        await self._run_using_half_reserve(grant_table.put_all, by, grants)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        await self._run_using_all_reserve(grant_table.remove, by, subject, pattern)

    # API tokens

    def token(self, token_id: str) -> tuple[ApiToken, bytes]:
        return api_token_table.get_token(self._db, self._clock(), token_id)

    def tokens(
        self, account: AccountName | None, after: str | None, limit: int, *, purpose: TokenPurpose | None = None
    ) -> Page[ApiToken]:
        return api_token_table.token_page(self._db, self._clock(), account, after, limit, purpose)

    async def add_token(
        self, token: ApiToken, secret_hash: bytes, *, expected_version: int | None = None, by: Actor
    ) -> None:
        await self._run_using_half_reserve(api_token_table.add, by, token, secret_hash, expected_version)

    async def revoke_token(self, token_id: str, *, by: Actor) -> None:
        await self._run_using_all_reserve(api_token_table.revoke, by, token_id)

    async def save_token_use(self, token_id: str, at: float) -> None:
        """Stores that the token was used at the time `at` (seconds since 1970)."""
        await self._writer.run(lambda db: api_token_table.save_token_use(db, token_id, at), durable=False)

    # Sessions of people who logged in with a browser

    def login_session(self, session_id: str) -> tuple[LoginSession, bytes]:
        return login_session_table.find_session(self._db, self._clock(), session_id)

    def login_sessions(self, account: AccountName) -> list[LoginSession]:
        return login_session_table.sessions_of_account(self._db, self._clock(), account)

    async def add_login_session(self, session: LoginSession, secret_hash: bytes, *, by: Actor) -> None:
        await self._run_using_half_reserve(login_session_table.add_session, by, session, secret_hash)

    async def end_login_session(self, session_id: str, *, by: Actor) -> None:
        await self._run_using_all_reserve(login_session_table.end_session, by, session_id)

    async def end_login_sessions(self, account: AccountName, *, except_id: str | None = None, by: Actor) -> int:
        return await self._run_using_all_reserve(login_session_table.end_sessions_of_account, by, account, except_id)

    async def save_session_use(self, session_id: str, at: float) -> None:
        """Stores that a request with the session came at the time `at` (seconds since 1970)."""
        await self._writer.run(lambda db: login_session_table.save_session_use(db, session_id, at), durable=False)

    # Keys that sign the tokens of `/token`

    def signing_keys(self) -> list[SigningKey]:
        return login_tables.signing_keys(self._db, self._clock())

    async def ensure_key(self, make_key: Callable[[], SigningKey], *, by: Actor) -> SigningKey:
        """Returns the key that signs new tokens. If there is none, makes a key with `make_key` and stores it."""
        keys = self.signing_keys()
        if keys and keys[0].retired is None:  # the key that signs new tokens comes first
            return keys[0]
        return await self._run_using_all_reserve(login_tables.ensure_key, by, make_key)

    async def rotate_key(self, key: SigningKey, *, keep_seconds: float, by: Actor) -> None:
        """Stores `key` as the key that signs new tokens. Tokens that earlier keys have signed stay valid for at most
        `keep_seconds` seconds."""
        await self._run_using_all_reserve(login_tables.rotate_key, by, key, keep_seconds)

    # Throttling of logins. A *throttling key* is a text that names an account, a client's network, or both. The
    # database has a time for each key. Each failed login under a key makes the key's time later. While the time lies
    # too far in the future, the caller refuses logins under the key.

    def throttled_until(self, key: str) -> float:
        """Returns the time of the throttling key in seconds since 1970. Returns 0.0 if the database has no time for the
        key, or if the time has passed."""
        return login_tables.throttled_until(self._db, self._clock(), key)

    async def add_failures(self, costs: Mapping[str, FailureCost]) -> None:
        """Stores a failed login. `costs` maps each throttling key of the login to the time that the failure adds."""
        now = self._clock()
        await self._writer.run(
            lambda db: login_tables.add_failures(db, now, costs), durable=False, reserve_use=ReserveUse.HALF
        )

    async def mark_once(self, key: str, seconds: float) -> bool:
        """Marks an action that must happen only once in `seconds` seconds. `key`: a text that stands for the action.
        The database stores a time for `key`, as for a throttling key.

        - If the key's time lies in the future, the action is marked already. Returns False.
        - Otherwise, sets the key's time to `seconds` seconds from now, and returns True."""
        now = self._clock()
        return await self._writer.run(
            lambda db: login_tables.mark_once(db, now, key, seconds), durable=False, reserve_use=ReserveUse.HALF
        )

    async def clear_failures(self, keys: Sequence[str]) -> None:
        """Deletes the throttling keys, so that logins under them are no longer refused."""
        await self._writer.run(
            lambda db: login_tables.clear_failures(db, keys), durable=False, reserve_use=ReserveUse.HALF
        )

    # Audit log

    async def add_audit_entries(self, entries: Sequence[AuditEntry]) -> None:
        """Writes lines about events that change nothing in the database, such as logins and denied requests."""
        await self._writer.run(lambda db: audit_table.add_entries(db, entries), durable=False)

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        return audit_table.page(self._db, query, limit)

    async def scan_audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns the same as `audit`, for queries that read many lines: `scans` runs the query."""
        return await self._scans.run(lambda db: audit_table.page(db, query, limit))

    async def prune_audit(self, before: float) -> int:
        """Deletes the lines that are older than the time `before` (seconds since 1970). Keeps all lines of the tag
        history. Returns the number of deleted lines."""
        deleted = 0
        while True:
            count = await self._writer.run(
                lambda db: audit_table.prune(db, before, AUDIT_LINES_PER_PRUNE),
                durable=False,
                reserve_use=ReserveUse.ALL,
            )
            deleted += count
            if count < AUDIT_LINES_PER_PRUNE:
                return deleted

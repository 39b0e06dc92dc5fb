"""Functions for the table of accounts and for the epoch, and `limited_page`, which makes pages of limited size.

An account belongs to a person or to a program (a *robot*).

The *epoch* is a number in the database. Each transaction that changes rights increments the epoch. Each request reads
the epoch, and ignores rights that its worker (server process) cached in an earlier epoch. So every worker refuses a
revoked right at the next request.

All functions take a connection. Functions that change something run inside a transaction, which the caller commits.
`by` is the actor (an account or a command) that the audit log names, `now` the time in seconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import apsw

from storage.access import Account, AccountExists, AccountInvalid, AccountKind, AccountName, AccountUnknown, LastAdmin
from storage.content import Actor, Page
from storage.errors import Unauthorized
from storage.metadata.sqlite.access.audit_table import nonzero_counts, record

_ACCOUNT = """
SELECT a.name, a.kind, a.enabled, a.admin, a.version, a.created, a.note, a.password IS NOT NULL,
       (SELECT json_group_array(m.name ORDER BY m.name) FROM group_member m WHERE m.member = a.name)
  FROM account a"""
_ACCOUNT_BY_NAME = _ACCOUNT + " WHERE a.name = ?"
_PAGE = _ACCOUNT + " WHERE (?1 IS NULL OR a.kind = ?1) AND a.name > ?2 ORDER BY a.name LIMIT ?3"

_HAS_RIGHTS = """
SELECT EXISTS (SELECT 1 FROM access_grant WHERE kind IN ('user', 'robot') AND name = ?1)
    OR EXISTS (SELECT 1 FROM group_member WHERE member = ?1)"""


def name_from_database(text: str) -> AccountName:
    """Returns a name read from the database. Skips the checks of `AccountName`: they ran before the name was stored."""
    return str.__new__(AccountName, text)


def _account(row: tuple[Any, ...]) -> Account:
    """Returns the account from a row that the statement `_ACCOUNT` read."""
    name, kind, enabled, admin, version, created, note, has_password, groups = row
    return Account(
        name=name_from_database(name),
        kind=AccountKind(kind),
        enabled=bool(enabled),
        admin=bool(admin),
        version=version,
        created=created,
        groups=tuple(map(name_from_database, json.loads(groups))),
        note=note,
        has_password=bool(has_password),
    )


def account(db: apsw.Connection, name: AccountName) -> Account:
    """Returns an account. Raises AccountUnknown."""
    row = db.execute(_ACCOUNT_BY_NAME, (name,)).get
    if row is None:
        raise AccountUnknown(f"there is no account {name}")
    return _account(row)


def check_version(db: apsw.Connection, name: AccountName, expected_version: int | None) -> None:
    """Raises Unauthorized if the account's version is not `expected_version`, or if the account does not exist. Checks
    nothing if `expected_version` is None.

    `expected_version`: the version that the account had when the client logged in. An account gets a new version when
    its password, `enabled` or `admin` changes. Call this in the transaction that adds a credential or changes the
    password: a client that logged in with an old password must not add a credential."""
    if expected_version is None:
        return
    if db.execute("SELECT version FROM account WHERE name = ?", (name,)).get != expected_version:
        raise Unauthorized(f"the account {name} was changed during this request; log in again")


def password_hash(db: apsw.Connection, name: AccountName) -> str | None:
    """Returns the hash of the account's password; None if it has no password or there is no such account."""
    stored_hash: str | None = db.execute("SELECT password FROM account WHERE name = ?", (name,)).get
    return stored_hash


def page(db: apsw.Connection, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
    """Returns a page of accounts, sorted by name. `kind`: USER for people, ROBOT for robots, None for both. The page
    starts with the first name that sorts after `after`, or with the first of all names if `after` is None. The page has
    at most `limit` accounts, and fewer if its accounts are in many groups: `limited_page` limits the total number of
    *parts* on a page, and the parts of an account are its groups."""
    rows = db.execute(_PAGE, (kind, after or "", limit + 1))
    return limited_page(rows, _account, count_parts=lambda account: len(account.groups), limit=limit)


def check_name_is_free(db: apsw.Connection, name: AccountName) -> None:
    """Raises AccountExists if a person, a robot or a group has the name."""
    if (kind := kind_of(db, name)) is not None:
        raise AccountExists(f"there is a {kind} {name} already")


def kind_of(db: apsw.Connection, name: AccountName) -> str | None:
    """Returns what has the name: `user`, `robot` or `group`. Returns None if the name is free."""
    kind: str | None = db.execute(
        "SELECT kind FROM account WHERE name = ?1 UNION ALL SELECT 'group' FROM account_group WHERE name = ?1", (name,)
    ).get
    return kind


def add(
    db: apsw.Connection,
    by: Actor,
    now: float,
    name: AccountName,
    kind: AccountKind,
    hashed_password: str | None,
    admin: bool,
    note: str,
    refuse_name_with_rights: bool,
) -> Account:
    """Adds an enabled account and returns it. `hashed_password`: None for an account without a password. `admin`:
    whether the account may do everything. Raises:

    - AccountExists if an account or a group has the name.
    - AccountInvalid if `kind` is ROBOT and there is a password.
    - AccountInvalid if `refuse_name_with_rights` is true and the name already has grants or is in a group."""
    if kind is AccountKind.ROBOT and hashed_password is not None:
        raise AccountInvalid("a robot has no password; make an API token for it")
    check_name_is_free(db, name)
    if refuse_name_with_rights and db.execute(_HAS_RIGHTS, (name,)).get:
        raise AccountInvalid(f"{name} has rights already, by grants or groups; an admin has to add the account")
    db.execute(
        "INSERT INTO account (name, kind, password, enabled, admin, version, created, note) "
        "VALUES (?, ?, ?, 1, ?, ?, ?, ?)",
        (name, kind, hashed_password, int(admin), increment_epoch(db), now, note),
    )
    _mark_has_had_account(db)
    record(db, by, now, "account.add", name, {"kind": kind, "admin": admin})
    return account(db, name)


def set_password(
    db: apsw.Connection,
    by: Actor,
    now: float,
    name: AccountName,
    hashed_password: str | None,
    expected_version: int | None = None,
) -> None:
    """Changes a person's password. `hashed_password`: the hash of the new password; None to remove the password.
    `expected_version`: see `check_version`.

    Invalidates the account's bearer tokens and login sessions. Deletes its refresh tokens: the API tokens that `docker
    login` got (purpose `login`). The API tokens that the person made (purpose `personal`) stay valid.

    Raises AccountUnknown; AccountInvalid for a robot; Unauthorized (`check_version`)."""
    check_version(db, name, expected_version)
    if account(db, name).kind is AccountKind.ROBOT:
        raise AccountInvalid(f"{name} is a robot, and robots have no password; make an API token for it")
    _set_column(db, name, "password", hashed_password)
    db.execute("DELETE FROM api_token WHERE account = ? AND purpose = 'login'", (name,))
    deleted_refresh_tokens = db.changes()
    detail = nonzero_counts(removed=int(hashed_password is None), logins=deleted_refresh_tokens)
    record(db, by, now, "account.password", name, detail)


def replace_hash(db: apsw.Connection, name: AccountName, old: str, new: str) -> None:
    """Replaces the hash `old` by `new`, a hash of the same password with stronger parameters. Does nothing if `old` is
    no longer the account's hash. All credentials of the account stay valid."""
    db.execute("UPDATE account SET password = ? WHERE name = ? AND password = ?", (new, name, old))


def set_enabled(db: apsw.Connection, by: Actor, now: float, name: AccountName, enabled: bool, keep_admin: bool) -> None:
    """Enables or disables an account. Does nothing if the account is already in the requested state. Raises
    AccountUnknown. With `keep_admin`, raises LastAdmin instead of disabling the only enabled admin."""
    if keep_admin and not enabled:
        _check_not_last_admin(db, name)
    if account(db, name).enabled is not enabled:
        _set_column(db, name, "enabled", int(enabled))
        record(db, by, now, "account.enable" if enabled else "account.disable", name)


def set_admin(db: apsw.Connection, by: Actor, now: float, name: AccountName, admin: bool, keep_admin: bool) -> None:
    """Makes an account an admin or an ordinary account. Does nothing if it is already in the requested state. Raises
    AccountUnknown. With `keep_admin`, raises LastAdmin instead of making the only enabled admin an ordinary account."""
    if keep_admin and not admin:
        _check_not_last_admin(db, name)
    if account(db, name).admin is not admin:
        _set_column(db, name, "admin", int(admin))
        record(db, by, now, "account.admin", name, {"admin": admin})


def set_flags(
    db: apsw.Connection,
    by: Actor,
    now: float,
    name: AccountName,
    admin: bool | None,
    enabled: bool | None,
    keep_admin: bool,
) -> None:
    """Calls `set_admin` if `admin` is not None, and then `set_enabled` if `enabled` is not None."""
    if admin is not None:
        set_admin(db, by, now, name, admin, keep_admin)
    if enabled is not None:
        set_enabled(db, by, now, name, enabled, keep_admin)


def _set_column(db: apsw.Connection, name: AccountName, column: str, value: str | int | None) -> None:
    """Changes a column of the account, increments the epoch, sets the account's version to the new epoch, and deletes
    the account's login sessions.

    Bearer tokens (from `/token`) and login sessions contain the account's version at the time of their issue. The
    registry refuses them once the account has another version. The epoch serves as the version because it never
    repeats, even if an account is removed and added again."""
    db.execute(f"UPDATE account SET {column} = ?, version = ? WHERE name = ?", (value, increment_epoch(db), name))
    db.execute("DELETE FROM login_session WHERE account = ?", (name,))


def _check_not_last_admin(db: apsw.Connection, name: AccountName) -> None:
    """Raises LastAdmin if the account is the only enabled admin."""
    admins = db.execute("SELECT name FROM account WHERE admin = 1 AND enabled = 1 LIMIT 2").fetchall()
    if admins == [(name,)]:
        raise LastAdmin(f"{name} is the last admin who is enabled; make another account an admin first")


def remove(db: apsw.Connection, by: Actor, now: float, name: AccountName, keep_admin: bool) -> None:
    """Removes an account with its API tokens, login sessions, group memberships and grants. Raises AccountUnknown. With
    `keep_admin`, raises LastAdmin instead of removing the only enabled admin."""
    account(db, name)  # raises AccountUnknown
    if keep_admin:
        _check_not_last_admin(db, name)
    removed_counts = {}
    for item_kind, sql in (
        ("tokens", "DELETE FROM api_token WHERE account = ?"),
        ("sessions", "DELETE FROM login_session WHERE account = ?"),
        ("groups", "DELETE FROM group_member WHERE member = ?"),
        ("grants", "DELETE FROM access_grant WHERE name = ? AND kind IN ('user', 'robot')"),
    ):
        db.execute(sql, (name,))
        removed_counts[item_kind] = db.changes()
    db.execute("DELETE FROM account WHERE name = ?", (name,))
    increment_epoch(db)
    record(db, by, now, "account.remove", name, nonzero_counts(**removed_counts))


SELECT_STATE = "SELECT epoch, grants_version, closed FROM access"
"""Reads values that every request needs. Triggers increment `grants_version` when a row of `access_grant` changes."""
SELECT_HAS_HAD_ACCOUNT = "SELECT closed FROM access"
"""The column `closed` is 0 until the first account is added, and then always 1. While it is 0, every client may do
everything."""
SELECT_INSTANCE_ID = "SELECT instance FROM access"
"""The column `instance` contains the random name of this database."""


def increment_epoch(db: apsw.Connection) -> int:
    """Increments the epoch and returns its new value."""
    epoch: int = db.execute("UPDATE access SET epoch = epoch + 1 RETURNING epoch").get
    return epoch


def _mark_has_had_account(db: apsw.Connection) -> None:
    """Sets `closed` to 1. It stays 1 even if all accounts are removed."""
    db.execute("UPDATE access SET closed = 1 WHERE closed = 0")


MAX_PAGE_PARTS: Final = 10_000
"""A page of accounts or groups ends when its entries have this number of parts or more. The parts of an account are its
groups; the parts of a group are its members."""
T = TypeVar("T")


def limited_page(
    rows: Iterable[Any],
    make_entry: Callable[[Any], T],
    count_parts: Callable[[T], int],
    limit: int,
    max_parts: int = MAX_PAGE_PARTS,
) -> Page[T]:
    """Returns a page of entries. The page ends after `limit` entries, or when its entries have `max_parts` or more
    parts in total.

    `make_entry` makes an entry from a row. `count_parts` returns an entry's number of parts. `rows`: the next
    `limit + 1` rows, or fewer at the end of the table. A row after the last entry shows that more entries follow.
    Closes `rows` if `rows` is a cursor."""
    entries: list[T] = []
    parts = 0
    has_more = False
    try:
        for row in rows:
            if len(entries) == limit or parts >= max_parts:
                has_more = True
                break
            entries.append(make_entry(row))
            parts += count_parts(entries[-1])
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()
    return Page(entries, has_more)

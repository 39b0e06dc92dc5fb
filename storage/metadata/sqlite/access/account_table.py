"""Accounts of people and robots, the epoch, and pages whose entries differ in size.

The *epoch* is a number that increases in the transaction of every change that affects the rights of somebody. Each
request reads it, and what a process has cached about rights is valid for one epoch only. So a worker notices a revoked
right at the next request, whichever process revoked it.

All functions take a connection; those with `by` and `now` run inside a transaction that the caller commits. `by` is the
actor whom the audit log names, `now` the time in seconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import apsw

from storage.access import Account, AccountExists, AccountInvalid, AccountKind, AccountName, AccountUnknown, LastAdmin
from storage.content import Actor, Page
from storage.metadata.sqlite.access.audit_table import counted, record

_ACCOUNT = """
SELECT a.name, a.kind, a.enabled, a.admin, a.version, a.created, a.note, a.password IS NOT NULL,
       (SELECT json_group_array(m.name ORDER BY m.name) FROM group_member m WHERE m.member = a.name)
  FROM account a"""
_ONE = _ACCOUNT + " WHERE a.name = ?"
_PAGE = _ACCOUNT + " WHERE (?1 IS NULL OR a.kind = ?1) AND a.name > ?2 ORDER BY a.name LIMIT ?3"


def name_from_database(text: str) -> AccountName:
    """Returns a name read from the database. Skips the checks of `AccountName`, which ran before it was stored."""
    return str.__new__(AccountName, text)


def _account(row: tuple[Any, ...]) -> Account:
    name, kind, enabled, admin, version, created, note, has_password, groups = row
    return Account(
        name_from_database(name),
        AccountKind(kind),
        bool(enabled),
        bool(admin),
        version,
        created,
        tuple(map(name_from_database, json.loads(groups))),
        note,
        bool(has_password),
    )


def account(db: apsw.Connection, name: AccountName) -> Account:
    """Returns an account. Raises AccountUnknown."""
    row = db.execute(_ONE, (name,)).get
    if row is None:
        raise AccountUnknown(f"there is no account {name}")
    return _account(row)


def password_hash(db: apsw.Connection, name: AccountName) -> str | None:
    """Returns the hash of the account's password; None if it has no password or there is no such account."""
    found: str | None = db.execute("SELECT password FROM account WHERE name = ?", (name,)).get
    return found


def page(db: apsw.Connection, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
    """Returns a page of the accounts in the order of their names, beginning behind the name `after`. `kind`: only
    people or only robots."""
    rows = db.execute(_PAGE, (kind, after or "", limit + 1))
    return limited_page(rows, _account, lambda account: len(account.groups), limit)


def check_name_is_free(db: apsw.Connection, name: AccountName) -> None:
    """Raises AccountExists if a person, a robot or a group has the name."""
    if (kind := kind_of(db, name)) is not None:
        raise AccountExists(f"there is a {kind} {name} already")


def kind_of(db: apsw.Connection, name: AccountName) -> str | None:
    """Returns `user`, `robot` or `group`, whichever has the name; None if the name is free."""
    found: str | None = db.execute(
        "SELECT kind FROM account WHERE name = ?1 UNION ALL SELECT 'group' FROM account_group WHERE name = ?1", (name,)
    ).get
    return found


def add(
    db: apsw.Connection,
    by: Actor,
    now: float,
    name: AccountName,
    kind: AccountKind,
    password: str | None,
    admin: bool,
    note: str,
) -> Account:
    """Adds an enabled account and returns it. `password`: its hash, or None. Raises AccountExists if the name is in
    use; AccountInvalid for a robot with a password."""
    if kind is AccountKind.ROBOT and password is not None:
        raise AccountInvalid("a robot has no password; make an API token for it")
    check_name_is_free(db, name)
    db.execute(
        "INSERT INTO account (name, kind, password, enabled, admin, version, created, note) "
        "VALUES (?, ?, ?, 1, ?, ?, ?, ?)",
        (name, kind, password, int(admin), increment_epoch(db), now, note),
    )
    store_that_accounts_exist(db)
    record(db, by, now, "account.add", name, {"kind": kind, "admin": admin})
    return account(db, name)


def set_password(db: apsw.Connection, by: Actor, now: float, name: AccountName, password: str | None) -> None:
    """Sets the hash of a person's password, or removes it with None. Ends the person's logins: deletes their tokens.
    Raises AccountUnknown; AccountInvalid for a robot."""
    if account(db, name).kind is AccountKind.ROBOT:
        raise AccountInvalid(f"{name} is a robot, and robots have no password; make an API token for it")
    _change(db, name, "password", password)
    db.execute("DELETE FROM api_token WHERE account = ? AND purpose = 'login'", (name,))
    record(db, by, now, "account.password", name, counted(removed=password is None, logins=db.changes()))


def improve_hash(db: apsw.Connection, name: AccountName, old: str, new: str) -> None:
    """Replaces the hash of an unchanged password by a stronger one. Does nothing if `old` is not the stored hash any
    more."""
    db.execute("UPDATE account SET password = ? WHERE name = ? AND password = ?", (new, name, old))


def set_enabled(db: apsw.Connection, by: Actor, now: float, name: AccountName, enabled: bool, keep_admin: bool) -> None:
    """Enables or disables an account. `keep_admin`: refuse to disable the last admin. Raises AccountUnknown,
    LastAdmin."""
    if keep_admin and not enabled:
        _check_not_last_admin(db, name)
    if account(db, name).enabled is not enabled:
        _change(db, name, "enabled", int(enabled))
        record(db, by, now, "account.enable" if enabled else "account.disable", name)


def set_admin(db: apsw.Connection, by: Actor, now: float, name: AccountName, admin: bool, keep_admin: bool) -> None:
    """Makes an account an admin, or takes that away. `keep_admin`: refuse to take it from the last admin. Raises
    AccountUnknown, LastAdmin."""
    if keep_admin and not admin:
        _check_not_last_admin(db, name)
    if account(db, name).admin is not admin:
        _change(db, name, "admin", int(admin))
        record(db, by, now, "account.admin", name, {"admin": admin})


def _change(db: apsw.Connection, name: AccountName, column: str, value: str | int | None) -> None:
    """Changes a column of the account, and sets the account's version to the new epoch. A credential is valid for one
    version. The epoch is used because it never repeats, so an account that is removed and added again gets a version
    that no earlier account of that name had."""
    db.execute(f"UPDATE account SET {column} = ?, version = ? WHERE name = ?", (value, increment_epoch(db), name))


def _check_not_last_admin(db: apsw.Connection, name: AccountName) -> None:
    """Raises LastAdmin if the account is the only enabled admin."""
    admins = db.execute("SELECT name FROM account WHERE admin = 1 AND enabled = 1 LIMIT 2").fetchall()
    if admins == [(name,)]:
        raise LastAdmin(f"{name} is the last admin who is enabled; make another account an admin before")


def remove(db: apsw.Connection, by: Actor, now: float, name: AccountName, keep_admin: bool) -> None:
    """Removes an account with its tokens, memberships and grants. `keep_admin`: refuse to remove the last admin.
    Raises AccountUnknown, LastAdmin."""
    account(db, name)  # raises AccountUnknown
    if keep_admin:
        _check_not_last_admin(db, name)
    removed_counts = {}
    for what, sql in (
        ("tokens", "DELETE FROM api_token WHERE account = ?"),
        ("groups", "DELETE FROM group_member WHERE member = ?"),
        ("grants", "DELETE FROM access_grant WHERE name = ? AND kind IN ('user', 'robot')"),
    ):
        db.execute(sql, (name,))
        removed_counts[what] = db.changes()
    db.execute("DELETE FROM account WHERE name = ?", (name,))
    increment_epoch(db)
    record(db, by, now, "account.remove", name, counted(**removed_counts))


SELECT_EPOCH_AND_CLOSED = "SELECT epoch, closed FROM access"
SELECT_CLOSED = "SELECT closed FROM access"
"""`closed` is 0 until the first account is added, and 1 ever after. While it is 0, everybody may do everything."""
SELECT_INSTANCE = "SELECT instance FROM access"
"""`instance` is the random name of this database."""


def increment_epoch(db: apsw.Connection) -> int:
    """Increments the epoch and returns the new one."""
    epoch: int = db.execute("UPDATE access SET epoch = epoch + 1 RETURNING epoch").get
    return epoch


def store_that_accounts_exist(db: apsw.Connection) -> None:
    """Sets the column `closed`, for good."""
    db.execute("UPDATE access SET closed = 1 WHERE closed = 0")


MAX_PAGE_PARTS: Final = 10_000
"""Approximate limit of the parts of a page's entries. Parts are the members of a group, or the groups of an account."""
T = TypeVar("T")


def limited_page(
    rows: Iterable[Any],
    entry_of: Callable[[Any], T],
    count_parts: Callable[[T], int],
    limit: int,
    max_parts: int = MAX_PAGE_PARTS,
) -> Page[T]:
    """Returns a page of at most `limit` entries. `entry_of` makes an entry from a row.

    The page ends earlier, but not before its first entry, once its entries together have `max_parts` parts, as
    `count_parts` counts them. So no page takes long to make and to send. `rows` must contain one row more than `limit`
    if more entries follow. Reads no more rows than it needs, and closes the cursor `rows`."""
    found: list[T] = []
    parts = 0
    more = False
    try:
        for row in rows:
            if len(found) == limit or (found and parts >= max_parts):
                more = True
                break
            found.append(entry_of(row))
            parts += count_parts(found[-1])
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()
    return Page(found, more)

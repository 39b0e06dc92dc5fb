"""Accounts of people and robots, the epoch of rights, and pages of lists whose entries differ in size.

The epoch is one row that every request reads, and that every change of rights increments in its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
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
    """Returns a name from the database without checking it again."""
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
    row = db.execute(_ONE, (name,)).get
    if row is None:
        raise AccountUnknown(f"there is no account {name}")
    return _account(row)


def password_hash(db: apsw.Connection, name: AccountName) -> str | None:
    found: str | None = db.execute("SELECT password FROM account WHERE name = ?", (name,)).get
    return found


def page(db: apsw.Connection, kind: AccountKind | None, after: str | None, limit: int) -> Page[Account]:
    rows = db.execute(_PAGE, (kind, after or "", limit + 1))
    return limited_page(rows, _account, lambda account: len(account.groups), limit)


def check_free(db: apsw.Connection, name: AccountName) -> None:
    """Raises AccountExists if a person, a robot or a group has the name."""
    if (kind := kind_of(db, name)) is not None:
        raise AccountExists(f"there is a {kind} {name} already")


def kind_of(db: apsw.Connection, name: AccountName) -> str | None:
    """Returns `user`, `robot` or `group`; None if nobody has the name."""
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
    if kind is AccountKind.ROBOT and password is not None:
        raise AccountInvalid("a robot has no password; make an API token for it")
    check_free(db, name)
    db.execute(
        "INSERT INTO account (name, kind, password, enabled, admin, version, created, note) "
        "VALUES (?, ?, ?, 1, ?, ?, ?, ?)",
        (name, kind, password, int(admin), increment_epoch(db), now, note),
    )
    close_registry(db)
    record(db, by, now, "account.add", name, {"kind": kind, "admin": admin})
    return account(db, name)


def set_password(db: apsw.Connection, by: Actor, now: float, name: AccountName, password: str | None) -> None:
    if account(db, name).kind is AccountKind.ROBOT:
        raise AccountInvalid(f"{name} is a robot, and robots have no password; make an API token for it")
    _change(db, name, "password", password)
    db.execute("DELETE FROM api_token WHERE account = ? AND purpose = 'login'", (name,))
    record(db, by, now, "account.password", name, counted(removed=password is None, logins=db.changes()))


def improve_hash(db: apsw.Connection, name: AccountName, old: str, new: str) -> None:
    db.execute("UPDATE account SET password = ? WHERE name = ? AND password = ?", (new, name, old))


def set_enabled(db: apsw.Connection, by: Actor, now: float, name: AccountName, enabled: bool, keep_admin: bool) -> None:
    if keep_admin and not enabled:
        _check_not_last_admin(db, name)
    if account(db, name).enabled is not enabled:
        _change(db, name, "enabled", int(enabled))
        record(db, by, now, "account.enable" if enabled else "account.disable", name)


def set_admin(db: apsw.Connection, by: Actor, now: float, name: AccountName, admin: bool, keep_admin: bool) -> None:
    if keep_admin and not admin:
        _check_not_last_admin(db, name)
    if account(db, name).admin is not admin:
        _change(db, name, "admin", int(admin))
        record(db, by, now, "account.admin", name, {"admin": admin})


def _change(db: apsw.Connection, name: AccountName, column: str, value: str | int | None) -> None:
    """Changes a column and the version, which becomes the epoch, so that no earlier account of the name had it."""
    db.execute(f"UPDATE account SET {column} = ?, version = ? WHERE name = ?", (value, increment_epoch(db), name))


def _check_not_last_admin(db: apsw.Connection, name: AccountName) -> None:
    """Raises LastAdmin if no other account is an enabled admin."""
    admins = db.execute("SELECT name FROM account WHERE admin = 1 AND enabled = 1 LIMIT 2").fetchall()
    if admins == [(name,)]:
        raise LastAdmin(f"{name} is the last admin who is enabled; make somebody else one before")


def remove(db: apsw.Connection, by: Actor, now: float, name: AccountName, keep_admin: bool) -> None:
    account(db, name)
    if keep_admin:
        _check_not_last_admin(db, name)
    gone = {}
    for what, sql in (
        ("tokens", "DELETE FROM api_token WHERE account = ?"),
        ("groups", "DELETE FROM group_member WHERE member = ?"),
        ("grants", "DELETE FROM access_grant WHERE name = ? AND kind IN ('user', 'robot')"),
    ):
        db.execute(sql, (name,))
        gone[what] = db.changes()
    db.execute("DELETE FROM account WHERE name = ?", (name,))
    increment_epoch(db)
    record(db, by, now, "account.remove", name, counted(**gone))


SELECT_EPOCH_AND_CLOSED = "SELECT epoch, closed FROM access"
SELECT_CLOSED = "SELECT closed FROM access"
SELECT_INSTANCE = "SELECT instance FROM access"


def increment_epoch(db: apsw.Connection) -> int:
    """Increments the epoch and returns it."""
    epoch: int = db.execute("UPDATE access SET epoch = epoch + 1 RETURNING epoch").get
    return epoch


def close_registry(db: apsw.Connection) -> None:
    """Stores that there is an account, for good."""
    db.execute("UPDATE access SET closed = 1 WHERE closed = 0")


PARTS: Final = 10_000
"""Approximate limit of a page's parts: members of groups, groups of accounts, limits of tokens."""
T = TypeVar("T")
Row = Sequence[Any]


def limited_page(
    rows: Iterable[Any], entry_of: Callable[[Any], T], parts_of: Callable[[T], int], limit: int, most: int = PARTS
) -> Page[T]:
    """Returns at most `limit` entries of `rows`, of which there may be one more. The page ends earlier, after at least
    one entry, once its entries have `most` parts, so that no page takes long to make and to send. Reads no more rows
    than it needs, and closes the cursor."""
    found: list[T] = []
    parts = 0
    more = False
    try:
        for row in rows:
            if len(found) == limit or (found and parts >= most):
                more = True
                break
            found.append(entry_of(row))
            parts += parts_of(found[-1])
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()
    return Page(found, more)

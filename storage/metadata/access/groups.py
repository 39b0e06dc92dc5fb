"""Groups and who is in them. A member may be somebody who is not in the store."""

from __future__ import annotations

import json
from typing import Any

import apsw

from storage.access import AccountInvalid, AccountName, AccountUnknown
from storage.content import Actor, Page
from storage.metadata.access.accounts import check_free, kind_of, known_name
from storage.metadata.access.audit import counted, record
from storage.metadata.access.epoch import raise_epoch

_PAGE = """
SELECT g.name, (SELECT json_group_array(m.member ORDER BY m.member) FROM group_member m WHERE m.name = g.name)
  FROM account_group g WHERE g.name > ? ORDER BY g.name LIMIT ?"""


def page(db: apsw.Connection, after: str | None, limit: int) -> Page[tuple[AccountName, tuple[str, ...]]]:
    rows: list[Any] = db.execute(_PAGE, (after or "", limit + 1)).fetchall()
    found = [(known_name(name), tuple(json.loads(members))) for name, members in rows[:limit]]
    return Page(found, len(rows) > limit)


def groups_of(db: apsw.Connection, member: str) -> tuple[AccountName, ...]:
    rows: list[Any] = db.execute("SELECT name FROM group_member WHERE member = ? ORDER BY name", (member,)).fetchall()
    return tuple(known_name(name) for (name,) in rows)


def _check_group(db: apsw.Connection, name: AccountName) -> None:
    if kind_of(db, name) != "group":
        raise AccountUnknown(f"there is no group {name}")


def add(db: apsw.Connection, by: Actor, now: float, name: AccountName) -> None:
    check_free(db, name)
    db.execute("INSERT INTO account_group (name, created) VALUES (?, ?)", (name, now))
    raise_epoch(db)
    record(db, by, now, "group.add", name)


def remove(db: apsw.Connection, by: Actor, now: float, name: AccountName) -> None:
    _check_group(db, name)
    db.execute("DELETE FROM group_member WHERE name = ?", (name,))
    members = db.changes()
    db.execute("DELETE FROM access_grant WHERE kind = 'group' AND name = ?", (name,))
    grants = db.changes()
    db.execute("DELETE FROM account_group WHERE name = ?", (name,))
    raise_epoch(db)
    record(db, by, now, "group.remove", name, counted(members=members, grants=grants))


def add_member(db: apsw.Connection, by: Actor, now: float, group: AccountName, member: AccountName) -> None:
    _check_group(db, group)
    if kind_of(db, member) == "group":
        raise AccountInvalid(f"{member} is a group, and no group can be in another")
    db.execute("INSERT INTO group_member (name, member) VALUES (?, ?) ON CONFLICT DO NOTHING", (group, member))
    if db.changes():
        raise_epoch(db)
        record(db, by, now, "member.add", group, {"member": member})


def remove_member(db: apsw.Connection, by: Actor, now: float, group: AccountName, member: AccountName) -> None:
    _check_group(db, group)
    db.execute("DELETE FROM group_member WHERE name = ? AND member = ?", (group, member))
    if db.changes() == 0:
        raise AccountUnknown(f"{member} is not in the group {group}")
    raise_epoch(db)
    record(db, by, now, "member.remove", group, {"member": member})

"""The tables of groups and their members. A member is a person or a robot (a program). A member need not have an
account in this database: a person may have an account in an htpasswd file or at an external issuer of tokens.

All functions take a connection. Functions that change something run inside a transaction, which the caller commits.
`by` is the actor (an account or a command) that the audit log names, `now` the time in seconds since 1970. Each change
increments the *epoch*, a number in the database. A process uses cached rights only until the epoch changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import apsw

from storage.access import AccountInvalid, AccountName, AccountUnknown
from storage.content import Actor, Page
from storage.metadata.sqlite.access.account_table import (
    check_name_is_free,
    increment_epoch,
    kind_of,
    limited_page,
    name_from_database,
)
from storage.metadata.sqlite.access.audit_table import nonzero_counts, record

MAX_MEMBERS_PER_GROUP = 10_000
MAX_GROUPS_PER_MEMBER = 1_000
"""Largest number of groups that one member can be in. The limit exists because a request of the member may have to read
the grants of all these groups."""
_GROUP = """
SELECT g.name, (SELECT json_group_array(m.member ORDER BY m.member) FROM group_member m WHERE m.name = g.name)
  FROM account_group g"""
_GROUP_BY_NAME = _GROUP + " WHERE g.name = ?"
_PAGE = _GROUP + " WHERE g.name > ? ORDER BY g.name LIMIT ?"
Group = tuple[AccountName, tuple[str, ...]]
"""Name of a group, and the sorted names of its members."""


def page(db: apsw.Connection, after: str | None, limit: int) -> Page[Group]:
    """Returns a page of groups, sorted by name. The page starts with the first name that sorts after `after`, or with
    the first of all names if `after` is None. The page has at most `limit` groups. A page whose groups have many
    members in total is shorter (`limited_page`)."""
    rows = db.execute(_PAGE, (after or "", limit + 1))
    return limited_page(rows, _group, count_parts=lambda entry: len(entry[1]), limit=limit)  # counts the members


def _group(row: tuple[Any, ...]) -> Group:
    """Returns the group from a row that the statement `_GROUP` read."""
    name, members = row
    return name_from_database(name), tuple(json.loads(members))


def group(db: apsw.Connection, name: AccountName) -> Group:
    """Returns a group. Raises AccountUnknown if there is no such group."""
    row: Any = db.execute(_GROUP_BY_NAME, (name,)).get
    if row is None:
        raise AccountUnknown(f"there is no group {name}")
    return _group(row)


def existing_groups(db: apsw.Connection, names: Iterable[str]) -> set[str]:
    """Returns those of the `names` that are names of groups."""
    sql = "SELECT 1 FROM account_group WHERE name = ?"
    return {name for name in names if db.execute(sql, (name,)).get is not None}


def groups_of(db: apsw.Connection, member: str) -> tuple[AccountName, ...]:
    """Returns the names of the groups that the member is in, in alphabetical order."""
    rows: list[Any] = db.execute("SELECT name FROM group_member WHERE member = ? ORDER BY name", (member,)).fetchall()
    return tuple(name_from_database(name) for (name,) in rows)


def _check_group(db: apsw.Connection, name: AccountName) -> None:
    """Raises AccountUnknown if there is no such group."""
    if kind_of(db, name) != "group":
        raise AccountUnknown(f"there is no group {name}")


def add(db: apsw.Connection, by: Actor, now: float, name: AccountName) -> None:
    """Adds a group without members. Raises AccountExists if an account or a group has the name."""
    check_name_is_free(db, name)
    db.execute("INSERT INTO account_group (name, created) VALUES (?, ?)", (name, now))
    increment_epoch(db)
    record(db, by, now, "group.add", name)


def remove(db: apsw.Connection, by: Actor, now: float, name: AccountName) -> None:
    """Removes a group, its list of members and its grants. The accounts of the members stay. Raises AccountUnknown if
    there is no such group."""
    _check_group(db, name)
    db.execute("DELETE FROM group_member WHERE name = ?", (name,))
    member_count = db.changes()
    db.execute("DELETE FROM access_grant WHERE kind = 'group' AND name = ?", (name,))
    grant_count = db.changes()
    db.execute("DELETE FROM account_group WHERE name = ?", (name,))
    increment_epoch(db)
    record(db, by, now, "group.remove", name, nonzero_counts(members=member_count, grants=grant_count))


def add_members(db: apsw.Connection, by: Actor, now: float, group: AccountName, members: Sequence[AccountName]) -> None:
    """Adds the members to a group. Does nothing for a member that is in the group already. Raises AccountUnknown if
    there is no such group. Raises AccountInvalid in these cases:

    - One of `members` is the name of a group.
    - The group would have more than `MAX_MEMBERS_PER_GROUP` members.
    - A member would be in more than `MAX_GROUPS_PER_MEMBER` groups."""
    _check_group(db, group)
    count: Any = db.execute("SELECT count(*) FROM group_member WHERE name = ?", (group,)).get
    for member in members:
        if kind_of(db, member) == "group":
            raise AccountInvalid(f"{member} is a group, and a group cannot be a member of another group")
        if db.execute("SELECT 1 FROM group_member WHERE name = ? AND member = ?", (group, member)).get is not None:
            continue
        _check_limits(db, group, count, member)
        db.execute("INSERT INTO group_member (name, member) VALUES (?, ?)", (group, member))
        count += 1
        increment_epoch(db)
        record(db, by, now, "member.add", group, {"member": member})


def _check_limits(db: apsw.Connection, group: AccountName, member_count: int, member: AccountName) -> None:
    """Raises AccountInvalid if the group already has `MAX_MEMBERS_PER_GROUP` members, or if the new member is already
    in `MAX_GROUPS_PER_MEMBER` groups. `member_count`: the present number of members of the group."""
    if member_count >= MAX_MEMBERS_PER_GROUP:
        raise AccountInvalid(
            f"{group} has {MAX_MEMBERS_PER_GROUP} members, as many as a group can have; make a second group"
        )
    group_count: Any = db.execute("SELECT count(*) FROM group_member WHERE member = ?", (member,)).get
    if group_count >= MAX_GROUPS_PER_MEMBER:
        raise AccountInvalid(f"{member} is in {MAX_GROUPS_PER_MEMBER} groups, as many as an account can be in")


def remove_members(
    db: apsw.Connection, by: Actor, now: float, group: AccountName, members: Sequence[AccountName]
) -> None:
    """Removes the members from a group. Raises AccountUnknown if there is no such group, or if one of `members` is not
    in the group."""
    for member in members:
        _remove_member(db, by, now, group, member)


def _remove_member(db: apsw.Connection, by: Actor, now: float, group: AccountName, member: AccountName) -> None:
    """Removes a member from a group. Raises AccountUnknown if there is no such group, or if the member is not in
    the group."""
    _check_group(db, group)
    db.execute("DELETE FROM group_member WHERE name = ? AND member = ?", (group, member))
    if db.changes() == 0:
        raise AccountUnknown(f"{member} is not in the group {group}")
    increment_epoch(db)
    record(db, by, now, "member.remove", group, {"member": member})

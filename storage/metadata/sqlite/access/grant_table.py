"""Grants of actions on repositories to users, robots and groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import apsw

from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grant, Grantee, GranteeKind
from storage.content import Actor, Page
from storage.metadata.sqlite.access.account_table import increment_epoch, kind_of
from storage.metadata.sqlite.access.audit_table import record
from storage.patterns import NamePattern

_ALL = "SELECT kind, name, pattern, actions FROM access_grant ORDER BY kind, name, pattern"
_THEIRS = "SELECT kind, name, pattern, actions FROM access_grant WHERE kind = ? AND name = ? ORDER BY pattern"

_FEW = "SELECT actions, pattern FROM access_grant WHERE kind = ? AND name = ?"
_PAGE = """
SELECT kind, name, pattern, actions FROM access_grant
 WHERE (kind, name, pattern) > (?, ?, ?) ORDER BY kind, name, pattern LIMIT ?"""
_PAGE_OF_ONE = """
SELECT kind, name, pattern, actions FROM access_grant
 WHERE kind = ? AND name = ? AND pattern > ? ORDER BY pattern LIMIT ?"""
_COUNTED = """
SELECT count(*), ifnull(sum(length(pattern) - star + 1) FILTER (
           WHERE star > 0 AND NOT (star = length(pattern) - 1 AND substr(pattern, -1) = '*')), 0)
  FROM (SELECT pattern, instr(pattern, '*') AS star FROM access_grant WHERE kind = ? AND name = ?)"""
MOST_GRANTS = 5_000
"""Most grants of one subject, since each of its requests may have to read all of them."""
MOST_WILD = 64 * 1024
"""Most characters after the first star, over those patterns of a subject that are not simple prefixes."""


def pattern_from_database(text: str) -> NamePattern:
    """Returns a pattern from the database without checking it again."""
    return str.__new__(NamePattern, text)


def grants(db: apsw.Connection, subjects: Sequence[Grantee] | None) -> list[Grant]:
    rows: list[Any] = []
    if subjects is None:
        rows = db.execute(_ALL).fetchall()
    for subject in subjects or ():
        rows += db.execute(_THEIRS, (subject.kind, subject.name)).fetchall()
    return [_grant(row) for row in rows]


def granted(db: apsw.Connection, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
    found: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for subject in subjects:
        rows: list[Any] = db.execute(_FEW, (subject.kind, subject.name)).fetchall()
        for actions, pattern in rows:
            found[actions].append(pattern_from_database(pattern))
    return {Action(actions): frozenset(patterns) for actions, patterns in found.items()}


def page(db: apsw.Connection, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
    """Returns grants in the order of their keys."""
    kind, name, pattern = _parts(after or "")
    if subjects is None:
        rows = _rows(db, _PAGE, (kind, name, pattern, limit + 1))
        return _page(rows, limit)
    rows = []
    for place in sorted({(subject.kind.value, subject.name) for subject in subjects}):
        if place < (kind, name):
            continue
        begin = pattern if place == (kind, name) else ""
        rows += _rows(db, _PAGE_OF_ONE, (*place, begin, limit + 1 - len(rows)))
        if len(rows) > limit:
            break
    return _page(rows, limit)


def _rows(db: apsw.Connection, sql: str, values: tuple[str | int, ...]) -> list[Any]:
    return db.execute(sql, values).fetchall()


def _page(rows: list[Any], limit: int) -> Page[Grant]:
    return Page([_grant(row) for row in rows[:limit]], len(rows) > limit)


def _grant(row: Any) -> Grant:
    kind, name, pattern, actions = row
    return Grant(Grantee(GranteeKind(kind), name), pattern_from_database(pattern), Action(actions))


def _parts(key: str) -> tuple[str, str, str]:
    """Splits a key such as `group:dev team/**` into kind, name and pattern. No name has a colon or a space."""
    subject, _, pattern = key.partition(" ")
    kind, _, name = subject.partition(":")
    return kind, name, pattern


def put(db: apsw.Connection, by: Actor, now: float, grant: Grant) -> None:
    subject = grant.subject
    _check_subject(db, subject)
    if not grant.actions:
        raise AccountInvalid("a grant of nothing is none; remove it")
    _check_room(db, grant)
    db.execute(
        "INSERT INTO access_grant (kind, name, pattern, actions) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (kind, name, pattern) DO UPDATE SET actions = excluded.actions "
        "WHERE actions <> excluded.actions",
        (subject.kind, subject.name, grant.pattern, int(grant.actions)),
    )
    if db.changes():
        increment_epoch(db)
        detail = {"pattern": grant.pattern, "actions": grant.actions.words}
        record(db, by, now, "grant.put", str(subject), detail)


def _check_room(db: apsw.Connection, grant: Grant) -> None:
    """Raises AccountInvalid if the subject has too many grants. Grants from before the limit existed stay."""
    subject, pattern = grant.subject, grant.pattern
    known = "SELECT 1 FROM access_grant WHERE kind = ? AND name = ? AND pattern = ?"
    if db.execute(known, (subject.kind, subject.name, pattern)).get is not None:
        return
    row: Any = db.execute(_COUNTED, (subject.kind, subject.name)).get
    count, wild = row
    if count >= MOST_GRANTS:
        raise AccountInvalid(
            f"{subject} has {MOST_GRANTS} grants, as many as one can have; "
            "grant on a pattern that covers several of them"
        )
    rest = 0 if pattern.whole else len(pattern) - len(pattern.prefix)
    if rest and wild + rest > MOST_WILD:
        raise AccountInvalid(
            f"the patterns of {subject} have more than {MOST_WILD} characters from their first stars on; "
            "grant on patterns like team/**, or to groups"
        )


def _check_subject(db: apsw.Connection, subject: Grantee) -> None:
    """Checks that a robot or a group exists; a user need not have an account here. Raises AccountUnknown,
    AccountInvalid."""
    if subject.kind in (GranteeKind.EVERYONE, GranteeKind.AUTHENTICATED):
        return
    kind = kind_of(db, AccountName(subject.name))
    if kind is None and subject.kind is not GranteeKind.USER:
        raise AccountUnknown(f"there is no {subject.kind} {subject.name}")
    if kind is not None and kind != subject.kind:
        raise AccountInvalid(f"{subject.name} is a {kind}: write {kind}:{subject.name}")


def remove(db: apsw.Connection, by: Actor, now: float, subject: Grantee, pattern: NamePattern) -> None:
    db.execute(
        "DELETE FROM access_grant WHERE kind = ? AND name = ? AND pattern = ?", (subject.kind, subject.name, pattern)
    )
    if db.changes() == 0:
        raise AccountUnknown(f"{subject} was granted nothing for {pattern}")
    increment_epoch(db)
    record(db, by, now, "grant.remove", str(subject), {"pattern": pattern})

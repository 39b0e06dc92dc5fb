"""Grants: who may do what to which repositories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grant, Subject, SubjectKind
from storage.content import Actor
from storage.metadata.access.accounts import kind_of
from storage.metadata.access.audit import record
from storage.metadata.access.epoch import raise_epoch
from storage.patterns import NamePattern

_ALL = "SELECT kind, name, pattern, actions FROM access_grant ORDER BY kind, name, pattern"
_THEIRS = "SELECT kind, name, pattern, actions FROM access_grant WHERE kind = ? AND name = ? ORDER BY pattern"


def known_pattern(text: str) -> NamePattern:
    """A pattern from the database: it was checked when it came."""
    return str.__new__(NamePattern, text)


def grants(db: apsw.Connection, subjects: Sequence[Subject] | None) -> list[Grant]:
    rows: list[Any] = []
    if subjects is None:
        rows = db.execute(_ALL).fetchall()
    for subject in subjects or ():
        rows += db.execute(_THEIRS, (subject.kind, subject.name)).fetchall()
    return [
        Grant(Subject(SubjectKind(kind), name), known_pattern(pattern), Action(actions))
        for kind, name, pattern, actions in rows
    ]


def put(db: apsw.Connection, by: Actor, now: float, grant: Grant) -> None:
    subject = grant.subject
    _check_subject(db, subject)
    if not grant.actions:
        raise AccountInvalid("a grant of nothing is none; remove it")
    db.execute(
        "INSERT INTO access_grant (kind, name, pattern, actions) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (kind, name, pattern) DO UPDATE SET actions = excluded.actions "
        "WHERE actions <> excluded.actions",
        (subject.kind, subject.name, grant.pattern, int(grant.actions)),
    )
    if db.changes():
        raise_epoch(db)
        detail = {"pattern": grant.pattern, "actions": grant.actions.words}
        record(db, by, now, "grant.put", str(subject), detail)


def _check_subject(db: apsw.Connection, subject: Subject) -> None:
    """Robots and groups are in the store; people need not be. Raises AccountUnknown, AccountInvalid."""
    if subject.kind in (SubjectKind.EVERYONE, SubjectKind.AUTHENTICATED):
        return
    kind = kind_of(db, AccountName(subject.name))
    if kind is None and subject.kind is not SubjectKind.USER:
        raise AccountUnknown(f"there is no {subject.kind} {subject.name}")
    if kind is not None and kind != subject.kind:
        raise AccountInvalid(f"{subject.name} is a {kind}: write {kind}:{subject.name}")


def remove(db: apsw.Connection, by: Actor, now: float, subject: Subject, pattern: NamePattern) -> None:
    db.execute(
        "DELETE FROM access_grant WHERE kind = ? AND name = ? AND pattern = ?", (subject.kind, subject.name, pattern)
    )
    if db.changes() == 0:
        raise AccountUnknown(f"{subject} was granted nothing for {pattern}")
    raise_epoch(db)
    record(db, by, now, "grant.remove", str(subject), {"pattern": pattern})

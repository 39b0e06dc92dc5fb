"""The table of grants. A grant allows its *subject* some actions on the repositories whose names match a pattern, such
as `team/**`. A subject (class `Grantee`) is a user, a robot, a group, everyone, or everyone who is authenticated.

Some patterns have a *tail*:

- An exact name has no tail. A prefix followed by `**`, such as `team/**`, has no tail.
- The tail of any other pattern is its first star and all characters after this star.

All functions take a connection. Functions that change something run inside a transaction, which the caller commits.
`by` is the actor (an account or a command) that the audit log names, `now` the time in seconds since 1970. Each change
increments the *epoch*, a number in the database. A process uses cached rights only until the epoch changes.
"""

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
_OF_SUBJECT = "SELECT kind, name, pattern, actions FROM access_grant WHERE kind = ? AND name = ? ORDER BY pattern"
_ACTIONS_AND_PATTERNS = "SELECT actions, pattern FROM access_grant WHERE kind = ? AND name = ?"
_PAGE = """
SELECT kind, name, pattern, actions FROM access_grant
 WHERE (kind, name, pattern) > (?, ?, ?) ORDER BY kind, name, pattern LIMIT ?"""
_PAGE_OF_SUBJECT = """
SELECT kind, name, pattern, actions FROM access_grant
 WHERE kind = ? AND name = ? AND pattern > ? ORDER BY pattern LIMIT ?"""
_COUNT_GRANTS_AND_TAIL_CHARACTERS = """
SELECT count(*), ifnull(sum(length(pattern) - star + 1) FILTER (
           WHERE star > 0 AND NOT (star = length(pattern) - 1 AND substr(pattern, -1) = '*')), 0)
  FROM (SELECT pattern, instr(pattern, '*') AS star FROM access_grant WHERE kind = ? AND name = ?)"""
"""Reads the number of grants of a subject, and the number of characters in the tails of the patterns of these
grants."""
MAX_GRANTS_PER_SUBJECT = 5_000
"""Largest number of grants of one subject. The limit exists because a request of the subject may have to read all these
grants."""
MAX_TAIL_CHARACTERS_PER_SUBJECT = 64 * 1024
"""Largest number of characters in the tails of all patterns of one subject together. The limit exists because matching
takes time for each character of a tail."""


def pattern_from_database(text: str) -> NamePattern:
    """Returns a pattern read from the database. Skips the checks of `NamePattern`, which every pattern passes before it
    is stored."""
    return str.__new__(NamePattern, text)


def grants(db: apsw.Connection, subjects: Sequence[Grantee] | None) -> list[Grant]:
    """Returns the grants of the subjects, or all grants if `subjects` is None."""
    rows: list[Any] = []
    if subjects is None:
        rows = db.execute(_ALL).fetchall()
    for subject in subjects or ():
        rows += db.execute(_OF_SUBJECT, (subject.kind, subject.name)).fetchall()
    return [_grant(row) for row in rows]


def patterns_by_actions(db: apsw.Connection, subjects: Sequence[Grantee]) -> dict[Action, frozenset[NamePattern]]:
    """Returns the patterns of all grants of the subjects, grouped by the actions of the grant. An `Action` is a set of
    flags, such as `PULL | PUSH`: a grant of both actions is in the group `PULL | PUSH` only."""
    patterns_of_actions: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for subject in subjects:
        rows: list[Any] = db.execute(_ACTIONS_AND_PATTERNS, (subject.kind, subject.name)).fetchall()
        for actions, pattern in rows:
            patterns_of_actions[actions].append(pattern_from_database(pattern))
    return {Action(actions): frozenset(patterns) for actions, patterns in patterns_of_actions.items()}


def page(db: apsw.Connection, subjects: Sequence[Grantee] | None, after: str | None, limit: int) -> Page[Grant]:
    """Returns a page of at most `limit` grants of the subjects, or of all grants if `subjects` is None. The grants are
    sorted by kind of subject, name of subject, and pattern. `after` is the key of a grant, such as `group:dev team/**`:
    the page starts with the first grant that sorts after this key. If `after` is None, this is the first page."""
    kind, name, pattern = _split_key(after or "")
    if subjects is None:
        rows = _rows(db, _PAGE, (kind, name, pattern, limit + 1))
        return _page(rows, limit)
    rows = []
    for subject_key in sorted({(subject.kind.value, subject.name) for subject in subjects}):
        if subject_key < (kind, name):
            continue
        after_pattern = pattern if subject_key == (kind, name) else ""
        rows += _rows(db, _PAGE_OF_SUBJECT, (*subject_key, after_pattern, limit + 1 - len(rows)))
        if len(rows) > limit:
            break
    return _page(rows, limit)


def _rows(db: apsw.Connection, sql: str, values: tuple[str | int, ...]) -> list[Any]:
    return db.execute(sql, values).fetchall()


def _page(rows: list[Any], limit: int) -> Page[Grant]:
    """Returns a page of the first `limit` rows. If there are more rows, the page says that more grants follow."""
    return Page([_grant(row) for row in rows[:limit]], len(rows) > limit)


def _grant(row: Any) -> Grant:
    kind, name, pattern, actions = row
    return Grant(Grantee(GranteeKind(kind), name), pattern_from_database(pattern), Action(actions))


def _split_key(key: str) -> tuple[str, str, str]:
    """Splits a key such as `group:dev team/**` into kind, name and pattern. Names have no colon and no space."""
    subject, _, pattern = key.partition(" ")
    kind, _, name = subject.partition(":")
    return kind, name, pattern


def put_all(db: apsw.Connection, by: Actor, now: float, grants: Sequence[Grant]) -> None:
    """Stores the grants. A grant replaces an earlier grant of the same subject for the same pattern. Raises
    AccountUnknown or AccountInvalid if a grant is refused (`_put`)."""
    for grant in grants:
        _put(db, by, now, grant)


def _put(db: apsw.Connection, by: Actor, now: float, grant: Grant) -> None:
    """Stores the grant. Does nothing if the same grant is stored already. Raises:

    - AccountUnknown or AccountInvalid if the subject is refused (`_check_subject`).
    - AccountInvalid if the grant has no actions.
    - AccountInvalid if the subject would exceed a limit (`_check_limits`)."""
    subject = grant.subject
    _check_subject(db, subject)
    if not grant.actions:
        raise AccountInvalid("a grant needs at least one action; to take all actions away, remove the grant")
    _check_limits(db, grant)
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


def _check_limits(db: apsw.Connection, grant: Grant) -> None:
    """Raises AccountInvalid if the new grant would give its subject more grants than `MAX_GRANTS_PER_SUBJECT`, or more
    tail characters than `MAX_TAIL_CHARACTERS_PER_SUBJECT`. Raises no error if the new grant replaces a grant for the
    same pattern. Earlier versions had no limits, so a subject in the database may exceed them."""
    subject, pattern = grant.subject, grant.pattern
    select_existing = "SELECT 1 FROM access_grant WHERE kind = ? AND name = ? AND pattern = ?"
    if db.execute(select_existing, (subject.kind, subject.name, pattern)).get is not None:
        return
    row: Any = db.execute(_COUNT_GRANTS_AND_TAIL_CHARACTERS, (subject.kind, subject.name)).get
    count, tail_characters = row
    if count >= MAX_GRANTS_PER_SUBJECT:
        raise AccountInvalid(
            f"{subject} has {MAX_GRANTS_PER_SUBJECT} grants, and no subject can have more; "
            "replace several of them by one with a wider pattern"
        )
    added_characters = 0 if pattern.is_prefix_match else len(pattern) - len(pattern.prefix)
    if added_characters and tail_characters + added_characters > MAX_TAIL_CHARACTERS_PER_SUBJECT:
        raise AccountInvalid(
            f"the patterns of {subject} that are not like team/app or team/** would be too long in total: more than "
            f"{MAX_TAIL_CHARACTERS_PER_SUBJECT} characters, counted from the first star of each; grant on patterns "
            "like team/**, or to groups"
        )


def _check_subject(db: apsw.Connection, subject: Grantee) -> None:
    """Raises AccountUnknown if the subject is a robot or a group that does not exist. Raises AccountInvalid if the name
    belongs to another kind of subject. Accepts a user without an account in this database: the user may have an account
    in an htpasswd file or at an external issuer of tokens."""
    if subject.kind in (GranteeKind.EVERYONE, GranteeKind.AUTHENTICATED):
        return
    kind = kind_of(db, AccountName(subject.name))
    if kind is None and subject.kind is not GranteeKind.USER:
        raise AccountUnknown(f"there is no {subject.kind} {subject.name}")
    if kind is not None and kind != subject.kind:
        raise AccountInvalid(f"{subject.name} is a {kind}: write {kind}:{subject.name}")


def remove(db: apsw.Connection, by: Actor, now: float, subject: Grantee, pattern: NamePattern) -> None:
    """Removes the subject's grant for exactly this pattern. Raises AccountUnknown if there is no such grant."""
    db.execute(
        "DELETE FROM access_grant WHERE kind = ? AND name = ? AND pattern = ?", (subject.kind, subject.name, pattern)
    )
    if db.changes() == 0:
        raise AccountUnknown(f"{subject} was granted nothing for {pattern}")
    increment_epoch(db)
    record(db, by, now, "grant.remove", str(subject), {"pattern": pattern})

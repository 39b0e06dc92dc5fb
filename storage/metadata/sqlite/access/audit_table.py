"""The audit log. The table `tag_history` has the lines about tags that were set (`tag.put`) or deleted (`tag.delete`).
The table `audit` has all other lines.

The transaction of a change also writes the line about the change. Pages merge the lines of both tables in this order:

1. Newer lines come before older lines.
2. Of lines with the same time, those of `audit` come before those of `tag_history`.
3. Of lines with the same time in one table, those with higher row ids come first.

The public id of a line encodes its position in this order. A page can begin after a public id even if the line has been
deleted.

A line of `audit` can stand for several equal events, such as denied requests. The column `count` has the number of
events.

Functions that write or delete lines run inside a transaction, which the caller commits. `by` is the actor (an account
or a command) that the line names. Times are seconds since 1970.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import apsw

from storage.access import AccountInvalid, AuditEntry, AuditQuery, GranteeKind
from storage.content import Actor, Page
from storage.names import Digest, RepositoryName, shown

_INSERT = (
    "INSERT INTO audit (at, actor, action, target, part, outcome, address, request_id, user_agent, detail, count) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


def record(
    db: apsw.Connection,
    by: Actor,
    now: float,
    action: str,
    target: str,
    detail: Mapping[str, object] | None = None,
    *,
    part: str = "",
) -> None:
    """Writes a line about a change that succeeded.

    - `action`: the kind of change, such as `account.add`.
    - `target`: the name of the changed account, group or repository, or the id of the changed signing key. For a
      change of a grant: who has the grant, such as `group:dev`.
    - `part`: the changed tag (`:tag`), blob or manifest (`@digest`) of a repository; empty for other changes.
    - `detail`: further facts about the change, which the line stores as JSON."""
    db.execute(
        _INSERT,
        (
            *(now, by.name, action, target, part, "ok", by.address, by.request_id, by.user_agent),
            json.dumps(detail) if detail else None,
            1,
        ),
    )


def record_content(
    db: apsw.Connection,
    by: Actor,
    now: float,
    action: str,
    repo: RepositoryName,
    digest: Digest,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Writes a line about a change of the blob or manifest `digest` of the repository."""
    record(db, by, now, action, repo, detail, part=f"@{digest}")


def add_entries(db: apsw.Connection, entries: Sequence[AuditEntry]) -> None:
    """Writes lines about events that change nothing in the database, such as logins and denied requests."""
    db.executemany(_INSERT, (_values(entry) for entry in entries))


def _values(entry: AuditEntry) -> tuple[str | float | None, ...]:
    """Returns the values that `_INSERT` needs to write the line `entry`."""
    return (
        *(entry.at, entry.actor, entry.action, *split_target(entry.target), entry.outcome),
        *(entry.address, entry.request_id, entry.user_agent),
        json.dumps(dict(entry.detail)) if entry.detail else None,
        entry.count,
    )


def split_target(target: str) -> tuple[str, str]:
    """Splits the target of a line into the values of the columns `target` and `part`: `team/app:latest` into `team/app`
    and `:latest`, `team/app@sha256:…` into `team/app` and `@sha256:…`. Returns any other target, such as `group:dev`,
    with an empty part."""
    kind, colon, _ = target.partition(":")
    if "@" not in target and (not colon or kind in set(GranteeKind)):
        return target, ""
    name_end = min(index for index in map(target.find, ":@") if index >= 0)
    return target[:name_end], target[name_end:]


def prune(db: apsw.Connection, before: float, limit: int) -> int:
    """Deletes at most `limit` lines of the table `audit` that are older than the time `before`, the oldest first.
    Returns the number of deleted lines. Lines of `tag_history` stay."""
    db.execute("DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < ? ORDER BY at LIMIT ?)", (before, limit))
    return db.changes()


def nonzero_counts(**counts: int) -> dict[str, object]:
    """Returns the counts that are not 0, by their names. Callers store the result as the detail of a line."""
    return {name: count for name, count in counts.items() if count}


_LINE_ID = re.compile(r"([0-9a-f]{16})([at])([0-9]{1,18})")
"""Public id of a line: its time (the 8 bytes of a double, in hexadecimal), the letter of its table, its row id."""
_AUDIT_LETTER, _TAG_HISTORY_LETTER = "a", "t"
_TAG_PUT, _TAG_DELETE = "tag.put", "tag.delete"
_HIGHEST_ROW_ID = 2**63 - 1
"""The largest row id of SQLite, which no line reaches."""

_AUDIT_LINES = """
SELECT at, id, actor, action, target || part, outcome, address, request_id, user_agent, detail, count
  FROM audit WHERE {} ORDER BY at DESC, id DESC LIMIT :limit"""
_TAG_HISTORY_LINES = """
SELECT h.at, h.id, h.actor, iif(h.digest IS NULL, 'tag.delete', 'tag.put'), r.name || ':' || h.tag, 'ok', h.address,
       h.request_id, h.user_agent, iif(h.digest IS NULL, NULL, json_object('digest', h.digest)), 1
  FROM tag_history h CROSS JOIN repository r ON r.id = h.repository
 WHERE {} ORDER BY h.at DESC, h.id DESC LIMIT :limit"""
_AFTER_POSITION = "{0}at <= :at AND ({0}at < :at OR {0}id < :id_bound)"
"""The condition for the lines that come after a `_Position`. `:at` is the time of the position, and `:id_bound` is the
result of its method `id_bound`. `{0}`: prefix of the column names."""


class _Position(NamedTuple):
    """Position of a line in the merged order of both tables. Positions compare like tuples. Pages list the lines from
    the greatest position to the least.

    `at`: the line's time. `is_audit`: True if the line is in the table `audit`, False if it is in `tag_history`.
    `row_id`: the line's row id in its table."""

    at: float
    is_audit: bool
    row_id: int

    @classmethod
    def parse(cls, text: str) -> _Position:
        """Returns the position that the public id `text` encodes. Raises AccountInvalid if `text` does not have the
        form of a public id."""
        if (match := _LINE_ID.fullmatch(text)) is None:
            raise AccountInvalid(f"{shown(text)} is not the id of a line of the audit log")
        (time_of_line,) = struct.unpack(">d", bytes.fromhex(match[1]))
        return cls(time_of_line, match[2] == _AUDIT_LETTER, int(match[3]))

    def __str__(self) -> str:
        """Returns the public id of the line."""
        letter = _AUDIT_LETTER if self.is_audit else _TAG_HISTORY_LETTER
        return f"{struct.pack('>d', self.at).hex()}{letter}{self.row_id}"

    def id_bound(self, in_audit: bool) -> int:
        """Returns a bound for the row ids of one table: the table `audit` if `in_audit` is true, otherwise
        `tag_history`. Pages list lines of one table with the same time from the highest row id to the lowest. So a line
        of this table with the time `at` comes after this position if the line's row id is below the bound."""
        if in_audit is self.is_audit:
            return self.row_id
        # Of lines with the same time, those of `audit` come before those of `tag_history`.
        return _HIGHEST_ROW_ID if self.is_audit else 0


_BEFORE_ALL_LINES = _Position(math.inf, is_audit=True, row_id=_HIGHEST_ROW_ID)


def page(db: apsw.Connection, query: AuditQuery, limit: int) -> Page[AuditEntry]:
    """Returns a page of at most `limit` lines that match the query, newest first.

    - `query.before` means before in time. Because newer lines come first, the page starts after the line with this
      public id. None: the page starts with the newest line. Raises AccountInvalid if `query.before` does not have the
      form of a public id.
    - `query.until`: the page has only lines that are older than this time; None: lines of any time.

    Reads at most `limit + 1` lines from each table, because all lines of the page may be from one table. The additional
    line shows that more lines follow the page."""
    start_position = _BEFORE_ALL_LINES if query.before is None else _Position.parse(query.before)
    if query.until is not None:
        # The page continues with smaller positions. Every line with the time `until` has a greater position than
        # (until, False, 0), because every row id is above 0. So only lines older than `until` follow (until, False, 0).
        start_position = min(start_position, _Position(query.until, is_audit=False, row_id=0))
    target, part = split_target(query.target or "")
    values: dict[str, str | float | None] = {
        "actor": query.actor,
        "action": query.action,
        "outcome": query.outcome,
        "since": query.since,
        "target": target,
        "part": part,
        "tag_or_digest": part[1:],
        "at": start_position.at,
        "limit": limit + 1,
    }
    lines = [
        _entry(row, is_audit)
        for is_audit, sql in ((True, _audit_sql(query, part)), (False, _tag_history_sql(query, part)))
        for row in (
            db.execute(sql, {**values, "id_bound": start_position.id_bound(is_audit)}).fetchall() if sql else ()
        )
    ]
    lines.sort(key=lambda line: line[0], reverse=True)
    entries = [entry for _, entry in lines[: limit + 1]]
    return Page(entries[:limit], len(entries) > limit)


def _audit_sql(query: AuditQuery, part: str) -> str:
    """Returns the statement that reads the lines of `audit` that match the query. `part`: the part of `query.target`,
    or an empty text for all parts."""
    terms = [f"{name} = :{name}" for name in ("actor", "action", "outcome") if getattr(query, name) is not None]
    # The next two terms exclude no further lines. Each repeats the condition of a partial index, because SQLite uses a
    # partial index only for a statement that contains the condition of the index.
    if query.outcome not in (None, "ok"):
        terms.append("outcome <> 'ok'")
    if query.action not in (None, "manifest.put"):
        terms.append("action <> 'manifest.put'")
    if query.target is not None:
        terms.append("target = :target")
        if part:
            terms.append("part = :part")
    if query.since is not None:
        terms.append("at >= :since")
    return _AUDIT_LINES.format(" AND ".join((*terms, _AFTER_POSITION.format(""))))


def _tag_history_sql(query: AuditQuery, part: str) -> str:
    """Returns the statement that reads the lines of `tag_history` that match the query. Returns an empty text if the
    query excludes successful changes of tags, because `tag_history` has no other lines. `part`: the part of
    `query.target`, or an empty text for all parts."""
    if query.action not in (None, _TAG_PUT, _TAG_DELETE) or query.outcome not in (None, "ok"):
        return ""
    terms = [] if query.actor is None else ["h.actor = :actor"]
    if query.action is not None:
        # A line without a digest is about a deleted tag.
        terms.append("h.digest IS NULL" if query.action == _TAG_DELETE else "h.digest IS NOT NULL")
    if query.target is not None:
        terms.append("h.repository = (SELECT id FROM repository WHERE name = :target)")
        if part:
            terms.append("h.tag = :tag_or_digest" if part[0] == ":" else "h.digest = :tag_or_digest")
    if query.since is not None:
        terms.append("h.at >= :since")
    return _TAG_HISTORY_LINES.format(" AND ".join((*terms, _AFTER_POSITION.format("h."))))


def _entry(row: tuple[Any, ...], is_audit: bool) -> tuple[_Position, AuditEntry]:
    """Returns the position and the line that a row contains. `is_audit`: True for a row of the table `audit`, False for
    a row of `tag_history`."""
    at, row_id, actor, action, target, outcome, address, request_id, user_agent, detail, count = row
    position = _Position(at, is_audit, row_id)
    details = json.loads(detail) if detail else None
    return position, AuditEntry(
        at, actor, action, target, outcome, address, request_id, user_agent, details, count, str(position)
    )

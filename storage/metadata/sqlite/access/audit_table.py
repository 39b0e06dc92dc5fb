"""The audit log. It is stored in two tables: `audit`, and `tag_history` for changes of tags.

A change writes its line in its own transaction. Pages merge the lines of both tables, newest first. Of two lines with
the same time, those of `audit` come before those of `tag_history`; within a table, the line with the higher row id
comes first. The public id of a line encodes its position in this order, so the next page begins at the right line even
if lines were written or deleted meanwhile.

`by` is the actor whom the line names. Times are seconds since 1970.
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
    """Writes a line for a change that succeeded. `target`: the account, group, key or repository that was changed.
    `part`: the tag or digest in a repository, with its ':' or '@'. `detail`: more about the change, stored as JSON."""
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
    """Writes a line for a change of a blob or manifest of a repository."""
    record(db, by, now, action, repo, detail, part=f"@{digest}")


def note(db: apsw.Connection, entries: Sequence[AuditEntry]) -> None:
    """Writes lines that are no changes of their own, such as logins and denials."""
    db.executemany(_INSERT, (_values(entry) for entry in entries))


def _values(entry: AuditEntry) -> tuple[str | float | None, ...]:
    return (
        *(entry.at, entry.actor, entry.action, *split_target(entry.target), entry.outcome),
        *(entry.address, entry.request_id, entry.user_agent),
        json.dumps(dict(entry.detail)) if entry.detail else None,
        entry.count,
    )


def split_target(target: str) -> tuple[str, str]:
    """Splits `team/app:latest` or `team/app@sha256:…` into `team/app` and the rest, its part. Returns any other target,
    such as `group:dev`, with an empty part."""
    kind, colon, _ = target.partition(":")
    if "@" not in target and (not colon or kind in set(GranteeKind)):
        return target, ""
    end = min(index for index in map(target.find, ":@") if index >= 0)
    return target[:end], target[end:]


def prune(db: apsw.Connection, before: float, limit: int) -> int:
    """Deletes at most `limit` lines of the table `audit` that are older than `before`. Returns how many it deleted."""
    db.execute("DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < ? ORDER BY at LIMIT ?)", (before, limit))
    return db.changes()


def counted(**counts: int) -> dict[str, object]:
    """Returns the counts that are not 0, for the detail of a line."""
    return {name: count for name, count in counts.items() if count}


_ID = re.compile(r"([0-9a-f]{16})([at])([0-9]{1,18})")
"""Public id of a line: the hexadecimal bytes of its time (a double), the letter of its table, its row id."""
_AUDIT_LETTER, _TAG_HISTORY_LETTER = "a", "t"
_PUT, _DELETE = "tag.put", "tag.delete"
_HIGHEST_ROW_ID = 2**63 - 1

_AUDIT_LINES = """
SELECT at, id, actor, action, target || part, outcome, address, request_id, user_agent, detail, count
  FROM audit WHERE {} ORDER BY at DESC, id DESC LIMIT :limit"""
_TAG_HISTORY_LINES = """
SELECT h.at, h.id, h.actor, iif(h.digest IS NULL, 'tag.delete', 'tag.put'), r.name || ':' || h.tag, 'ok', h.address,
       h.request_id, h.user_agent, iif(h.digest IS NULL, NULL, json_object('digest', h.digest)), 1
  FROM tag_history h CROSS JOIN repository r ON r.id = h.repository
 WHERE {} ORDER BY h.at DESC, h.id DESC LIMIT :limit"""
_OLDER = "{0}at <= :at AND ({0}at < :at OR {0}id < :id_bound)"
"""Condition for the lines behind a position. `{0}`: prefix of the column names."""


class _Position(NamedTuple):
    """Position of a line in the merged order. The greater of two positions is newer, that is, earlier on the pages.

    `at`: the line's time. `is_audit`: the line is in the table `audit`, not in `tag_history`. `row_id`: its row id."""

    at: float
    is_audit: bool
    row_id: int

    @classmethod
    def parse(cls, text: str) -> _Position:
        """Parses the public id of a line. Raises AccountInvalid."""
        if (found := _ID.fullmatch(text)) is None:
            raise AccountInvalid(f"{shown(text)} is not the id of a line of the audit log")
        (at,) = struct.unpack(">d", bytes.fromhex(found[1]))
        return cls(at, found[2] == _AUDIT_LETTER, int(found[3]))

    def __str__(self) -> str:
        """Returns the public id of the line."""
        letter = _AUDIT_LETTER if self.is_audit else _TAG_HISTORY_LETTER
        return f"{struct.pack('>d', self.at).hex()}{letter}{self.row_id}"

    def id_bound(self, in_audit: bool) -> int:
        """Returns the row id below which a line with the same time, in `audit` or in `tag_history`, is older."""
        if in_audit is self.is_audit:
            return self.row_id
        return _HIGHEST_ROW_ID if self.is_audit else 0


_NEWEST = _Position(math.inf, True, _HIGHEST_ROW_ID)


def page(db: apsw.Connection, query: AuditQuery, limit: int) -> Page[AuditEntry]:
    """Returns a page of at most `limit` lines that match the query, newest first. The page begins behind the line with
    the id `query.before`, or with the newest line. Raises AccountInvalid if no line can have that id.

    Reads up to `limit` lines and one more from each table, since all lines of the page may be from one table."""
    before = _NEWEST if query.before is None else _Position.parse(query.before)
    target, part = split_target(query.target or "")
    values: dict[str, str | float | None] = {
        "actor": query.actor,
        "action": query.action,
        "outcome": query.outcome,
        "since": query.since,
        "target": target,
        "part": part,
        "tag_or_digest": part[1:],
        "at": before.at,
        "limit": limit + 1,
    }
    lines = [
        _entry(row, is_audit)
        for is_audit, sql in ((True, _audit_sql(query, part)), (False, _tag_history_sql(query, part)))
        for row in (db.execute(sql, {**values, "id_bound": before.id_bound(is_audit)}).fetchall() if sql else ())
    ]
    lines.sort(key=lambda line: line[0], reverse=True)
    found = [entry for _, entry in lines[: limit + 1]]
    return Page(found[:limit], len(found) > limit)


def _audit_sql(query: AuditQuery, part: str) -> str:
    """Returns the statement that reads the lines of `audit` that match the query."""
    terms = [f"{name} = :{name}" for name in ("actor", "action", "outcome") if getattr(query, name) is not None]
    # The next two terms repeat the conditions of partial indexes, which SQLite uses only for such statements.
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
    return _AUDIT_LINES.format(" AND ".join((*terms, _OLDER.format(""))))


def _tag_history_sql(query: AuditQuery, part: str) -> str:
    """Returns the statement that reads the lines of `tag_history` that match the query; an empty text if none can
    match, because all of these are successful changes of tags."""
    if query.action not in (None, _PUT, _DELETE) or query.outcome not in (None, "ok"):
        return ""
    terms = [] if query.actor is None else ["h.actor = :actor"]
    if query.action is not None:
        terms.append("h.digest IS NULL" if query.action == _DELETE else "h.digest IS NOT NULL")  # NULL: deleted
    if query.target is not None:
        terms.append("h.repository = (SELECT id FROM repository WHERE name = :target)")
        if part:
            terms.append("h.tag = :tag_or_digest" if part[0] == ":" else "h.digest = :tag_or_digest")
    if query.since is not None:
        terms.append("h.at >= :since")
    return _TAG_HISTORY_LINES.format(" AND ".join((*terms, _OLDER.format("h."))))


def _entry(row: tuple[Any, ...], is_audit: bool) -> tuple[_Position, AuditEntry]:
    at, row_id, actor, action, target, outcome, address, request_id, user_agent, detail, count = row
    position = _Position(at, is_audit, row_id)
    details = json.loads(detail) if detail else None
    return position, AuditEntry(
        at, actor, action, target, outcome, address, request_id, user_agent, details, count, str(position)
    )

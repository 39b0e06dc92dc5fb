"""The audit log: lines are written in the transaction of the change, and read in pages together with `tag_history`.

Pages are newest first. Of two lines with the same time, those of the log come before those of `tag_history`, then the
higher number comes first. A line's id is its position in that order, so the next page is right whatever is written or
deleted meanwhile.
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
    """Writes a line for a change. `part`: the tag or digest in the target, with its ':' or '@'."""
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
    """Writes a line for a change of a repository's content."""
    record(db, by, now, action, repo, detail, part=f"@{digest}")


def note(db: apsw.Connection, entries: Sequence[AuditEntry]) -> None:
    db.executemany(_INSERT, (_values(entry) for entry in entries))


def _values(entry: AuditEntry) -> tuple[str | float | None, ...]:
    return (
        *(entry.at, entry.actor, entry.action, *split_target(entry.target), entry.outcome),
        *(entry.address, entry.request_id, entry.user_agent),
        json.dumps(dict(entry.detail)) if entry.detail else None,
        entry.count,
    )


def split_target(target: str) -> tuple[str, str]:
    """Splits `team/app:latest` and `team/app@sha256:…` into repository and part; other targets have no part."""
    kind, colon, _ = target.partition(":")
    if "@" not in target and (not colon or kind in set(GranteeKind)):
        return target, ""
    place = min(at for at in map(target.find, ":@") if at >= 0)
    return target[:place], target[place:]


def prune(db: apsw.Connection, before: float, limit: int) -> int:
    """Deletes at most `limit` lines, and returns their number."""
    db.execute("DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < ? ORDER BY at LIMIT ?)", (before, limit))
    return db.changes()


def counted(**counts: int) -> dict[str, object]:
    """Returns the counts that are not 0, for a line's detail."""
    return {name: count for name, count in counts.items() if count}


_ID = re.compile(r"([0-9a-f]{16})([at])([0-9]{1,18})")
_LOG, _TAGS = "a", "t"
_PUT, _DELETE = "tag.put", "tag.delete"
_HIGHEST = 2**63 - 1

_LOG_LINES = """
SELECT at, id, actor, action, target || part, outcome, address, request_id, user_agent, detail, count
  FROM audit WHERE {} ORDER BY at DESC, id DESC LIMIT :most"""
_TAG_LINES = """
SELECT h.at, h.id, h.actor, iif(h.digest IS NULL, 'tag.delete', 'tag.put'), r.name || ':' || h.tag, 'ok', h.address,
       h.request_id, h.user_agent, iif(h.digest IS NULL, NULL, json_object('digest', h.digest)), 1
  FROM tag_history h CROSS JOIN repository r ON r.id = h.repository
 WHERE {} ORDER BY h.at DESC, h.id DESC LIMIT :most"""
_AFTER = "{0}at <= :at AND ({0}at < :at OR {0}id < :number)"


class _Place(NamedTuple):
    """Position of a line; the greater of two is newer."""

    at: float
    logged: bool
    number: int

    @classmethod
    def parse(cls, text: str) -> _Place:
        """Parses a line's id. Raises AccountInvalid."""
        if (found := _ID.fullmatch(text)) is None:
            raise AccountInvalid(f"{shown(text)} is the id of no line of the audit log")
        (at,) = struct.unpack(">d", bytes.fromhex(found[1]))
        return cls(at, found[2] == _LOG, int(found[3]))

    def __str__(self) -> str:
        return f"{struct.pack('>d', self.at).hex()}{_LOG if self.logged else _TAGS}{self.number}"

    def bound(self, logged: bool) -> int:
        """Returns the number below which lines of the log (or of the tags) with the same time are older."""
        if logged is self.logged:
            return self.number
        return _HIGHEST if self.logged else 0


_NEWEST = _Place(math.inf, True, _HIGHEST)


def page(db: apsw.Connection, query: AuditQuery, limit: int) -> Page[AuditEntry]:
    """Returns a page. Reads as many lines from each of the two tables as the page may have."""
    after = _NEWEST if query.before is None else _Place.parse(query.before)
    target, part = split_target(query.target or "")
    values: dict[str, str | float | None] = {
        "actor": query.actor,
        "action": query.action,
        "outcome": query.outcome,
        "since": query.since,
        "target": target,
        "part": part,
        "within": part[1:],
        "at": after.at,
        "most": limit + 1,
    }
    lines = [
        _entry(row, logged)
        for logged, sql in ((True, _log_sql(query, part)), (False, _tag_sql(query, part)))
        for row in (db.execute(sql, {**values, "number": after.bound(logged)}).fetchall() if sql else ())
    ]
    lines.sort(key=lambda line: line[0], reverse=True)
    found = [entry for _, entry in lines[: limit + 1]]
    return Page(found[:limit], len(found) > limit)


def _log_sql(query: AuditQuery, part: str) -> str:
    terms = [f"{name} = :{name}" for name in ("actor", "action", "outcome") if getattr(query, name) is not None]
    # This condition lets SQLite use the partial index.
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
    return _LOG_LINES.format(" AND ".join((*terms, _AFTER.format(""))))


def _tag_sql(query: AuditQuery, part: str) -> str:
    """Returns the statement for `tag_history`; empty if no line of it can match."""
    if query.action not in (None, _PUT, _DELETE) or query.outcome not in (None, "ok"):
        return ""
    terms = [] if query.actor is None else ["h.actor = :actor"]
    if query.action is not None:
        terms.append("h.digest IS NULL" if query.action == _DELETE else "h.digest IS NOT NULL")
    if query.target is not None:
        terms.append("h.repository = (SELECT id FROM repository WHERE name = :target)")
        if part:
            terms.append("h.tag = :within" if part[0] == ":" else "h.digest = :within")
    if query.since is not None:
        terms.append("h.at >= :since")
    return _TAG_LINES.format(" AND ".join((*terms, _AFTER.format("h."))))


def _entry(row: tuple[Any, ...], logged: bool) -> tuple[_Place, AuditEntry]:
    at, number, actor, action, target, outcome, address, request_id, user_agent, detail, count = row
    place = _Place(at, logged, number)
    known = json.loads(detail) if detail else None
    return place, AuditEntry(
        at, actor, action, target, outcome, address, request_id, user_agent, known, count, str(place)
    )

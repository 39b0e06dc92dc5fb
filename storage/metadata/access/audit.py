"""The audit log's own lines, written in the transaction of what they tell of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import apsw

from storage.access import AuditEntry, SubjectKind
from storage.content import Actor
from storage.names import Digest, RepositoryName

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
    """A line for a change that is being made. `part`: what of the target it is about, with the sign before it."""
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
    """A line for a change of what is in a repository."""
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
    """`team/app:latest` and `team/app@sha256:…` as repository and part; `group:dev`, and what else there is, whole."""
    kind, colon, _ = target.partition(":")
    if "@" not in target and (not colon or kind in set(SubjectKind)):
        return target, ""
    place = min(at for at in map(target.find, ":@") if at >= 0)
    return target[:place], target[place:]


def prune(db: apsw.Connection, before: float, limit: int) -> int:
    """Drops lines, `limit` at the most; how many."""
    db.execute("DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < ? ORDER BY at LIMIT ?)", (before, limit))
    return db.changes()


def counted(**counts: int) -> dict[str, object]:
    """What went along with something, for a line's detail."""
    return {name: count for name, count in counts.items() if count}

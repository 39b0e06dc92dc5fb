"""Keeps the tables of events within their limits, and counts what waits in them.

`find_excess` only reads, because it may look at many rows; `delete_excess` then deletes what it found, inside a
transaction that the caller commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.outbox import DroppedDeliveries, EventLimits, WebhookBacklog

MAX_DELETED_EVENTS: Final = 2000
"""Largest number of events that one transaction deletes."""
MAX_DROPPED: Final = 2000
"""Largest number of deliveries of a webhook that one transaction deletes."""
_IS_WAITED_FOR: Final = "EXISTS (SELECT 1 FROM event_delivery d WHERE d.event = e.id)"
_OLDEST_EVENTS: Final = f"""
SELECT e.id, e.at, {_IS_WAITED_FOR} FROM event e WHERE e.id > ?1 AND e.id < ?2 ORDER BY e.id LIMIT {MAX_DELETED_EVENTS}
"""
_COUNTS: Final = """
SELECT d.webhook, sum(d.dead IS NULL), sum(d.dead IS NOT NULL), min(iif(d.dead IS NULL, d.event, NULL)) AS oldest
  FROM event_delivery d GROUP BY d.webhook"""
_OLDEST: Final = """
SELECT event FROM event_delivery WHERE webhook = ?1 AND (dead IS NULL) = ?2 ORDER BY event LIMIT ?3"""


@dataclass(frozen=True, slots=True)
class Excess:
    """What exceeds the limits. `events`: numbers of events. `deliveries`: pairs of a webhook and the number of an
    event. `dropped`: how many of these are deliveries and dead letters, for each webhook. `bool(excess)` is False if
    there is nothing."""

    events: Sequence[int]
    deliveries: Sequence[tuple[str, int]]
    dropped: Sequence[DroppedDeliveries]

    @property
    def is_complete(self) -> bool:
        """Whether this is all that exceeded the limits."""
        most = max((max(found.pending, found.dead) for found in self.dropped), default=0)
        return len(self.events) < MAX_DELETED_EVENTS and most < MAX_DROPPED

    def __bool__(self) -> bool:
        return bool(self.events or self.deliveries)


def find_excess(db: apsw.Connection, limits: EventLimits) -> Excess:
    """Returns what exceeds the limits, oldest first; not all if there is very much."""
    deliveries: list[tuple[str, int]] = []
    dropped: list[DroppedDeliveries] = []
    counts: list[Any] = db.execute(_COUNTS).fetchall()
    for webhook, pending, dead, _ in counts:
        too_old = _oldest(db, webhook, pending - limits.pending, is_pending=True)
        too_dead = _oldest(db, webhook, dead - limits.dead, is_pending=False)
        if too_old or too_dead:
            deliveries += [*too_old, *too_dead]
            dropped.append(DroppedDeliveries(webhook, len(too_old), len(too_dead)))
    return Excess(_old_events(db, limits), deliveries, dropped)


def _old_events(db: apsw.Connection, limits: EventLimits) -> list[int]:
    """Returns events that are too old or too many, without those that a webhook still has to get. Never returns the
    newest event."""
    newest: int = db.execute("SELECT max(id) FROM event").get or 0
    found: list[int] = []
    position = 0
    while len(found) < MAX_DELETED_EVENTS:
        rows: list[Any] = db.execute(_OLDEST_EVENTS, (position, newest)).fetchall()
        for position, at, is_waited_for in rows:
            if at >= limits.keep_since and position > newest - limits.events:
                return found
            if not is_waited_for:
                found.append(position)
        if not rows:
            break
    return found


def _oldest(db: apsw.Connection, webhook: str, count: int, *, is_pending: bool) -> list[tuple[str, int]]:
    """Returns the `count` oldest deliveries (`is_pending`) or dead letters of a webhook, but only so many as one
    transaction should delete."""
    if count <= 0:
        return []
    rows: list[Any] = db.execute(_OLDEST, (webhook, is_pending, min(count, MAX_DROPPED))).fetchall()
    return [(webhook, event) for (event,) in rows]


def delete_excess(db: apsw.Connection, excess: Excess) -> None:
    """Deletes what `find_excess` found."""
    db.executemany("DELETE FROM event_delivery WHERE webhook = ? AND event = ?", excess.deliveries)
    rows = [(event,) for event in excess.events]
    db.executemany(f"DELETE FROM event AS e WHERE id = ? AND NOT {_IS_WAITED_FOR}", rows)


def backlog(db: apsw.Connection) -> list[WebhookBacklog]:
    """Returns the backlog of each webhook."""
    sql = f"SELECT c.*, e.at FROM ({_COUNTS}) c LEFT JOIN event e ON e.id = c.oldest"
    rows: list[Any] = db.execute(sql).fetchall()
    return [WebhookBacklog(webhook, pending, dead, at) for webhook, pending, dead, _, at in rows]

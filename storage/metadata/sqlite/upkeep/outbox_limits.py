"""Keeps the tables of events within their limits, and counts the deliveries to each webhook.

The *list of events*, which people and programs read, has the rows of the table `event` whose column `kept` is 1. A
*delivery* is an event for one webhook (table `event_delivery`). A *pending* delivery is still to be sent. A *dead
letter* is a delivery that was given up. An *unneeded* event is not in the list and has no delivery.

`find_excess` may read many rows, so it runs outside of a write transaction and changes nothing. Afterwards,
`delete_excess` deletes the found rows inside a transaction, which the caller commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.future_times import is_future
from storage.outbox import DroppedDeliveries, EventLimits, WebhookBacklog

MAX_DELETED_EVENTS: Final = 2000
"""Largest number of listed events, and largest number of unneeded events, that one transaction removes."""
MAX_DELETED_DELIVERIES: Final = 2000
"""Largest number of pending deliveries, and largest number of dead letters, that one transaction deletes for each
webhook."""
_HAS_DELIVERIES: Final = "EXISTS (SELECT 1 FROM event_delivery d WHERE d.event = e.id)"
_IS_NEWEST: Final = "e.id = (SELECT max(id) FROM event)"
"""The newest event is never deleted, because SQLite would give its number to the next event."""
_OLDEST_LISTED: Final = f"SELECT e.id, e.at FROM event e WHERE e.kept = 1 ORDER BY e.id LIMIT {MAX_DELETED_EVENTS}"
_NEWEST_BEYOND_LIMIT: Final = "SELECT e.id FROM event e WHERE e.kept = 1 ORDER BY e.id DESC LIMIT 1 OFFSET ?"
_UNNEEDED_EVENTS: Final = f"""
SELECT e.id FROM event e WHERE e.kept = 0 AND NOT {_HAS_DELIVERIES} AND NOT {_IS_NEWEST}
 ORDER BY e.id LIMIT {MAX_DELETED_EVENTS}"""
_DELIVERY_COUNTS: Final = """
SELECT d.webhook, sum(d.dead IS NULL), sum(d.dead IS NOT NULL), min(iif(d.dead IS NULL, d.event, NULL)) AS oldest
  FROM event_delivery d WHERE d.webhook IN (SELECT name FROM event_reader) GROUP BY d.webhook"""
"""Does not count the deliveries of removed webhooks (`storage.metadata.sqlite.upkeep.removed_webhooks`)."""
_OLDEST_DELIVERIES: Final = """
SELECT event FROM event_delivery WHERE webhook = ?1 AND (dead IS NULL) = ?2 ORDER BY event LIMIT ?3"""


@dataclass(frozen=True, slots=True)
class Excess:
    """The events and deliveries to delete. `bool(excess)` is False if there are none.

    - `listed_events`: numbers of the events to remove from the list, because they are too old or the list is too long.
    - `unneeded_events`: numbers of the unneeded events.
    - `deliveries`: the deliveries over the limits, each as the name of the webhook and the number of the event.
    - `dropped`: for each webhook, how many pending deliveries and how many dead letters are in `deliveries`.
    """

    listed_events: Sequence[int]
    unneeded_events: Sequence[int]
    deliveries: Sequence[tuple[str, int]]
    dropped: Sequence[DroppedDeliveries]

    @property
    def is_complete(self) -> bool:
        """True if there is nothing else to delete. False if there may be more events or deliveries to delete."""
        most_dropped = max((max(counts.pending, counts.dead) for counts in self.dropped), default=0)
        return (
            max(len(self.listed_events), len(self.unneeded_events)) < MAX_DELETED_EVENTS
            and most_dropped < MAX_DELETED_DELIVERIES
        )

    def __bool__(self) -> bool:
        return bool(self.listed_events or self.unneeded_events or self.deliveries)


def find_excess(db: apsw.Connection, limits: EventLimits) -> Excess:
    """Returns the events and deliveries to delete, oldest first. If they are too many for one transaction, returns only
    the oldest ones (`Excess.is_complete`)."""
    deliveries: list[tuple[str, int]] = []
    dropped: list[DroppedDeliveries] = []
    counts: list[Any] = db.execute(_DELIVERY_COUNTS).fetchall()
    for webhook, pending, dead, _ in counts:
        excess_pending = _oldest_deliveries(db, webhook, pending - limits.pending, is_pending=True)
        excess_dead = _oldest_deliveries(db, webhook, dead - limits.dead, is_pending=False)
        if excess_pending or excess_dead:
            deliveries += [*excess_pending, *excess_dead]
            dropped.append(DroppedDeliveries(webhook, len(excess_pending), len(excess_dead)))
    unneeded_events: list[int] = [number for (number,) in db.execute(_UNNEEDED_EVENTS)]
    return Excess(_excess_listed_events(db, limits), unneeded_events, deliveries, dropped)


def _excess_listed_events(db: apsw.Connection, limits: EventLimits) -> list[int]:
    """Returns the numbers of the events to remove from the list. The reason to remove an event is one of these:

    - The list is too long: it has at least `limits.events` newer events.
    - The event is too old: its time is before `limits.keep_since`.
    - The time of the event is in the future, so its age is unknown. Such an event is removed if an event with
      a higher number is removed.

    Stops at the first event to which none of these reasons can apply, even if a later event is too old."""
    rows: list[Any] = db.execute(_OLDEST_LISTED).fetchall()
    # The newest event that the list has no room for.
    newest_excess: int | None = db.execute(_NEWEST_BEYOND_LIMIT, (limits.events,)).get
    count = 0
    for index, (number, event_time) in enumerate(rows):
        if event_time < limits.keep_since or (newest_excess is not None and number <= newest_excess):
            count = index + 1
        elif not is_future(event_time, limits.now):
            break
    return [number for number, _ in rows[:count]]


def _oldest_deliveries(db: apsw.Connection, webhook: str, count: int, *, is_pending: bool) -> list[tuple[str, int]]:
    """Returns the oldest `count` pending deliveries of a webhook, but not more than `MAX_DELETED_DELIVERIES`. If
    `is_pending` is False, returns dead letters instead."""
    if count <= 0:
        return []
    rows: list[Any] = db.execute(
        _OLDEST_DELIVERIES, (webhook, is_pending, min(count, MAX_DELETED_DELIVERIES))
    ).fetchall()
    return [(webhook, event) for (event,) in rows]


def delete_excess(db: apsw.Connection, excess: Excess) -> None:
    """Deletes the events and deliveries that `find_excess` has returned. A listed event that has a delivery, or that is
    the newest event, is only removed from the list."""
    db.executemany("DELETE FROM event_delivery WHERE webhook = ? AND event = ?", excess.deliveries)
    event_numbers = [(number,) for number in (*excess.listed_events, *excess.unneeded_events)]
    db.executemany(f"DELETE FROM event AS e WHERE id = ? AND NOT {_HAS_DELIVERIES} AND NOT {_IS_NEWEST}", event_numbers)
    if excess.listed_events:
        db.executemany("UPDATE event SET kept = 0 WHERE id = ?", [(number,) for number in excess.listed_events])
        db.execute("UPDATE event_list SET kept_from = max(kept_from, ?)", (excess.listed_events[-1] + 1,))


def backlog(db: apsw.Connection) -> list[WebhookBacklog]:
    """Returns, for each webhook, the number of pending deliveries, the number of dead letters, and the time of the
    oldest event with a pending delivery."""
    sql = f"SELECT c.*, e.at FROM ({_DELIVERY_COUNTS}) c LEFT JOIN event e ON e.id = c.oldest"
    rows: list[Any] = db.execute(sql).fetchall()
    return [WebhookBacklog(webhook, pending, dead, at) for webhook, pending, dead, _, at in rows]

"""The *leftovers*: deliveries of webhooks that were removed from the settings. A *delivery* is an event that waits to
be sent to one webhook, or that was given up (a dead letter). A *reader* is a webhook with a row in the table
`event_reader`; the change that removes a webhook deletes this row.

A webhook may have a million deliveries, and all other changes wait for a transaction. So the change that removes the
webhook leaves its deliveries where they are. They are deleted in portions afterwards (`delete_portion`). Until then,
the look-ups of deliveries skip them (`IS_OF_READER`). If the process dies meanwhile, the next call of
`SqliteOutbox.tidy` deletes the rest.

If the webhook is added to the settings again, it becomes a reader only after its leftovers are deleted. So a delivery
of a reader is never a leftover.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any, Final

import apsw

from storage.metadata.sqlite.upkeep import outbox_limits
from storage.outbox import DroppedDeliveries

IS_OF_READER: Final = "+d.webhook IN (SELECT name FROM event_reader)"
"""SQL condition: the table `event_reader` has the webhook of the delivery `d`. The `+` keeps SQLite
from choosing an index for this condition."""
_FIND_REMOVED: Final = """
WITH RECURSIVE webhook (name) AS (
  SELECT min(webhook) FROM event_delivery
  UNION ALL
  SELECT (SELECT min(d.webhook) FROM event_delivery d WHERE d.webhook > w.name) FROM webhook w WHERE w.name IS NOT NULL)
SELECT name FROM webhook WHERE name IS NOT NULL AND name NOT IN (SELECT name FROM event_reader) LIMIT 1"""
"""Finds a webhook with leftovers. Reads one delivery of each webhook."""
_DELETE_OLDEST: Final = """
DELETE FROM event_delivery
 WHERE webhook = ?1 AND event IN (SELECT event FROM event_delivery WHERE webhook = ?1 ORDER BY event LIMIT ?2)"""
_COUNTS: Final = """
SELECT webhook, sum(dead IS NULL), sum(dead IS NOT NULL) FROM event_delivery
 WHERE webhook IN (SELECT value FROM json_each(?)) GROUP BY webhook"""


def is_reader(db: apsw.Connection, webhook: str) -> bool:
    """Returns whether the webhook is a reader."""
    return db.execute("SELECT 1 FROM event_reader WHERE name = ?", (webhook,)).get is not None


def has_deliveries(db: apsw.Connection, webhooks: Set[str]) -> bool:
    """Returns whether one of the webhooks has deliveries."""
    return any(
        db.execute("SELECT 1 FROM event_delivery WHERE webhook = ? LIMIT 1", (webhook,)).get is not None
        for webhook in webhooks
    )


def count_deliveries(db: apsw.Connection, webhooks: Set[str]) -> list[DroppedDeliveries]:
    """Returns the numbers of deliveries of the webhooks. Leaves out webhooks without deliveries. Reads all the
    deliveries, so it must not run in a transaction that changes something."""
    rows: list[Any] = db.execute(_COUNTS, (json.dumps(sorted(webhooks)),)).fetchall()
    return [DroppedDeliveries(*row) for row in rows]


def find_removed(db: apsw.Connection) -> str | None:
    """Returns the name of a webhook with leftovers; None if there are no leftovers."""
    webhook: str | None = db.execute(_FIND_REMOVED).get
    return webhook


def delete_portion(db: apsw.Connection) -> None:
    """Deletes at most `outbox_limits.MAX_DELETED_DELIVERIES` leftovers of one webhook, if there are leftovers. Runs
    inside a transaction, which the caller commits."""
    db.execute(_DELETE_OLDEST, (find_removed(db), outbox_limits.MAX_DELETED_DELIVERIES))

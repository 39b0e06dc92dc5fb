"""Deletes the *leftovers*: the deliveries of webhooks that were removed from the settings.

- A *delivery* is an event that waits to be sent to one webhook, or a dead letter: an event that was given up.
- A webhook is called a *reader* while the table `event_reader` has a row for it. Only readers get deliveries of new
  events. When a webhook is removed, its row is deleted.

A webhook may have a million deliveries. Deleting them in one transaction would block all other changes for too long, so
`delete_portion` deletes them in portions later. Until then, the look-ups of deliveries use the condition `IS_OF_READER`
to skip leftovers. After a crash, the next call of `SqliteOutbox.tidy` deletes the rest.

A webhook that is added to the settings again becomes a reader only after its leftovers are deleted. So a delivery of a
reader is never a leftover.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any, Final

import apsw

from storage.metadata.sqlite.upkeep import outbox_limits
from storage.outbox import DroppedDeliveries

IS_OF_READER: Final = "+d.webhook IN (SELECT name FROM event_reader)"
"""SQL condition: the delivery `d` is of a reader, so it is not a leftover. The `+` keeps SQLite from using an index for
this condition."""
_FIND_REMOVED: Final = """
WITH RECURSIVE webhook (name) AS (
  SELECT min(webhook) FROM event_delivery
  UNION ALL
  SELECT (SELECT min(d.webhook) FROM event_delivery d WHERE d.webhook > w.name) FROM webhook w WHERE w.name IS NOT NULL)
SELECT name FROM webhook WHERE name IS NOT NULL AND name NOT IN (SELECT name FROM event_reader) LIMIT 1"""
"""Finds one webhook with leftovers. Reads only one delivery of each webhook."""
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
    """Returns whether at least one of the webhooks has a delivery."""
    return any(
        db.execute("SELECT 1 FROM event_delivery WHERE webhook = ? LIMIT 1", (webhook,)).get is not None
        for webhook in webhooks
    )


def count_deliveries(db: apsw.Connection, webhooks: Set[str]) -> list[DroppedDeliveries]:
    """Returns the numbers of deliveries of each of the webhooks. Leaves out webhooks without deliveries. Takes long if
    there are many deliveries, so it must not run in a transaction that changes something."""
    rows: list[Any] = db.execute(_COUNTS, (json.dumps(sorted(webhooks)),)).fetchall()
    return [DroppedDeliveries(*row) for row in rows]


def find_removed_webhook(db: apsw.Connection) -> str | None:
    """Returns the name of a webhook with leftovers; None if there are no leftovers."""
    webhook: str | None = db.execute(_FIND_REMOVED).get
    return webhook


def delete_portion(db: apsw.Connection) -> None:
    """Deletes leftovers of one webhook, at most `outbox_limits.MAX_DELETED_DELIVERIES`. Does nothing if there are no
    leftovers. The caller begins and commits the transaction."""
    db.execute(_DELETE_OLDEST, (find_removed_webhook(db), outbox_limits.MAX_DELETED_DELIVERIES))

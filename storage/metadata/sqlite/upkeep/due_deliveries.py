"""Finds the deliveries of a webhook that are due (`find_due`).

A *delivery* is an event that one webhook has not received yet. It is *pending* until the server gives it up; then it is
a *dead letter*. The *head* of a repository is its oldest pending delivery to the webhook. The server sends the
deliveries of a repository in order, so none of them is due before the head.

The statements name the index that finds the pending deliveries of one repository. Without the name, SQLite may read all
deliveries to the webhook to find one head.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

import apsw

from storage.metadata.sqlite.upkeep.event_tables import DELIVERY_COLUMNS, to_delivery
from storage.outbox import DueDeliveries

MAX_FIRST_HEADS: Final = 500
"""A look-up begins with the statement `_FIRST_HEADS`. If a webhook has at most this many heads, this statement reads
all of them. This takes about two milliseconds."""
MAX_OLDEST_DELIVERIES: Final = 20_000
"""If a webhook has more than `MAX_FIRST_HEADS` heads, a look-up first searches for due heads among this many of its
oldest deliveries. Dead letters are often older than all pending deliveries. So this number must be larger than the
default of the setting `events.max_dead`."""
WAIT_SECONDS_PER_HEAD: Final = 50e-6
"""After a look-up with the statement `_ALL_HEADS`, the caller waits this time for each head before the next look-up.
SQLite reads a head in about a tenth of this time. So the look-ups keep their thread busy for at most about a tenth of
the time."""
LONGEST_PAUSE_SECONDS: Final = 300.0
"""Longest time from a failed attempt of a delivery to its next attempt."""
_PENDING: Final = "event_delivery p INDEXED BY event_delivery_pending WHERE p.webhook = ?1 AND p.dead IS NULL"
_HEADS: Final = f"""
WITH RECURSIVE head (event, repository, next_at) AS (
  SELECT d.event, d.repository, d.next_at FROM event_delivery d
   WHERE d.webhook = ?1 AND d.event = (SELECT p.event FROM {_PENDING} ORDER BY p.repository, p.event LIMIT 1)
  UNION ALL
  SELECT d.event, d.repository, d.next_at FROM head h CROSS JOIN event_delivery d
   WHERE d.webhook = ?1 AND d.event = (SELECT p.event FROM {_PENDING} AND p.repository > h.repository
                                        ORDER BY p.repository, p.event LIMIT 1)"""
"""The beginning of a statement. Finds the heads of all repositories for the webhook ?1, in the order of the
repositories' names. Reads only one pending delivery of each repository."""
_FIRST_HEADS: Final = f"{_HEADS} LIMIT ?2) SELECT repository, next_at FROM head ORDER BY event"
"""Returns at most ?2 heads: those of the repositories whose names come first. The oldest of these heads is in the first
row."""
# The conditions `_IS_DUE` and `_IS_INCLUDED` use these parameters: ?2 is the current time. ?3 is the current time plus
# `LONGEST_PAUSE_SECONDS` (see `_is_due`). ?4 is a JSON array of the repositories to leave out.
_IS_DUE: Final = "(next_at <= ?2 OR next_at > ?3)"
_IS_INCLUDED: Final = "repository NOT IN (SELECT value FROM json_each(?4))"
_DUE_AMONG_THE_OLDEST: Final = f"""
SELECT o.repository
  FROM (SELECT event, repository, next_at, dead FROM event_delivery WHERE webhook = ?1
         ORDER BY event LIMIT {MAX_OLDEST_DELIVERIES}) o
 WHERE o.dead IS NULL AND {_IS_DUE} AND {_IS_INCLUDED}
   AND o.event = (SELECT p.event FROM {_PENDING} AND p.repository = o.repository ORDER BY p.event LIMIT 1)
 ORDER BY o.event LIMIT ?5"""
_ALL_HEADS: Final = f"""{_HEADS})
SELECT repository, NULL, NULL FROM (
  SELECT repository FROM head WHERE {_IS_DUE} AND {_IS_INCLUDED} ORDER BY event LIMIT ?5)
UNION ALL SELECT NULL, min(iif(NOT {_IS_DUE} AND {_IS_INCLUDED}, next_at, NULL)), count(*) FROM head"""
"""Returns at most ?5 rows with the name of a repository whose head is due, oldest head first. Then returns a last row
with three columns:

- NULL.
- The earliest time at which a head that is not due becomes due; NULL if there is no such head.
- The number of all heads. This number includes the heads of the repositories in ?4.

All other values leave out the repositories in ?4."""
_QUEUE: Final = f"""
SELECT {DELIVERY_COLUMNS} FROM event_delivery d INDEXED BY event_delivery_pending CROSS JOIN event e ON e.id = d.event
 WHERE d.webhook = ?1 AND d.repository = ?2 AND d.dead IS NULL ORDER BY d.event LIMIT ?3"""


def find_due(
    db: apsw.Connection,
    webhook: str,
    now: float,
    *,
    max_repositories: int,
    max_events: int,
    excluded: Collection[str],
) -> DueDeliveries:
    """Does what `storage.outbox.Outbox.due` describes: returns the due deliveries of at most `max_repositories`
    repositories, and at most `max_events` of each. `now`: the current time, in seconds since 1970. `excluded`: the
    repositories to leave out.

    If the webhook has at most `MAX_FIRST_HEADS` heads, reads all heads. Otherwise, first searches for due heads among
    the oldest deliveries. If this finds fewer than `max_repositories` heads, reads all heads."""
    first_heads: list[Any] = db.execute(_FIRST_HEADS, (webhook, MAX_FIRST_HEADS + 1)).fetchall()
    wait_seconds = 0.0
    if len(first_heads) <= MAX_FIRST_HEADS:
        heads = [head for head in first_heads if head[0] not in excluded]
        repositories = [repository for repository, next_at in heads if _is_due(next_at, now)][:max_repositories]
        next_at = min((next_at for _, next_at in heads if not _is_due(next_at, now)), default=None)
    else:
        values = (webhook, now, now + LONGEST_PAUSE_SECONDS, json.dumps(list(excluded)), max_repositories)
        repositories = [repository for (repository,) in db.execute(_DUE_AMONG_THE_OLDEST, values)]
        next_at = None
        if len(repositories) < max_repositories:
            rows: list[Any] = db.execute(_ALL_HEADS, values).fetchall()
            repositories = [repository for repository, _, _ in rows[:-1]]
            _, next_at, head_count = rows[-1]
            wait_seconds = head_count * WAIT_SECONDS_PER_HEAD
    queues = [
        [to_delivery(row) for row in db.execute(_QUEUE, (webhook, repository, max_events))]
        for repository in repositories
    ]
    return DueDeliveries(queues, next_at, wait_seconds)


def _is_due(next_at: float, now: float) -> bool:
    """Returns whether a delivery is due. It is also due if `next_at` is more than `LONGEST_PAUSE_SECONDS` after `now`:
    the clock was then set back after `next_at` was stored."""
    return next_at <= now or next_at > now + LONGEST_PAUSE_SECONDS

"""Finds the deliveries of a webhook that are due (`find_due`).

A delivery is *pending* until the webhook has received the event or the server has given up. The *head* of a repository
is its oldest pending delivery. Deliveries of a repository are sent in order, so only the time of its head says whether
the repository has anything to send now.

The pending deliveries of a webhook can all belong to one repository, or each to a different one. SQLite cannot know
which. So each statement names the index by which SQLite reads the table. Without the name, SQLite may read all
deliveries of the webhook to find the head of one repository.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

import apsw

from storage.metadata.sqlite.upkeep.event_tables import DELIVERY_COLUMNS, to_delivery
from storage.outbox import DueDeliveries

MAX_FIRST_HEADS: Final = 500
"""Number of heads that a look-up reads first. If the webhook has no further heads, the look-up needs no other statement
to find the due heads. SQLite reads this number of heads in about two milliseconds."""
MAX_OLDEST_DELIVERIES: Final = 20_000
"""Number of deliveries, oldest first, in which a look-up searches for due heads before it reads all heads. Some of them
can be *dead letters*: deliveries that were given up. These are often older than all pending deliveries, so the number
is larger than the default of the setting `events.max_dead`."""
WAIT_SECONDS_PER_HEAD: Final = 50e-6
"""After a look-up that has read all heads, the caller waits for this time per head before the next look-up. To read a
head takes a tenth of this time. So the look-ups of a webhook take at most about a tenth of the time of the thread in
which they run."""
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
"""The beginning of a statement. Finds the heads of the webhook ?1, one repository after the other, in the order of the
repositories' names. SQLite reads only one pending delivery of each repository."""
_FIRST_HEADS: Final = f"{_HEADS} LIMIT ?2) SELECT repository, next_at FROM head ORDER BY event"
# The conditions `_IS_DUE` and `_IS_INCLUDED` use these parameters: ?2 is the current time. ?3 is the latest plausible
# time of a next attempt; a time after ?3 was stored before the clock was set back (see `_is_due`). ?4 is a JSON array
# of the repositories to leave out.
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
"""Returns a row for each repository with a due head, at most ?5, and then one more row without a repository. The last
row has two numbers: the time at which the next head becomes due, and the number of all heads. The heads of the
repositories in ?4 count only for the second number."""
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
    """Returns the deliveries that `storage.outbox.Outbox.due` describes: those of at most `max_repositories`
    repositories, and at most `max_events` of each. `now`: in seconds since 1970. `excluded`: the repositories to leave
    out.

    If at most `MAX_FIRST_HEADS` repositories have pending deliveries, reads all heads. Otherwise searches for due heads
    among the oldest deliveries first, and reads all heads only if it finds fewer than `max_repositories`."""
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
    """Returns whether a delivery is due. If `next_at` is more than `LONGEST_PAUSE_SECONDS` in the future, the clock was
    set back after `next_at` was stored. The delivery then counts as due."""
    return next_at <= now or next_at > now + LONGEST_PAUSE_SECONDS

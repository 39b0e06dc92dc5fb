"""Stores events and their deliveries in the metadata database (`SqliteOutbox`).

The *list of events*, which people and programs read, has the events whose column `kept` is 1. The other events are
stored only for their *deliveries*. A delivery is an event that one webhook has not accepted yet. The server still tries
to send it (a *pending* delivery), or has given it up (a *dead letter*). The list and each webhook are *readers* of
events.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import apsw

from storage.data_dir.reserve import ReserveUse
from storage.errors import StorageFailed
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import event_tables, outbox_limits, removed_webhooks
from storage.metadata.sqlite.upkeep.due_deliveries import find_due
from storage.metadata.sqlite.upkeep.event_tables import DELIVERY_COLUMNS, EVENT_COLUMNS, to_delivery, to_event
from storage.outbox import (
    MAX_ADDED_EVENTS,
    Delivery,
    DeliveryPosition,
    DroppedDeliveries,
    DueDeliveries,
    EventAction,
    EventLimits,
    EventPage,
    EventReader,
    FailedDelivery,
    NewEvent,
    WebhookBacklog,
)

T = TypeVar("T")
_OLDER_WINDOW: Final = """
SELECT min(id), count(*) FROM (SELECT id FROM event WHERE kept = 1 AND id < ?1 ORDER BY id DESC LIMIT ?2)"""
_NEWER_WINDOW: Final = """
SELECT max(id), count(*) FROM (SELECT id FROM event WHERE kept = 1 AND id > ?1 ORDER BY id LIMIT ?2)"""
_MATCHES_FILTER: Final = "e.kept = 1 AND (?3 IS NULL OR e.action = ?3) AND (?4 IS NULL OR e.repository = ?4)"
_OLDER_EVENTS: Final = f"""
SELECT {EVENT_COLUMNS} FROM event e WHERE e.id < ?1 AND e.id >= ?2 AND {_MATCHES_FILTER} ORDER BY e.id DESC LIMIT ?5"""
_NEWER_EVENTS: Final = f"""
SELECT {EVENT_COLUMNS} FROM event e WHERE e.id > ?1 AND e.id <= ?2 AND {_MATCHES_FILTER} ORDER BY e.id LIMIT ?5"""
MAX_READ_EVENTS: Final = 5000
"""Largest number of events that one lookup for an action or a repository reads, so that other lookups wait only a few
milliseconds."""
_HIGHEST_ROW_ID: Final = 2**63 - 1
"""The largest row id of SQLite, which no event reaches."""


class SqliteOutbox:
    """Implements `storage.outbox.Outbox`, which describes the methods."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        delivery_scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
    ) -> None:
        """Creates the outbox.

        - `db`: for lookups that read a few rows.
        - `scans`: for lookups that read a page of events or deliveries.
        - `delivery_scans`: for lookups that may read all deliveries. The lookups in `scans` do not wait for them.
        - `writer`: for changes.
        - `clock`: returns the time in seconds since 1970."""
        self._db = db
        self._writer = writer
        self._scans = scans
        self._delivery_scans = delivery_scans
        self._clock = clock

    async def configure(self, readers: Sequence[EventReader]) -> Sequence[DroppedDeliveries]:
        with _as_storage_failed():
            rows: list[Any] = self._db.execute("SELECT name, actions, repositories FROM event_reader").fetchall()
        if set(rows) == set(map(event_tables.reader_row, readers)):
            return []
        removed = {name for name, _, _ in rows} - {reader.name for reader in readers}
        counts = (
            await self._scan_deliveries(partial(removed_webhooks.count_deliveries, webhooks=removed)) if removed else []
        )
        change = partial(event_tables.replace_readers, readers=readers)
        # If a webhook that was removed earlier still has deliveries, no reader with the same name can be added: the
        # change does nothing and returns None. The change is tried again when these deliveries have been deleted.
        while (removed_by_change := await self._writer.run(change, reserve_use=ReserveUse.HALF)) is None:
            await self._delete_leftovers()
        # Another process may have removed some of the webhooks since the count. That process reports their deliveries.
        return [dropped for dropped in counts if dropped.webhook in removed_by_change]

    async def _delete_leftovers(self) -> None:
        """Deletes the deliveries of removed webhooks, a limited number in each transaction. Writes nothing if there are
        no such deliveries."""
        while await self._scan_deliveries(removed_webhooks.find_removed_webhook) is not None:
            await self._writer.run(removed_webhooks.delete_portion, durable=False, reserve_use=ReserveUse.ALL)

    async def add(self, events: Sequence[NewEvent]) -> None:
        assert len(events) <= MAX_ADDED_EVENTS

        def insert(db: apsw.Connection) -> None:
            for event in events:
                event_tables.add_event(db, event)

        await self._writer.run(insert, durable=False)

    async def due(
        self,
        webhook: str,
        now: float,
        max_repositories: int,
        max_events: int,
        excluded_repositories: Collection[str] = (),
    ) -> DueDeliveries:
        limits = {"max_repositories": max_repositories, "max_events": max_events}
        excluded = frozenset(excluded_repositories)  # a copy, because the caller may change it during the lookup

        def look_up(db: apsw.Connection) -> DueDeliveries:
            if not removed_webhooks.is_reader(db, webhook):
                return DueDeliveries([], None)
            return find_due(db, webhook, now, **limits, excluded=excluded)

        return await self._scan_deliveries(look_up)

    async def settle(self, webhook: str, delivered: Sequence[int], failed: Sequence[FailedDelivery]) -> None:
        updates = [
            (failure.attempts, failure.next_at, failure.dead, failure.error, webhook, failure.event)
            for failure in failed
        ]

        def change(db: apsw.Connection) -> None:
            db.executemany(
                "DELETE FROM event_delivery WHERE webhook = ? AND event = ?", [(webhook, event) for event in delivered]
            )
            db.executemany(
                "UPDATE event_delivery SET attempts = ?, next_at = ?, dead = ?, error = ? "
                "WHERE webhook = ? AND event = ?",
                updates,
            )

        await self._writer.run(change, durable=False, reserve_use=ReserveUse.ALL)

    async def newest_number(self) -> int:
        with _as_storage_failed():
            number: int | None = self._db.execute("SELECT max(id) FROM event").get
        return number or 0

    async def first_complete_number(self) -> int:
        # Since the event with the number `kept_from`, the list was always enabled and has lost no event.
        with _as_storage_failed():
            return int(self._db.execute("SELECT kept_from FROM event_list").get)

    async def after(
        self, number: int, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        return await self._scan(partial(_read_page, _NEWER_WINDOW, _NEWER_EVENTS, number, limit, action, repository))

    async def before(
        self, number: int | None, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        start = _HIGHEST_ROW_ID if number is None else number
        return await self._scan(partial(_read_page, _OLDER_WINDOW, _OLDER_EVENTS, start, limit, action, repository))

    async def deliveries(
        self,
        webhook: str | None,
        after: DeliveryPosition | None,
        limit: int,
        *,
        only_dead: bool,
        only_pending: bool = False,
    ) -> Sequence[Delivery]:
        sql = _deliveries_query(has_webhook=webhook is not None, only_dead=only_dead, only_pending=only_pending)
        start = DeliveryPosition(_HIGHEST_ROW_ID, "") if after is None else after
        values = (start.event, start.webhook, limit, *(() if webhook is None else (webhook,)))
        return await self._scan(lambda db: [to_delivery(row) for row in db.execute(sql, values)])

    async def retry(self, webhook: str | None, event: int | None) -> int:
        def change(db: apsw.Connection) -> int:
            db.execute(
                "UPDATE event_delivery AS d SET dead = NULL, attempts = 0, next_at = 0 "
                "WHERE dead IS NOT NULL AND (?1 IS NULL OR webhook = ?1) AND (?2 IS NULL OR event = ?2) "
                f"AND {removed_webhooks.IS_OF_READER}",
                (webhook, event),
            )
            return db.changes()

        return await self._writer.run(change, reserve_use=ReserveUse.HALF)

    async def tidy(self, limits: EventLimits) -> Sequence[DroppedDeliveries]:
        await self._delete_leftovers()
        dropped: list[DroppedDeliveries] = []
        while excess := await self._scan_deliveries(lambda db: outbox_limits.find_excess(db, limits)):
            delete = partial(outbox_limits.delete_excess, excess=excess)
            await self._writer.run(delete, durable=False, reserve_use=ReserveUse.ALL)
            dropped += excess.dropped
            if excess.is_complete:
                break
        return dropped

    async def backlog(self) -> Sequence[WebhookBacklog]:
        return await self._scan_deliveries(outbox_limits.backlog)

    async def _scan(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs a lookup that reads a page of events or deliveries. Raises StorageFailed."""
        with _as_storage_failed():
            return await self._scans.run(lookup)

    async def _scan_deliveries(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs a lookup that may read all deliveries. Raises StorageFailed."""
        with _as_storage_failed():
            return await self._delivery_scans.run(lookup)


@contextmanager
def _as_storage_failed() -> Iterator[None]:
    """Raises StorageFailed in place of an error of SQLite."""
    try:
        yield
    except apsw.Error as error:
        raise StorageFailed(f"the events cannot be read: {error}") from error


def _read_page(
    window_sql: str,
    events_sql: str,
    start: int,
    limit: int,
    action: EventAction | None,
    repository: str | None,
    db: apsw.Connection,
) -> EventPage:
    """Reads a page of the list of events: newer or older events than the event with the number `start`. The page has
    only events of the *window*, which is a limited number of events next to `start`.

    - `window_sql`: `_NEWER_WINDOW` or `_OLDER_WINDOW`. Returns the number of the last event in the window, and how many
      events the window has.
    - `events_sql`: `_NEWER_EVENTS` or `_OLDER_EVENTS`. Returns the events in the window that match `action` and
      `repository`."""
    has_filter = action is not None or repository is not None
    window_size = max(limit + 1, MAX_READ_EVENTS) if has_filter else limit + 1
    row: Any = db.execute(window_sql, (start, window_size)).get
    end, count = row
    if end is None:
        return EventPage([], start, is_last=True)
    rows: list[Any] = db.execute(events_sql, (start, end, action, repository, limit)).fetchall()
    # If the page is full, later events in the window may match as well.
    position: int = rows[-1][0] if len(rows) == limit else end
    return EventPage([to_event(row) for row in rows], position, is_last=count < window_size and position == end)


def _deliveries_query(*, has_webhook: bool, only_dead: bool, only_pending: bool) -> str:
    """Returns the query for a page of at most ?3 deliveries, newest events first. The page begins after the delivery of
    the event ?1 to the webhook ?2.

    - `has_webhook`: the query selects only deliveries to the webhook ?4.
    - `only_dead`: the query selects only dead letters. Its clause INDEXED BY makes SQLite use the index of the dead
      letters, so that SQLite does not read the pending deliveries. There may be far more pending deliveries.
    - `only_pending`: the query selects only pending deliveries."""
    conditions = ["d.event <= ?1", "(d.event < ?1 OR d.webhook > ?2)", removed_webhooks.IS_OF_READER]
    if has_webhook:
        conditions.append("d.webhook = ?4")
    if only_dead:
        conditions.append("d.dead IS NOT NULL")
    if only_pending:
        conditions.append("d.dead IS NULL")
    return (
        f"SELECT {DELIVERY_COLUMNS} FROM event_delivery d {'INDEXED BY event_delivery_dead' if only_dead else ''} "
        f"CROSS JOIN event e ON e.id = d.event WHERE {' AND '.join(conditions)} "
        "ORDER BY d.event DESC, d.webhook LIMIT ?3"
    )

"""Adds events to the metadata database, and turns rows into events and deliveries. An event is added in the same
transaction as the change that it describes.

Each function with a connection runs inside a transaction; the caller commits it. `by` is the client for which the
change is made, `now` the time in seconds since 1970. A *reader* is a webhook, or the list of events that this registry
keeps. A *delivery* is a row which says that a webhook has yet to get an event. A function that adds an event adds
nothing if no reader wants the event.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence, Set
from functools import lru_cache
from typing import Any, Final, NamedTuple

import apsw

from storage.content import BLOB_TYPE, Actor, Manifest
from storage.metadata.sqlite.upkeep import removed_webhooks
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import LIST_READER, Delivery, Event, EventAction, EventReader, NewEvent
from storage.pattern_matcher import Matcher

_INSERT_EVENT: Final = """
INSERT INTO event (uuid, at, action, repository, tag, digest, previous, media_type, size, actor, address, request_id,
                   user_agent, reason, kept)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"""
EVENT_COLUMNS: Final = (
    "e.id, e.uuid, e.at, e.action, e.repository, e.tag, e.digest, e.previous, e.media_type, e.size, e.actor, "
    "e.address, e.request_id, e.user_agent, e.reason"
)
"""The columns of the table `event`, which the query calls `e`. `previous`: the digest that the tag pointed at before it
moved."""
DELIVERY_COLUMNS: Final = f"d.webhook, d.attempts, d.next_at, d.dead, d.error, {EVENT_COLUMNS}"
"""The columns of the table `event_delivery`, which the query calls `d`, and of the event that has to be sent.
`next_at`: when the server tries next. `dead`: when the server gave up the delivery; NULL if it has not given up."""


class _Filter(NamedTuple):
    """The actions and repositories whose events a reader wants."""

    actions: frozenset[str]
    repositories: Matcher


def add(db: apsw.Connection, event: NewEvent) -> None:
    """Adds an event, and a delivery for each webhook that wants it. Adds nothing if no reader wants it."""
    readers = [name for name, reader_filter in _readers(db) if _wants(reader_filter, event)]
    if not readers:
        return
    by = event.by
    number: Any = db.execute(
        _INSERT_EVENT,
        (
            *(str(uuid.uuid4()), event.at, event.action, event.repository, event.tag, event.digest, event.previous),
            *(event.media_type, event.size, by.name, by.address, by.request_id, by.user_agent, event.reason),
            LIST_READER in readers,
        ),
    ).get
    for name in readers:
        if name != LIST_READER:
            db.execute(
                "INSERT INTO event_delivery (webhook, event, repository) VALUES (?, ?, ?)",
                (name, number, event.repository),
            )


def is_wanted(db: apsw.Connection, action: EventAction, repo: str) -> bool:
    """Returns whether a reader wants events with this action in the repository. A caller that gets False need not look
    up the other fields of the event.

    Do not call this function for pushes. A push that points a tag at another manifest also goes to the readers that
    want only `EventAction.MOVE`, and this function does not check for them."""
    return any(
        action in reader_filter.actions and reader_filter.repositories.matches(repo)
        for _, reader_filter in _readers(db)
    )


def add_stored(
    db: apsw.Connection,
    action: EventAction,
    repo: RepositoryName,
    manifest: Manifest,
    tag: Tag | None,
    previous: Digest | None,
    by: Actor,
    now: float,
) -> None:
    """Adds the event of a manifest that was stored, or of a tag that was set to a manifest. `previous`: the digest that
    the tag pointed at before; None if there was no such tag."""
    moved_from = None if previous == manifest.digest else previous
    size = len(manifest.body)
    add(db, NewEvent(action, repo, now, by, tag, manifest.digest, moved_from, manifest.media_type, size))


def add_blob(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, digest: Digest, size: int, by: Actor, now: float
) -> None:
    """Adds the event of a blob. `size`: in bytes; 0 if it is not known."""
    add(db, NewEvent(action, repo, now, by, digest=digest, media_type=BLOB_TYPE, size=size))


def add_deleted_tag(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, tag: str, digest: str | None, by: Actor, now: float
) -> None:
    """Adds the event of a deleted tag, which pointed at `digest`."""
    add(db, NewEvent(action, repo, now, by, tag, digest))


def add_deleted_tags(
    db: apsw.Connection,
    action: EventAction,
    repo: RepositoryName,
    manifest_id: int,
    tags: Sequence[str],
    by: Actor,
    now: float,
) -> None:
    """Adds the events of tags that are deleted because their manifest is about to be deleted."""
    if not is_wanted(db, action, repo):
        return
    digest, media_type, size = _digest_type_and_size(db, manifest_id)
    for tag in tags:
        add(db, NewEvent(action, repo, now, by, tag, digest, media_type=media_type, size=size))


def add_deleted_manifest(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, manifest_id: int, by: Actor, now: float
) -> None:
    """Adds the event of a manifest that is about to be deleted. The caller has added the events of its tags
    (`add_deleted_tags`)."""
    if is_wanted(db, action, repo):
        digest, media_type, size = _digest_type_and_size(db, manifest_id)
        add(db, NewEvent(action, repo, now, by, digest=digest, media_type=media_type, size=size))


def _digest_type_and_size(db: apsw.Connection, manifest_id: int) -> tuple[str, str, int]:
    """Returns the digest, media type and size of a manifest."""
    row: Any = db.execute("SELECT digest, media_type, size FROM manifest WHERE id = ?", (manifest_id,)).get
    digest, media_type, size = row
    return digest, media_type, size


def configure(db: apsw.Connection, readers: Sequence[EventReader]) -> Set[str] | None:
    """Replaces the readers. Returns the names of the readers that it removes.

    The deliveries of a removed webhook stay in the database as its *leftovers*
    (`storage.metadata.sqlite.upkeep.removed_webhooks`). If a new webhook has the name of a removed webhook that still
    has leftovers, this function changes nothing and returns None. The caller then deletes the leftovers and calls this
    function again.

    The list of events misses the events that were added while it was not a reader. When it becomes a reader, it is
    complete only from the next event on (column `kept_from`)."""
    former_names = {name for name, _ in _readers(db)}
    names = [reader.name for reader in readers]
    if removed_webhooks.has_deliveries(db, set(names) - former_names):
        return None
    if LIST_READER in names and LIST_READER not in former_names:
        db.execute("UPDATE event_list SET kept_from = (SELECT coalesce(max(id), 0) + 1 FROM event)")
    db.execute("DELETE FROM event_reader")
    db.executemany("INSERT INTO event_reader (name, actions, repositories) VALUES (?, ?, ?)", map(reader_row, readers))
    return former_names - set(names)


def reader_row(reader: EventReader) -> tuple[str, str, str]:
    """Returns the row of a reader in the table `event_reader`."""
    return reader.name, json.dumps(sorted(reader.actions)), json.dumps(list(reader.repositories))


def _readers(db: apsw.Connection) -> list[tuple[str, _Filter]]:
    """Returns the name and the filter of each reader."""
    rows: list[Any] = db.execute("SELECT name, actions, repositories FROM event_reader").fetchall()
    return [(name, _filter(actions, repositories)) for name, actions, repositories in rows]


@lru_cache(maxsize=256)
def _filter(actions: str, repositories: str) -> _Filter:
    """Returns the filter of a reader with these columns."""
    return _Filter(frozenset(json.loads(actions)), Matcher(tuple(json.loads(repositories))))


def _wants(reader_filter: _Filter, event: NewEvent) -> bool:
    # A push that moves a tag counts as a move as well.
    is_move = event.action is EventAction.PUSH and event.previous is not None
    if event.action not in reader_filter.actions and not (is_move and EventAction.MOVE in reader_filter.actions):
        return False
    return reader_filter.repositories.matches(event.repository)


def to_event(row: Sequence[Any]) -> Event:
    """Returns the event of a row with the columns `EVENT_COLUMNS`."""
    number, event_uuid, at, action, repository, tag, digest, previous, media_type, size, *origin_columns = row
    actor, address, request_id, user_agent, reason = origin_columns
    by = Actor(actor, address, request_id, user_agent)
    # `NewEvent` is the content of an event without its number (the column `id`) and its UUID.
    content = NewEvent(EventAction(action), repository, at, by, tag, digest, previous, media_type, size, reason)
    return Event(number, event_uuid, content)


def to_delivery(row: Sequence[Any]) -> Delivery:
    """Returns the delivery of a row with the columns `DELIVERY_COLUMNS`."""
    webhook, attempts, next_at, dead, error, *event = row
    return Delivery(webhook, to_event(event), attempts, next_at, dead, error)

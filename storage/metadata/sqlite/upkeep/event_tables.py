"""Adds events to the metadata database, and turns rows into events and deliveries. An event is added in the same
transaction as the change that it describes.

A *reader* is a webhook, or the list of events that this registry keeps. A *delivery* is a row for an event that a
webhook has not received yet. A function that adds an event adds nothing if no reader wants the event.

Each function with a parameter `db` runs inside a transaction, which the caller commits. `by` is the client for which
the change is made, and `now` is the time in seconds since 1970.
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
"""The columns of the table `event`, for a query that gives this table the alias `e`. `previous`: the digest that the
tag pointed at before it moved."""
DELIVERY_COLUMNS: Final = f"d.webhook, d.attempts, d.next_at, d.dead, d.error, {EVENT_COLUMNS}"
"""The columns of a delivery and of its event, for a query that gives the table `event_delivery` the alias `d`.
`next_at`: the time of the next attempt. `dead`: the time at which the server gave up; NULL if it has not given up."""


class _Filter(NamedTuple):
    """The filter of a reader, which wants the events with one of these actions in one of these repositories."""

    actions: frozenset[str]
    repositories: Matcher


def add_event(db: apsw.Connection, event: NewEvent) -> None:
    """Adds an event, and a delivery for each webhook that wants the event."""
    readers = [name for name, reader_filter in _reader_filters(db) if _wants(reader_filter, event)]
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
    """Returns whether a reader wants events with this action in the repository. `action` must not be
    `EventAction.PUSH`. A reader of moves also wants a push that moves a tag, and this function does not know whether a
    push moves a tag."""
    return any(
        action in reader_filter.actions and reader_filter.repositories.matches(repo)
        for _, reader_filter in _reader_filters(db)
    )


def add_manifest_event(
    db: apsw.Connection,
    action: EventAction,
    repo: RepositoryName,
    manifest: Manifest,
    tag: Tag | None,
    previous: Digest | None,
    by: Actor,
    now: float,
) -> None:
    """Adds the event of a manifest that was stored, or of a tag that was pointed at a manifest. `tag`: the tag; None if
    the event is about the manifest only. `previous`: the digest that the tag pointed at before; None if the tag is new
    or `tag` is None."""
    moved_from = None if previous == manifest.digest else previous
    size = len(manifest.body)
    add_event(db, NewEvent(action, repo, now, by, tag, manifest.digest, moved_from, manifest.media_type, size))


def add_blob_event(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, digest: Digest, size: int, by: Actor, now: float
) -> None:
    """Adds the event of a blob. `size`: in bytes; 0 if it is not known."""
    add_event(db, NewEvent(action, repo, now, by, digest=digest, media_type=BLOB_TYPE, size=size))


def add_tag_deletion(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, tag: str, digest: str | None, by: Actor, now: float
) -> None:
    """Adds the event of a deleted tag. `digest`: the digest that the tag pointed at."""
    add_event(db, NewEvent(action, repo, now, by, tag, digest))


def add_deletions_of_all_tags(
    db: apsw.Connection,
    action: EventAction,
    repo: RepositoryName,
    manifest_id: int,
    tags: Sequence[str],
    by: Actor,
    now: float,
) -> None:
    """Adds an event for each of `tags`, the tags of a manifest that is about to be deleted."""
    if not is_wanted(db, action, repo):
        return
    digest, media_type, size = _digest_type_and_size(db, manifest_id)
    for tag in tags:
        add_event(db, NewEvent(action, repo, now, by, tag, digest, media_type=media_type, size=size))


def add_manifest_deletion(
    db: apsw.Connection, action: EventAction, repo: RepositoryName, manifest_id: int, by: Actor, now: float
) -> None:
    """Adds the event of a manifest that is about to be deleted. Does not add the events of its tags."""
    if is_wanted(db, action, repo):
        digest, media_type, size = _digest_type_and_size(db, manifest_id)
        add_event(db, NewEvent(action, repo, now, by, digest=digest, media_type=media_type, size=size))


def _digest_type_and_size(db: apsw.Connection, manifest_id: int) -> tuple[str, str, int]:
    """Returns the digest, media type and size of a manifest."""
    row: Any = db.execute("SELECT digest, media_type, size FROM manifest WHERE id = ?", (manifest_id,)).get
    digest, media_type, size = row
    return digest, media_type, size


def replace_readers(db: apsw.Connection, readers: Sequence[EventReader]) -> Set[str] | None:
    """Replaces the readers. Returns the names of the removed readers.

    The deliveries of a removed webhook stay in the database as its *leftovers*
    (`storage.metadata.sqlite.upkeep.removed_webhooks`). If a new webhook has the name of a removed webhook that still
    has leftovers, this function changes nothing and returns None. The caller then deletes the leftovers and calls this
    function again.

    If the list of events was not a reader before and is one now, sets the column `kept_from` of the table `event_list`
    to the id of the next event. The list of events is complete from this id on."""
    former_names = {name for name, _ in _reader_filters(db)}
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


def _reader_filters(db: apsw.Connection) -> list[tuple[str, _Filter]]:
    """Returns the name and the filter of each reader."""
    rows: list[Any] = db.execute("SELECT name, actions, repositories FROM event_reader").fetchall()
    return [(name, _parse_filter(actions, repositories)) for name, actions, repositories in rows]


@lru_cache(maxsize=256)
def _parse_filter(actions: str, repositories: str) -> _Filter:
    """Returns the filter that these two columns of the table `event_reader` contain as JSON."""
    return _Filter(frozenset(json.loads(actions)), Matcher(tuple(json.loads(repositories))))


def _wants(reader_filter: _Filter, event: NewEvent) -> bool:
    # A push that moves a tag also counts as a move.
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

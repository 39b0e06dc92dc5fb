"""The outbox stores events of changes for the event list and for webhooks. The events of a change are added in the
transaction of the change. Each webhook gets the events of a repository in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import BLOB_TYPE, Actor, Condition, digest_of
from storage.data_dir.system import System
from storage.errors import Denied, PreconditionFailed, StorageFull
from storage.metadata.sqlite.upkeep import sqlite_outbox
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import (
    CHANGE_ACTIONS,
    LIST_READER,
    DeliveryPosition,
    DroppedDeliveries,
    EventAction,
    EventLimits,
    EventPage,
    EventReader,
    FailedDelivery,
    NewEvent,
    WebhookBacklog,
)
from storage.retention import UnusedSince
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.registry_content import BY, index_of, manifest_from, push_image
from tests.fakes.scrub_runs import scrub
from tests.fakes.second_connection import second_connection
from tests.fakes.upkeep_store import APP, Clock, clocked_store
from tests.unit.storage.upkeep.test_damaged_manifests import change_body

HOOK = "hook"
OTHER = RepositoryName("team/other")
ALL_REPOSITORIES = ("**",)
NO_LIMITS = EventLimits(keep_since=0.0, events=10**9, pending=10**9, dead=10**9, now=1e12)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    """A store whose events are for a list and for a webhook."""
    async with clocked_store(tmp_path, clock) as opened:
        await opened.outbox.configure([reader(LIST_READER), reader(HOOK)])
        yield opened


def reader(name: str, actions: frozenset[EventAction] = frozenset(EventAction), *patterns: str) -> EventReader:
    return EventReader(name, actions, patterns or ALL_REPOSITORIES)


async def recorded_events(store: StoredRegistry) -> list[tuple[str, str | None, str | None, str | None]]:
    """Returns the action, tag, digest and previous digest of all events, oldest first."""
    events = [event.content for event in (await store.outbox.after(0, 1000)).events]
    return [(str(event.action), event.tag, event.digest, event.previous) for event in events]


async def due_events(store: StoredRegistry, webhook: str = HOOK, now: float = 0.0) -> list[list[int]]:
    """Returns the numbers of the events that are due for a webhook, with one list for each repository."""
    due = await store.outbox.due(webhook, now, 100, 100)
    return [[delivery.event.number for delivery in queue] for queue in due.queues]


async def push_index(store: StoredRegistry, seed: str, *tags: str, repo: RepositoryName = APP) -> Digest:
    index = index_of([], annotations={"seed": seed})
    await store.put_manifest(repo, index, [Tag(tag) for tag in tags], by=BY)
    return index.digest


async def test_events_of_pushes(store: StoredRegistry) -> None:
    """A push adds one event for each of its tags, or one event if it has no tag, even if the push changes nothing. The
    event of a tag that moves has the previous digest."""
    first = await push_index(store, "first")
    await push_index(store, "first", "v1", "v2")
    await push_index(store, "first", "v1")
    second = await push_index(store, "second", "v1")
    assert await recorded_events(store) == [
        ("push", None, first, None),
        ("push", "v1", first, None),
        ("push", "v2", first, None),
        ("push", "v1", first, None),
        ("push", "v1", second, first),
    ]
    event = (await store.outbox.after(0, 1)).events[0].content
    assert (event.by, event.repository, event.media_type) == (BY, APP, "application/vnd.oci.image.index.v1+json")
    assert event.size > 0


async def test_a_change_that_fails_has_no_event(store: StoredRegistry) -> None:
    """A push whose condition is not met adds no event, and neither does the refused delete of an immutable tag."""
    await push_index(store, "first", "v1")
    index = index_of([], annotations={"seed": "second"})
    with pytest.raises(PreconditionFailed):
        await store.put_manifest(APP, index, [Tag("v1")], by=BY, condition=Condition(negated=True))
    with pytest.raises(Denied):
        await store.metadata.delete_tag(APP, Tag("v1"), BY, lambda _: True)
    assert len(await recorded_events(store)) == 1


async def test_events_of_deletes_and_moves(store: StoredRegistry) -> None:
    """When a manifest is deleted, each of its tags has a delete event before the delete event of the manifest. If a tag
    is moved back to a deleted manifest, which is thereby restored, the event is a move. A move to the same digest adds
    no event."""
    first = await push_index(store, "first", "v1", "v2")
    second = await push_index(store, "second", "v1")
    await store.delete_manifest(APP, second, by=BY)
    await TagChanger(store.tag_history, ImmutableTags()).move(APP, Tag("v1"), second, by=BY)
    await TagChanger(store.tag_history, ImmutableTags()).move(APP, Tag("v2"), second, by=BY)
    await TagChanger(store.tag_history, ImmutableTags()).move(APP, Tag("v2"), second, by=BY)
    await store.delete_tag(APP, Tag("v2"), by=BY)
    assert (await recorded_events(store))[3:] == [
        ("delete", "v1", second, None),
        ("delete", None, second, None),
        ("move", "v1", second, None),
        ("move", "v2", second, first),
        ("delete", "v2", second, None),
    ]


async def test_events_of_deletes_by_retention(store: StoredRegistry, clock: Clock) -> None:
    """The events of tags and manifests that retention deletes have the action `retention`."""
    first = await push_index(store, "first", "v1")
    (tag_facts,) = await store.retention.tag_facts(APP, None)
    clock.pass_days(1)
    assert await store.retention.delete_tag(APP, tag_facts, BY)
    now = clock.now
    assert await store.retention.delete_unused_orphan(APP, first, UnusedSince(now, now, now), now, BY) is not None
    assert (await recorded_events(store))[1:] == [("retention", "v1", first, None), ("retention", None, first, None)]


async def test_an_event_of_damage_has_the_reason(store: StoredRegistry) -> None:
    """When a scrub finds damaged content, it adds an event with the reason."""
    image = await push_image(store, APP, "image", "v1")
    change_body(store, image.digest, image.body.replace(b"layer", b"lawyer"))
    await scrub(store)
    event = (await store.outbox.after(0, 100)).events[-1].content
    assert (event.action, event.repository, event.digest) == (EventAction.QUARANTINE, APP, image.digest)
    assert event.reason.startswith("its stored body has the digest sha256:")


async def test_events_of_content_that_a_mirror_stores(store: StoredRegistry) -> None:
    """The event of a manifest or blob that a mirror stores has the action `fill`, not `push`."""
    repo = RepositoryName("hub.test/app")
    manifest = manifest_from({"schemaVersion": 2, "manifests": []}, "application/vnd.oci.image.index.v1+json")
    await store.put_manifest(repo, manifest, [Tag("v1")], by=Actor("mirror"), sparse=True)
    blob = digest_of(b"blob")
    await store.metadata.add_blob_without_upload(repo, blob, 4, "place", is_fill=True)
    await store.metadata.add_blob_without_upload(repo, digest_of(b"imported"), 8, "place")
    assert await recorded_events(store) == [("fill", "v1", manifest.digest, None), ("fill", None, blob, None)]


async def test_a_webhook_gets_only_events_that_match_its_settings(store: StoredRegistry) -> None:
    """A webhook gets only events with the actions and repositories of its settings. A push that moves a tag also counts
    as a move. An event that matches no webhook and not the list is not stored."""
    moves = EventReader("moves", frozenset({EventAction.MOVE}), ("team/app*",))
    pushes = EventReader("pushes", frozenset({EventAction.PUSH}), ("team/other",))
    await store.outbox.configure([moves, pushes])
    await push_index(store, "first", "v1")
    await push_index(store, "second", "v1")
    await push_index(store, "first", "v1", repo=OTHER)
    await push_index(store, "first", "v1", repo=RepositoryName("alone"))
    assert await store.outbox.newest_number() == 2
    assert (await due_events(store, "moves"), await due_events(store, "pushes")) == ([[1]], [[2]])


async def test_the_list_has_only_events_that_match_its_settings(
    store: StoredRegistry, tmp_path: Path, clock: Clock
) -> None:
    """An event that matches only a webhook is not in the event list, and does not count for the size of the list. It is
    deleted after it was delivered to the webhook."""
    deletes = frozenset({EventAction.DELETE})
    await store.outbox.configure([reader(LIST_READER, deletes), reader(HOOK)])
    for number in range(3):
        await push_index(store, f"{number}", "v1")
        await store.delete_tag(APP, Tag("v1"), by=BY)
    listed = [event.number for event in (await store.outbox.after(0, 100)).events]
    assert listed == [2, 4, 6]
    assert [event.number for event in (await store.outbox.before(None, 100)).events] == [6, 4, 2]
    limits = EventLimits(clock.now, 2, 100, 100, clock.now)
    await store.outbox.tidy(limits)
    assert [event.number for event in (await store.outbox.after(0, 100)).events] == [4, 6]
    assert (await due_events(store), await store.outbox.first_complete_number()) == ([[1, 2, 3, 4, 5, 6]], 3)
    await store.outbox.settle(HOOK, [1, 2, 3, 5], [])
    await store.outbox.tidy(limits)
    assert stored_numbers(tmp_path) == [4, 6]
    assert await store.outbox.first_complete_number() == 3  # the list has lost no event after event 2


async def test_a_look_up_reads_a_limited_number_of_events(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up of events with an action or a repository reads a limited number of events, even if none of them
    matches. It returns where the next look-up continues. A later look-up finds the events further away."""
    monkeypatch.setattr(sqlite_outbox, "MAX_READ_EVENTS", 10)
    repositories = ["rare/app", *["team/app"] * 30, "rare/app"]
    await store.outbox.add([NewEvent(EventAction.PULL, name, 1.0, BY) for name in repositories])
    found, pages = list[int](), list[tuple[int, bool]]()
    for read, position in ((store.outbox.after, 0), (store.outbox.before, 33)):
        is_last = False
        while not is_last:
            page = await read(position, 2, repository="rare/app")
            position, is_last = page.position, page.is_last
            found += [event.number for event in page.events]
            pages.append((position, is_last))
    assert found == [1, 32, 32, 1]
    assert pages[:4] == [(10, False), (20, False), (30, False), (32, True)]
    assert pages[4:] == [(23, False), (13, False), (3, False), (1, True)]
    assert await store.outbox.before(None, 32) == replace(await store.outbox.before(33, 40), position=1)
    assert not (await store.outbox.before(None, 31)).is_last


async def test_a_list_that_is_enabled_again_begins_with_the_next_event(store: StoredRegistry, clock: Clock) -> None:
    """If the event list was disabled for a while, the events of this time are missing. `first_complete_number` returns
    the number of the first event after the gap."""
    await push_index(store, "first", "v1")
    await store.outbox.configure([reader(HOOK)])
    await push_index(store, "second", "v1")
    await store.outbox.configure([reader(LIST_READER), reader(HOOK)])
    await push_index(store, "third", "v1")
    assert await store.outbox.first_complete_number() == 3
    assert [event.number for event in (await store.outbox.after(1, 100)).events] == [3]


async def test_events_of_blobs_name_the_client(store: StoredRegistry) -> None:
    """A push, a mount and a delete of a blob add events that name the client, whether or not a manifest refers to the
    blob."""
    image = await push_image(store, APP, "image", "v1")
    layer = image.blobs[1].digest
    await store.mount_blob(OTHER, layer, APP, BY)
    await store.delete_blob(OTHER, layer, by=BY)
    events = [event.content for event in (await store.outbox.after(0, 100)).events]
    pushed = [event for event in events if event.action is EventAction.BLOB_PUSH]
    assert [event.digest for event in pushed] == [blob.digest for blob in image.blobs]
    assert [(event.size, event.repository) for event in pushed] == [(blob.size, APP) for blob in image.blobs]
    assert [(event.action, event.repository, event.digest, event.by, event.media_type) for event in events[-2:]] == [
        (EventAction.BLOB_MOUNT, OTHER, layer, BY, BLOB_TYPE),
        (EventAction.BLOB_DELETE, OTHER, layer, BY, BLOB_TYPE),
    ]


async def test_event_of_a_blob_names_the_client_that_completed_the_upload(store: StoredRegistry) -> None:
    """The event of a pushed blob names the client that completed the upload."""
    writer = await store.start_upload(APP, by=BY)
    await writer.write(b"half")
    await writer.aclose()
    completing_client = Actor(BY.name, "192.0.2.9", "request", "other client")
    writer = await store.resume_upload(APP, writer.id, by=completing_client)
    await writer.write(b"whole")
    await writer.commit(digest_of(b"halfwhole"))
    await writer.aclose()
    (event,) = (await store.outbox.after(0, 100)).events
    assert (event.content.action, event.content.by, event.content.size) == (EventAction.BLOB_PUSH, completing_client, 9)


async def test_deliveries_of_a_removed_webhook_are_deleted(store: StoredRegistry) -> None:
    """The deliveries of a webhook that is no longer in the settings are deleted. If the same list and webhooks are
    configured again, nothing is written."""
    await push_index(store, "first", "v1")
    dropped = await store.outbox.configure([reader(LIST_READER), reader("new")])
    assert dropped == [DroppedDeliveries(HOOK, 1, 0)]
    assert await due_events(store) == []
    version = store.metadata.version()
    await store.outbox.configure([reader("new"), reader(LIST_READER)])
    assert store.metadata.version() == version


async def test_no_events_without_list_and_webhooks(tmp_path: Path, clock: Clock) -> None:
    """If neither the event list nor a webhook is configured, no event is stored."""
    async with clocked_store(tmp_path, clock) as store:
        await push_index(store, "first", "v1")
        assert await recorded_events(store) == []


async def test_events_of_a_repository_are_delivered_in_order(store: StoredRegistry) -> None:
    """If the delivery of an event has failed, later events of the same repository wait until its next attempt. Events
    of other repositories do not wait. After the event has become a dead letter (its delivery was given up), no event
    waits for it."""
    for number in range(3):
        await push_index(store, f"{number}", "v1")
        await push_index(store, f"{number}", "v1", repo=OTHER)
    assert await due_events(store) == [[1, 3, 5], [2, 4, 6]]
    await store.outbox.settle(HOOK, [2], [FailedDelivery(1, 1, 100.0, None, "it answered 500")])
    assert await due_events(store) == [[4, 6]]
    assert (await store.outbox.due(HOOK, 0.0, 100, 100)).next_at == 100.0
    assert await due_events(store, now=100.0) == [[1, 3, 5], [4, 6]]
    await store.outbox.settle(HOOK, [], [FailedDelivery(1, 2, 100.0, 50.0, "it answered 500")])
    assert await due_events(store) == [[3, 5], [4, 6]]
    third = (await store.outbox.after(2, 1)).events[0]
    assert await store.outbox.backlog() == [WebhookBacklog(HOOK, 4, 1, third.content.at)]


async def test_dead_letters_are_listed_and_retried(store: StoredRegistry) -> None:
    """Dead letters (deliveries that were given up) are listed, the newest event first. One of them, or all of a
    webhook, can be retried."""
    for number in range(3):
        await push_index(store, f"{number}", "v1")
    dead_letters = [FailedDelivery(number, 10, 0.0, 50.0, "no") for number in (1, 2, 3)]
    await store.outbox.settle(HOOK, [], dead_letters)
    listed = await store.outbox.deliveries(None, None, 10, only_dead=True)
    assert [(delivery.event.number, delivery.dead, delivery.error) for delivery in listed] == [
        *((3, 50.0, "no"), (2, 50.0, "no"), (1, 50.0, "no")),
    ]
    after_third = DeliveryPosition(3, HOOK)
    assert [d.event.number for d in await store.outbox.deliveries(HOOK, after_third, 1, only_dead=True)] == [2]
    await push_index(store, "4", "v1")
    await push_index(store, "5", "v1")
    await store.outbox.settle(HOOK, [], [FailedDelivery(5, 10, 0.0, 50.0, "no")])
    pending = await store.outbox.deliveries(HOOK, None, 1, only_dead=False, only_pending=True)
    assert [delivery.event.number for delivery in pending] == [4]
    await store.outbox.settle(HOOK, [4, 5], [])
    assert await store.outbox.retry("other", None) == 0
    assert await store.outbox.retry(None, 2) == 1
    assert await due_events(store) == [[2]]
    assert await store.outbox.retry(HOOK, None) == 2
    assert await due_events(store) == [[1, 2, 3]]


def stored_numbers(folder: Path) -> list[int]:
    """Returns the numbers of all events in the database, whether or not they are in the list."""
    db = second_connection(folder / "entrepot.db", read_only=True)
    rows: list[Any] = db.execute("SELECT id FROM event ORDER BY id").fetchall()
    db.close()
    return [number for (number,) in rows]


async def test_old_and_excess_events_are_deleted(store: StoredRegistry, clock: Clock, tmp_path: Path) -> None:
    """Old events are deleted, except events that still have to be delivered to a webhook. If there are too many
    deliveries or dead letters, the oldest are deleted. The newest event stays in the database, so that its number is
    never used again."""
    for number in range(6):
        await push_index(store, f"{number}", "v1")
    await store.outbox.settle(HOOK, [1, 2], [FailedDelivery(number, 1, 0.0, 50.0, "no") for number in (3, 4)])
    assert await store.outbox.tidy(NO_LIMITS) == []
    limits = EventLimits(keep_since=clock.now + 1, events=100, pending=1, dead=1, now=clock.now)
    (dropped,) = await store.outbox.tidy(limits)
    assert (dropped.webhook, dropped.pending, dropped.dead) == (HOOK, 1, 1)
    assert stored_numbers(tmp_path) == [4, 6]
    assert await store.outbox.after(0, 10) == EventPage([], 0, is_last=True)
    assert await store.outbox.first_complete_number() == 7
    assert [d.event.number for d in await store.outbox.deliveries(HOOK, None, 10, only_dead=False)] == [6, 4]
    await store.outbox.settle(HOOK, [4, 6], [])
    assert await store.outbox.tidy(limits) == []
    assert (stored_numbers(tmp_path), await store.outbox.newest_number()) == ([6], 6)
    await push_index(store, "more", "v1")
    assert await store.outbox.newest_number() == 7


async def test_events_from_the_future_keep_no_old_ones(store: StoredRegistry, clock: Clock) -> None:
    """An event was stored while the clock was ahead. It is deleted together with the old events after it. Younger
    events stay."""
    for number, seconds in enumerate((0, 10**8, 10, 20)):
        started = clock.now
        clock.now += seconds
        await push_index(store, f"{number}", "v1")
        clock.now = started
    await store.outbox.settle(HOOK, [1, 2, 3, 4], [])
    await store.outbox.tidy(EventLimits(clock.now + 15, 100, 10, 10, clock.now))
    assert [event.number for event in (await store.outbox.after(0, 10)).events] == [4]


async def test_an_event_from_the_past_deletes_no_young_ones(store: StoredRegistry, clock: Clock) -> None:
    """An event was stored while the clock was far behind. The younger events before it stay in the list."""
    await push_index(store, "young", "v1")
    started = clock.now
    clock.now = 5.0
    await push_index(store, "from the past", "v1")
    clock.now = started
    await store.outbox.settle(HOOK, [1, 2], [])
    await store.outbox.tidy(EventLimits(clock.now - 10, 100, 10, 10, clock.now))
    assert [event.number for event in (await store.outbox.after(0, 10)).events] == [1, 2]


async def test_the_number_of_kept_events(store: StoredRegistry) -> None:
    """If there are more events than may be kept, the oldest are deleted."""
    await store.outbox.configure([reader(LIST_READER)])
    for number in range(5):
        await push_index(store, f"{number}", "v1")
    await store.outbox.tidy(EventLimits(0.0, 2, 10, 10, 1e12))
    assert [event.number for event in (await store.outbox.after(0, 10)).events] == [4, 5]
    assert await store.outbox.first_complete_number() == 4
    assert [event.number for event in (await store.outbox.before(None, 1)).events] == [5]
    assert (await store.outbox.before(5, 10, action=EventAction.DELETE)).events == []
    assert [event.number for event in (await store.outbox.before(5, 10, repository=APP)).events] == [4]


class FullDisk(System):
    """A disk without space for any commit while `is_full` is true."""

    is_full = False
    refused = 0
    """The number of commits that have failed."""

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        if self.is_full:
            self.refused += 1
            raise apsw.FullError
        super().commit(commit, durable=durable)


async def test_a_full_disk(tmp_path: Path, clock: Clock) -> None:
    """If there is no space for the event of a push, the whole push fails: neither its tag nor its event is stored."""
    prepare_data_dir(tmp_path)
    system = FullDisk()
    async with open_registry(tmp_path, clock=clock, system=system) as store:
        await store.outbox.configure([reader(LIST_READER)])
        await push_index(store, "first", "v1")
        system.is_full = True
        with pytest.raises(StorageFull):
            await push_index(store, "second", "v2")
        with pytest.raises(StorageFull):
            await store.outbox.add([NewEvent(EventAction.PULL, APP, clock.now, BY)])
        system.is_full = False
        assert len(await recorded_events(store)) == 1
        assert list((await store.tags(APP, None, 10)).items) == ["v1"]


async def test_a_backup_has_no_events(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup of the database has no deliveries, no readers, and no events in the list. So a restored registry stores
    no events until its server has read its settings. Only the row of the newest event stays, for its number."""
    await push_index(store, "first", "v1")
    copy = tmp_path / "copy.db"
    await store.snapshots.write(copy, lambda _done, _total: None)
    db: Any = second_connection(copy, read_only=True)
    for table in ("event_delivery", "event_reader"):
        assert db.execute(f"SELECT count(*) FROM {table}").get == 0
    assert db.execute("SELECT id, kept FROM event").fetchall() == [(await store.outbox.newest_number(), 0)]
    db.close()


def test_default_actions_of_a_webhook() -> None:
    """By default, a webhook gets no events of pulls, of fills (content that a mirror stores), and of blobs."""
    others = {EventAction.PULL, EventAction.FILL}
    blobs = {EventAction.BLOB_PUSH, EventAction.BLOB_MOUNT, EventAction.BLOB_DELETE}
    assert frozenset(EventAction) - CHANGE_ACTIONS == others | blobs

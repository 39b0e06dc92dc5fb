"""The deliveries of a webhook that is removed from the settings. They are dropped at once, and deleted in portions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.metadata.sqlite.upkeep import outbox_limits
from storage.names import RepositoryName
from storage.outbox import (
    LIST_READER,
    DroppedDeliveries,
    EventAction,
    EventLimits,
    EventReader,
    FailedDelivery,
    NewEvent,
    WebhookBacklog,
)
from storage.store.stored_registry import StoredRegistry
from tests.fakes.blob_files import layout_behind
from tests.fakes.registry_content import BY
from tests.fakes.second_connection import second_connection

HOOK, OTHER = "hook", "other"
APP = RepositoryName("team/app")
NO_LIMITS = EventLimits(keep_since=0.0, events=10**9, pending=10**9, dead=10**9, now=1e12)
EVENTS = 35
PORTION = 10


class CountedCommits(System):
    """A system that counts the commits. Each of them sets `has_committed`, and then waits for `may_continue`."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = 0
        self.has_committed = threading.Event()
        self.may_continue = threading.Event()
        self.may_continue.set()

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        super().commit(commit, durable=durable)
        self.commits += 1
        self.has_committed.set()
        self.may_continue.wait(60)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> CountedCommits:
    monkeypatch.setattr(outbox_limits, "MAX_DELETED_DELIVERIES", PORTION)
    return CountedCommits()


@pytest.fixture
async def store(tmp_path: Path, system: CountedCommits) -> AsyncIterator[StoredRegistry]:
    """A store with `EVENTS` events that wait for the webhooks `HOOK` and `OTHER`. The first is a dead letter of
    both."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, system=system) as opened:
        await opened.outbox.configure(readers(HOOK, OTHER))
        await opened.outbox.add([NewEvent(EventAction.PUSH, APP, 1.0, BY, tag="v1")] * EVENTS)
        for webhook in (HOOK, OTHER):
            await opened.outbox.settle(webhook, [], [FailedDelivery(1, 1, 0.0, 50.0, "no")])
        yield opened


def readers(*names: str) -> list[EventReader]:
    return [EventReader(name, frozenset(EventAction), ("**",)) for name in names]


def rows(store: StoredRegistry, table: str, where: str = "1") -> int:
    """Returns the number of rows in a table of the database."""
    db = second_connection(layout_behind(store).metadata, read_only=True)
    count = int(db.execute(f"SELECT count(*) FROM {table} WHERE {where}").get)
    db.close()
    return count


async def due_events(store: StoredRegistry, webhook: str) -> list[int]:
    """Returns the numbers of the events that are due for a webhook."""
    due = await store.outbox.due(webhook, 0.0, 100, 100)
    return [delivery.event.number for queue in due.queues for delivery in queue]


async def test_no_method_finds_the_deliveries_of_a_removed_webhook(
    store: StoredRegistry, system: CountedCommits
) -> None:
    """Once a webhook is removed, none of its deliveries is due, listed, retried or counted, although their rows are
    still stored. The removal is one commit, however many deliveries there are. Other webhooks keep theirs."""
    commits = system.commits
    assert await store.outbox.configure(readers(OTHER)) == [DroppedDeliveries(HOOK, EVENTS - 1, 1)]
    assert system.commits == commits + 1
    assert rows(store, "event_delivery", f"webhook = '{HOOK}'") == EVENTS
    assert await due_events(store, HOOK) == []
    for webhook, count in ((HOOK, 0), (None, EVENTS)):
        assert len(await store.outbox.deliveries(webhook, None, 100, only_dead=False)) == count
        assert len(await store.outbox.deliveries(webhook, None, 100, only_dead=True)) == (count > 0)
    assert await store.outbox.backlog() == [WebhookBacklog(OTHER, EVENTS - 1, 1, 1.0)]
    assert await store.outbox.retry(HOOK, None) == 0
    assert await store.outbox.retry(None, None) == 1
    assert await due_events(store, OTHER) == list(range(1, EVENTS + 1))


async def test_one_process_reports_the_removal(store: StoredRegistry) -> None:
    """If the workers of a server remove a webhook at the same moment, after a reload, only one of them reports its
    deliveries."""
    root = layout_behind(store).root
    async with open_registry(root) as other:
        reports = await asyncio.gather(*(each.outbox.configure(readers(OTHER)) for each in (store, other)))
    assert sorted(map(len, reports)) == [0, 1]


async def test_tidying_without_leftovers_writes_nothing(store: StoredRegistry, system: CountedCommits) -> None:
    """If no webhook was removed and no limit is reached, tidying makes no commit. So it works on a full disk."""
    commits = system.commits
    assert await store.outbox.tidy(NO_LIMITS) == []
    assert system.commits == commits


async def test_the_deliveries_are_deleted_in_portions(store: StoredRegistry, system: CountedCommits) -> None:
    """The next tidying deletes the deliveries of a removed webhook, a limited number in each commit, and then the
    events for which nobody waits. It does not report them as dropped because of a limit. The newest event stays, so
    that its number is never used again."""
    await store.outbox.configure(readers())
    commits = system.commits
    assert await store.outbox.tidy(EventLimits(keep_since=0.0, events=0, pending=0, dead=0, now=1e12)) == []
    assert system.commits >= commits + 2 * EVENTS // PORTION
    assert (rows(store, "event_delivery"), rows(store, "event")) == (0, 1)


async def test_an_interrupted_deletion_is_continued(store: StoredRegistry, system: CountedCommits) -> None:
    """If the process ends before all deliveries of a removed webhook are deleted, the next tidying deletes the rest,
    also if the same webhooks are configured again after a restart."""
    await store.outbox.configure(readers(LIST_READER))
    system.has_committed.clear()
    system.may_continue.clear()
    tidying = asyncio.create_task(store.outbox.tidy(NO_LIMITS))
    await asyncio.to_thread(system.has_committed.wait, 60)
    tidying.cancel()
    system.may_continue.set()
    with pytest.raises(asyncio.CancelledError):
        await tidying
    assert 0 < rows(store, "event_delivery") < 2 * EVENTS
    assert await store.outbox.configure(readers(LIST_READER)) == []
    assert await store.outbox.tidy(NO_LIMITS) == []
    assert rows(store, "event_delivery") == 0


async def test_a_webhook_that_is_added_again_begins_with_the_next_event(
    store: StoredRegistry, system: CountedCommits
) -> None:
    """If a removed webhook is added again before its deliveries are deleted, they are deleted first, in portions. So it
    gets only events that happen after it was added again."""
    await store.outbox.configure(readers(OTHER))
    commits = system.commits
    assert await store.outbox.configure(readers(HOOK, OTHER)) == []
    assert system.commits > commits + EVENTS // PORTION
    assert await due_events(store, HOOK) == []
    await store.outbox.add([NewEvent(EventAction.PUSH, APP, 2.0, BY, tag="v2")])
    assert await due_events(store, HOOK) == [EVENTS + 1]
    await store.outbox.tidy(NO_LIMITS)
    assert await due_events(store, HOOK) == [EVENTS + 1]
    assert len(await due_events(store, OTHER)) == EVENTS

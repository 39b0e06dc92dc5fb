"""`WebhookDispatcher` delivers events to a webhook. The tests use a store on disk and a receiver on loopback, in one
process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from registry.config.event_settings import Webhook
from registry.events import dispatcher
from registry.events.attempts import DeliveryOutcome
from registry.events.dispatcher import SenderLimit, WebhookDispatcher
from registry.events.webhook_client import WebhookClient
from storage.composition import open_registry, prepare_data_dir
from storage.metadata.sqlite.upkeep import due_deliveries, sqlite_outbox
from storage.metadata.sqlite.upkeep.due_deliveries import find_due
from storage.names import RepositoryName, Tag
from storage.outbox import Delivery, DueDeliveries, EventAction, EventReader
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, index_of
from tests.fakes.upkeep_store import START, Clock, clocked_store
from tests.fakes.webhook_receiver import WebhookReceiver, receiver_running
from tests.unit.storage.metadata.test_outbox import FullDisk

BAD = RepositoryName("team/bad")
"""The repository whose events the receiver does not accept in some tests."""


class CountingObserver:
    """A delivery observer that counts attempts by their outcome, and events that were given up."""

    def __init__(self) -> None:
        self.attempts = dict.fromkeys(DeliveryOutcome, 0)
        self.dead = 0

    def on_attempt(self, webhook: str, outcome: DeliveryOutcome) -> None:
        self.attempts[outcome] += 1

    def on_given_up(self, webhook: str) -> None:
        self.dead += 1

    def on_dropped(self, webhook: str, pending: int, dead: int) -> None:
        raise AssertionError


@pytest.fixture
def clock() -> Clock:
    """Returns a clock that the test sets."""
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    """Yields a store whose outbox, the queue of events, has the webhook `hook` for all events."""
    async with clocked_store(tmp_path, clock) as opened:
        await opened.outbox.configure([EventReader("hook", frozenset(EventAction), ("**",))])
        yield opened


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with receiver_running() as running:
        yield running


@pytest.fixture
def hanging(receiver: WebhookReceiver) -> Iterator[threading.Event]:
    """Yields a `threading.Event`. A test can make the receiver wait for it, so that a request hangs. It is set when the
    test has ended."""
    event = threading.Event()
    yield event
    event.set()


@asynccontextmanager
async def running_dispatcher(
    store: StoredRegistry,
    receiver: WebhookReceiver,
    clock: Callable[[], float],
    limit: SenderLimit | None = None,
    **settings: Any,
) -> AsyncIterator[CountingObserver]:
    """Runs a dispatcher until the end of the block, and yields its observer."""
    webhook = Webhook(name="hook", url=receiver.url, private_network=True, **settings)
    client, counts = WebhookClient(webhook, "http://registry.test"), CountingObserver()
    limit = limit or SenderLimit()
    webhook_dispatcher = WebhookDispatcher(webhook, client, store.outbox, store.metadata.version, clock, counts, limit)
    task = asyncio.create_task(webhook_dispatcher.run())
    try:
        yield counts
    finally:
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=60)
        assert ended, "the dispatcher does not end"
        await client.aclose()


async def push(store: StoredRegistry, repo: RepositoryName, tag: str) -> None:
    await store.put_manifest(repo, index_of([], annotations={"tag": tag}), [Tag(tag)], by=BY)


def subjects(receiver: WebhookReceiver) -> list[str]:
    """Returns the subjects (repository and tag) of the events that the receiver has accepted."""
    return [body["subject"] for body in receiver.accepted()]


async def wait_for(receiver: WebhookReceiver, count: int) -> None:
    """Waits until the receiver has accepted `count` events."""
    await asyncio.to_thread(receiver.wait_for, lambda: len(subjects(receiver)) >= count, f"event {count}")


async def wait_until(condition: Callable[[], Any]) -> None:
    """Waits until `condition()` is true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  `condition` depends on other tasks and threads
            await asyncio.sleep(0.02)


async def wait_until_left(store: StoredRegistry, count: int) -> Sequence[Delivery]:
    """Waits until only `count` deliveries are left in the outbox, and returns them. The dispatcher records a delivery a
    moment after it has sent the event."""
    async with asyncio.timeout(60):
        while len(pending := await store.outbox.deliveries("hook", None, 100, only_dead=False)) > count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return pending


@pytest.mark.slow
async def test_a_hanging_request_times_out_without_a_refusal(
    store: StoredRegistry, receiver: WebhookReceiver, hanging: threading.Event
) -> None:
    """While a request for one repository hangs until its timeout, the events of other repositories are delivered,
    including those that are added later. The hanging delivery stays pending and does not count as refused."""
    receiver.status = lambda body: 204 if not body["subject"].startswith(BAD) or hanging.wait(60) else 500
    started = time.monotonic()
    async with running_dispatcher(store, receiver, lambda: START + time.monotonic() - started, timeout=1):
        await push(store, BAD, "v1")
        for number in range(10):
            await push(store, RepositoryName(f"team/good{number}"), "v1")
        await wait_for(receiver, 10)
        await push(store, RepositoryName("team/good0"), "v2")
        await wait_for(receiver, 11)
        pending = await wait_until_left(store, 1)
        assert (pending[0].event.content.repository, pending[0].attempts, pending[0].dead) == (BAD, 0, None)
    assert "team/good0:v2" in subjects(receiver)


@pytest.mark.slow
async def test_a_hanging_request_delays_no_other_repository(
    store: StoredRegistry, receiver: WebhookReceiver, hanging: threading.Event, clock: Clock
) -> None:
    """While a request for one repository hangs, several events of another repository are delivered one after the other,
    and their deliveries are recorded."""
    receiver.status = lambda body: 204 if not body["subject"].startswith(BAD) or hanging.wait(150) else 500
    good = RepositoryName("team/good")
    async with running_dispatcher(store, receiver, clock, timeout=300):
        await push(store, BAD, "v1")
        for number in range(3):
            await push(store, good, f"v{number}")
            await wait_for(receiver, number + 1)
        await wait_until_left(store, 1)
    assert subjects(receiver) == [f"{good}:v{number}" for number in range(3)]


@pytest.mark.slow
async def test_an_endpoint_has_few_requests_at_a_time(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock
) -> None:
    """An endpoint gets at most as many requests at a time as the setting `connections` allows. If all webhooks together
    have too many requests, it gets one at a time."""
    running, most_running, lock = 0, 0, threading.Lock()

    def status(_: Any) -> int:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 204

    receiver.status = status
    for number in range(12):
        await push(store, RepositoryName(f"team/app{number}"), "v1")
    # Without permits: as if other webhooks had used up all permits for requests.
    async with running_dispatcher(store, receiver, clock, SenderLimit(permits=0), connections=3):
        await wait_for(receiver, 12)
    assert most_running == 1
    for number in range(12):
        await push(store, RepositoryName(f"team/app{number}"), "v2")
    async with running_dispatcher(store, receiver, clock, connections=3):
        await wait_for(receiver, 24)
    assert most_running <= 3


async def test_events_are_not_sent_twice_while_the_store_fails(
    tmp_path: Path, receiver: WebhookReceiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the store cannot write, the dispatcher cannot record its deliveries. It sends no event twice."""
    monkeypatch.setattr(dispatcher, "STORE_RETRY_SECONDS", 0.1)
    prepare_data_dir(tmp_path)
    system = FullDisk()
    async with open_registry(tmp_path, clock=clock, system=system) as store:
        await store.outbox.configure([EventReader("hook", frozenset(EventAction), ("**",))])
        await push(store, BAD, "v1")
        system.is_full = True
        async with running_dispatcher(store, receiver, clock) as counts:
            await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 1)
            refused_before = system.refused
            await wait_until(lambda: system.refused >= refused_before + 3)
            system.is_full = False
            await wait_until_left(store, 0)
    assert subjects(receiver) == [f"{BAD}:v1"]


@pytest.mark.slow
async def test_an_event_becomes_a_dead_letter_after_its_largest_age(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock
) -> None:
    """An event that could not be delivered for `max_age` becomes a dead letter (it is not tried again), even if the
    endpoint has refused no attempt."""
    receiver.status = lambda _: 503
    await push(store, BAD, "v1")
    async with running_dispatcher(store, receiver, clock, max_age=3600) as counts:
        await wait_until(lambda: counts.attempts[DeliveryOutcome.DOWN] >= 1)
        assert counts.dead == 0
        clock.now += 3600
        await wait_until(lambda: counts.dead == 1)
    # The dispatcher has ended, so it has recorded its attempts.
    (dead,) = await store.outbox.deliveries("hook", None, 10, only_dead=True)
    assert (dead.attempts, dead.error) == (0, "it answered 503")
    assert counts.attempts[DeliveryOutcome.REFUSED] == 0


async def test_delivery_continues_after_a_restart_of_the_receiver(store: StoredRegistry, clock: Clock) -> None:
    """After a restart of the receiver, the old connections are closed. The next event is still delivered."""
    async with AsyncExitStack() as stack:
        with receiver_running() as first:
            counts = await stack.enter_async_context(running_dispatcher(store, first, clock))
            await push(store, BAD, "v1")
            await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 1)  # it has the response as well
        with receiver_running(first.port) as second:
            await push(store, BAD, "v2")
            await wait_for(second, 1)
            await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 2)
    assert (subjects(first), subjects(second)) == (["team/bad:v1"], ["team/bad:v2"])


async def test_a_delivered_event_is_not_delivered_again(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock
) -> None:
    """A dispatcher records its deliveries before it stops, so that the next dispatcher does not repeat them."""
    async with running_dispatcher(store, receiver, clock) as counts:
        for number in range(20):
            await push(store, BAD, f"v{number}")
        await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 20)
    async with running_dispatcher(store, receiver, clock) as counts:
        await push(store, BAD, "last")
        await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 1)
    assert subjects(receiver) == [*(f"team/bad:v{number}" for number in range(20)), "team/bad:last"]


@pytest.mark.slow
@pytest.mark.parametrize("secret", ["missing", "empty", "unset"])
async def test_a_secret_that_cannot_be_read(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock, tmp_path: Path, secret: str
) -> None:
    """If the secret for the signature cannot be read, no event is sent. Once the secret can be read, the event is sent
    with a signature."""
    file = tmp_path / "secret"
    if secret == "empty":
        file.write_text("\n")
    settings = {"secret_env": "ENTREPOT_TEST_UNSET"} if secret == "unset" else {"secret_file": file}
    async with running_dispatcher(store, receiver, clock, **settings) as counts:
        await push(store, BAD, "v1")
        await wait_until(lambda: counts.attempts[DeliveryOutcome.DOWN] >= 1)
        assert receiver.requests == []
        if secret != "unset":
            file.write_text("now there is one\n")
            await wait_for(receiver, 1)
            assert receiver.requests[0].headers["x-hub-signature-256"].startswith("sha256=")


@pytest.mark.slow
async def test_look_ups_of_very_many_repositories_have_pauses(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If very many repositories have pending deliveries, and few of them are due, a look-up is costly. The dispatcher
    then waits before the next look-up, although the store changes in the meantime."""
    monkeypatch.setattr(due_deliveries, "MAX_FIRST_HEADS", 2)
    monkeypatch.setattr(due_deliveries, "WAIT_SECONDS_PER_HEAD", 0.1)
    receiver.status = lambda body: 400
    look_ups = list[float]()

    def find(*values: Any, **keywords: Any) -> DueDeliveries:
        look_ups.append(time.monotonic())
        return find_due(*values, **keywords)

    monkeypatch.setattr(sqlite_outbox, "find_due", find)
    for number in range(5):
        await push(store, RepositoryName(f"team/app{number}"), "v1")
    async with running_dispatcher(store, receiver, clock) as counts:
        await wait_until(lambda: counts.attempts[DeliveryOutcome.REFUSED] == 5)
        await push(store, BAD, "v1")
        await wait_until(lambda: counts.attempts[DeliveryOutcome.REFUSED] == 6)
        await push(store, BAD, "v2")
        await wait_until(lambda: len(look_ups) >= 3)
    # 0.1 s for each of at least five repositories
    assert min(later - earlier for earlier, later in pairwise(look_ups)) >= 0.5


async def test_clock_that_was_ahead_does_not_stop_deliveries(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt failed while the clock was a day ahead. After the clock was set back, the event is sent again, even if
    nothing else changes the store."""
    planned_times = list[float | None]()

    def find(*values: Any, **keywords: Any) -> DueDeliveries:
        due = find_due(*values, **keywords)
        planned_times.append(due.next_at)
        return due

    monkeypatch.setattr(sqlite_outbox, "find_due", find)
    clock.pass_days(1)
    receiver.status = lambda _: 400
    await push(store, BAD, "v1")
    async with running_dispatcher(store, receiver, clock):
        await wait_until(lambda: any(planned_times))  # the dispatcher knows the time of the next attempt
        receiver.status = lambda _: 204
        clock.pass_days(-1)
        await wait_for(receiver, 1)


@pytest.mark.parametrize("token", ["s3cret\nsecond\n", "s3cret \u00e9\n", "s3 cret", "s3cret\x00", " \n"])
async def test_a_token_that_is_not_valid_in_a_header(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock, tmp_path: Path, token: str
) -> None:
    """If the token in a file cannot be sent in a header, the error names the file and shows nothing of the token."""
    file = tmp_path / "token"
    file.write_text(token)
    await push(store, BAD, "v1")
    async with running_dispatcher(store, receiver, clock, token_file=file) as counts:
        await wait_until(lambda: counts.attempts[DeliveryOutcome.DOWN] >= 1)
    (delivery,) = await store.outbox.deliveries("hook", None, 10, only_dead=False)
    assert delivery.error == f"ValueError: {file} is not one line of visible ASCII"
    assert receiver.requests == []


async def test_a_token_with_spaces_around_it(
    store: StoredRegistry, receiver: WebhookReceiver, clock: Clock, tmp_path: Path
) -> None:
    """Spaces around a token are not sent."""
    file = tmp_path / "token"
    file.write_text("s3cret \r\n")
    async with running_dispatcher(store, receiver, clock, token_file=file):
        await push(store, BAD, "v1")
        await wait_for(receiver, 1)
    assert receiver.requests[0].headers["authorization"] == "Bearer s3cret"


async def test_a_dispatcher_stops_while_the_store_fails(
    tmp_path: Path,
    receiver: WebhookReceiver,
    hanging: threading.Event,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dispatcher stops even if it cannot record its deliveries. These deliveries stay pending."""
    monkeypatch.setattr(dispatcher, "SETTLE_SECONDS", 60.0)  # the dispatcher records nothing before the disk is full
    prepare_data_dir(tmp_path)
    system = FullDisk()
    receiver.status = lambda body: 204 if not body["subject"].startswith(BAD) or hanging.wait(60) else 500
    async with open_registry(tmp_path, clock=clock, system=system) as store:
        await store.outbox.configure([EventReader("hook", frozenset(EventAction), ("**",))])
        await push(store, BAD, "v1")
        await push(store, RepositoryName("team/good"), "v1")
        async with running_dispatcher(store, receiver, clock, timeout=60) as counts:
            await wait_until(lambda: counts.attempts[DeliveryOutcome.DELIVERED] == 1)
            system.is_full = True
        system.is_full = False
        assert len(await store.outbox.deliveries("hook", None, 10, only_dead=False)) == 2

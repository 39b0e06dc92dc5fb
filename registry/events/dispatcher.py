"""Delivers events to webhooks (`WebhookDispatcher`).

Only one process at a time delivers events (see `delivery_leader`). Each webhook has a task of its own, so that a slow
webhook does not delay the other webhooks. The task does the following:

- It reads the events that are *due* (to be sent now), in *queues*. A queue has the next events of one repository.
- It starts a *sender* for each queue: a task that sends the events of the queue one after the other. A webhook has at
  most `Webhook.connections` senders at a time. `SenderLimit` limits the senders of all webhooks together.
- It stores the outcomes of attempts in groups. A repository gets no new sender until its outcomes are stored. While the
  store fails, no sender starts. After a crash, the events whose outcomes were not stored are sent again.

The *endpoint* is the URL of the webhook. If the endpoint answers 2xx, the event is delivered. Otherwise the attempt has
failed: the endpoint *refuses* the event (it answers with another status) or is *down* (it does not answer, or is not
available now). After a failed attempt, one of two things happens:

- The event is sent again later. Until then, its repository *pauses*: none of the repository's events is sent. The more
  failures in a row, the longer the pause, up to five minutes. The pause has a random part, so that many registries do
  not send at the same moment. After certain failures, the events of all other repositories wait as well:
  `WebhookHealth` decides when and how long.
- The event becomes a *dead letter*, which is not sent any more (see `Webhook.max_attempts` and `Webhook.max_age`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from registry.config.event_settings import Webhook
from registry.events.attempts import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    AttemptResult,
    DeliveryObserver,
    DeliveryOutcome,
    WebhookHealth,
    back_off,
)
from registry.events.webhook_client import WebhookClient
from storage.background_rounds import log_round_error, raise_if_cancelled
from storage.errors import RegistryError
from storage.outbox import Delivery, FailedDelivery, Outbox

POLL_SECONDS: Final = 0.2
"""Longest time between two checks whether a process has added events or a pause has ended."""
STORE_RETRY_SECONDS: Final = 5.0
"""Pause after an error of the store."""
QUEUES_PER_READ: Final = 64
"""Largest number of queues that one read returns."""
EVENTS_PER_QUEUE: Final = 50
"""Largest number of events in a queue."""
SETTLE_SECONDS: Final = 0.5
"""Longest time from an attempt until its outcome is stored. The outcome is stored earlier if no sender runs."""
MAX_SHARED_SENDERS: Final = 64
"""Largest number of senders of all webhooks together, not counting the first sender of each webhook."""
log = logging.getLogger("registry.events")


class SenderLimit:
    """Limits the senders of all webhooks together. Each webhook may always have one sender, so that slow endpoints
    never stop the deliveries to other endpoints. For each further sender, a webhook needs one of the `permits`."""

    def __init__(self, permits: int = MAX_SHARED_SENDERS) -> None:
        self._free = permits

    def acquire(self) -> bool:
        """Takes a permit. Returns False if no permit is free."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    def release(self) -> None:
        """Gives a permit back."""
        self._free += 1


@dataclass(slots=True)
class _Outcomes:
    """The outcomes that are not stored yet. `delivered`: the numbers of the delivered events. `failed`: the failed
    attempts. `repositories`: the repositories of the delivered and failed events."""

    delivered: list[int] = field(default_factory=list)
    failed: list[FailedDelivery] = field(default_factory=list)
    repositories: set[str] = field(default_factory=set)

    def add(self, later: _Outcomes) -> None:
        """Adds the `later` outcomes after the outcomes in this object."""
        self.delivered += later.delivered
        self.failed += later.failed
        self.repositories |= later.repositories

    def __bool__(self) -> bool:
        return bool(self.delivered or self.failed)


class WebhookDispatcher:
    """Delivers events to one webhook. Used from one event loop.

    `outbox`: the store of the events and of their deliveries. `data_version` returns the data version: a value that
    changes with every commit of any process. `clock` returns the time in seconds since 1970. `observer` receives
    reports about the attempts. `sender_limit`: one object for all webhooks."""

    def __init__(
        self,
        settings: Webhook,
        client: WebhookClient,
        outbox: Outbox,
        data_version: Callable[[], object],
        clock: Callable[[], float],
        observer: DeliveryObserver,
        sender_limit: SenderLimit,
    ) -> None:
        self._settings = settings
        self._client = client
        self._outbox = outbox
        self._data_version = data_version
        self._clock = clock
        self._observer = observer
        self._sender_limit = sender_limit
        self._time = asyncio.get_running_loop().time
        self._health = WebhookHealth(self._time)
        self._waiting_queues: deque[Sequence[Delivery]] = deque()
        """Queues that were read and have no sender yet."""
        self._senders: dict[str, asyncio.Task[None]] = {}
        """The running senders, by repository."""
        self._outcomes = _Outcomes()
        self._settle_at = float("inf")
        """When to store the outcomes, in seconds of the event loop's clock."""
        self._sender_ended = asyncio.Event()
        self._last_read_version: object = None
        """The data version at the last read."""
        self._next_due_at: float | None = None
        """The value of `DueDeliveries.next_at` at the last read."""
        self._read_again_at = float("-inf")
        """When to read again even if the store has not changed, in seconds of the event loop's clock."""
        self._earliest_read_at = float("-inf")
        """No read begins before this time, in seconds of the event loop's clock."""
        self._logged_reason = ""
        """The reason in the last warning about a failed attempt; empty after the endpoint has accepted an event. The
        same reason is not logged twice in a row."""

    async def run(self) -> None:
        """Delivers events until the task is cancelled. If the store raises an error, logs the error and continues. A
        cancellation aborts the running requests, whose events are sent again later, and stores the outcomes."""
        try:
            while True:
                try:
                    await self._deliver_until_error()
                except Exception as error:
                    log_round_error(log, f"webhook {self._settings.name}: cannot read or write its events", error)
                raise_if_cancelled()
                await asyncio.sleep(STORE_RETRY_SECONDS)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Cancels the senders, and stores their outcomes."""
        senders = list(self._senders.values())
        for sender in senders:
            sender.cancel()
        try:
            if senders:
                await asyncio.wait(senders)
        finally:  # another cancellation can arrive in any `await`
            try:
                await self._settle()
            except RegistryError as error:
                name, events = self._settings.name, len(self._outcomes.delivered)
                log.warning("webhook %s: %d events will be sent again, because of an error: %s", name, events, error)

    async def _deliver_until_error(self) -> None:
        """Reads the events that are due, starts senders and stores outcomes, until an error or a cancellation."""
        while True:
            if self._outcomes and (not self._senders or self._time() >= self._settle_at):
                await self._settle()
            if self._health.is_paused:
                self._waiting_queues.clear()  # the store may delete some of these events during the pause
                self._read_again_at = float("-inf")
            else:
                if not self._waiting_queues and len(self._senders) < self._settings.connections:
                    await self._read()
                self._start_senders()
            if self._senders or not self._outcomes:
                await self._wait()

    async def _read(self) -> None:
        """Reads the queues that are due, except for repositories that have a sender, that pause, or whose outcomes are
        not stored yet. Reads nothing in two cases:

        - The last read returned all due queues, and since then the data version has not changed, no delivery has become
          due, and no pause has ended.
        - The store has demanded a wait after the last read (`DueDeliveries.wait_seconds`)."""
        if self._time() < self._earliest_read_at:
            return
        version, now = self._data_version(), self._clock()
        # No pause is longer than `LONGEST_PAUSE_SECONDS`. So a delivery that becomes due after `latest` was planned
        # before the clock was set back. Such a delivery counts as due. The store has the same rule.
        next_due_at, latest = self._next_due_at, now + LONGEST_PAUSE_SECONDS
        is_due = next_due_at is not None and (next_due_at <= now or next_due_at > latest)
        if version == self._last_read_version and not is_due and self._time() < self._read_again_at:
            return
        pauses = self._health.paused_repositories()
        # After a failure, reads only as many queues as can have a sender at once: a pause would discard the other
        # queues.
        limit = self._settings.connections if self._health.failures else QUEUES_PER_READ
        excluded_repositories = {*self._senders, *self._outcomes.repositories, *pauses}
        due = await self._outbox.due(self._settings.name, now, limit, EVENTS_PER_QUEUE, excluded_repositories)
        self._earliest_read_at = self._time() + due.wait_seconds
        self._waiting_queues.extend(due.queues)
        self._last_read_version, self._next_due_at = version, due.next_at
        has_more = len(due.queues) == limit
        self._read_again_at = float("-inf") if has_more else min(pauses.values(), default=float("inf"))

    async def _wait(self) -> None:
        """Waits until a sender has ended, but at most `POLL_SECONDS`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._sender_ended.wait()
        self._sender_ended.clear()

    def _start_senders(self) -> None:
        """Starts senders for the queues in `_waiting_queues`, as many as the limits allow."""
        while self._waiting_queues and len(self._senders) < self._settings.connections:
            needs_permit = bool(self._senders)  # the first sender of a webhook needs no permit
            if needs_permit and not self._sender_limit.acquire():
                return
            queue = self._waiting_queues.popleft()
            sender = asyncio.create_task(self._send_queue(queue))
            self._senders[queue[0].event.content.repository] = sender
            sender.add_done_callback(partial(self._on_sender_ended, queue, needs_permit))

    def _on_sender_ended(self, queue: Sequence[Delivery], has_permit: bool, sender: asyncio.Task[None]) -> None:
        del self._senders[queue[0].event.content.repository]
        if has_permit:
            self._sender_limit.release()
        if len(queue) == EVENTS_PER_QUEUE:
            # The repository may have more events, which can be read only after the outcomes are stored.
            self._settle_at = self._time()
        self._sender_ended.set()
        if not sender.cancelled() and (error := sender.exception()) is not None:
            log.error("webhook %s: an unexpected error; events are sent again", self._settings.name, exc_info=error)

    async def _send_queue(self, queue: Sequence[Delivery]) -> None:
        """Sends the events of a queue, until an attempt fails or `WebhookHealth` pauses the endpoint."""
        for delivery in queue:
            if self._health.is_paused:
                return
            delivered_before = self._health.delivered_count
            result = await self._attempt(delivery)
            raise_if_cancelled()
            self._observer.on_attempt(self._settings.name, result.outcome)
            self._settle_at = min(self._settle_at, self._time() + SETTLE_SECONDS)
            if result.outcome is not DeliveryOutcome.DELIVERED:
                await self._note_failure(delivery, result, delivered_before)
                return
            self._outcomes.repositories.add(delivery.event.content.repository)
            self._outcomes.delivered.append(delivery.event.number)
            if self._health.failures or self._logged_reason:
                log.info("webhook %s: the endpoint accepts events again", self._settings.name)
                self._logged_reason = ""
            self._health.on_delivered(delivery.event.content.repository)

    async def _attempt(self, delivery: Delivery) -> AttemptResult:
        """Sends an event once. An unexpected error in this program counts as a refusal, so that the event does not
        block other events for ever."""
        try:
            return await self._client.send(delivery.event)
        except Exception as error:
            raise_if_cancelled()
            log.exception("webhook %s: event %d cannot be sent", self._settings.name, delivery.event.number)
            return AttemptResult(
                DeliveryOutcome.REFUSED, f"the event cannot be sent, because of an unexpected {type(error).__name__}"
            )

    async def _note_failure(self, delivery: Delivery, result: AttemptResult, delivered_before: int) -> None:
        """Records a failed attempt: plans the next attempt, or makes the event a dead letter.

        `delivered_before`: the value of `WebhookHealth.delivered_count` when the attempt began. If the event becomes a
        dead letter, this method may wait for up to `FIRST_PAUSE_SECONDS`."""
        event, now = delivery.event, self._clock()
        attempts = delivery.attempts
        is_too_old = now - event.content.at >= self._settings.max_age
        is_down = result.outcome is DeliveryOutcome.DOWN
        # An event that is too old becomes a dead letter after one more failed attempt. `on_down` delays the attempts
        # for other old events, so that a failing endpoint does not turn many of them into dead letters within a moment.
        repository_wait = 0.0
        if is_down or is_too_old:
            repository_wait = self._health.on_down(event.content.repository, delivered_before)
        if not is_down:
            attempts += 1
        next_at = now + (repository_wait if is_down else back_off(attempts))
        is_dead = attempts >= self._settings.max_attempts or is_too_old
        if is_dead:
            self._observer.on_given_up(self._settings.name)
            log.error(
                "webhook %s: event %d (%s of %s) is given up: %s; `entrepot events retry %d` sends it again",
                *(self._settings.name, event.number, event.content.action, event.content.repository),
                *(result.reason, event.number),
            )
        elif result.reason != self._logged_reason:
            self._logged_reason = result.reason
            log.warning("webhook %s: %s; its events are sent again later", self._settings.name, result.reason)
        dead = now if is_dead else None
        self._outcomes.repositories.add(event.content.repository)
        self._outcomes.failed.append(FailedDelivery(event.number, attempts, next_at, dead, result.reason))
        # After a dead letter, the store does not delay the later events of the repository. Instead, this sender waits
        # before it ends: until then, the repository gets no new sender.
        if is_dead and repository_wait:
            await asyncio.sleep(min(repository_wait, FIRST_PAUSE_SECONDS))

    async def _settle(self) -> None:
        """Stores the outcomes. If the store raises RegistryError, keeps the outcomes for the next call and raises the
        error."""
        settling, self._outcomes, self._settle_at = self._outcomes, _Outcomes(), float("inf")
        if not settling:
            return
        try:
            await self._outbox.settle(self._settings.name, settling.delivered, settling.failed)
        except RegistryError:
            settling.add(self._outcomes)
            self._outcomes, self._settle_at = settling, self._time()
            raise

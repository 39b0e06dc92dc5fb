"""Runs the delivery of events to webhooks, in one of the server's processes (`EventDelivery`). The *outbox* is the
store of the events and of their deliveries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from registry.config import Settings
from registry.events.attempts import DeliveryObserver, NoObserver
from storage.background_rounds import log_round_error, run_in_one_process
from storage.errors import RegistryError
from storage.leases import Leases
from storage.outbox import LIST_READER, EventLimits, EventReader, Outbox

DELIVERY_SLOT: Final = "events"
"""Name of a *slot*: a permit that one process at a time can hold. The process that holds this slot delivers events."""
SLOT_POLL_SECONDS: Final = 1.0
"""Time between two attempts of a process to get the slot while another process holds it. The slot becomes free when
the other process stops its delivery or ends."""
CANCEL_AGAIN_SECONDS: Final = 1.0
"""Time after which `aclose` cancels the delivery task again if the task has not ended. One cancellation may not be
enough: the CancelledError is lost if another error in the task replaces it. The task can then go on running."""
TIDY_SECONDS: Final = 10.0
"""Time between two checks whether the outbox exceeds its limits."""
log = logging.getLogger("registry.events")


def event_readers(settings: Settings) -> list[EventReader]:
    """Returns the *readers* that the settings define: the receivers of events, each with the events that it wants. Each
    webhook is a reader. The management API shows a list of events. If `settings.events.keep` (seconds) is above 0, this
    list also counts as a reader, with the name `LIST_READER`."""
    readers = [
        EventReader(webhook.name, frozenset(webhook.actions), tuple(webhook.repositories))
        for webhook in settings.webhook
    ]
    if settings.events.keep:
        readers.append(EventReader(LIST_READER, frozenset(settings.events.actions), ("**",)))
    return readers


def registry_address(settings: Settings) -> str:
    """Returns the registry's URL, which events state as their source."""
    scheme = "http" if settings.tls.certificate is None else "https"
    return settings.public_url or f"{scheme}://{settings.listen}"


class EventDelivery:
    """Delivers events to webhooks, and keeps the outbox within its limits. Every process has an `EventDelivery`, but
    only the process that holds the slot `DELIVERY_SLOT` delivers events. Used from one event loop."""

    def __init__(
        self,
        outbox: Outbox,
        leases: Leases,
        data_version: Callable[[], object],
        clock: Callable[[], float],
        observer: DeliveryObserver | None = None,
    ) -> None:
        """`data_version` returns the data version: a value that changes with every commit of any process. `clock`
        returns seconds since 1970. `observer` receives reports about the deliveries. The object does nothing until
        `apply` is called."""
        self._outbox = outbox
        self._leases = leases
        self._data_version = data_version
        self._clock = clock
        self._observer = observer or NoObserver()
        self._task: asyncio.Task[None] | None = None
        self._is_configured = False
        """Whether the store knows which events the readers of the current settings want."""

    async def apply(self, settings: Settings) -> None:
        """Uses these settings from now on: stops the delivery, stores which events each reader wants, and starts the
        delivery again. Starts the delivery only if there are readers or stored events.

        If the store raises an error, this method logs the error, and the delivery task tries to store the readers
        again. Until an attempt succeeds, the registry records the events that the previous settings wanted."""
        await self.aclose()
        self._is_configured = False
        has_events = True
        try:
            await self._configure(settings)
            has_events = bool(await self._outbox.newest_number())
        except RegistryError as error:
            log.error("cannot store which events the settings ask for: %s", error)
        if settings.webhook or settings.events.keep or has_events:
            self._task = asyncio.create_task(self._run(settings))

    async def aclose(self) -> None:
        """Stops the delivery. Aborts running requests; their events are sent again later. Records which events were
        delivered. May be called more than once."""
        task, self._task = self._task, None
        if task is not None:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_AGAIN_SECONDS)

    async def _configure(self, settings: Settings) -> None:
        """Stores which events each reader wants. Raises StorageFull, StorageFailed."""
        for dropped in await self._outbox.configure(event_readers(settings)):
            log.warning(
                "webhook %s is not in the settings any more: %d events that waited for it and %d dead letters are "
                "deleted",
                *(dropped.webhook, dropped.pending, dropped.dead),
            )
        self._is_configured = True

    async def _run(self, settings: Settings) -> None:
        """Waits until this process gets the slot, and then delivers events. After an error, releases the slot and waits
        for it again. Ends only when the task is cancelled."""

        async def deliver() -> None:
            if not self._is_configured:
                await self._configure(settings)
            await _deliver_and_tidy(settings, self._outbox, self._data_version, self._clock, self._observer)

        await run_in_one_process(
            self._leases,
            DELIVERY_SLOT,
            deliver,
            lambda: asyncio.sleep(SLOT_POLL_SECONDS),
            log=log,
            what_failed="the delivery of events stopped with an error",
        )


async def _deliver_and_tidy(
    settings: Settings,
    outbox: Outbox,
    data_version: Callable[[], object],
    clock: Callable[[], float],
    observer: DeliveryObserver,
) -> None:
    """Runs one delivery task for each webhook, and keeps the outbox within its limits, until the task is cancelled."""
    from registry.events.dispatcher import SenderLimit, WebhookDispatcher
    from registry.events.webhook_client import WebhookClient

    limit = SenderLimit()
    async with AsyncExitStack() as stack:
        dispatchers = []
        for webhook in settings.webhook:
            client = WebhookClient(webhook, registry_address(settings))
            stack.push_async_callback(client.aclose)
            dispatchers.append(WebhookDispatcher(webhook, client, outbox, data_version, clock, observer, limit))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())  # ends before the stack closes the clients
        for dispatcher in dispatchers:
            tasks.create_task(dispatcher.run())
        await _keep_tidy(settings, outbox, clock, observer)


async def _keep_tidy(
    settings: Settings, outbox: Outbox, clock: Callable[[], float], observer: DeliveryObserver
) -> None:
    """Keeps the outbox within its limits, until the task is cancelled. After an error, continues with the next
    round."""
    events = settings.events
    while True:
        now = clock()
        # `events.keep`: seconds for which events are kept for the list of the management API.
        limits = EventLimits(now - events.keep, events.keep_max, events.max_pending, events.max_dead, now)
        try:
            for dropped in await outbox.tidy(limits):
                observer.on_dropped(dropped.webhook, dropped.pending, dropped.dead)
                if dropped.pending:
                    log.error(
                        "webhook %s: %d events that wait for it were dropped, the oldest first, because there are more "
                        "than events.max_pending",
                        *(dropped.webhook, dropped.pending),
                    )
                if dropped.dead:
                    log.warning(
                        "webhook %s: %d dead letters were dropped, the oldest first, because there are more than "
                        "events.max_dead",
                        *(dropped.webhook, dropped.dead),
                    )
        except Exception as error:
            log_round_error(log, "cannot tidy the outbox", error)
        await asyncio.sleep(TIDY_SECONDS)

"""The interface of the store of events about content, and of their deliveries to webhooks (`Outbox`).

An *event* is one thing that happened to a repository: a push, a deletion, a tag that moved. The store writes a change
and its events in one transaction, so every change that the server has acknowledged has its events.

A *webhook* is an HTTP endpoint to which the server sends events. A *delivery* is an event that one webhook has not
accepted yet. A delivery is *pending* while the server tries to send it, and is a *dead letter* after the server has
given it up.

The store also has one *list of events*, from which people and programs read events. A *reader* is what the store keeps
events for: each webhook is a reader, and the list of events is a reader. The store keeps only events that a reader
wants. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from storage.content import Actor

LIST_READER: Final = ""
"""Name of the reader that is the list of events."""
MAX_ADDED_EVENTS: Final = 500
"""Largest number of events in one call of `Outbox.add`."""


class EventAction(StrEnum):
    """The kind of an event.

    - `PUSH`: a client pushed a manifest. The event has a tag if the client pushed the manifest by tag.
    - `DELETE`: a manifest or tag was deleted. Each tag of a deleted manifest has its own event.
    - `MOVE`: a tag was pointed at a manifest without a push. A reader that wants `MOVE` also gets each `PUSH` that
      moves a tag.
    - `RETENTION`: a rule of retention deleted a manifest or tag.
    - `EVICTION`: a mirrored manifest, or a tag of it, was deleted to free space in the cache.
    - `QUARANTINE`: the stored bytes of a blob or manifest were found damaged.
    - `PULL`: a client pulled a manifest.
    - `FILL`: a mirror fetched a manifest or blob from its upstream.
    - `BLOB_PUSH`: a client or an import stored a blob, even if the repository had the blob already.
    - `BLOB_MOUNT`: a repository got a blob from another repository, without an upload.
    - `BLOB_DELETE`: a client deleted a blob. Garbage collection adds no events."""

    PUSH = "push"
    DELETE = "delete"
    MOVE = "move"
    RETENTION = "retention"
    EVICTION = "eviction"
    QUARANTINE = "quarantine"
    PULL = "pull"
    FILL = "fill"
    BLOB_PUSH = "blob_push"
    BLOB_MOUNT = "blob_mount"
    BLOB_DELETE = "blob_delete"


CHANGE_ACTIONS: Final = frozenset(EventAction) - {
    *(EventAction.PULL, EventAction.FILL),
    *(EventAction.BLOB_PUSH, EventAction.BLOB_MOUNT, EventAction.BLOB_DELETE),
}
"""The actions of events about changed manifests and tags, and about damaged content."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that is not stored yet.

    - `repository`: the repository's name in the store.
    - `tag`, `digest`: the tag, and the manifest or blob, that the event is about. One of the two may be None.
    - `previous`: the digest that the tag pointed at before it moved; None if the tag did not move, or is new.
    - `media_type`: media type of the manifest or blob; empty if unknown.
    - `size`: size of the manifest or blob in bytes; 0 if unknown.
    - `by`: the client, command or job that caused the event.
    - `reason`: a text for people about the cause of the event."""

    action: EventAction
    repository: str
    at: float
    by: Actor
    tag: str | None = None
    digest: str | None = None
    previous: str | None = None
    media_type: str = ""
    size: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A stored event. `number`: a later event has a higher number. `id`: a UUID."""

    number: int
    id: str
    content: NewEvent


@dataclass(frozen=True, slots=True)
class EventPage:
    """The result of one look-up in the list of events. A look-up reads a limited number of events.

    - `events`: the events that were read and match. May be empty even if the next look-up finds matching events.
    - `position`: the argument `number` for the next look-up. If the look-up read no event, this is the number at which
      the look-up began.
    - `is_last`: whether the list had no further event to read."""

    events: Sequence[Event]
    position: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class EventReader:
    """A webhook, or the list of events (`LIST_READER`). A reader wants the events with one of the `actions`, from
    repositories whose names match one of the patterns in `repositories`."""

    name: str
    actions: frozenset[EventAction]
    repositories: Sequence[str]


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that `webhook` has not accepted yet. `attempts`: number of failed attempts so far. `next_at`: time of
    the next attempt. `dead`: time at which the server gave up the delivery; None if the server still tries. `error`:
    why the last attempt failed."""

    webhook: str
    event: Event
    attempts: int
    next_at: float
    dead: float | None
    error: str


@dataclass(frozen=True, slots=True)
class DeliveryPosition:
    """The position of a delivery in the list of deliveries: the number of its event, and its webhook. The list has the
    newest event first, and the deliveries of an event in the order of their webhooks."""

    event: int
    webhook: str


@dataclass(frozen=True, slots=True)
class DueDeliveries:
    """Deliveries of one webhook that are due. A repository *waits* if it has pending deliveries to the webhook, but
    none of them is due.

    - `queues`: one sequence for each repository, in the order of the events.
    - `next_at`: the earliest time at which a delivery of a waiting repository becomes due. None if no repository waits.
      If `queues` has as many sequences as the caller asked for, `next_at` may be None although repositories wait.
      Repositories that the caller excluded do not count.
    - `wait_seconds`: how long the caller must wait before it looks for due deliveries again. 0 unless very many
      repositories have pending deliveries."""

    queues: Sequence[Sequence[Delivery]]
    next_at: float | None
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FailedDelivery:
    """The new values of a delivery after a failed attempt to send it. `event`: number of the event. The other fields
    replace the fields of the `Delivery`."""

    event: int
    attempts: int
    next_at: float
    dead: float | None
    error: str


@dataclass(frozen=True, slots=True)
class EventLimits:
    """How much the outbox keeps. An event is deleted if it is not in the list and has no deliveries. The newest event
    is never deleted, because a later event would get its number.

    - `keep_since`: events before this time are removed from the list.
    - `events`: largest number of events in the list.
    - `pending`: largest number of pending deliveries of each webhook.
    - `dead`: largest number of dead letters of each webhook.
    - `now`: the current time."""

    keep_since: float
    events: int
    pending: int
    dead: int
    now: float


@dataclass(frozen=True, slots=True)
class DroppedDeliveries:
    """How many pending deliveries, and how many dead letters, of a webhook were dropped. The server drops deliveries if
    there are too many, or if the webhook was removed."""

    webhook: str
    pending: int
    dead: int


@dataclass(frozen=True, slots=True)
class WebhookBacklog:
    """How many pending deliveries, and how many dead letters, a webhook has. `oldest`: time of the oldest event with a
    pending delivery to this webhook; None if no delivery is pending."""

    webhook: str
    pending: int
    dead: int
    oldest: float | None


class Outbox(Protocol):
    """The events and deliveries, which all processes share. All methods may raise StorageFailed. Methods that change
    something may also raise StorageFull."""

    async def configure(self, readers: Sequence[EventReader]) -> Sequence[DroppedDeliveries]:
        """Replaces the readers, and drops the deliveries of webhooks that are no longer readers. No method returns or
        counts a dropped delivery, and `tidy` deletes it later. A webhook that becomes a reader again does not get the
        deliveries that were dropped before. Returns the numbers of dropped deliveries of each webhook that this call
        removed. Does not write if nothing changes."""
        ...

    async def add(self, events: Sequence[NewEvent]) -> None:
        """Adds at most `MAX_ADDED_EVENTS` events that do not belong to a change of content, such as pulls. A power cut
        may lose the newest of these events. The store itself adds the events of changes of content."""
        ...

    async def due(
        self,
        webhook: str,
        now: float,
        max_repositories: int,
        max_events: int,
        excluded_repositories: Collection[str] = (),
    ) -> DueDeliveries:
        """Returns the deliveries that are due at the time `now`: those of at most `max_repositories` repositories, and
        at most `max_events` of each repository. The repositories with the oldest pending deliveries come first. If the
        oldest pending delivery of a repository is not due yet, no delivery of that repository is due.
        `excluded_repositories`: repositories to leave out."""
        ...

    async def settle(self, webhook: str, delivered: Sequence[int], failed: Sequence[FailedDelivery]) -> None:
        """Deletes the deliveries of the events with the numbers `delivered`, and updates the deliveries that failed. A
        power cut may undo this change; the server then delivers these events again."""
        ...

    async def newest_number(self) -> int:
        """Returns the number of the newest event, even if the event is not in the list; 0 if there never was an
        event."""
        ...

    async def first_complete_number(self) -> int:
        """Call this method only while the list is enabled (a reader). Returns the number from which the list is
        complete:

        - The list has not lost an event with this number or a higher number.
        - From the event with this number on, the list has been enabled (a reader) without a break.

        If the list is complete only for future events, returns the number that the next event gets. Even a complete
        list has gaps in its numbers, because not every event enters the list."""
        ...

    async def after(
        self, number: int, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        """Returns at most `limit` events of the list with numbers above `number`, oldest first. `action`: returns only
        events with this action; None: with any. `repository`: returns only events of this repository; None: of any."""
        ...

    async def before(
        self, number: int | None, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        """Returns at most `limit` events of the list with numbers below `number`, newest first. If `number` is None,
        begins with the newest event. `action`, `repository`: as for `after`."""
        ...

    async def deliveries(
        self,
        webhook: str | None,
        after: DeliveryPosition | None,
        limit: int,
        *,
        only_dead: bool,
        only_pending: bool = False,
    ) -> Sequence[Delivery]:
        """Returns at most `limit` deliveries that follow the position `after`, in the order of `DeliveryPosition`. If
        `after` is None, begins with the first delivery. `webhook`: returns only deliveries to this webhook; None: to
        any. `only_dead`: returns only dead letters. `only_pending`: returns only pending deliveries."""
        ...

    async def retry(self, webhook: str | None, event: int | None) -> int:
        """Makes dead letters pending and due again, and returns how many it changed. `webhook`: only dead letters to
        this webhook; None: to any. `event`: only dead letters of the event with this number; None: of any event."""
        ...

    async def tidy(self, limits: EventLimits) -> Sequence[DroppedDeliveries]:
        """Deletes the deliveries of removed webhooks. Then deletes the events and deliveries that exceed the limits,
        oldest first. May use several transactions. Returns how many pending deliveries and how many dead letters of
        each webhook exceeded the limits."""
        ...

    async def backlog(self) -> Sequence[WebhookBacklog]:
        """Returns the backlog of each webhook that has deliveries."""
        ...

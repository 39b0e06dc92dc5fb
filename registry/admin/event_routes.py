"""The routes of `/api/v1/events`: list or stream the events of changes and pulls, list their deliveries to webhooks,
and send dead letters again. A *dead letter* is an event that the registry no longer tries to deliver to a webhook. The
docstrings of the routes are the descriptions in the OpenAPI document."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from fastapi import Header, Query, Request
from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.body_model import BodyModel
from registry.admin.caller import AdminCaller, Caller, LoggedInCaller
from registry.admin.event_models import DeliveryResponse, EventResponse
from registry.admin.event_stream import EVENT_STREAM_TYPE, EventStream, EventStreamResponse
from registry.admin.management_route import AfterQuery, LimitQuery
from registry.admin.management_router import management_router
from registry.config.event_settings import MAX_NAME_LENGTH
from registry.events.event_feed import PAGE_EVENTS
from registry.http.query import MAX_NUMBER, parse_number
from registry.request import RequestInvalid
from storage.access import Action
from storage.content import Page
from storage.errors import Unsupported
from storage.outbox import Delivery, DeliveryPosition, Event, EventAction, NewEvent

router = management_router()
MAX_LOOK_UPS: Final = 20
"""Largest number of look-ups (calls of `Outbox.before`) for one page. Each look-up returns at most `PAGE_EVENTS`
events, so one page checks the caller's rights to at most 2,000 events. These checks take tens of milliseconds."""
CURSOR_STEP: Final = 1_000
"""The cursor `next` of a page is the number of the last event that was read for the page. If this event may be *hidden*
(the caller may not see it), `next` is rounded up to a multiple of `CURSOR_STEP`, so that `next` does not reveal the
number.

Each cursor must be lower than the cursor of the page before, even after rounding. Therefore, `CURSOR_STEP` must not
exceed `MAX_LOOK_UPS * PAGE_EVENTS`:

- `next` is rounded up only if the page took `MAX_LOOK_UPS` look-ups and is not full. Each of these look-ups reads at
  least `PAGE_EVENTS` events. A look-up can read more events than it returns, because it returns only the events that
  match. So before the rounding, `next` is lower than the previous cursor by at least `MAX_LOOK_UPS * PAGE_EVENTS`.
- The rounding adds less than `CURSOR_STEP`."""
_MAX_POSITION_CHARACTERS: Final = len(f"{MAX_NUMBER}:") + MAX_NAME_LENGTH
"""Largest length of a cursor of `list_deliveries`: the number of an event, a colon and the name of a webhook."""
EVENTS_NOT_KEPT = 'this registry keeps no events; set events.keep in its settings, such as keep = "24h"'


class RetryBody(BodyModel):
    """Which dead letters to send again. With `webhook`: the dead letters of this webhook. With `event`: the dead
    letters of this event. With both: the dead letter of this event for this webhook. With neither: all dead letters."""

    webhook: str | None = Field(default=None, max_length=64)
    event: int | None = Field(default=None, ge=1, le=MAX_NUMBER)


class RetryResponse(BaseModel):
    """How many dead letters are sent again."""

    retried: int


@router.get(
    "/events",
    tags=["events"],
    response_model=models.ListPage[EventResponse],
    responses={200: {"content": {EVENT_STREAM_TYPE: {"schema": {"type": "string"}}}}},
)
async def list_events(
    request: Request,
    caller: LoggedInCaller,
    action: Annotated[EventAction | None, Query(description="Only events with this action")] = None,
    repository: Annotated[str | None, Query(max_length=512, description="Only events of this repository")] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Any:
    """Lists the events of repositories that the caller may pull from, newest first. An admin sees all events. The
    setting `events.keep` says how long the registry keeps events.

    With `Accept: text/event-stream`, sends events as they happen (Server-Sent Events). If the request has the header
    `Last-Event-ID` or the parameter `after`, the stream begins after the event with this number. If the registry has
    already deleted events after this number, the first message has the type `gap`. Without a number, the stream begins
    with the next event that happens."""
    if not caller.upkeep.settings.events.keep:
        raise Unsupported(EVENTS_NOT_KEPT)
    position = _number_or_none(last_event_id or after)
    if EVENT_STREAM_TYPE in accept:
        stream = EventStream(request, position, _as_json, caller, action=action, repository=repository)
        return EventStreamResponse(await stream.open())
    return await _read_page(caller, position, limit, action=action, repository=repository)


@router.get("/events/deliveries", tags=["events"])
async def list_deliveries(
    caller: AdminCaller,
    webhook: Annotated[str | None, Query(max_length=64, description="Only deliveries to this webhook")] = None,
    dead: Annotated[bool, Query(description="Only dead letters")] = False,
    after: Annotated[
        str | None, Query(description="The field `next` of the previous page", max_length=_MAX_POSITION_CHARACTERS)
    ] = None,
    limit: LimitQuery = 100,
) -> models.ListPage[DeliveryResponse]:
    """Lists the events that are not delivered to webhooks yet, and the dead letters, newest first."""
    outbox = caller.upkeep.store.outbox
    deliveries = await outbox.deliveries(webhook, _position_or_none(after), limit + 1, only_dead=dead)
    page = Page(deliveries[:limit], more=len(deliveries) > limit)
    return models.list_page(page, DeliveryResponse.from_stored, _position_text)


@router.post("/events/retry", tags=["events"])
async def retry_deliveries(caller: AdminCaller, body: RetryBody) -> RetryResponse:
    """Sends dead letters again."""
    return RetryResponse(retried=await caller.upkeep.store.outbox.retry(body.webhook, body.event))


async def recent_events(caller: Caller, limit: int) -> list[EventResponse]:
    """Returns at most `limit` events that the caller may see, newest first. The caller must have an account. The list
    is empty if the settings keep no events."""
    if not caller.upkeep.settings.events.keep:
        return []
    return (await _read_page(caller, None, limit)).items


def _response(event: Event, caller: Caller) -> EventResponse | None:
    """Returns an event as the caller may see it; None if the caller may not see the event. Only an
    admin, or a caller who may push to the repository, sees the data about the client that caused the event: the
    address, the request ID and the user agent."""
    content: NewEvent = event.content
    if caller.rights.admin:
        return EventResponse.from_stored(event)
    if not _may_see(caller, content.repository):
        return None
    with_client = caller.principal.may(Action.PUSH, content.repository)
    return EventResponse.from_stored(event, with_client=with_client)


def _may_see(caller: Caller, repository: str) -> bool:
    """Returns whether a caller may see the events of a repository. `repository`: the repository's name in the store.
    For a mirrored repository, this name begins with the name of the upstream."""
    return caller.rights.admin or caller.principal.may(Action.PULL, repository)


def _as_json(event: Event, caller: Caller) -> tuple[str, str] | None:
    """Returns what a stream sends for an event: its action, and the event as JSON. Returns None if the caller may not
    see the event."""
    response = _response(event, caller)
    return None if response is None else (response.action, response.model_dump_json())


async def _read_page(
    caller: Caller,
    before: int | None,
    limit: int,
    *,
    action: EventAction | None = None,
    repository: str | None = None,
) -> models.ListPage[EventResponse]:
    """Returns a page of events, newest first. `before`: only events with lower numbers; None: all numbers. `action`:
    only events with this action; None: all actions. `repository`: only events of this repository; None: all
    repositories. The page may have fewer than `limit` events although more follow, because the number of look-ups for
    one page is limited (`MAX_LOOK_UPS`).

    For a caller who is not an admin, `next` is the number of an event on the page, or a multiple of `CURSOR_STEP`.
    `next` may depend on how many hidden events there are, but must not depend on their actions or repositories.

    Therefore, if a look-up can return hidden events, it must not select events by action. A look-up stops
    reading when it has found `PAGE_EVENTS` events. If it counted only the events with one action, the actions of hidden
    events would decide where it stops, and so decide `next`. So the look-up returns events with all actions, and this
    function discards the events with other actions than `action`."""
    if repository is not None and not _may_see(caller, repository):
        return models.ListPage(items=[])  # the same response as for a repository that does not exist
    outbox = caller.upkeep.store.outbox
    can_find_hidden_events = not caller.rights.admin and repository is None
    items: list[EventResponse] = []
    position = MAX_NUMBER if before is None else before
    for _ in range(MAX_LOOK_UPS):
        if can_find_hidden_events:
            page = await outbox.before(position, PAGE_EVENTS)
        else:
            count = min(PAGE_EVENTS, limit - len(items))
            page = await outbox.before(position, count, action=action, repository=repository)
        for event in page.events:
            if action is not None and event.content.action is not action:
                continue
            if (response := _response(event, caller)) is None:
                continue
            items.append(response)
            if len(items) == limit:
                is_oldest = page.is_last and event is page.events[-1]
                return models.ListPage(items=items, next=None if is_oldest else str(event.number))
        if page.is_last:
            return models.ListPage(items=items)
        position = page.position
        # Lets other requests run between look-ups. A look-up usually runs in a thread, but if the disk is too full to
        # open the database normally, the look-up runs on the event loop.
        await asyncio.sleep(0)
    if not caller.rights.admin:
        rounded_up = position + -position % CURSOR_STEP
        position = min(rounded_up, items[-1].number) if items else rounded_up
    return models.ListPage(items=items, next=str(position))


def _number_or_none(text: str | None) -> int | None:
    """Returns the number of an event that a query parameter or header states; None if there is no `text`. Raises
    RequestInvalid if `text` is not a number."""
    return None if text is None else parse_number(text, "this is not the number of an event")


def _position_text(delivery: Delivery) -> str:
    """Returns the cursor of the page that begins after a delivery."""
    return f"{delivery.event.number}:{delivery.webhook}"


def _position_or_none(text: str | None) -> DeliveryPosition | None:
    """Returns the position that `_position_text` wrote as `text`; None if there is no `text`. Raises RequestInvalid for
    any other text."""
    if text is None:
        return None
    number, _, webhook = text.partition(":")
    problem = f"{text!r} is not from the field `next` of an earlier page"
    if not webhook:
        raise RequestInvalid(problem)
    return DeliveryPosition(parse_number(number, problem), webhook)

"""The page *Overview*. It shows admins the activity of the registry, and all other visitors what they may pull.

Only admins see figures about the whole registry, because the figures include repositories that other visitors may not
see.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.event_models import EventResponse
from registry.admin.event_routes import recent_events
from registry.admin.models import AuditEntryResponse
from registry.admin.server_status import ServerStatus, read_server_status
from registry.admin.status_routes import ActivityPeriod, read_activity_for
from registry.ui.charts import Chart
from registry.ui.languages import translatable
from registry.ui.page_route import (
    SlotlessRoute,
    admin_of,
    caller_of,
    image_host,
    page_response,
    page_slot,
    query_of,
    redirect,
    visit_of,
)
from registry.ui.pages import PageComponents
from registry.ui.repository_list import list_repositories, visible_upstreams
from registry.ui.system_page import BREAKER_NAMES
from registry.upkeep.eviction import read_cache_sizes
from storage.access import AuditQuery

OVERVIEW_PATH: Final = "/ui/overview"
SHOWN_EVENTS: Final = 8
"""How many entries of the audit log the page shows to admins, and how many events to other visitors."""
SHOWN_FILLS: Final = 20
"""How many downloads from upstreams the page shows."""
_TRAFFIC_CHART: Final = (translatable("Pulls and pushes"), (translatable("Pulls"), translatable("Pushes")), False)
_REQUESTS_CHART: Final = (
    translatable("Requests for mirrored content"),
    (translatable("Hits"), translatable("Misses")),
    False,
)
_BYTES_CHART: Final = (
    translatable("Bytes of mirrored content"),
    (translatable("Saved"), translatable("Fetched")),
    True,
)
"""For each chart, the first three arguments of `TitledChart`: the title, the names of the series, and `is_size`."""
_JOB_STATE_NAMES: Final = {"queued": translatable("waits"), "running": translatable("runs")}
"""The texts for the states of jobs that have not ended."""
_PERIODS: Final = {"day": translatable("The last 24 hours"), "month": translatable("The last 30 days")}

# A *slot* is the permit to render a page. A `SlotlessRoute` runs its handler without a slot, so that the handler can do
# slow work first, such as `_count_repositories`. The handler then acquires a slot itself (`page_slot`).
router = APIRouter(route_class=SlotlessRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class TitledChart:
    """A chart with texts to translate: its title, and the name of each series. `is_size`: whether the values are
    numbers of bytes."""

    title: str
    series: tuple[str, ...]
    is_size: bool
    chart: Chart


@dataclass(frozen=True, slots=True)
class ChartedPeriod:
    """A period with its charts. `name`: identifies the period on the page. `title`: a text to translate."""

    name: str
    title: str
    activity: ActivityPeriod
    charts: list[TitledChart]


@dataclass(frozen=True, slots=True)
class RepositoryCount:
    """How many repositories of an upstream the visitor may pull. `upstream`: the name of the upstream; None for hosted
    repositories. `has_more`: whether there are more than `count` repositories."""

    upstream: str | None
    count: int
    has_more: bool


@router.get(OVERVIEW_PATH)
async def overview(request: Request) -> Response:
    """Shows admins the activity of the registry, and other visitors what they may pull. With `live=off` in the query,
    the part that shows the current state does not reload itself."""
    caller = caller_of(request)
    if caller.rights.admin:
        async with page_slot(request):
            return await _admin_page(request, await admin_of(request))
    counts = await _count_repositories(request, caller)
    async with page_slot(request):
        return await page_response(
            request,
            "welcome.html",
            section="overview",
            counts=counts,
            events=await _events_for(caller),
            host=image_host(request),
            now=datetime.now(UTC),
        )


@router.get(f"{OVERVIEW_PATH}/now")
async def current_state(request: Request) -> Response:
    """Returns the part of the page that shows the current state, if htmx requests it. Redirects other requests to the
    whole page. Raises Unauthorized, Denied."""
    if not visit_of(request).is_from_htmx:
        return redirect(OVERVIEW_PATH)
    caller = await admin_of(request)
    async with page_slot(request):
        status = await read_server_status(caller.upkeep, with_cache=False)
        return await page_response(request, "overview_now.html", **_current_values(status, is_live=True))


async def _admin_page(request: Request, caller: Caller) -> Response:
    activity = await read_activity_for(request, caller)
    status = await read_server_status(caller.upkeep, with_cache=False)
    entries = await caller.accounts.scan_audit(AuditQuery(), SHOWN_EVENTS)
    has_mirrors = bool(status.upstreams)
    return await page_response(
        request,
        "overview.html",
        section="overview",
        periods=[
            _charted(name, period, has_mirrors) for name, period in (("day", activity.day), ("month", activity.month))
        ],
        today=activity.day.total,
        caches=await read_cache_sizes(caller.upkeep.settings, caller.upkeep.store),
        entries=[AuditEntryResponse.from_stored(entry) for entry in entries.items],
        breaker_names=BREAKER_NAMES,
        now=datetime.now(UTC),
        **_current_values(status, is_live=query_of(request).one("live") != "off"),
    )


def _current_values(status: ServerStatus, *, is_live: bool) -> dict[str, Any]:
    """Returns the values for the part of the page that shows the current state (`overview_now.html`). `is_live`:
    whether that part reloads itself."""
    fills = sorted(status.fills, key=lambda fill: not fill.running)  # running downloads first
    return {
        "status": status,
        "fills": fills[:SHOWN_FILLS],
        "more_fills": len(fills[SHOWN_FILLS:]),
        "job_states": _JOB_STATE_NAMES,
        "is_live": is_live,
    }


def _charted(name: str, period: ActivityPeriod, has_mirrors: bool) -> ChartedPeriod:
    buckets = period.buckets
    charts = [
        TitledChart(
            *_TRAFFIC_CHART, Chart.of([bucket.pulls for bucket in buckets], [bucket.pushes for bucket in buckets])
        )
    ]
    if has_mirrors:
        requests = Chart.of([bucket.hits for bucket in buckets], [bucket.misses for bucket in buckets])
        size = Chart.of([bucket.saved_bytes for bucket in buckets], [bucket.fetched_bytes for bucket in buckets])
        charts += [TitledChart(*_REQUESTS_CHART, requests), TitledChart(*_BYTES_CHART, size)]
    return ChartedPeriod(name, _PERIODS[name], period, charts)


async def _count_repositories(request: Request, caller: Caller) -> list[RepositoryCount]:
    """Returns how many hosted repositories the visitor may pull, and how many repositories of each upstream. Counts at
    most one page of each list."""
    components: PageComponents = request.app.service.pages
    counts = []
    for upstream in (None, *visible_upstreams(components, caller.principal.listable_names)):
        page = await list_repositories(components, upstream, "", None)
        counts.append(RepositoryCount(upstream, len(page.names), page.next_after is not None))
        await asyncio.sleep(0)  # lets waiting requests run
    return counts


async def _events_for(caller: Caller) -> list[EventResponse]:
    """Returns the newest events of repositories that the visitor may pull, as `/api/v1/events` does. The list is empty
    for a visitor without an account."""
    return [] if caller.principal.is_anonymous else await recent_events(caller, SHOWN_EVENTS)

"""The pages of the list of deliveries: each delivery is on one page, also if several webhooks wait for one event."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry
from storage.outbox import EventAction, EventReader, FailedDelivery, NewEvent
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.store_accounts import BY

WEBHOOKS = ("chat", "ci", "w" * 64)
"""Their order is that of a page. The last one has the longest name that the settings allow."""
DELIVERIES = [(number, webhook) for number in (3, 2, 1) for webhook in WEBHOOKS]
DEAD_LETTERS = [(3, "ci"), (2, "chat"), (2, "ci")]


@asynccontextmanager
async def site_with_deliveries(folder: Path) -> AsyncIterator[AppInProcess]:
    """Runs an application with `DELIVERIES`, of which `DEAD_LETTERS` are dead letters. Its settings have no webhooks,
    so it delivers nothing."""
    async with running_app(folder) as site:
        async with open_registry(folder) as store:
            outbox = store.outbox
            await outbox.configure([EventReader(name, frozenset(EventAction), ("**",)) for name in WEBHOOKS])
            await outbox.add([NewEvent(EventAction.PUSH, "team/app", time.time(), BY) for _ in range(3)])
            for number, webhook in DEAD_LETTERS:
                await outbox.settle(webhook, [], [FailedDelivery(number, 10, 0.0, time.time(), "no")])
        yield site


async def listed(site: AppInProcess, login: str, query: str, limit: int) -> list[tuple[int, str]]:
    """Follows `next` to the last page. Returns the number of the event and the webhook of each delivery."""
    found, after = list[tuple[int, str]](), ""
    while True:
        path = f"/api/v1/events/deliveries?limit={limit}{query}{after}"
        answer = await site.client("GET", path, {"authorization": login})
        assert answer.status == 200, answer.body
        page: dict[str, Any] = answer.json
        assert 0 < len(page["items"]) <= limit
        found += [(item["event"]["number"], item["webhook"]) for item in page["items"]]
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
@pytest.mark.slow
async def test_each_delivery_is_on_one_page(tmp_path: Path, limit: int) -> None:
    """The pages together have each delivery once, newest event first, however many deliveries of an event fit on a
    page. The same is true of the list of dead letters and of the list of one webhook."""
    async with site_with_deliveries(tmp_path) as site:
        admin = await site.user("root", admin=True)
        assert await listed(site, admin, "", limit) == DELIVERIES
        assert await listed(site, admin, "&dead=true", limit) == DEAD_LETTERS
        assert await listed(site, admin, "&webhook=ci", limit) == [(3, "ci"), (2, "ci"), (1, "ci")]


@pytest.mark.parametrize("after", ["", "3", "3:", ":ci", "x:ci", "-1:ci", "1e3:ci"])
@pytest.mark.slow
async def test_a_malformed_cursor_is_refused(tmp_path: Path, after: str) -> None:
    """A cursor that no page of deliveries had is answered with 400."""
    async with site_with_deliveries(tmp_path) as site:
        admin = await site.user("root", admin=True)
        path = f"/api/v1/events/deliveries?after={after}"
        assert (await site.client("GET", path, {"authorization": admin})).status == 400

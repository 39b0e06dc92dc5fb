"""The pages of the list of events: what the cursor `next` tells accounts that may not see all events, and how many
events one page reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.admin.event_routes import CURSOR_STEP
from registry.auth.rights.principal import Principal
from registry.events.event_feed import PAGE_EVENTS
from storage.access import Action
from storage.composition import open_registry
from storage.outbox import LIST_READER, MAX_ADDED_EVENTS, EventAction, EventReader, NewEvent
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.second_connection import second_connection
from tests.fakes.store_accounts import BY, add_grant

SECRET, OWN, MISSING = "team/secret", "team/own", "team/missing"
HIDDEN_EVENTS = 8 * MAX_ADDED_EVENTS
"""Number of pushes to the repository that the account may not pull. It is more than one page reads."""
LARGE_GAP = 9_000
"""Distance between the numbers of two events in the list, if many pulls between them are only for a webhook."""


def new_event(action: EventAction, repository: str) -> NewEvent:
    """Returns an event of this moment, because the server deletes old events."""
    return NewEvent(action, repository, time.time(), BY)


def push(repository: str) -> NewEvent:
    return new_event(EventAction.PUSH, repository)


@asynccontextmanager
async def site_with_events(folder: Path, *events: NewEvent) -> AsyncIterator[AppInProcess]:
    """Runs an application whose list has these events, oldest first."""
    async with running_app(folder, events={"keep": "1h"}) as site:
        async with open_registry(folder) as store:
            await store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
            for first in range(0, len(events), MAX_ADDED_EVENTS):
                await store.outbox.add(events[first : first + MAX_ADDED_EVENTS])
        yield site


def spread_numbers(folder: Path, distance: int) -> None:
    """Multiplies the numbers of all events by `distance`. Removes the newest event from the list, as if it were only
    for a webhook, and raises its number by `100 * distance`. So the numbers have the same gaps as those of a registry
    that sends the events of pulls to a webhook."""
    db = second_connection(folder / "entrepot.db")
    with db:
        db.execute("UPDATE event SET id = -id * ?", (distance,))  # negative, so that no new number is still in use
        db.execute("UPDATE event SET id = -id")
        newest = "(SELECT max(id) FROM event)"
        db.execute(f"UPDATE event SET kept = 0, id = id + 100 * ? WHERE id = {newest}", (distance,))
    db.close()


async def page_of(site: AppInProcess, login: str, query: str) -> dict[str, Any]:
    answer = await site.client("GET", f"/api/v1/events?{query}", {"authorization": login})
    assert answer.status == 200, answer.body
    page: dict[str, Any] = answer.json
    return page


async def repositories_on(site: AppInProcess, login: str, query: str) -> tuple[list[str], int]:
    """Follows `next` to the last page. Returns the repositories of all events, and the number of pages."""
    found, pages, after = [], 0, ""
    while True:
        page = await page_of(site, login, query + after)
        found += [event["repository"] for event in page["items"]]
        pages += 1
        if page["next"] is None:
            return found, pages
        after = f"&after={page['next']}"


async def test_a_hidden_repository_looks_like_a_missing_one(tmp_path: Path) -> None:
    """For an account that may not pull a repository with events, the list has the same answer as for a repository that
    does not exist: it is empty, and there is no next page. An account that may pull the repository gets pages."""
    async with site_with_events(tmp_path, *[push(SECRET)] * 12) as site:
        alice, bob = await site.user("alice"), await site.user("bob")
        await add_grant(site.accounts, "user:bob", SECRET, "pull")
        for query in ("limit=1", "limit=1&action=push", "limit=1&after=9", "limit=1&action=delete"):
            for name in (SECRET, MISSING):
                page = await page_of(site, alice, f"repository={name}&{query}")
                assert page == {"items": [], "next": None}, (name, query)
        page = await page_of(site, bob, f"repository={SECRET}&limit=1")
        assert (len(page["items"]), page["next"]) == (1, str(page["items"][0]["number"]))
        assert (await repositories_on(site, bob, f"repository={SECRET}&limit=5"))[0] == [SECRET] * 12


async def test_the_end_of_the_list_does_not_depend_on_hidden_events(tmp_path: Path) -> None:
    """The account may pull one repository. Its pages of pushes are the same, whether an older event of another
    repository is a push or a deletion."""
    pages_by_action = []
    for action in (EventAction.PUSH, EventAction.DELETE):
        oldest = new_event(action, SECRET)
        async with site_with_events(tmp_path / action, oldest, push(OWN), push(SECRET)) as site:
            alice = await site.user("alice")
            await add_grant(site.accounts, "user:alice", OWN, "pull")
            pages = [await page_of(site, alice, f"limit={limit}&action=push") for limit in (1, 2, 3)]
            assert [event["repository"] for page in pages for event in page["items"]] == [OWN] * 3
            pages_by_action.append([page["next"] for page in pages])
    assert pages_by_action[0] == pages_by_action[1]


@pytest.mark.slow
async def test_the_cursor_does_not_depend_on_hidden_events(tmp_path: Path) -> None:
    """The account may pull one repository, whose only event is older than many events of another repository. All
    requests of the account have the same `next`, whether or not the hidden events have the action that the request
    names. By this cursor, the account gets to its own event. The pages end in few steps."""
    async with site_with_events(tmp_path, push(OWN), *[push(SECRET)] * HIDDEN_EVENTS) as site:
        alice, root = await site.user("alice"), await site.user("root", admin=True)
        await add_grant(site.accounts, "user:alice", OWN, "pull")
        cursors = set()
        for query in ("limit=1", "limit=100", "limit=1&action=push", "limit=1&action=delete", "limit=7&action=push"):
            page = await page_of(site, alice, query)
            assert page["items"] == []
            cursors.add(page["next"])
        assert len(cursors) == 1
        assert int(cursors.pop()) % CURSOR_STEP == 0
        for query in ("limit=1", "limit=100", "limit=3&action=push"):
            found, pages = await repositories_on(site, alice, query)
            assert found == [OWN]
            assert pages <= 2 + HIDDEN_EVENTS // CURSOR_STEP
        assert (await repositories_on(site, alice, "limit=100&action=delete"))[0] == []
        assert await repositories_on(site, alice, f"repository={OWN}&limit=2") == ([OWN], 1)
        found, _ = await repositories_on(site, root, "limit=1000&action=push")
        assert found == [SECRET] * HIDDEN_EVENTS + [OWN]


async def test_gaps_between_the_numbers_of_events_make_no_empty_pages(tmp_path: Path) -> None:
    """The numbers of the events in the list have large gaps. The first page of an admin and of another account still
    has the events that they may see, also for the 8 events of the overview, and there is no further page."""
    async with site_with_events(tmp_path, *[push(OWN), push(SECRET)] * 4, push(SECRET)) as site:
        spread_numbers(tmp_path, LARGE_GAP)
        alice, root = await site.user("alice"), await site.user("root", admin=True)
        await add_grant(site.accounts, "user:alice", OWN, "pull")
        for query in ("limit=8", "limit=100", "limit=100&action=push"):
            assert await repositories_on(site, root, query) == ([SECRET, OWN] * 4, 1), query
            assert await repositories_on(site, alice, query) == ([OWN] * 4, 1), query
        for login in (alice, root):
            assert await repositories_on(site, login, f"repository={OWN}&limit=4") == ([OWN] * 4, 1)
            assert await repositories_on(site, login, "limit=100&action=delete") == ([], 1)


@pytest.mark.slow
async def test_each_visible_event_is_on_one_page(tmp_path: Path) -> None:
    """The account may see every hundredth event. There are more events than one page reads, and their numbers have
    gaps. Together, the pages have each visible event once, whatever the size of a page is."""
    events = [push(OWN), *[push(SECRET)] * 99] * 25
    async with site_with_events(tmp_path, *events, push(SECRET)) as site:
        spread_numbers(tmp_path, 3)
        alice = await site.user("alice")
        await add_grant(site.accounts, "user:alice", OWN, "pull")
        for limit in (1, 7, 20, 100):
            found, _ = await repositories_on(site, alice, f"limit={limit}&action=push")
            assert found == [OWN] * 25, limit
        assert (await repositories_on(site, alice, "limit=100"))[1] == 2  # the first page cannot read all events


@pytest.mark.parametrize("limit", [8, 1000])
@pytest.mark.slow
async def test_other_requests_run_while_a_page_reads_hidden_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A page for an account that may see none of the events reads many events. Other tasks run each time after at most
    100 events are compared with the rights of the account, however many events the request asks for."""
    checked_events, most_checked_at_once = 0, 0
    may = Principal.may

    def counted(principal: Principal, action: Action, stored_name: str, requested_name: str | None = None) -> bool:
        nonlocal checked_events
        checked_events += stored_name == SECRET
        return may(principal, action, stored_name, requested_name)

    async with site_with_events(tmp_path, *[push(SECRET)] * (4 * MAX_ADDED_EVENTS)) as site:
        monkeypatch.setattr(Principal, "may", counted)
        reading = asyncio.create_task(page_of(site, await site.user("alice"), f"limit={limit}"))
        while not reading.done():
            most_checked_at_once, checked_events = max(most_checked_at_once, checked_events), 0
            await asyncio.sleep(0)
        assert (await reading)["items"] == []
        assert 0 < max(most_checked_at_once, checked_events) <= PAGE_EVENTS

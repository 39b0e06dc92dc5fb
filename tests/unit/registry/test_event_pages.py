"""The pages of the list of events, for accounts that may not see all events: what the cursor `next` tells them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from registry.admin.event_routes import EVENTS_IN_WINDOW
from storage.composition import open_registry
from storage.outbox import LIST_READER, MAX_ADDED_EVENTS, EventAction, EventReader, NewEvent
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.store_accounts import BY, add_grant

SECRET, OWN, MISSING = "team/secret", "team/own", "team/missing"
HIDDEN_EVENTS = 8 * MAX_ADDED_EVENTS
"""Number of pushes to the repository that the account may not pull. It is more than one page reads."""


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
        assert int(cursors.pop()) % EVENTS_IN_WINDOW == 0
        for query in ("limit=1", "limit=100", "limit=3&action=push"):
            found, pages = await repositories_on(site, alice, query)
            assert found == [OWN]
            assert pages <= 2 + HIDDEN_EVENTS // EVENTS_IN_WINDOW
        assert (await repositories_on(site, alice, "limit=100&action=delete"))[0] == []
        assert await repositories_on(site, alice, f"repository={OWN}&limit=2") == ([OWN], 1)
        found, _ = await repositories_on(site, root, "limit=1000&action=push")
        assert found == [SECRET] * HIDDEN_EVENTS + [OWN]

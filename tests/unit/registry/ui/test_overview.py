"""The page *Overview*, and the API from which programs get the same figures."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from storage.access import Grantee
from storage.activity import DAY_SECONDS, HOUR_SECONDS, Activity
from storage.cached_images import CacheSummary
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern
from tests.fakes.auth_worker import AuthClock
from tests.fakes.page_store import add_cached
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.ui.test_pages import Site, site

HTMX = {"hx-request": "true"}
"""The header with which the page's script (htmx) requests a part of the page."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Site]:
    """Yields a running registry with quotas and events. alice may pull from team/** and from docker.io/library/**, and
    everyone may pull from public/**."""
    settings: dict[str, Any] = {
        "quota": [{"prefix": "secret-quota/", "max_size": "10GiB", "max_tags": 100}],
        "events": {"keep": "24h"},
        "cache": {"max": "20GiB"},
        "clock": AuthClock(),  # stands still, so that no test crosses the end of an hour
    }
    async with site(tmp_path, **settings) as server:
        for repo in ("public/a", "team/b", "team/c", "secret/d", "docker.io/library/ubuntu", "docker.io/corp/e"):
            await add_cached(server.store, repo, "1")
        for repo in ("team/pushed", "secret/pushed"):
            name = RepositoryName(repo)
            config = await push_blob(server.store, name, b"{}")
            await server.store.put_manifest(name, image_of(config), [Tag("v9")], by=BY)
        await add_grant(server.app.accounts, "everyone", "public/**", "pull")
        await add_grant(server.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(server.app.accounts, "user:alice", "docker.io/library/**", "pull")
        yield server


async def test_admins_see_the_whole_registry(server: Site) -> None:
    """Admins see figures, charts, upstreams, budgets and the audit log. Each chart has its values in a table too, for
    people who cannot see charts."""
    application = server.app.app  # `server.app` is the tests' helper for the application
    now = application.factory.clock()
    activity = Activity(pulls=10, pushes=2, hits=30, misses=10, fetched_bytes=5 * 2**20, saved_bytes=9 * 2**20)
    await server.store.activity.add(now, activity)
    await server.store.activity.add(now - 3 * DAY_SECONDS, Activity(pulls=1234))
    async with server.browser() as browser:
        await server.log_in(browser, "root")
        page = (await browser.get("/ui/overview")).text
    facts = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]*)", page))
    assert facts["Pulls"] == "10"
    assert facts["Hit ratio of the mirror"] == "75.0 %"
    assert facts["Bytes that did not have to be fetched"] == "9.00 MiB"
    assert "10.0 GiB" in facts["Quota of secret-quota/"]
    assert "20.0 GiB" in facts["Cache of all upstreams"]
    assert re.findall(r'<desc id="month-1-text">([^<]+)</desc>', page) == [
        "The last 30 days. Pulls: 1,244. Pushes: 2. "
    ]
    assert page.count('role="img"') == 6
    # The tables of the charts have rows for 24 hours and 30 days.
    assert page.count('<th scope="row"><time') + len(re.findall(r'<th scope="row">20\d\d-', page)) == 24 + 30
    assert "http://127.0.0.1:9" in page
    assert "<code>grant.put</code>" in page
    assert "Nothing at the moment." in page


@pytest.mark.slow
async def test_the_page_does_not_count_images(server: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page does not count images. Counting many images takes seconds, and the page is updated every five
    seconds."""

    async def summary(upstream: str) -> CacheSummary:  # counts the images of an upstream
        raise AssertionError("the images are counted")

    monkeypatch.setattr(server.store.cached_images, "summary", summary)
    async with server.browser() as browser:
        await server.log_in(browser, "root")
        for path in ("/ui/overview", "/ui/overview/now", "/ui/system"):
            assert (await browser.get(path, headers=HTMX)).status_code == 200


@pytest.mark.slow
async def test_other_visitors_see_only_their_own_figures(server: Site) -> None:
    """Visitors who are not admins see how many repositories they may pull. With an account, they also see recent
    changes of these repositories. They see no figures of the whole registry, and no name of a repository that they may
    not pull."""
    for visitor, counts in (
        ("", {"Hosted": "1"}),
        ("alice", {"Hosted": "4", "Cached from docker.io": "1"}),
    ):
        async with server.browser() as browser:
            if visitor:
                await server.log_in(browser, visitor)
            page = (await browser.get("/ui/overview")).text
            assert dict(re.findall(r"<dt>([^<]+)</dt><dd><a [^>]+>([^<]+)</a>", page)) == counts
            assert ("team/pushed" in page) is (visitor == "alice")
            for hidden in ("secret", "corp", "127.0.0.1:9", "<svg", "GiB", "grant.put", 'id="now"'):
                assert hidden not in page, (visitor, hidden)
            current_part = await browser.get("/ui/overview/now", headers=HTMX)
            if visitor:
                assert current_part.status_code == 403
            else:
                assert current_part.headers["hx-redirect"].startswith("/ui/login")


async def test_the_count_of_repositories_is_limited(server: Site) -> None:
    """The page counts at most fifty repositories, and says "50 or more" if there are more."""
    for number in range(60):
        await add_cached(server.store, f"public/{number}", "1")
    async with server.browser() as browser:
        assert "50 or more" in (await browser.get("/ui/overview")).text


async def test_a_visitor_without_rights(server: Site) -> None:
    """A visitor who may pull nothing is told that there is nothing to see."""
    await server.app.accounts.remove_grant(Grantee.parse("everyone"), NamePattern("public/**"), by=BY)
    async with server.browser() as browser:
        assert "There is nothing here that you may see." in (await browser.get("/ui/overview")).text


@pytest.mark.slow
async def test_the_current_part_is_updated(server: Site) -> None:
    """The part of the page about the present is requested again by htmx. A visitor can stop these updates. Without
    htmx, the path of the part redirects to the page."""
    await server.store.jobs.add("unknown", {}, actor="root")  # no worker runs a job of an unknown kind
    async with server.browser() as browser:
        await server.log_in(browser, "root")
        page = (await browser.get("/ui/overview")).text
        part = (await browser.get("/ui/overview/now", headers=HTMX)).text
        assert 'hx-get="/ui/overview/now"' in page
        assert 'hx-get="/ui/overview/now"' in part
        assert "<html" not in part
        assert re.search(r'<th scope="row">unknown</th>', part)
        assert 'hx-get="/ui/overview/now"' not in (await browser.get("/ui/overview?live=off")).text
        assert (await browser.get("/ui/overview/now")).headers["location"] == "/ui/overview"


async def test_a_registry_without_mirrors(tmp_path: Path) -> None:
    """If the registry mirrors nothing, the page does not mention mirrors."""
    async with site(tmp_path, upstream=[]) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        page = (await browser.get("/ui/overview")).text.partition("<main")[2]
        assert page.count('role="img"') == 2
        assert "irror" not in page
        assert "pstream" not in page


async def test_the_api_has_the_same_figures(server: Site) -> None:
    """Admins get the same figures from the API. The figures include requests that are counted only in memory, and not
    stored yet."""
    application = server.app.app  # `server.app` is the tests' helper for the application
    now = application.factory.clock()
    await server.store.activity.add(now - HOUR_SECONDS, Activity(pulls=5))
    # Counts three more pulls, as this process does in its memory. A cell is the number in which it counts requests of
    # one kind.
    metrics = application.telemetry.metrics
    metrics.cells.own[metrics.requests.cell("manifests", "GET", "200")] += 3
    token = await server.app.token("root")
    answer = await server.app.client("GET", "/api/v1/activity", {"authorization": token})
    day, month = answer.json["day"], answer.json["month"]
    assert (day["bucket_seconds"], len(day["buckets"]), day["total"]["pulls"]) == (HOUR_SECONDS, 24, 8)
    assert (month["bucket_seconds"], len(month["buckets"]), month["total"]["pulls"]) == (DAY_SECONDS, 30, 8)
    assert [bucket["pulls"] for bucket in day["buckets"]][-2:] == [5, 3]
    refused = await server.app.client("GET", "/api/v1/activity", {"authorization": await server.app.token("alice")})
    assert refused.status == 403

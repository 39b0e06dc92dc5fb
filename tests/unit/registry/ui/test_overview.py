"""The page *Overview*, and the API behind its charts."""

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
from tests.fakes.page_store import add_cached
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.ui.test_pages import Site, site

HTMX = {"hx-request": "true"}


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Site]:
    """Yields a site with quotas and events. alice may pull team/** and some cached images, and everyone public/**."""
    settings: dict[str, Any] = {
        "quota": [{"prefix": "secret-quota/", "max_size": "10GiB", "max_tags": 100}],
        "events": {"keep": "24h"},
        "cache": {"max": "20GiB"},
    }
    async with site(tmp_path, **settings) as here:
        for repo in ("public/a", "team/b", "team/c", "secret/d", "docker.io/library/ubuntu", "docker.io/corp/e"):
            await add_cached(here.store, repo, "1")
        for repo in ("team/pushed", "secret/pushed"):
            name = RepositoryName(repo)
            config = await push_blob(here.store, name, b"{}")
            await here.store.put_manifest(name, image_of(config), [Tag("v9")], by=BY)
        await add_grant(here.app.accounts, "everyone", "public/**", "pull")
        await add_grant(here.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(here.app.accounts, "user:alice", "docker.io/library/**", "pull")
        yield here


async def test_admins_see_the_whole_registry(here: Site) -> None:
    """Admins see figures, charts with a table for those who cannot see charts, upstreams, budgets and the audit log."""
    now = here.app.app.factory.clock()
    await here.store.activity.add(now, Activity(10, 2, 30, 10, 5 * 2**20, 9 * 2**20))
    await here.store.activity.add(now - 3 * DAY_SECONDS, Activity(pulls=1234))
    async with here.browser() as browser:
        await here.log_in(browser, "root")
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
    assert page.count('<th scope="row"><time') + len(re.findall(r'<th scope="row">20\d\d-', page)) == 54
    assert "http://127.0.0.1:9" in page
    assert "<code>grant.put</code>" in page
    assert "Nothing at the moment." in page


async def test_pages_do_not_count_images(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page does not count images: that takes seconds where there are many, and the page is updated every five
    seconds."""

    async def summary(upstream: str) -> CacheSummary:
        raise AssertionError("the images are counted")

    monkeypatch.setattr(here.store.cached_images, "summary", summary)
    async with here.browser() as browser:
        await here.log_in(browser, "root")
        for path in ("/ui/overview", "/ui/overview/now", "/ui/system"):
            assert (await browser.get(path, headers=HTMX)).status_code == 200


async def test_others_see_what_they_may_pull(here: Site) -> None:
    """Other visitors see how many repositories they may pull, and with an account what happened to these. They see no
    figures of the whole registry, and no name of a repository that they may not pull."""
    for visitor, counted in (
        ("", {"Hosted": "1"}),
        ("alice", {"Hosted": "4", "Cached from docker.io": "1"}),
    ):
        async with here.browser() as browser:
            if visitor:
                await here.log_in(browser, visitor)
            page = (await browser.get("/ui/overview")).text
            assert dict(re.findall(r"<dt>([^<]+)</dt><dd><a [^>]+>([^<]+)</a>", page)) == counted
            assert ("team/pushed" in page) is (visitor == "alice")
            for hidden in ("secret", "corp", "127.0.0.1:9", "<svg", "GiB", "grant.put", 'id="now"'):
                assert hidden not in page, (visitor, hidden)
            present = await browser.get("/ui/overview/now", headers=HTMX)
            if visitor:
                assert present.status_code == 403
            else:
                assert present.headers["hx-redirect"].startswith("/ui/login")


async def test_many_repositories_are_not_counted(here: Site) -> None:
    """If there are too many repositories to count, the page says that there are more."""
    for number in range(60):
        await add_cached(here.store, f"public/{number}", "1")
    async with here.browser() as browser:
        assert "50 or more" in (await browser.get("/ui/overview")).text


async def test_somebody_who_may_see_nothing(here: Site) -> None:
    """A visitor who may pull nothing is told so."""
    await here.app.accounts.remove_grant(Grantee.parse("everyone"), NamePattern("public/**"), by=BY)
    async with here.browser() as browser:
        assert "There is nothing here that you may see." in (await browser.get("/ui/overview")).text


async def test_the_present_updates_itself(here: Site) -> None:
    """htmx requests that part alone, and a visitor can stop the updates. Without htmx the part's address leads to the
    page."""
    await here.store.jobs.add("unknown", {}, actor="root")  # so nothing runs it
    async with here.browser() as browser:
        await here.log_in(browser, "root")
        whole = (await browser.get("/ui/overview")).text
        part = (await browser.get("/ui/overview/now", headers=HTMX)).text
        assert 'hx-get="/ui/overview/now"' in whole
        assert 'hx-get="/ui/overview/now"' in part
        assert "<html" not in part
        assert re.search(r'<th scope="row">unknown</th>', part)
        assert 'hx-get="/ui/overview/now"' not in (await browser.get("/ui/overview?live=off")).text
        assert (await browser.get("/ui/overview/now")).headers["location"] == "/ui/overview"


async def test_a_registry_without_mirrors(tmp_path: Path) -> None:
    """Without mirrors the page has nothing about mirrors."""
    async with site(tmp_path, upstream=[]) as here, here.browser() as browser:
        await here.log_in(browser, "root")
        page = (await browser.get("/ui/overview")).text.partition("<main")[2]
        assert page.count('role="img"') == 2
        assert "irror" not in page
        assert "pstream" not in page


async def test_programs_get_the_same_figures(here: Site) -> None:
    """The API has the same figures, including those that are not stored yet, for admins only."""
    app = here.app.app
    now = app.factory.clock()
    await here.store.activity.add(now - HOUR_SECONDS, Activity(pulls=5))
    metrics = app.telemetry.metrics
    metrics.cells.own[metrics.requests.cell("manifests", "GET", "200")] += 3
    token = await here.app.token("root")
    answer = await here.app.client("GET", "/api/v1/activity", {"authorization": token})
    day, month = answer.json["day"], answer.json["month"]
    assert (day["bucket_seconds"], len(day["buckets"]), day["total"]["pulls"]) == (HOUR_SECONDS, 24, 8)
    assert (month["bucket_seconds"], len(month["buckets"]), month["total"]["pulls"]) == (DAY_SECONDS, 30, 8)
    assert [bucket["pulls"] for bucket in day["buckets"]][-2:] == [5, 3]
    refused = await here.app.client("GET", "/api/v1/activity", {"authorization": await here.app.token("alice")})
    assert refused.status == 403

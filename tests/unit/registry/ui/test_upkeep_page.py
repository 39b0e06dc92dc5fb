"""The page about upkeep, without a browser: who sees it, what it shows, and what its forms start."""

from __future__ import annotations

import re
from pathlib import Path

from tests.fakes.page_store import add_cached
from tests.unit.registry.ui.test_pages import FROM_PAGE, Site, site

PATHS = ("/ui/upkeep", "/ui/upkeep/jobs", "/ui/upkeep/newest-jobs", "/ui/upkeep/retention")
KINDS = {
    "gc": ("gc", {"dry_run": False, "strays": False}),
    "gc-preview": ("gc", {"dry_run": True, "strays": False}),
    "fsck": ("fsck", {"repair": False, "hash": False}),
    "scrub": ("scrub", {"rate": None, "keep_going": False}),
    "retention": ("retention", {}),
    "evict": ("evict", {"to": None, "upstream": None, "dry_run": False}),
}
RULES = [{"repositories": ["team/*"], "keep_last": 2, "keep_tags": ["v*"]}]


async def without_jobs(here: Site) -> None:
    """Makes jobs wait."""
    work = here.app.app.service.work
    assert work is not None
    await work.hand_over()


async def test_it_is_for_admins(tmp_path: Path) -> None:
    """Only admins see the pages and start work; forms of another site are refused."""
    async with site(tmp_path) as here, here.browser() as browser:
        for path in PATHS:
            assert (await browser.get(path)).status_code == 303
        await here.log_in(browser, "alice")
        for path in PATHS:
            assert (await browser.get(path)).status_code == 403
        start = {"kind": "gc", "sure": "yes"}
        assert (await browser.post("/ui/upkeep/start", data=start, headers=FROM_PAGE)).status_code == 403
        assert 'href="/ui/upkeep"' not in (await browser.get("/ui/repositories")).text
        await here.log_in(browser, "root")
        for path in PATHS:
            assert (await browser.get(path)).status_code == 200
        foreign = await browser.post("/ui/upkeep/start", data=start, headers={"sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403
        assert (await here.store.jobs.jobs(None, 10)).items == []


async def test_each_kind_of_work_is_started(tmp_path: Path) -> None:
    """Work is started as a job of the visitor. Work that deletes content needs a confirmation. If work cannot be
    started, the page says why."""
    async with site(tmp_path, retention=RULES, cache={"max": 10**9}) as here, here.browser() as browser:
        await here.log_in(browser, "root")
        await without_jobs(here)
        for kind, (job_kind, arguments) in KINDS.items():
            answer = await browser.post("/ui/upkeep/start", data={"kind": kind}, headers=FROM_PAGE)
            if kind in ("retention", "evict"):
                assert (answer.status_code, 'name="sure"' in answer.text) == (200, True)
                assert await here.store.jobs.active(job_kind) == []
                data = {"kind": kind, "sure": "yes"}
                answer = await browser.post("/ui/upkeep/start", data=data, headers=FROM_PAGE)
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/upkeep#jobs")
            job = (await here.store.jobs.active(job_kind))[-1]
            assert (job.arguments, job.actor) == (arguments, "root")
        for kind, status in (("scrub", 409), ("backup", 409), ("", 400), ("import-remote", 400)):
            answer = await browser.post("/ui/upkeep/start", data={"kind": kind}, headers=FROM_PAGE)
            assert answer.status_code == status
        page = (await browser.get("/ui/upkeep")).text
        numbers = re.findall(r'id="stop-(\d+)"', page)
        assert len(numbers) == len(KINDS)
        stop = {"job": numbers[0], "next": "/ui/upkeep"}
        assert (await browser.post("/ui/upkeep/stop", data=stop, headers=FROM_PAGE)).status_code == 303
        assert f'id="stop-{numbers[0]}"' not in (await browser.get("/ui/upkeep/newest-jobs")).text
        assert len(re.findall(r'scope="row"', (await browser.get("/ui/upkeep/jobs?kind=gc")).text)) == 2
        for query in ("kind=none", "after=x"):
            assert (await browser.get(f"/ui/upkeep/jobs?{query}")).status_code == 400


async def test_budgets_quotas_and_backups(tmp_path: Path) -> None:
    """Budgets and quotas are shown with their limits. If the directory of backups cannot be read, the page says so."""
    target = tmp_path / "backups"
    (target / "snapshots" / "bad").mkdir(parents=True)
    async with (
        site(
            tmp_path / "data",
            quota=[{"prefix": "team/", "max_size": 2**30, "max_tags": 9}],
            cache={"max": 2**31},
            backup={"target": target},
        ) as here,
        here.browser() as browser,
    ):
        await here.log_in(browser, "root")
        page = (await browser.get("/ui/upkeep")).text
        for shown in ("Quota of team/", "1.00 GiB", "Cache, all upstreams", "2.00 GiB", "There is no backup yet"):
            assert shown in page, shown
        (target / "snapshots" / "bad" / "manifest.json").write_text("<script>")
        page = (await browser.get("/ui/upkeep")).text
        assert "cannot be read" in page
        assert "<script>alert" not in page


async def test_the_preview_of_retention(tmp_path: Path) -> None:
    """The rules, what they would do in each repository, and for one what they decide on each tag."""
    async with site(tmp_path, retention=RULES) as here, here.browser() as browser:
        await here.log_in(browser, "root")
        for number in range(4):
            await add_cached(here.store, "team/app", f"build-{number}", of=str(number))
        await add_cached(here.store, "team/app", "v1", of="v1")
        await add_cached(here.store, "team/web", "v1")
        await add_cached(here.store, "other/app", "v1")
        listed = (await browser.get("/ui/upkeep/retention")).text
        counts = re.findall(
            r'retention\?repository=([^"]+)">.*?</a>.*?data-label="Rule".*?>(\d+)</td>.*?>(\d+)</td>', listed, re.DOTALL
        )
        assert counts == [("team%2Fapp", "2", "3"), ("team%2Fweb", "1", "0")]
        after = (await browser.get("/ui/upkeep/retention?after=team/app")).text
        assert ("team%2Fapp" in after, "team%2Fweb" in after) == (False, True)
        page = (await browser.get("/ui/upkeep/retention?repository=team/app")).text
        decisions = re.findall(r'scope="row"><a [^>]+>([^<]+)</a></th>\s*<td [^>]+>(\w+)', page)
        assert dict(decisions) == {
            "build-0": "deleted",
            "build-1": "deleted",
            "build-2": "deleted",
            "build-3": "kept",
            "v1": "kept",
        }
        assert "keeps the last 2 tags" in page
        for name, status in (("other/app", 404), ("UPPER", 400), ("%3Cscript%3E", 400), ("", 200)):
            answer = await browser.get(f"/ui/upkeep/retention?repository={name}")
            assert (answer.status_code, "<script>" in answer.text) == (status, False)

"""The page about upkeep (garbage collection, checks, retention, backups): who sees the page, what it shows, and which
jobs its forms start. The tests send requests without a browser."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from registry.ui.pages import MAX_RENDERED_PAGES
from registry.ui.upkeep_page import RETENTION_PATH
from registry.upkeep.retention import preview
from storage.jobs import MAX_QUEUED_JOBS
from tests.fakes.app_in_process import until
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
"""For each kind of work in the form: the kind of job that it starts, and the arguments of the job."""
RULES = [{"repositories": ["team/*"], "keep_last": 2, "keep_tags": ["v*"]}]


async def stop_running_jobs(server: Site) -> None:
    """Makes this process run no jobs, so that new jobs stay in the queue."""
    work = server.app.app.service.work
    assert work is not None
    await work.hand_over()


@pytest.mark.slow
async def test_the_upkeep_pages_are_for_admins(tmp_path: Path) -> None:
    """Only admins see the pages and may start work. Forms of another site are refused."""
    async with site(tmp_path) as server, server.browser() as browser:
        for path in PATHS:
            assert (await browser.get(path)).status_code == 303
        await server.log_in(browser, "alice")
        for path in PATHS:
            assert (await browser.get(path)).status_code == 403
        start = {"kind": "gc", "sure": "yes"}
        assert (await browser.post("/ui/upkeep/start", data=start, headers=FROM_PAGE)).status_code == 403
        assert 'href="/ui/upkeep"' not in (await browser.get("/ui/repositories")).text
        await server.log_in(browser, "root")
        for path in PATHS:
            assert (await browser.get(path)).status_code == 200
        foreign = await browser.post("/ui/upkeep/start", data=start, headers={"sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403
        assert (await server.store.jobs.jobs(None, 10)).items == []


@pytest.mark.slow
async def test_each_kind_of_work_is_started(tmp_path: Path) -> None:
    """A form starts a job in the name of the visitor. A job that deletes content needs a confirmation. If a job cannot
    be started, the page says why."""
    async with site(tmp_path, retention=RULES, cache={"max": 10**9}) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        await stop_running_jobs(server)
        for kind, (job_kind, arguments) in KINDS.items():
            answer = await browser.post("/ui/upkeep/start", data={"kind": kind}, headers=FROM_PAGE)
            if kind in ("retention", "evict"):
                assert (answer.status_code, 'name="sure"' in answer.text) == (200, True)
                assert await server.store.jobs.active(job_kind) == []
                data = {"kind": kind, "sure": "yes"}
                answer = await browser.post("/ui/upkeep/start", data=data, headers=FROM_PAGE)
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/upkeep#jobs")
            job = (await server.store.jobs.active(job_kind))[-1]
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
        for _ in range(MAX_QUEUED_JOBS - 1):
            await server.store.jobs.add("fsck", {}, actor="root")
        answer = await browser.post("/ui/upkeep/start", data={"kind": "fsck"}, headers=FROM_PAGE)
        assert answer.status_code == 429
        assert "100 jobs of the kind fsck are queued already" in answer.text
        assert len(re.findall(r'scope="row"', (await browser.get("/ui/upkeep/jobs?kind=gc")).text)) == 2
        for query in ("kind=none", "after=x"):
            assert (await browser.get(f"/ui/upkeep/jobs?{query}")).status_code == 400


async def test_budgets_quotas_and_backups(tmp_path: Path) -> None:
    """The page shows budgets and quotas with their limits. If the directory of backups cannot be read, the page says
    so."""
    target = tmp_path / "backups"
    (target / "snapshots" / "bad").mkdir(parents=True)
    async with (
        site(
            tmp_path / "data",
            quota=[{"prefix": "team/", "max_size": 2**30, "max_tags": 9}],
            cache={"max": 2**31},
            backup={"target": target},
        ) as server,
        server.browser() as browser,
    ):
        await server.log_in(browser, "root")
        page = (await browser.get("/ui/upkeep")).text
        for text in ("Quota of team/", "1.00 GiB", "Cache, all upstreams", "2.00 GiB", "There is no backup yet"):
            assert text in page, text
        (target / "snapshots" / "bad" / "manifest.json").write_text("<script>")
        page = (await browser.get("/ui/upkeep")).text
        assert "cannot be read" in page
        assert "<script>alert" not in page


@pytest.mark.slow
async def test_the_retention_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows the retention rules and the number of tags that they would keep and delete in each repository. For
    one repository, it shows the decision on each tag. It says if the totals of the repository are not complete."""
    async with site(tmp_path, retention=RULES) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        for number in range(4):
            await add_cached(server.store, "team/app", f"build-{number}", of=str(number))
        await add_cached(server.store, "team/app", "v1", of="v1")
        await add_cached(server.store, "team/web", "v1")
        await add_cached(server.store, "other/app", "v1")
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
        assert "or more" not in page
        monkeypatch.setattr(preview, "MAX_COUNTED_MANIFESTS", 1)
        page = (await browser.get("/ui/upkeep/retention?repository=team/app")).text
        assert "3 or more" in page
        assert "<code>entrepot retention preview team/app</code>" in page
        for name, status in (("other/app", 404), ("UPPER", 400), ("%3Cscript%3E", 400), ("", 200)):
            answer = await browser.get(f"/ui/upkeep/retention?repository={name}")
            assert (answer.status_code, "<script>" in answer.text) == (status, False)


@pytest.mark.parametrize("query", ["", "?repository=team/app"])
@pytest.mark.slow
async def test_waiting_for_a_retention_preview_keeps_nobody_from_pages(tmp_path: Path, query: str) -> None:
    """A page that waits for a preview of retention holds no slot for pages, so that other pages are rendered
    meanwhile."""
    async with site(tmp_path, retention=RULES) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        await add_cached(server.store, "team/app", "1")
        assert server.app.app.service.access is not None
        slots = server.app.app.service.access.management.upkeep.retention_preview.slots
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as busy:
            for number in range(preview.MAX_PREVIEWS):
                await busy.enter_async_context(slots.slot(f"visitor {number}"))
            waiting = [tasks.create_task(browser.get(f"{RETENTION_PATH}{query}")) for _ in range(MAX_RENDERED_PAGES)]
            await until(lambda: slots.pending == preview.MAX_PREVIEWS + len(waiting))
            async with asyncio.timeout(30):
                assert (await browser.get("/ui/repositories")).status_code == 200
        assert [task.result().status_code for task in waiting] == [200] * len(waiting)

"""The page about the mirror: who sees the page, what it shows, and what its forms do. The tests send requests without a
browser."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import pytest

from registry.single_flight import cancel_and_wait
from registry.ui.pages import MAX_RENDERED_PAGES_PER_VISITOR
from storage.jobs import JobState
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.page_store import add_cached, add_index
from tests.fakes.registry_content import all_tags
from tests.fakes.store_accounts import BY
from tests.unit.registry.ui.test_pages import FROM_PAGE, site

UBUNTU = "docker.io/library/ubuntu"
PATHS = ("/ui/mirror", "/ui/mirror/images", "/ui/mirror/downloads")
FORMS = ("refresh", "freeze", "unfreeze", "purge", "warm")


@pytest.mark.slow
async def test_the_mirror_pages_are_for_admins(tmp_path: Path) -> None:
    """Only admins see the pages and the link to them, and only admins may send their forms. Forms of another site are
    refused."""
    async with site(tmp_path) as server, server.browser() as browser:
        for path in PATHS:
            assert (await browser.get(path)).status_code == 303
        await server.log_in(browser, "alice")
        for path in PATHS:
            assert (await browser.get(path)).status_code == 403
        for form in FORMS:
            data = {"reference": f"{UBUNTU}:24.04", "references": "ubuntu", "sure": "yes"}
            assert (await browser.post(f"/ui/mirror/{form}", data=data, headers=FROM_PAGE)).status_code == 403
        assert 'href="/ui/mirror"' not in (await browser.get("/ui/repositories")).text
        await server.log_in(browser, "root")
        assert 'href="/ui/mirror"' in (await browser.get("/ui/repositories")).text
        for path in PATHS:
            assert (await browser.get(path)).status_code == 200
        for form in (*FORMS, "../upkeep/stop"):
            foreign = await browser.post(f"/ui/mirror/{form}", data={}, headers={"sec-fetch-site": "cross-site"})
            assert foreign.status_code == 403
        assert await server.store.jobs.active("warm") == []


async def test_without_an_upstream(tmp_path: Path) -> None:
    """If the registry has no upstream, the pages say so."""
    async with site(tmp_path, upstream=[]) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        assert "mirrors no other one" in (await browser.get("/ui/mirror")).text
        assert "No image is cached" in (await browser.get("/ui/mirror/images")).text


async def test_cached_images(tmp_path: Path) -> None:
    """The page lists the cached images in the order and with the filter of its query. A long list has several pages."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        for number in range(27):
            await add_cached(server.store, f"docker.io/team/app{number:02}", "v1", of=str(number))
        index = await add_index(server.store, UBUNTU, "24.04", [("linux", "amd64"), ("linux", "arm64")], present=2)
        await add_cached(server.store, "team/hosted", "v1")

        async def names(query: str) -> list[str]:
            answer = await browser.get(f"/ui/mirror/images?{query}")
            assert answer.status_code == 200, answer.text
            next_link = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', answer.text)
            listed = re.findall(r'<a href="/ui/repositories/([^@"]+)@', answer.text)
            return listed + (await names(next_link[1].partition("?")[2].replace("&amp;", "&")) if next_link else [])

        apps = [f"docker.io/team/app{number:02}" for number in range(27)]
        assert await names("sort=oldest-pull") == [*apps, UBUNTU]
        assert await names("sort=newest-pull") == [UBUNTU, *apps[::-1]]
        assert await names("q=APP2&in=docker.io") == apps[20:]
        assert await names("q=%3Cscript%3E") == []
        page = (await browser.get("/ui/mirror/images?q=ubuntu")).text
        assert f'value="{UBUNTU}@{index.digest}"' in page
        for query, status in (("sort=colour", 400), ("after=x", 400), ("after=-1", 400), ("in=ghcr.io", 404)):
            assert (await browser.get(f"/ui/mirror/images?{query}")).status_code == status


async def test_a_purge_needs_a_confirmation(tmp_path: Path) -> None:
    """A purge deletes an image from the cache. Only the confirmed form deletes it. An image that a frozen tag needs
    stays until the tag is unfrozen."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        image = await add_cached(server.store, UBUNTU, "24.04", "lts")
        reference = {"reference": f"{UBUNTU}@{image.digest}"}

        async def purge(**fields: str) -> tuple[int, str]:
            answer = await browser.post("/ui/mirror/purge", data={**reference, **fields}, headers=FROM_PAGE)
            return answer.status_code, answer.text

        await server.store.upstream_tags.freeze(RepositoryName(UBUNTU), Tag("lts"), Digest(image.digest), by=BY)
        status, text = await purge()
        assert (status, 'name="sure"' in text) == (200, True)
        status, text = await purge(sure="yes")
        assert (status, "is frozen at" in text) == (403, True)
        assert "24.04" in (await browser.get("/ui/mirror/images")).text
        assert f'value="{UBUNTU}:lts"' in (await browser.get("/ui/mirror")).text
        unfrozen = await browser.post("/ui/mirror/unfreeze", data={"reference": f"{UBUNTU}:lts"}, headers=FROM_PAGE)
        assert "follows the upstream again" in unfrozen.text
        status, text = await purge(sure="yes")
        assert (status, "deleted from the cache" in text) == (200, True)
        assert "No image is cached" in (await browser.get("/ui/mirror/images")).text
        status, text = await purge(sure="yes")
        assert (status, 'role="alert"' in text) == (404, True)


async def test_purge_of_a_repository(tmp_path: Path) -> None:
    """The purge of a repository needs a confirmation too. It deletes all cached images of this repository, and none of
    another."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        for number in range(2):
            await add_cached(server.store, UBUNTU, f"24.0{number}", of=str(number))
        await add_cached(server.store, "docker.io/library/debian", "12")

        async def purge(reference: str, **fields: str) -> tuple[int, str]:
            data = {"reference": reference, "everything": "yes", **fields}
            answer = await browser.post("/ui/mirror/purge", data=data, headers=FROM_PAGE)
            return answer.status_code, answer.text

        status, text = await purge("ubuntu:24.04")
        assert (status, 'name="everything" value="yes"' in text) == (200, True)
        assert '<h1 class="name">ubuntu</h1>' in text
        assert len(await all_tags(server.store, RepositoryName(UBUNTU))) == 2
        status, text = await purge("ubuntu:24.04", sure="yes")
        assert (status, "deleted from the cache" in text) == (200, True)
        images = (await browser.get("/ui/mirror/images")).text
        assert (UBUNTU in images, "docker.io/library/debian" in images) == (False, True)
        for reference, status in (("<script>", 400), ("ubuntu", 404), ("team/none", 404)):
            # For a valid reference, the unconfirmed form asks for the confirmation, so only the confirmed form fails.
            for fields in ({}, {"sure": "yes"}) if status == 400 else ({"sure": "yes"},):
                assert (await purge(reference, **fields))[0] == status, reference


@pytest.mark.slow
async def test_an_unavailable_upstream(tmp_path: Path) -> None:
    """If the upstream cannot be reached, the page is still sent, and a refresh shows an error. An invalid reference is
    shown as text."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        await add_cached(server.store, UBUNTU, "24.04")
        assert "http://127.0.0.1:9" in (await browser.get("/ui/mirror")).text
        for form in ("refresh", "freeze"):
            for reference, status in (
                ("ubuntu:none", 502),
                ("<script>", 400),
                ("Ubuntu:1", 400),
                ("x.test/app:1", 404),
            ):
                answer = await browser.post(f"/ui/mirror/{form}", data={"reference": reference}, headers=FROM_PAGE)
                assert (answer.status_code, 'role="alert"' in answer.text) == (status, True), (form, reference)
                assert "<script>" not in answer.text
            for reference in ("", "x" * 601):
                answer = await browser.post(f"/ui/mirror/{form}", data={"reference": reference}, headers=FROM_PAGE)
                assert answer.status_code == 400


async def test_warming_is_started_and_stopped(tmp_path: Path) -> None:
    """A form starts a job that downloads images into the cache. The page shows the job, and another form stops it."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "root")
        work = server.app.app.service.work
        assert work is not None
        await work.hand_over()  # now this process runs no jobs, so the job stays in the queue
        data = {"references": "ubuntu:24.04\r\n debian:12\r\n", "platform": "linux/amd64 linux/arm64"}
        answer = await browser.post("/ui/mirror/warm", data=data, headers=FROM_PAGE)
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/mirror#downloads")
        (job,) = await server.store.jobs.active("warm")
        assert job.arguments == {
            "references": ["ubuntu:24.04", "debian:12"],
            "platforms": ["linux/amd64", "linux/arm64"],
        }
        page = (await browser.get("/ui/mirror/downloads")).text
        assert f'id="stop-{job.id}"' in page
        stop = {"job": str(job.id), "next": "/ui/mirror"}
        stopped = await browser.post("/ui/upkeep/stop", data=stop, headers=FROM_PAGE)
        assert stopped.headers["location"] == "/ui/mirror"
        assert await server.store.jobs.active("warm") == []
        assert f'id="stop-{job.id}"' not in (await browser.get("/ui/mirror")).text
        for number, status in (("", 400), ("x", 400), ("-1", 400), ("999999", 404)):
            answer = await browser.post("/ui/upkeep/stop", data={"job": number}, headers=FROM_PAGE)
            assert answer.status_code == status
        for wrong_fields in (
            {"references": ""},
            {"references": "UPPER"},
            {"references": "a\n" * 101},
            {"references": "a", "platform": "b"},
        ):
            answer = await browser.post("/ui/mirror/warm", data=wrong_fields, headers=FROM_PAGE)
            assert (answer.status_code, 'role="alert"' in answer.text) == (400, True), wrong_fields


@pytest.mark.slow
async def test_an_upstream_that_hangs(tmp_path: Path) -> None:
    """While forms wait for an upstream that does not respond, other pages are not delayed. A job that waits for this
    upstream can be stopped."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hanging_upstream:
        upstream = {
            "name": "docker.io",
            "default": True,
            "endpoints": [f"http://127.0.0.1:{hanging_upstream.getsockname()[1]}"],
        }
        async with site(tmp_path, upstream=[upstream]) as server, server.browser() as browser:
            await server.log_in(browser, "root")
            await browser.post("/ui/mirror/warm", data={"references": "ubuntu:24.04"}, headers=FROM_PAGE)
            data = {"reference": "ubuntu:24.04"}
            forms = [
                asyncio.create_task(browser.post("/ui/mirror/refresh", data=data, headers=FROM_PAGE))
                for _ in range(MAX_RENDERED_PAGES_PER_VISITOR + 1)
            ]
            (job,) = (await server.store.jobs.jobs(None, 1)).items
            while job.state is JobState.QUEUED:
                await asyncio.sleep(0.02)
                job = await server.store.jobs.job(job.id)
            for path in PATHS:
                assert (await browser.get(path)).status_code == 200
            await browser.post("/ui/upkeep/stop", data={"job": str(job.id)}, headers=FROM_PAGE)
            while job.ended is None:
                await asyncio.sleep(0.02)
                job = await server.store.jobs.job(job.id)
            assert job.state is JobState.STOPPED
            assert not any(form.done() for form in forms)
            await cancel_and_wait(forms)

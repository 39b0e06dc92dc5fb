"""The pages about repositories in a running application: which visitor sees what. The tests send requests without a
browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.auth.password.hashing import hash_password
from registry.ui.image_page import STEPS_ON_A_PAGE
from registry.ui.pages import MAX_RENDERED_PAGES
from registry.ui.repository_list import PAGE_SIZE
from registry.ui.search_page import FIRST_PAGE_HITS
from storage.access import AccountKind, AccountName
from storage.metadata.sqlite.search import search_scope
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.app_in_process import AppInProcess, running_app, until
from tests.fakes.page_store import add_cached, add_described, add_index
from tests.fakes.store_accounts import BY, add_grant

PASSWORD = "correct horse battery"
BASE_URL = "http://registry.test"
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]
"""The settings of a default upstream that cannot be reached."""
FROM_PAGE = {"sec-fetch-site": "same-origin"}
"""The header that browsers send with a form of the registry's own page."""


class Site:
    """A running application with the accounts root (an admin) and alice, and browsers for it."""

    def __init__(self, app: AppInProcess) -> None:
        self.app = app
        access = app.app.service.access
        assert access is not None
        self.store: StoredRegistry = access.management.upkeep.store

    def browser(self, *, address: str = "192.0.2.1", **headers: str) -> httpx2.AsyncClient:
        """Returns a client at another machine with this IP address, which sends these headers with each request."""
        transport = httpx2.ASGITransport(app=self.app.app, client=(address, 1), raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport, base_url=BASE_URL, headers=headers)

    async def log_in(self, browser: httpx2.AsyncClient, name: str, **form: str) -> httpx2.Response:
        """Sends the login form."""
        fields = {"user": name, "password": PASSWORD, **form}
        return await browser.post("/ui/login", data=fields, headers=FROM_PAGE)


@cache
def password_hash() -> str:
    """Returns one hash for all tests, because hashing is slow on purpose."""
    return hash_password(PASSWORD)


@asynccontextmanager
async def site(folder: Path, *, accounts: bool = True, **settings: Any) -> AsyncIterator[Site]:
    """Runs a registry with these settings. With `accounts`, it has the admin root and the member alice."""
    async with running_app(folder, **{"upstream": UPSTREAM, **settings}) as app:
        if accounts:
            hashed = password_hash()
            for name, admin in (("root", True), ("alice", False)):
                await app.accounts.add_account(
                    AccountName(name), AccountKind.USER, password_hash=hashed, admin=admin, by=BY
                )
        yield Site(app)


def names_on(answer: httpx2.Response) -> list[str]:
    """Returns the names in the list of repositories on a page."""
    assert answer.status_code == 200, answer.text
    return re.findall(r'<li><a href="/ui/repositories/[^"]+">([^<]+)</a></li>', answer.text)


async def test_visitors_see_what_they_may_pull(tmp_path: Path) -> None:
    """An anonymous visitor, a member and an admin see different repositories, in lists and on the pages of
    repositories. Hosted and mirrored repositories are in separate lists. A repository that a visitor may not pull looks
    like a missing one."""
    async with site(tmp_path) as server:
        for repo in ("public/a", "team/b", "team-x/c", "secret/d", "docker.io/library/ubuntu", "docker.io/corp/e"):
            await add_cached(server.store, repo, "1")
        await add_grant(server.app.accounts, "everyone", "public/**", "pull")
        await add_grant(server.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(server.app.accounts, "user:alice", "docker.io/library/**", "pull")
        expected = {
            "": (["public/a"], None),
            "alice": (["public/a", "team/b"], ["docker.io/library/ubuntu"]),
            "root": (
                ["public/a", "secret/d", "team-x/c", "team/b"],
                ["docker.io/corp/e", "docker.io/library/ubuntu"],
            ),
        }
        for visitor, (hosted, mirrored) in expected.items():
            async with server.browser() as browser:
                if visitor:
                    assert (await server.log_in(browser, visitor)).status_code == 303
                assert names_on(await browser.get("/ui/repositories")) == hosted
                answer = await browser.get("/ui/repositories?in=docker.io")
                if mirrored is None:
                    assert answer.status_code == 404
                    assert 'href="/ui/repositories?in=docker.io"' not in (await browser.get("/ui/repositories")).text
                else:
                    assert names_on(answer) == mirrored
                for repo in ("public/a", "team/b", "secret/d", "docker.io/corp/e", "no/such"):
                    page = await browser.get(f"/ui/repositories/{repo}")
                    is_visible = repo in [*hosted, *(mirrored or ())]
                    assert page.status_code == (200 if is_visible else 404 if visitor else 303), (visitor, repo)
                    if not is_visible and visitor:
                        assert "there is no repository" in page.text


async def test_long_lists_have_pages(tmp_path: Path) -> None:
    """A long list has several pages, which have each name once. This holds if the mirrored names sort between hosted
    names, and if the list is filtered by a prefix."""
    async with site(tmp_path, accounts=False) as server:
        hosted = sorted([f"a/{n:03}" for n in range(PAGE_SIZE + 5)] + [f"z/{n:03}" for n in range(PAGE_SIZE)])
        mirrored = [f"docker.io/m/{n:03}" for n in range(PAGE_SIZE + 1)]
        for repo in hosted + mirrored + ["docker.iox", "docker"]:
            await add_cached(server.store, repo, "1")
        hosted = sorted([*hosted, "docker.iox", "docker"])

        async def all_names(query: str) -> list[str]:
            names, path = [], f"/ui/repositories?{query}"
            for _ in range(5):
                answer = await browser.get(path)
                names += names_on(answer)
                next_link = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', answer.text)
                if next_link is None:
                    return names
                path = next_link[1].replace("&amp;", "&")
            raise AssertionError("the list does not end")

        async with server.browser() as browser:
            assert await all_names("") == hosted
            assert await all_names("in=docker.io") == mirrored
            assert await all_names("q=z/0") == [name for name in hosted if name.startswith("z/0")]
            assert await all_names("q=docker") == ["docker", "docker.iox"]
            assert await all_names("in=docker.io&q=m/04") == [f"docker.io/m/{n:03}" for n in range(40, 50)]
            assert await all_names("in=docker.io&q=docker.io/m/050") == ["docker.io/m/050"]
            assert await all_names("q=A/001") == ["a/001"]
            for nothing in ("q=zz", "q=%3Cscript%3E", "q=b&in=docker.io", "after=zzz"):
                assert await all_names(nothing) == []
            for no_name in ("%F0%9F%90%B3", "%EE%80%80", "docker%EE%80%80", "%7F"):
                assert await all_names(f"q={no_name}") == await all_names(f"in=docker.io&q={no_name}") == []


async def test_a_repository_shows_its_tags(tmp_path: Path) -> None:
    """Each tag has its digest, its platforms with their sizes, and the command to pull it. A long list of tags has
    several pages. Platforms that are not stored are marked. Short names redirect to the stored name."""
    async with site(tmp_path, accounts=False) as server:
        manifest = await add_cached(server.store, "docker.io/library/ubuntu", *(f"t{n:02}" for n in range(30)))
        platforms = [("linux", "amd64"), ("linux", "arm64"), ("unknown", "unknown")]
        await add_index(server.store, "docker.io/library/ubuntu", "all", platforms)
        async with server.browser() as browser:
            for short in ("ubuntu", "library/ubuntu", "docker.io/ubuntu"):
                answer = await browser.get(f"/ui/repositories/{short}")
                assert answer.headers["location"] == "/ui/repositories/docker.io/library/ubuntu"
            first = (await browser.get("/ui/repositories/docker.io/library/ubuntu")).text
            missing = re.findall(r'<li class="missing">\s*(\S+) <small>not here</small>\s*</li>', first)
            assert missing[:2] == ["linux/amd64", "linux/arm64"]
            assert manifest.digest in first
            assert "5.00 MiB" in first
            assert "docker pull registry.test/docker.io/library/ubuntu:t00" in first
            next_link = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', first)
            assert next_link is not None
            second = (await browser.get(next_link[1].replace("&amp;", "&"))).text
            assert tags_on(first) + tags_on(second) == ["all", *(f"t{n:02}" for n in range(30))]


def tags_on(page: str) -> list[str]:
    """Returns the tags in the rows of a page."""
    return re.findall(r'<th scope="row">(?:<a [^>]+>)?([\w.-]+)', page)


async def test_tags_are_sorted_and_filtered(tmp_path: Path) -> None:
    """The query of the page sorts and filters the tags. The links of the page change the order and keep the filter."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        for tag in ("1.9", "1.10", "2.0-rc1", "2.0"):
            await add_cached(server.store, "team/app", tag, of=tag)
        for query, tags in (
            ("", ["1.10", "1.9", "2.0", "2.0-rc1"]),
            ("sort=-version", ["2.0", "2.0-rc1", "1.10", "1.9"]),
            ("sort=-pushed", ["2.0", "2.0-rc1", "1.10", "1.9"]),
            ("sort=version&q=1.", ["1.9", "1.10"]),
            ("q=RC", ["2.0-rc1"]),
            ("q=%3Cscript%3E", []),
        ):
            assert tags_on((await browser.get(f"/ui/repositories/team/app?{query}")).text) == tags, query
        page = (await browser.get("/ui/repositories/team/app?sort=-version&q=2.")).text
        assert 'href="/ui/repositories/team/app?q=2.&amp;sort=version" aria-current="true"' in page
        assert 'href="/ui/repositories/team/app?q=2.&amp;sort=-size">Size' in page
        for wrong_query in ("sort=colour", "after=nothing"):
            assert (await browser.get(f"/ui/repositories/team/app?{wrong_query}")).status_code == 400


@pytest.mark.slow
async def test_a_description_is_shown(tmp_path: Path) -> None:
    """The headings of a description are at a lower level than those of the page. HTML in a description is shown as
    text. A note says that the end of a text with very much formatting is shown as plain text."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        await add_cached(server.store, "team/app", "1")
        assert 'class="description"' not in (await browser.get("/ui/repositories/team/app")).text
        text = "# Our app\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![y](https://evil.example/y.png)"
        await server.store.descriptions.put_description(RepositoryName("team/app"), text, by=BY)
        page = (await browser.get("/ui/repositories/team/app")).text
        assert "<h3>Our app</h3>" in page
        assert "&lt;script&gt;alert(1)" in page
        assert '"javascript:' not in page
        assert 'src="https://evil' not in page
        assert "shown as plain text" not in page
        await server.store.descriptions.put_description(RepositoryName("team/app"), "# a\n" * 10_000, by=BY)
        page = (await browser.get("/ui/repositories/team/app")).text
        assert "shown as plain text" in page
        assert "<pre># a\n" in page


async def test_waiting_for_a_description_keeps_nobody_from_pages(tmp_path: Path) -> None:
    """A page that waits until its description is rendered holds no slot for pages, so that other pages are rendered
    meanwhile."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        await add_cached(server.store, "team/app", "1")
        await server.store.descriptions.put_description(RepositoryName("team/app"), "# Our app", by=BY)
        access = server.app.app.service.access
        assert access is not None
        renderings = access.management.repository_browser._descriptions.rendering_limits
        async with asyncio.TaskGroup() as tasks, renderings.slot("somebody"):
            page = "/ui/repositories/team/app"
            waiting = [tasks.create_task(browser.get(page)) for _ in range(MAX_RENDERED_PAGES)]
            await until(lambda: renderings.pending > len(waiting))
            async with asyncio.timeout(30):
                assert "team/app" in (await browser.get("/ui/repositories")).text
        assert all("<h3>Our app</h3>" in task.result().text for task in waiting)


async def test_the_page_of_a_tag(tmp_path: Path) -> None:
    """The page has the platforms, the layers with their commands, the config, the annotations, the referrers and the
    manifest. HTML in any of their texts is shown as text. An unknown reference gets 404, and so does a visitor who may
    not pull."""
    hostile = "<script>alert(1)</script>"
    async with site(tmp_path) as server, server.browser() as browser:
        index = await add_described(server.store, "team/app", "v1", hostile, label_bytes=100_000)
        await server.log_in(browser, "root")
        page = (await browser.get("/ui/repositories/team/app:v1")).text
        assert "<script>alert" not in page
        assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
        assert "docker pull registry.test/team/app:v1" in page
        assert re.findall(r'<li class="missing">\s*(\S+) ', page) == ["linux/arm64"]
        for text in ("RUN make", "PATH=/bin", "NODE", "Signatures", "signed", "19.5 KiB", index.digest):
            assert text in page, text
        platform = re.search(r'href="(/ui/repositories/team/app:v1\?platform=[^"]+)" aria-current="true"', page)
        assert platform is not None
        assert "RUN make" in (await browser.get(platform[1])).text
        by_digest = (await browser.get(f"/ui/repositories/team/app@{index.digest}")).text
        assert "RUN make" in by_digest
        signature = re.search(r'<ul class="referrers">\s*<li><a href="([^"]+)"', page)
        assert signature is not None
        signature_page = (await browser.get(signature[1])).text
        assert hostile.replace("<", "&lt;").replace(">", "&gt;") in signature_page
        for missing in ("team/app:v2", "team/app:", "team/app@sha256:1", "team/app:v1?platform=plan9", "no/app:v1"):
            assert (await browser.get(f"/ui/repositories/{missing}")).status_code == 404, missing
        await server.log_in(browser, "alice")
        hidden = await browser.get("/ui/repositories/team/app:v1")
        assert (hidden.status_code, "RUN make" in hidden.text) == (404, False)


async def test_a_short_name_redirects_to_the_stored_name(tmp_path: Path) -> None:
    """A short name redirects to the page of the stored name, which shows the part of the image that the mirror has
    cached."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        await add_cached(server.store, "docker.io/library/ubuntu", "24.04")
        answer = await browser.get("/ui/repositories/ubuntu:24.04")
        assert answer.headers["location"] == "/ui/repositories/docker.io/library/ubuntu:24.04"
        page = (await browser.get(answer.headers["location"])).text
        assert "The config is not stored here" in page
        assert "not here" in page


@pytest.mark.slow
async def test_large_images_and_indexes(tmp_path: Path) -> None:
    """For an image with 500 layers, the page shows some layers and the number of the others. For an index with 100
    platforms, of which one is stored, the others are marked as not stored."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        await add_cached(server.store, "team/app", "many", layers=500)
        page = (await browser.get("/ui/repositories/team/app:many")).text
        assert page.count('<th scope="row">') == STEPS_ON_A_PAGE
        assert f"There are {500 - STEPS_ON_A_PAGE} more steps." in page
        await add_index(server.store, "team/app", "wide", [("linux", f"cpu{n}") for n in range(100)], present=1)
        page = (await browser.get("/ui/repositories/team/app:wide")).text
        assert page.count('<li class="missing">') == 99
        assert "5.00 MiB" in page


async def test_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results have hosted and mirrored content in separate lists, with links to further pages. A visitor finds only
    what they may pull. A search for a tag, a digest or a pull command redirects to the page of the image. HTML in a
    search is shown as text. If the visitor may pull many repositories but not all, the page says that matches may be
    missing, except for such a tag, digest or command."""
    async with site(tmp_path) as server, server.browser() as browser:
        hostile = "<script>alert(1)</script>"
        index = await add_described(server.store, "team/app", "v1", hostile)
        await add_cached(server.store, "docker.io/corp/app", "v2")
        for number in range(FIRST_PAGE_HITS + 1):
            await add_cached(server.store, f"secret/app{number}", "v3", of="secret")
        await server.store.search_indexer.run()
        await add_grant(server.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(server.app.accounts, "user:alice", "docker.io/**", "pull")
        search = partial(browser.get, "/ui/search")
        assert (await search(params={"q": "app"})).headers["location"] == "/ui/login?next=/ui/search%3Fq%3Dapp"
        await server.log_in(browser, "alice")
        page = (await search(params={"q": "app"})).text
        hosted, mirrored = page.split("<h2", 2)[1].split("<h3>Mirrored</h3>")
        assert result_paths(hosted) == ["/ui/repositories/team/app"]
        assert result_paths(mirrored) == ["/ui/repositories/docker.io/corp/app"]
        assert "secret" not in page
        assert "/ui/repositories/team/app:v1" in result_paths((await search(params={"q": "alert"})).text)
        assert "<script>alert" not in (await search(params={"q": hostile})).text
        for nothing in ("secret", "", "v3"):
            assert result_paths((await search(params={"q": nothing})).text) == [], nothing
        for text, path in (
            ("docker pull registry.test/team/app:v1", "team/app:v1"),
            ("docker pull registry.test/team/app", "team/app"),
            (f"team/app@{index.digest}", f"team/app@{index.digest}"),
            (index.digest, f"team/app@{index.digest}"),
        ):
            answer = await search(params={"q": text})
            assert answer.headers["location"] == f"/ui/repositories/{path}", text
            while_typing = await search(params={"q": text}, headers={"hx-request": "true"})
            assert while_typing.status_code == 200
            assert f'href="/ui/repositories/{path}"' in while_typing.text
        # A further page with the last of several matches shows this match.
        one_match = await search(params={"q": index.digest, "kind": "digests", "after": "0"})
        assert (one_match.status_code, result_paths(one_match.text)) == (
            200,
            [f"/ui/repositories/team/app@{index.digest}"],
        )
        for wrong in ({"kind": "people"}, {"after": "1"}, {"kind": "tags", "after": "-1"}):
            assert (await search(params={"q": "app", **wrong})).status_code == 400
        monkeypatch.setattr(search_scope, "MAX_LISTED_REPOSITORIES", 0)
        for text, may_lack_matches in (
            ("alert", True),
            ("team/app:v1", False),
            (index.digest, False),
            (f"sha256:{'0' * 64}", False),  # a digest that is not stored
        ):
            page = (await search(params={"q": text}, headers={"hx-request": "true"})).text
            assert ("Some matches may be missing" in page) is may_lack_matches, text
        await server.log_in(browser, "root")
        first = (await search(params={"q": "secret/app"})).text
        next_link = re.search(r'<a class="button" href="([^"]+kind=repositories[^"]+)"', first)
        assert next_link is not None
        second = (await browser.get(next_link[1].replace("&amp;", "&"))).text
        names = {path for path in result_paths(first) + result_paths(second) if ":" not in path}
        assert names == {f"/ui/repositories/secret/app{number}" for number in range(FIRST_PAGE_HITS + 1)}


def result_paths(page: str) -> list[str]:
    """Returns the paths of the results on a page of results, or on a part of it."""
    return re.findall(r'<li><a href="([^"]+)">', page)

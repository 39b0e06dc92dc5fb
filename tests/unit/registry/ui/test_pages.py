"""The pages of a running application, without a browser: who sees what, errors, and what other sites may cause."""

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

from registry.app import create_app
from registry.auth.password.hashing import hash_password
from registry.ui import page_limits
from registry.ui.image_page import STEPS_ON_A_PAGE
from registry.ui.repository_list import PAGE_SIZE
from registry.ui.search_page import HITS_OF_EACH_KIND
from storage.access import AccountKind, AccountName
from storage.errors import StorageFailed
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.page_store import add_cached, add_described, add_index
from tests.fakes.store_accounts import BY, add_grant

PASSWORD = "correct horse battery"
OWN = "http://registry.test"
UPSTREAM = [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]
FROM_PAGE = {"sec-fetch-site": "same-origin"}


class Site:
    """A running application with the accounts root (an admin) and alice, and browsers for it."""

    def __init__(self, app: AppInProcess) -> None:
        self.app = app
        access = app.app.service.access
        assert access is not None
        self.store: StoredRegistry = access.management.upkeep.store

    def browser(self, **headers: str) -> httpx2.AsyncClient:
        transport = httpx2.ASGITransport(app=self.app.app, client=("192.0.2.1", 1), raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport, base_url=OWN, headers=headers)

    async def log_in(self, browser: httpx2.AsyncClient, name: str, **form: str) -> httpx2.Response:
        fields = {"user": name, "password": PASSWORD, **form}
        return await browser.post("/ui/login", data=fields, headers=FROM_PAGE)


@cache
def password_hash() -> str:
    """Returns one hash for all tests, because hashing is slow on purpose."""
    return hash_password(PASSWORD)


@asynccontextmanager
async def site(folder: Path, *, accounts: bool = True, **settings: Any) -> AsyncIterator[Site]:
    async with running_app(folder, **{"upstream": UPSTREAM, **settings}) as app:
        if accounts:
            hashed = password_hash()
            for name, admin in (("root", True), ("alice", False)):
                await app.accounts.add_account(
                    AccountName(name), AccountKind.USER, password_hash=hashed, admin=admin, by=BY
                )
        yield Site(app)


def names_on(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return re.findall(r'<li><a href="/ui/repositories/[^"]+">([^<]+)</a></li>', answer.text)


async def test_visitors_see_what_they_may_pull(tmp_path: Path) -> None:
    """In lists and on the page of a repository: nobody, a member and an admin. Hosted and mirrored names are apart. A
    repository that somebody may not see is like one that is not there."""
    async with site(tmp_path) as here:
        for repo in ("public/a", "team/b", "team-x/c", "secret/d", "docker.io/library/ubuntu", "docker.io/corp/e"):
            await add_cached(here.store, repo, "1")
        await add_grant(here.app.accounts, "everyone", "public/**", "pull")
        await add_grant(here.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(here.app.accounts, "user:alice", "docker.io/library/**", "pull")
        seen = {
            "": (["public/a"], None),
            "alice": (["public/a", "team/b"], ["docker.io/library/ubuntu"]),
            "root": (
                ["public/a", "secret/d", "team-x/c", "team/b"],
                ["docker.io/corp/e", "docker.io/library/ubuntu"],
            ),
        }
        for visitor, (hosted, mirrored) in seen.items():
            async with here.browser() as browser:
                if visitor:
                    assert (await here.log_in(browser, visitor)).status_code == 303
                assert names_on(await browser.get("/ui/repositories")) == hosted
                answer = await browser.get("/ui/repositories?in=docker.io")
                if mirrored is None:
                    assert answer.status_code == 404
                    assert 'href="/ui/repositories?in=docker.io"' not in (await browser.get("/ui/repositories")).text
                else:
                    assert names_on(answer) == mirrored
                for repo in ("public/a", "team/b", "secret/d", "docker.io/corp/e", "no/such"):
                    shown = await browser.get(f"/ui/repositories/{repo}")
                    may = repo in [*hosted, *(mirrored or ())]
                    assert shown.status_code == (200 if may else 404 if visitor else 303), (visitor, repo)
                    if not may and visitor:
                        assert "there is no repository" in shown.text


async def test_long_lists_have_pages(tmp_path: Path) -> None:
    """Each name is listed once, also where mirrored names sort between hosted ones, and with a prefix."""
    async with site(tmp_path, accounts=False) as here:
        hosted = sorted([f"a/{n:03}" for n in range(PAGE_SIZE + 5)] + [f"z/{n:03}" for n in range(PAGE_SIZE)])
        mirrored = [f"docker.io/m/{n:03}" for n in range(PAGE_SIZE + 1)]
        for repo in hosted + mirrored + ["docker.iox", "docker"]:
            await add_cached(here.store, repo, "1")
        hosted = sorted([*hosted, "docker.iox", "docker"])

        async def all_names(query: str) -> list[str]:
            names, path = [], f"/ui/repositories?{query}"
            for _ in range(5):
                answer = await browser.get(path)
                names += names_on(answer)
                more = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', answer.text)
                if more is None:
                    return names
                path = more[1].replace("&amp;", "&")
            raise AssertionError("the list does not end")

        async with here.browser() as browser:
            assert await all_names("") == hosted
            assert await all_names("in=docker.io") == mirrored
            assert await all_names("q=z/0") == [name for name in hosted if name.startswith("z/0")]
            assert await all_names("q=docker") == ["docker", "docker.iox"]
            assert await all_names("in=docker.io&q=m/04") == [f"docker.io/m/{n:03}" for n in range(40, 50)]
            assert await all_names("in=docker.io&q=docker.io/m/050") == ["docker.io/m/050"]
            assert await all_names("q=A/001") == ["a/001"]
            for nothing in ("q=zz", "q=%3Cscript%3E", "q=b&in=docker.io", "after=zzz", "q=%F0%9F%90%B3"):
                assert await all_names(nothing) == []


async def test_a_repository_shows_its_tags(tmp_path: Path) -> None:
    """Each tag has its digest, its platforms with their sizes, and the command to pull it. The list has pages.
    Platforms that are not stored are shown as such. Short names lead to the stored one."""
    async with site(tmp_path, accounts=False) as here:
        manifest = await add_cached(here.store, "docker.io/library/ubuntu", *(f"t{n:02}" for n in range(30)))
        platforms = [("linux", "amd64"), ("linux", "arm64"), ("unknown", "unknown")]
        await add_index(here.store, "docker.io/library/ubuntu", "all", platforms)
        async with here.browser() as browser:
            for short in ("ubuntu", "library/ubuntu", "docker.io/ubuntu"):
                answer = await browser.get(f"/ui/repositories/{short}")
                assert answer.headers["location"] == "/ui/repositories/docker.io/library/ubuntu"
            first = (await browser.get("/ui/repositories/docker.io/library/ubuntu")).text
            missing = re.findall(r'<li class="missing">\s*(\S+) <small>not here</small>\s*</li>', first)
            assert missing[:2] == ["linux/amd64", "linux/arm64"]
            assert manifest.digest in first
            assert "5.00 MiB" in first
            assert "docker pull registry.test/docker.io/library/ubuntu:t00" in first
            more = re.search(r'<a class="button" href="([^"]+after=[^"]+)"', first)
            assert more is not None
            second = (await browser.get(more[1].replace("&amp;", "&"))).text
            assert tags_on(first) + tags_on(second) == ["all", *(f"t{n:02}" for n in range(30))]


def tags_on(page: str) -> list[str]:
    """Returns the tags in the rows of a page."""
    return re.findall(r'<th scope="row">(?:<a [^>]+>)?([\w.-]+)', page)


async def test_tags_are_sorted_and_filtered(tmp_path: Path) -> None:
    """The query of the page sorts and filters. Its links change one of them and keep the other."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        for tag in ("1.9", "1.10", "2.0-rc1", "2.0"):
            await add_cached(here.store, "team/app", tag, of=tag)
        for query, shown in (
            ("", ["1.10", "1.9", "2.0", "2.0-rc1"]),
            ("sort=-version", ["2.0", "2.0-rc1", "1.10", "1.9"]),
            ("sort=-pushed", ["2.0", "2.0-rc1", "1.10", "1.9"]),
            ("sort=version&q=1.", ["1.9", "1.10"]),
            ("q=RC", ["2.0-rc1"]),
            ("q=%3Cscript%3E", []),
        ):
            assert tags_on((await browser.get(f"/ui/repositories/team/app?{query}")).text) == shown, query
        page = (await browser.get("/ui/repositories/team/app?sort=-version&q=2.")).text
        assert 'href="/ui/repositories/team/app?q=2.&amp;sort=version" aria-current="true"' in page
        assert 'href="/ui/repositories/team/app?q=2.&amp;sort=-size">Size' in page
        for wrong in ("sort=colour", "after=nothing"):
            assert (await browser.get(f"/ui/repositories/team/app?{wrong}")).status_code == 400


async def test_a_description_is_shown(tmp_path: Path) -> None:
    """The headings of a description are below those of the page, and HTML in it is shown as text."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        await add_cached(here.store, "team/app", "1")
        assert 'class="description"' not in (await browser.get("/ui/repositories/team/app")).text
        text = "# Our app\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![y](https://evil.example/y.png)"
        await here.store.descriptions.put_description(RepositoryName("team/app"), text, by=BY)
        page = (await browser.get("/ui/repositories/team/app")).text
        assert "<h3>Our app</h3>" in page
        assert "&lt;script&gt;alert(1)" in page
        assert '"javascript:' not in page
        assert 'src="https://evil' not in page


async def test_what_a_tag_leads_to(tmp_path: Path) -> None:
    """The page has platforms, layers with commands, config, annotations, referrers and the manifest, and each text in
    it is harmless. A missing reference is not found, and a visitor who may not pull sees nothing."""
    evil = "<script>alert(1)</script>"
    async with site(tmp_path) as here, here.browser() as browser:
        index = await add_described(here.store, "team/app", "v1", evil, label_bytes=100_000)
        await here.log_in(browser, "root")
        page = (await browser.get("/ui/repositories/team/app:v1")).text
        assert "<script>alert" not in page
        assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
        assert "docker pull registry.test/team/app:v1" in page
        assert re.findall(r'<li class="missing">\s*(\S+) ', page) == ["linux/arm64"]
        for shown in ("RUN make", "PATH=/bin", "NODE", "Signatures", "signed", "19.5 KiB", index.digest):
            assert shown in page, shown
        platform = re.search(r'href="(/ui/repositories/team/app:v1\?platform=[^"]+)" aria-current="true"', page)
        assert platform is not None
        assert "RUN make" in (await browser.get(platform[1])).text
        by_digest = (await browser.get(f"/ui/repositories/team/app@{index.digest}")).text
        assert "RUN make" in by_digest
        signature = re.search(r'<ul class="referrers">\s*<li><a href="([^"]+)"', page)
        assert signature is not None
        signature_page = (await browser.get(signature[1])).text
        assert evil.replace("<", "&lt;").replace(">", "&gt;") in signature_page
        for missing in ("team/app:v2", "team/app:", "team/app@sha256:1", "team/app:v1?platform=plan9", "no/app:v1"):
            assert (await browser.get(f"/ui/repositories/{missing}")).status_code == 404, missing
        await here.log_in(browser, "alice")
        hidden = await browser.get("/ui/repositories/team/app:v1")
        assert (hidden.status_code, "RUN make" in hidden.text) == (404, False)


async def test_a_pull_by_a_short_name_has_a_page(tmp_path: Path) -> None:
    """A short name leads to the page of the stored name, which shows what a mirror has cached."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        await add_cached(here.store, "docker.io/library/ubuntu", "24.04")
        answer = await browser.get("/ui/repositories/ubuntu:24.04")
        assert answer.headers["location"] == "/ui/repositories/docker.io/library/ubuntu:24.04"
        page = (await browser.get(answer.headers["location"])).text
        assert "The config is not stored here" in page
        assert "not here" in page


async def test_unusual_manifests(tmp_path: Path) -> None:
    """Of 500 layers the page shows some, and counts the rest. Of an index with 100 platforms, the 99 that are not
    stored are shown as such."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        await add_cached(here.store, "team/app", "many", layers=500)
        page = (await browser.get("/ui/repositories/team/app:many")).text
        assert page.count('<th scope="row">') == STEPS_ON_A_PAGE
        assert f"There are {500 - STEPS_ON_A_PAGE} more steps." in page
        await add_index(here.store, "team/app", "wide", [("linux", f"cpu{n}") for n in range(100)], present=1)
        page = (await browser.get("/ui/repositories/team/app:wide")).text
        assert page.count('<li class="missing">') == 99
        assert "5.00 MiB" in page


async def test_search(tmp_path: Path) -> None:
    """Hosted and mirrored content are apart, lists have a next page, and a visitor finds what they may pull. A tag, a
    digest or a pull command leads to the page of what it names; markup in it is text."""
    async with site(tmp_path) as here, here.browser() as browser:
        evil = "<script>alert(1)</script>"
        index = await add_described(here.store, "team/app", "v1", evil)
        await add_cached(here.store, "docker.io/corp/app", "v2")
        for number in range(HITS_OF_EACH_KIND + 1):
            await add_cached(here.store, f"secret/app{number}", "v3", of="secret")
        await here.store.search_indexer.run()
        await add_grant(here.app.accounts, "user:alice", "team/**", "pull")
        await add_grant(here.app.accounts, "user:alice", "docker.io/**", "pull")
        search = partial(browser.get, "/ui/search")
        assert (await search(params={"q": "app"})).headers["location"] == "/ui/login?next=/ui/search%3Fq%3Dapp"
        await here.log_in(browser, "alice")
        page = (await search(params={"q": "app"})).text
        hosted, mirrored = page.split("<h2", 2)[1].split("<h3>Mirrored</h3>")
        assert found_in(hosted) == ["/ui/repositories/team/app"]
        assert found_in(mirrored) == ["/ui/repositories/docker.io/corp/app"]
        assert "secret" not in page
        assert "/ui/repositories/team/app:v1" in found_in((await search(params={"q": "alert"})).text)
        assert "<script>alert" not in (await search(params={"q": evil})).text
        for nothing in ("secret", "", "v3"):
            assert found_in((await search(params={"q": nothing})).text) == [], nothing
        for text, path in (
            ("docker pull registry.test/team/app:v1", "team/app:v1"),
            ("docker pull registry.test/team/app", "team/app"),
            (f"team/app@{index.digest}", f"team/app@{index.digest}"),
            (index.digest, f"team/app@{index.digest}"),
        ):
            answer = await search(params={"q": text})
            assert answer.headers["location"] == f"/ui/repositories/{path}", text
            typed = await search(params={"q": text}, headers={"hx-request": "true"})
            assert typed.status_code == 200
            assert f'href="/ui/repositories/{path}"' in typed.text
        for wrong in ({"kind": "people"}, {"after": "1"}, {"kind": "tags", "after": "-1"}):
            assert (await search(params={"q": "app", **wrong})).status_code == 400
        await here.log_in(browser, "root")
        first = (await search(params={"q": "secret/app"})).text
        more = re.search(r'<a class="button" href="([^"]+kind=repositories[^"]+)"', first)
        assert more is not None
        rest = (await browser.get(more[1].replace("&amp;", "&"))).text
        names = {path for path in found_in(first) + found_in(rest) if ":" not in path}
        assert names == {f"/ui/repositories/secret/app{number}" for number in range(HITS_OF_EACH_KIND + 1)}


def found_in(page: str) -> list[str]:
    """Returns the paths to which the results on a page, or on a part of one, lead."""
    return re.findall(r'<li><a href="([^"]+)">', page)


async def test_log_in_and_out(tmp_path: Path) -> None:
    """The session is a cookie that scripts cannot read. A wrong password says nothing about the account. The way back
    never leads to another site."""
    async with site(tmp_path) as here, here.browser() as browser:
        for name in ("alice", "nobody", "Not A Name"):
            refused = await here.log_in(browser, name, password="wrong")
            assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
            assert "The user name or the password is wrong." in refused.text
        assert (await here.log_in(browser, "", password="")).status_code == 400
        refused = await here.log_in(browser, "alice", password="wrong", next="/ui/setup?client=podman")
        place = "/ui/login?next=/ui/setup%3Fclient%3Dpodman"
        # The form of the language leads back to the login.
        assert f'action="/ui/language">\n<input type="hidden" name="next" value="{place}">' in refused.text
        form = await browser.get(place)
        assert '<input type="hidden" name="next" value="/ui/setup?client=podman">' in form.text
        done = await here.log_in(browser, "alice", next="/ui/setup?client=podman")
        assert done.headers["location"] == "/ui/setup?client=podman"
        assert "HttpOnly" in done.headers["set-cookie"]
        assert "SameSite=lax" in done.headers["set-cookie"]
        assert '<span class="account">alice</span>' in (await browser.get("/ui/setup")).text
        assert (await browser.get("/ui/system")).status_code == 403
        for elsewhere in ("//evil.example", "https://evil.example", "/\\evil.example", "/\t/evil.example", ""):
            answer = await here.log_in(browser, "alice", next=elsewhere)
            assert answer.headers["location"] == "/ui/", elsewhere
        ended = await browser.post("/ui/logout", headers={**FROM_PAGE, "content-type": FORM})
        assert ended.headers["location"] == "/ui/"
        assert '<span class="account">' not in (await browser.get("/ui/setup")).text
        assert (await browser.get("/ui/system")).headers["location"] == "/ui/login?next=/ui/system"


FORM = "application/x-www-form-urlencoded"


async def test_without_accounts_nobody_logs_in(tmp_path: Path) -> None:
    """The login page leads to the home page."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        for answer in (await browser.get("/ui/login"), await here.log_in(browser, "alice")):
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")


async def test_an_api_token_is_no_password_for_pages(tmp_path: Path) -> None:
    """A session has all rights of the account, and a token may have less."""
    async with site(tmp_path) as here, here.browser() as browser:
        import base64

        header = await here.app.token("alice")
        secret = base64.b64decode(header.partition(" ")[2]).decode().partition(":")[2]
        refused = await here.log_in(browser, "alice", password=secret)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)


async def test_a_session_that_ended(tmp_path: Path) -> None:
    """The page says so, the cookie is gone, and the visitor sees what everyone sees."""
    async with site(tmp_path) as here, here.browser() as browser:
        await here.log_in(browser, "alice")
        await here.app.accounts.set_enabled(AccountName("alice"), False, by=BY)
        page = await browser.get("/ui/repositories")
        assert "Your session has ended" in page.text
        assert '<span class="account">' not in page.text
        assert "Your session has ended" not in (await browser.get("/ui/repositories")).text


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}, {}])
@pytest.mark.parametrize("path", ["/ui/login", "/ui/logout", "/ui/language"])
async def test_forms_of_other_sites_do_nothing(tmp_path: Path, path: str, headers: dict[str, str]) -> None:
    """Forms of other sites cannot log somebody in as another, log them out, or change the language."""
    async with site(tmp_path) as here, here.browser() as browser:
        fields = {"user": "alice", "password": PASSWORD, "language": "zh-Hans"}
        refused = await browser.post(path, data=fields, headers=headers)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
        assert refused.headers["content-type"] == "text/html; charset=utf-8"


async def test_a_name_that_leads_here_is_not_trusted(tmp_path: Path) -> None:
    """While there are no accounts, a page whose host name leads to this machine cannot read the pages (DNS
    rebinding)."""
    async with site(tmp_path, accounts=False) as here:
        transport = httpx2.ASGITransport(app=here.app.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://evil.example") as browser:
            refused = await browser.get("/ui/repositories", headers=FROM_PAGE)
            assert refused.status_code == 403


@pytest.mark.parametrize(("language", "word"), [("en", "Nothing is here"), ("zh-CN", "页面不存在")])
async def test_errors_are_pages(tmp_path: Path, language: str, word: str) -> None:
    """404, 403, 400, 405 and 500, in the language of the visitor, as HTML that runs nothing."""
    async with site(tmp_path) as here, here.browser(**{"accept-language": language}) as browser:
        missing = await browser.get("/ui/nothing")
        assert (missing.status_code, word in missing.text) == (404, True)
        evil = "/ui/repositories/%3Cscript%3Ealert(1)%3C/script%3E"
        for path, status in ((evil, 404), ("/ui/repositories?q=%zz", 400), ("/ui/setup?client=%3Cb%3E", 404)):
            answer = await browser.get(path)
            assert (answer.status_code, "<script>alert" in answer.text) == (status, False)
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert answer.headers["x-frame-options"] == "DENY"
        await here.log_in(browser, "root")

        async def fail(*_: object, **__: object) -> None:
            raise StorageFailed("the secret path")

        pages = here.app.app.service.pages
        assert pages is not None
        pages.content.repositories = fail  # type: ignore[method-assign, assignment]
        failed = await browser.get("/ui/repositories")
        assert (failed.status_code, "secret" in failed.text) == (500, False)
        assert ("This registry failed" in failed.text) == (language == "en")


async def test_too_many_requests_get_a_page(tmp_path: Path) -> None:
    """With Retry-After, in the visitor's language; programs get JSON."""
    limits = {"requests_per_second": 0.001, "burst": 1}
    async with site(tmp_path, limits=limits) as here, here.browser(**{"accept-language": "zh"}) as browser:
        assert (await browser.get("/ui/setup")).status_code == 200
        for _ in range(2):
            refused = await browser.get("/ui/setup")
            assert (refused.status_code, "请求过多" in refused.text) == (429, True)
            assert int(refused.headers["retry-after"]) > 0
        assert (await browser.get("/livez2")).headers["content-type"] == "application/json"


async def test_a_docker_hub_that_is_not_the_default_upstream(tmp_path: Path) -> None:
    """docker gets the name to pull, and builders with `?ns=` get the mirror."""
    endpoints = ["http://127.0.0.1:9"]
    hub = {"name": "docker.io", "endpoints": endpoints}
    upstream = [hub, {"name": "quay.io", "default": True, "endpoints": endpoints}]
    async with site(tmp_path, accounts=False, upstream=upstream) as here, here.browser() as browser:
        docker = (await browser.get("/ui/setup")).text
        assert "docker pull registry.test/docker.io/library/ubuntu" in docker
        assert "registry-mirrors" not in docker
        jobs = (await browser.get("/ui/setup?client=ci")).text
        assert "--registry-mirror" not in jobs
        assert "[registry.&#34;docker.io&#34;]" in jobs


async def test_too_many_pages_of_one_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that says so is the same for all, and so costs nothing."""
    monkeypatch.setattr(page_limits, "WAITING_FOR_ONE", 0)
    async with site(tmp_path) as here, here.browser() as browser:
        first, second = [await browser.get("/ui/setup") for _ in range(2)]
        assert (first.status_code, first.text) == (429, second.text)
        assert "Too many requests" in first.text
        assert int(first.headers["retry-after"]) > 0


async def test_forms_that_arrive_slowly_hold_up_no_pages(tmp_path: Path) -> None:
    """However many forms arrive slowly, other pages are made."""
    async with site(tmp_path) as here, here.browser() as browser:
        rest, arriving = asyncio.Event(), 0

        async def slow_form() -> AsyncIterator[bytes]:
            nonlocal arriving
            arriving += 1
            yield b"user=alice&"
            await rest.wait()
            yield b"password=wrong"

        async def send(path: str) -> int:
            headers = {**FROM_PAGE, "content-type": FORM}
            return (await browser.post(path, content=slow_form(), headers=headers)).status_code

        async with asyncio.TaskGroup() as tasks:
            forms = [tasks.create_task(send(path)) for path in ("/ui/login", "/ui/logout", "/ui/language") * 2]
            while arriving < len(forms):  # noqa: ASYNC110 - the requests have no event for it
                await asyncio.sleep(0.01)
            async with asyncio.timeout(30):
                assert (await browser.get("/ui/setup")).status_code == 200
            rest.set()
        assert sorted(form.result() for form in forms) == [303, 303, 400, 400, 403, 403]


async def test_the_root_leads_browsers_to_the_pages(tmp_path: Path) -> None:
    """`/` leads browsers to the pages, and programs get a text. Without pages everybody gets the text."""
    html = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with site(tmp_path / "a", accounts=False) as here, here.browser() as browser:
        assert (await browser.get("/", headers=html)).headers["location"] == "/ui/"
        assert (await browser.get("/ui")).headers["location"] == "/ui/"
        assert (await browser.get("/ui/")).headers["location"] == "/ui/overview"
        text = await browser.get("/")
        assert "docker push registry.test/team/app" in text.text
        assert text.headers["vary"] == "Accept"
    async with site(tmp_path / "b", accounts=False, pages={"enabled": False}) as here, here.browser() as browser:
        assert "docker push" in (await browser.get("/", headers=html)).text
        assert (await browser.get("/ui/repositories")).headers["content-type"] == "application/json"


async def test_files_are_kept_for_ever(tmp_path: Path) -> None:
    """Files are cached for ever under the path with the right hash, and not under another one."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        page = (await browser.get("/ui/setup")).text
        paths = re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page)
        assert {path.rpartition("/")[2] for path in paths} == {"page.css", "page.js", "icon.svg", "htmx.min.js"}
        for path in paths:
            assert "immutable" in (await browser.get(path)).headers["cache-control"]
        assert (await browser.get("/ui/static/old/page.css")).headers["cache-control"] == "no-cache"
        for path in ("/ui/static/x/none.css", "/ui/static/x/..%2frendering.py"):
            assert (await browser.get(path)).status_code == 404


async def test_pages_never_ask_an_upstream(tmp_path: Path) -> None:
    """The registry that pages read refuses changes, and content that is not stored is unknown to it."""
    async with site(tmp_path, accounts=False) as here, here.browser() as browser:
        missing = await browser.get("/ui/repositories/docker.io/library/nginx")
        assert missing.status_code == 404
        assert await here.store.records.allowance("docker.io") is None
        assert RepositoryName("docker.io/library/nginx") not in names_on(await browser.get("/ui/repositories"))


def test_the_application_without_a_store_has_no_pages(tmp_path: Path) -> None:
    """Without a store there are no accounts and no settings that pages could show."""
    from registry.config import Settings
    from storage.memory_registry import MemoryRegistry

    assert create_app(Settings(data=tmp_path), MemoryRegistry()).pages is None

"""Logins, forms and errors of the pages, without a browser, and what requests of other sites may cause."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from registry.app import create_app
from registry.ui import page_limits
from storage.access import AccountName
from storage.errors import StorageFailed
from storage.names import RepositoryName
from tests.fakes.store_accounts import BY
from tests.unit.registry.ui.test_pages import FROM_PAGE, PASSWORD, names_on, site


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

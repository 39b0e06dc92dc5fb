"""Logins, forms and errors of the pages. The tests send requests without a browser, including requests that other sites
could cause."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import ClientDisconnect

from registry.app import create_app
from registry.browse.repository_browser import _READ_LIMITS
from registry.ui.pages import MAX_PENDING_PAGES_PER_VISITOR, MAX_RENDERED_PAGES
from storage.access import AccountName
from storage.content import digest_of
from storage.errors import StorageFailed
from storage.names import RepositoryName
from tests.fakes.app_in_process import until
from tests.fakes.page_store import add_cached
from tests.fakes.store_accounts import BY
from tests.unit.registry.ui.test_pages import FROM_PAGE, PASSWORD, names_on, site


async def test_log_in_and_out(tmp_path: Path) -> None:
    """The session is in a cookie that scripts cannot read. The response to a wrong password does not tell whether the
    account exists. After the login, the visitor is never redirected to another site."""
    async with site(tmp_path) as server, server.browser() as browser:
        for name in ("alice", "nobody", "Not A Name"):
            refused = await server.log_in(browser, name, password="wrong")
            assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
            assert "The user name or the password is wrong." in refused.text
        assert (await server.log_in(browser, "", password="")).status_code == 400
        refused = await server.log_in(browser, "alice", password="wrong", next="/ui/setup?client=podman")
        login_path = "/ui/login?next=/ui/setup%3Fclient%3Dpodman"
        # After a change of the language, the visitor gets back to the login page.
        assert f'action="/ui/language">\n<input type="hidden" name="next" value="{login_path}">' in refused.text
        form = await browser.get(login_path)
        assert '<input type="hidden" name="next" value="/ui/setup?client=podman">' in form.text
        logged_in = await server.log_in(browser, "alice", next="/ui/setup?client=podman")
        assert logged_in.headers["location"] == "/ui/setup?client=podman"
        assert "HttpOnly" in logged_in.headers["set-cookie"]
        assert "SameSite=lax" in logged_in.headers["set-cookie"]
        assert '<span class="account">alice</span>' in (await browser.get("/ui/setup")).text
        assert (await browser.get("/ui/system")).status_code == 403
        for foreign_url in ("//evil.example", "https://evil.example", "/\\evil.example", "/\t/evil.example", ""):
            answer = await server.log_in(browser, "alice", next=foreign_url)
            assert answer.headers["location"] == "/ui/", foreign_url
        ended = await browser.post("/ui/logout", headers={**FROM_PAGE, "content-type": FORM})
        assert ended.headers["location"] == "/ui/"
        assert '<span class="account">' not in (await browser.get("/ui/setup")).text
        assert (await browser.get("/ui/system")).headers["location"] == "/ui/login?next=/ui/system"


FORM = "application/x-www-form-urlencoded"


async def test_without_accounts_there_is_no_login(tmp_path: Path) -> None:
    """If the registry has no accounts, the login page redirects to the home page."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        for answer in (await browser.get("/ui/login"), await server.log_in(browser, "alice")):
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")


async def test_an_api_token_cannot_log_in_to_pages(tmp_path: Path) -> None:
    """An API token is not accepted as a password, because a session has all rights of the account, and the token may
    have fewer."""
    async with site(tmp_path) as server, server.browser() as browser:
        import base64

        header = await server.app.token("alice")
        secret = base64.b64decode(header.partition(" ")[2]).decode().partition(":")[2]
        refused = await server.log_in(browser, "alice", password=secret)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)


async def test_a_session_that_ended(tmp_path: Path) -> None:
    """If the session has ended, the next page says so once and deletes the cookie. Then the visitor is anonymous."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "alice")
        await server.app.accounts.set_enabled(AccountName("alice"), False, by=BY)
        page = await browser.get("/ui/repositories")
        assert "Your session has ended" in page.text
        assert '<span class="account">' not in page.text
        assert "Your session has ended" not in (await browser.get("/ui/repositories")).text


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}, {}])
@pytest.mark.parametrize("path", ["/ui/login", "/ui/logout", "/ui/language"])
@pytest.mark.slow
async def test_forms_of_other_sites_do_nothing(tmp_path: Path, path: str, headers: dict[str, str]) -> None:
    """A form of another site cannot log a visitor in or out, or change the language."""
    async with site(tmp_path) as server, server.browser() as browser:
        fields = {"user": "alice", "password": PASSWORD, "language": "zh-Hans"}
        refused = await browser.post(path, data=fields, headers=headers)
        assert (refused.status_code, "set-cookie" in refused.headers) == (403, False)
        assert refused.headers["content-type"] == "text/html; charset=utf-8"


async def test_a_foreign_host_name_is_refused(tmp_path: Path) -> None:
    """While there are no accounts, a browser on the registry's machine may not use a foreign host name. Otherwise a
    page of another site could read the pages (DNS rebinding)."""
    async with site(tmp_path, accounts=False) as server:
        transport = httpx2.ASGITransport(app=server.app.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://evil.example") as browser:
            refused = await browser.get("/ui/repositories", headers=FROM_PAGE)
            assert refused.status_code == 403


@pytest.mark.parametrize(("language", "text"), [("en", "Nothing is here"), ("zh-CN", "页面不存在")])
@pytest.mark.slow
async def test_errors_are_pages(tmp_path: Path, language: str, text: str) -> None:
    """Errors with 400, 404 and 500 are pages in the visitor's language. They contain no script from the request, and no
    cause of an internal error."""
    async with site(tmp_path) as server, server.browser(**{"accept-language": language}) as browser:
        missing = await browser.get("/ui/nothing")
        assert (missing.status_code, text in missing.text) == (404, True)
        hostile_path = "/ui/repositories/%3Cscript%3Ealert(1)%3C/script%3E"
        for path, status in ((hostile_path, 404), ("/ui/repositories?q=%zz", 400), ("/ui/setup?client=%3Cb%3E", 404)):
            answer = await browser.get(path)
            assert (answer.status_code, "<script>alert" in answer.text) == (status, False)
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert answer.headers["x-frame-options"] == "DENY"
        await server.log_in(browser, "root")

        async def fail(*_: object, **__: object) -> None:
            raise StorageFailed("the secret path")

        pages = server.app.app.service.pages
        assert pages is not None
        pages.content.repositories = fail  # type: ignore[method-assign, assignment]
        failed = await browser.get("/ui/repositories")
        assert (failed.status_code, "secret" in failed.text) == (500, False)
        assert ("This registry failed" in failed.text) == (language == "en")


async def test_too_many_requests_get_a_page(tmp_path: Path) -> None:
    """A browser gets the 429 as a page in the visitor's language, with Retry-After. Paths outside the pages get
    JSON."""
    limits = {"requests_per_second": 0.001, "burst": 1}
    async with site(tmp_path, limits=limits) as server, server.browser(**{"accept-language": "zh"}) as browser:
        assert (await browser.get("/ui/setup")).status_code == 200
        for _ in range(2):
            refused = await browser.get("/ui/setup")
            assert (refused.status_code, "请求过多" in refused.text) == (429, True)
            assert int(refused.headers["retry-after"]) > 0
        # This path is outside the pages. It is not `/livez`, because health checks have a rate limit of their own.
        assert (await browser.get("/livez2")).headers["content-type"] == "application/json"


async def test_a_docker_hub_that_is_not_the_default_upstream(tmp_path: Path) -> None:
    """docker can use a mirror only if Docker Hub is the default upstream. Otherwise the set-up page shows the full name
    to pull. BuildKit can still use the mirror."""
    endpoints = ["http://127.0.0.1:9"]
    hub = {"name": "docker.io", "endpoints": endpoints}
    upstream = [hub, {"name": "quay.io", "default": True, "endpoints": endpoints}]
    async with site(tmp_path, accounts=False, upstream=upstream) as server, server.browser() as browser:
        docker = (await browser.get("/ui/setup")).text
        assert "docker pull registry.test/docker.io/library/ubuntu" in docker
        assert "registry-mirrors" not in docker
        jobs = (await browser.get("/ui/setup?client=ci")).text
        assert "--registry-mirror" not in jobs
        assert "[registry.&#34;docker.io&#34;]" in jobs


async def test_too_many_pages_of_one_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a visitor requests too many pages at a time, the 429 is a page that is the same for everyone, so it need not
    be rendered."""
    monkeypatch.setattr("registry.ui.pages.MAX_PENDING_PAGES_PER_VISITOR", 0)
    async with site(tmp_path) as server, server.browser() as browser:
        first, second = [await browser.get("/ui/setup") for _ in range(2)]
        assert (first.status_code, first.text) == (429, second.text)
        assert "Too many requests" in first.text
        assert int(first.headers["retry-after"]) > 0


async def test_a_client_that_leaves_while_it_sends_a_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that disconnects while it sends a form is no failure: nothing is logged, and no page is rendered."""
    async with site(tmp_path) as server:
        headers = {"content-type": "application/x-www-form-urlencoded", **FROM_PAGE}
        answer = await server.app.client("POST", "/ui/login", headers, [b"user="], leaves=True)
    assert isinstance(answer.cut, ClientDisconnect)
    assert answer["content-type"] == "application/json"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
async def test_slow_forms_do_not_delay_pages(tmp_path: Path) -> None:
    """While several forms arrive slowly, other pages are still sent."""
    async with site(tmp_path) as server, server.browser() as browser:
        send_rest, arriving = asyncio.Event(), 0

        async def slow_form() -> AsyncIterator[bytes]:
            nonlocal arriving
            arriving += 1
            yield b"user=alice&"
            await send_rest.wait()
            yield b"password=wrong"

        async def send(path: str) -> int:
            headers = {**FROM_PAGE, "content-type": FORM}
            return (await browser.post(path, content=slow_form(), headers=headers)).status_code

        async with asyncio.TaskGroup() as tasks:
            forms = [tasks.create_task(send(path)) for path in ("/ui/login", "/ui/logout", "/ui/language") * 2]
            while arriving < len(forms):  # noqa: ASYNC110 - there is no event for the start of a request
                await asyncio.sleep(0.01)
            async with asyncio.timeout(30):
                assert (await browser.get("/ui/setup")).status_code == 200
            send_rest.set()
        # Two forms each: the logout, the choice of an unknown language, and the login with a wrong password.
        assert sorted(form.result() for form in forms) == [303, 303, 400, 400, 403, 403]


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/ui/search?q=app", "searches"),
        ("/ui/repositories/team/app", "lists"),
        ("/ui/repositories/team/app:1", "reads"),
        ("/ui/comparison/team/app?tag=1&tag=1", "reads"),
        ("/ui/tag-removal/team/app?tag=1", "lists"),
        ("/ui/description/team/app", "reads"),
    ],
)
@pytest.mark.slow
async def test_pages_that_wait_for_other_requests_keep_nobody_from_pages(tmp_path: Path, path: str, limit: str) -> None:
    """Other requests hold all slots for searches, reads or lists (`limit`), so pages that need such a slot wait. While
    they wait, they hold no slot for rendering, so other pages are still rendered."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        await add_cached(server.store, "team/app", "1")
        access = server.app.app.service.access
        assert access is not None
        management = access.management
        slots = {
            "searches": management.content_searches._store_limits,
            "reads": management.repository_browser._reads,
            "lists": management.repository_browser._lists,
        }[limit]
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as held:
            for number in range(slots._limits.max_running):
                await held.enter_async_context(slots.slot(f"visitor {number}"))
            waiting = [tasks.create_task(browser.get(path)) for _ in range(MAX_RENDERED_PAGES)]
            await until(lambda: slots.pending == slots._limits.max_running + len(waiting))
            async with asyncio.timeout(30):
                assert (await browser.get("/ui/setup")).status_code == 200
        assert [task.result().status_code for task in waiting] == [200] * len(waiting)


@pytest.mark.parametrize(
    "path",
    [
        "/ui/repositories/team/app",
        "/ui/repositories/team/app:1",
        "/ui/comparison/team/app?tag=1&tag=1",
        "/ui/tag-removal/team/app?tag=1",
        "/ui/description/team/app",
    ],
)
@pytest.mark.slow
async def test_pages_that_wait_to_be_rendered_keep_nobody_from_reads(tmp_path: Path, path: str) -> None:
    """While pages of some visitors wait for a slot to render, these pages hold no slot to read. So another visitor can
    read."""
    async with site(tmp_path, accounts=False) as server, AsyncExitStack() as browsers:
        await add_cached(server.store, "team/app", "1")
        pages = server.app.app.pages
        assert pages is not None
        slots = pages.limits._limits
        visitors = [
            await browsers.enter_async_context(server.browser(address=f"192.0.2.{number}"))
            for number in range(_READ_LIMITS.max_running + 1)
        ]
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as held:
            for number in range(MAX_RENDERED_PAGES):
                await held.enter_async_context(slots.slot(f"visitor {number}"))
            waiting = [tasks.create_task(visitor.get(path)) for visitor in visitors[1:]]
            await until(lambda: slots.pending == MAX_RENDERED_PAGES + len(waiting))
            async with asyncio.timeout(30):
                for read in ("manifests/1/details", "tag-list"):
                    answer = await visitors[0].get(f"/api/v1/repositories/team/app/{read}")
                    assert answer.status_code == 200, read
        assert [task.result().status_code for task in waiting] == [200] * len(waiting)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/ui/comparison/none", {}, 404), ("/ui/logout", {"sec-fetch-site": "cross-site"}, 403)],
)
async def test_error_pages_wait_for_a_slot(tmp_path: Path, path: str, headers: dict[str, str], status: int) -> None:
    """A page about an error is rendered in a slot of its visitor, like every other page. If too many pages of this
    visitor wait, the visitor gets 429."""
    async with site(tmp_path, accounts=False) as server, server.browser(**headers) as browser:
        pages = server.app.app.pages
        assert pages is not None
        slots = pages.limits._limits
        method = "POST" if headers else "GET"
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as held:
            for number in range(MAX_RENDERED_PAGES):
                await held.enter_async_context(slots.slot(f"visitor {number}"))
            waiting = [tasks.create_task(browser.request(method, path)) for _ in range(MAX_PENDING_PAGES_PER_VISITOR)]
            await until(lambda: slots.pending == MAX_RENDERED_PAGES + len(waiting))
            assert (await browser.request(method, path)).status_code == 429
        assert [task.result().status_code for task in waiting] == [status] * len(waiting)


@pytest.mark.parametrize("path", ["/ui/repositories", "/ui/overview"])
@pytest.mark.slow
async def test_pages_that_wait_for_a_list_of_repositories_keep_nobody_from_pages(tmp_path: Path, path: str) -> None:
    """A page that waits for a list of repositories holds no slot for pages, so that other pages are rendered
    meanwhile."""
    async with site(tmp_path) as server, server.browser() as browser:
        await server.log_in(browser, "alice")
        pages = server.app.app.service.pages
        assert pages is not None
        read, waiting_lists, may_read = pages.content.repositories, 0, asyncio.Event()

        async def read_later(*values: Any, **keywords: Any) -> Any:
            nonlocal waiting_lists
            waiting_lists += 1
            await may_read.wait()
            return await read(*values, **keywords)

        pages.content.repositories = read_later  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(browser.get(path)) for _ in range(MAX_RENDERED_PAGES)]
            await until(lambda: waiting_lists == len(waiting))
            async with asyncio.timeout(30):
                assert (await browser.get("/ui/setup")).status_code == 200
            may_read.set()
        assert [task.result().status_code for task in waiting] == [200] * len(waiting)


async def test_the_root_redirects_browsers_to_the_pages(tmp_path: Path) -> None:
    """`/` redirects browsers to the pages. Other programs get a text. If the pages are disabled, browsers get the text
    too."""
    html = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with site(tmp_path / "a", accounts=False) as server, server.browser() as browser:
        assert (await browser.get("/", headers=html)).headers["location"] == "/ui/"
        assert (await browser.get("/ui")).headers["location"] == "/ui/"
        assert (await browser.get("/ui/")).headers["location"] == "/ui/overview"
        text = await browser.get("/")
        assert "docker push registry.test/team/app" in text.text
        assert text.headers["vary"] == "Accept"
    async with site(tmp_path / "b", accounts=False, pages={"enabled": False}) as server, server.browser() as browser:
        assert "docker push" in (await browser.get("/", headers=html)).text
        assert (await browser.get("/ui/repositories")).headers["content-type"] == "application/json"


async def test_static_files_are_cached_for_ever(tmp_path: Path) -> None:
    """A static file is cached for ever under the path with the present version. Under a path with another version, it
    must be revalidated."""
    async with site(tmp_path, accounts=False) as server, server.browser() as browser:
        page = (await browser.get("/ui/setup")).text
        paths = re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', page)
        assert {path.rpartition("/")[2] for path in paths} == {"page.css", "page.js", "icon.svg", "htmx.min.js"}
        for path in paths:
            assert "immutable" in (await browser.get(path)).headers["cache-control"]
        assert (await browser.get("/ui/static/old/page.css")).headers["cache-control"] == "no-cache"
        for path in ("/ui/static/x/none.css", "/ui/static/x/..%2frendering.py"):
            assert (await browser.get(path)).status_code == 404


async def test_pages_send_no_request_to_an_upstream(tmp_path: Path) -> None:
    """The pages of a mirrored repository that is not in the cache get 404, and no connection to the upstream is made
    for them. A pull of the same repository makes one."""
    connections = 0

    def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as upstream:
        endpoint = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
        settings = [{"name": "docker.io", "default": True, "endpoints": [endpoint]}]
        async with site(tmp_path, accounts=False, upstream=settings) as server, server.browser() as browser:
            for path in (
                "repositories/docker.io/library/nginx",
                "repositories/nginx",
                "repositories/docker.io/library/nginx:1",
                f"repositories/docker.io/library/nginx@{digest_of(b'')}",
                "tag-history/docker.io/library/nginx:1",
                "comparison/docker.io/library/nginx?tag=1&tag=2",
            ):
                assert (await browser.get(f"/ui/{path}")).status_code == 404, path
            assert RepositoryName("docker.io/library/nginx") not in names_on(await browser.get("/ui/repositories"))
            assert connections == 0
            assert (await browser.get("/v2/docker.io/library/nginx/manifests/1")).status_code == 502
            assert connections > 0


def test_the_application_without_a_store_has_no_pages(tmp_path: Path) -> None:
    """Without a store, there are no accounts and no content that pages could show, so there are no pages."""
    from registry.config import Settings
    from storage.memory_registry import MemoryRegistry

    assert create_app(Settings(data=tmp_path), MemoryRegistry()).pages is None

"""Rights that change while the body of a request arrives: the management API and the pages check the rights before they
receive the body, and again before they act. The tests send requests without a browser, to an application in this
process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from fastapi.routing import APIRoute

from registry.admin.browser_login import LOGIN_PAGE_PATH
from registry.admin.cookies import SESSION_COOKIE
from registry.admin.management_api import management_routes
from registry.auth.rights.principal import Identity
from registry.ui import site as page_routes
from registry.ui.account_pages import LANGUAGE_PATH, LOGOUT_PATH
from storage.access import AccountName, Grantee
from storage.patterns import NamePattern
from tests.fakes.page_store import add_cached
from tests.fakes.store_accounts import BY, add_account, add_grant
from tests.system.admin.test_api_refusals import BODIES, filled
from tests.unit.registry.ui.test_pages import FROM_PAGE, Site, site

REPOSITORY = "root"
"""A repository with the name that `filled` puts into the paths of routes."""
ALICE = AccountName("alice")
ROOT = AccountName("root")
DIGEST = "sha256:" + 64 * "0"
FORM_TYPE = "application/x-www-form-urlencoded"
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "/ui/access": ("/ui/access", {"name": "backdoor", "admin": "yes"}),
    "/ui/access/robots": ("/ui/access/robots", {"name": "backdoor"}),
    "/ui/access/groups": ("/ui/access/groups", {"name": "backdoor"}),
    "/ui/access/grants": (
        "/ui/access/grants",
        {"do": "put", "kind": "everyone", "name": "", "pattern": "**", "action": "pull"},
    ),
    "/ui/access/tokens": ("/ui/access/tokens", {"do": "revoke", "token": "x", "confirmed": "yes"}),
    "/ui/access/accounts/{name}": ("/ui/access/accounts/alice", {"do": "make-admin", "confirmed": "yes"}),
    "/ui/access/groups/{name}": ("/ui/access/groups/dev", {"do": "join", "member": "alice"}),
    "/ui/account": ("/ui/account", {"do": "token", "days": ""}),
    "/ui/description/{path:path}": (
        f"/ui/description/{REPOSITORY}",
        {"action": "save", "text": "changed", "revision": "0"},
    ),
    "/ui/tag-removal/{path:path}": (f"/ui/tag-removal/{REPOSITORY}", {"tag": f"v1@{DIGEST}"}),
    "/ui/tag-restoration/{path:path}": (f"/ui/tag-restoration/{REPOSITORY}", {"tag": f"v1@{DIGEST}"}),
    "/ui/tag-history/{path:path}": (f"/ui/tag-history/{REPOSITORY}:v1", {"digest": DIGEST}),
    "/ui/upkeep/start": ("/ui/upkeep/start", {"kind": "fsck", "sure": "yes"}),
    "/ui/upkeep/stop": ("/ui/upkeep/stop", {"job": "1"}),
    "/ui/mirror/refresh": ("/ui/mirror/refresh", {"reference": "app:1"}),
    "/ui/mirror/freeze": ("/ui/mirror/freeze", {"reference": "app:1"}),
    "/ui/mirror/unfreeze": ("/ui/mirror/unfreeze", {"reference": "app:1"}),
    "/ui/mirror/purge": ("/ui/mirror/purge", {"reference": "app:1", "sure": "yes"}),
    "/ui/mirror/warm": ("/ui/mirror/warm", {"references": "app:1"}),
}
"""For the path of each form that needs an account: a path of a request, and fields that the form accepts."""
FORMS_FOR_ALL = {LOGIN_PAGE_PATH, LOGOUT_PATH, LANGUAGE_PATH}
"""The paths of the forms that need no account."""


Change = Callable[[], Awaitable[object]]
"""A change of rights that a test makes while a body arrives."""


@dataclass
class SlowBody:
    """A request body that calls `change` after the server has received its first half. `is_changed`: whether it has
    called `change`."""

    body: bytes
    change: Change
    is_changed: bool = False

    async def parts(self) -> AsyncIterator[bytes]:
        half = len(self.body) // 2
        yield self.body[:half]
        await self.change()
        self.is_changed = True
        yield self.body[half:]


async def send_json(
    browser: httpx2.AsyncClient, route: tuple[str, str], login: str, document: object, change: Change
) -> httpx2.Response:
    """Sends a request to the API. `route`: its method, and its path below `/api/v1`. `login`: the Authorization header;
    empty: none. Calls `change` when the server has received a half of the body, which must happen."""
    slow = SlowBody(json.dumps(document).encode(), change)
    method, path = route
    headers = {"content-type": "application/json", **({"authorization": login} if login else {})}
    answer = await browser.request(method, f"/api/v1{path}", content=slow.parts(), headers=headers)
    assert slow.is_changed, (method, path, answer.text)
    return answer


async def send_form(browser: httpx2.AsyncClient, path: str, fields: dict[str, str], change: Change) -> httpx2.Response:
    """Sends a form of a page. Calls `change` when the server has received a half of the form, which must happen."""
    slow = SlowBody(urlencode(fields).encode(), change)
    answer = await browser.post(path, content=slow.parts(), headers={**FROM_PAGE, "content-type": FORM_TYPE})
    assert slow.is_changed, (path, answer.text)
    return answer


def routes_with_body() -> list[tuple[str, str]]:
    """Returns the method and the path of each route of the API that receives a body."""
    routes = [route for route in management_routes() if isinstance(route, APIRoute) and route.body_field is not None]
    return [
        (method, route.path.removeprefix("/api/v1").replace(":path", ""))
        for route in routes
        for method in route.methods or ()
    ]


def account_names(server: Site) -> list[str]:
    return [account.name for account in server.app.accounts.accounts(None, None, 10).items]


async def test_an_account_that_is_disabled_during_a_body_changes_nothing(tmp_path: Path) -> None:
    """On every route of the API with a body, an admin whose account is disabled before the last bytes of the body
    arrive gets 401, as for the next request."""
    async with site(tmp_path) as server, server.browser() as browser:
        await add_cached(server.store, REPOSITORY, "v1")
        login = await server.app.user("eve", admin=True)
        names = account_names(server)

        async def disable() -> None:
            await server.app.accounts.set_enabled(AccountName("eve"), False, by=BY)

        for method, path in routes_with_body():
            await server.app.accounts.set_enabled(AccountName("eve"), True, by=BY)
            answer = await send_json(browser, (method, filled(path)), login, BODIES[method, path], disable)
            assert answer.status_code == 401, (method, path, answer.text)
        assert account_names(server) == names
        assert server.app.accounts.grants() == []


def test_all_forms_are_tested() -> None:
    """`FORMS` has each form that needs an account."""
    posts = {
        route.path
        for route in page_routes._page_routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    assert posts == set(FORMS) | FORMS_FOR_ALL


async def returned_page(browser: httpx2.AsyncClient, path: str, fields: dict[str, str], **headers: str) -> str:
    """Sends a form without a login. Returns the path of the page to which the login page would redirect."""
    answer = await browser.post(path, data=fields, headers={**FROM_PAGE, **headers})
    assert answer.status_code == 303, (path, answer.text)
    return parse_qs(urlsplit(answer.headers["location"]).query)["next"][0]


@pytest.mark.slow
async def test_a_login_after_a_form_leads_to_a_page(tmp_path: Path) -> None:
    """A visitor whose session has ended when they send a form gets to the login page, and from there to a page that
    exists: the one on which they sent the form if the browser names it, with its query."""
    async with site(tmp_path) as server, server.browser() as anonymous, server.browser() as admin:
        await add_cached(server.store, REPOSITORY, "v1")
        await server.app.accounts.add_group(AccountName("dev"), by=BY)
        await server.log_in(admin, "root")
        for path, fields in FORMS.values():
            page = await returned_page(anonymous, path, fields)
            answer = await admin.get(page, follow_redirects=True)
            assert answer.status_code == 200, (path, page)
        refresh, stop = "/ui/mirror/refresh", "/ui/upkeep/stop"
        for path, referer, page in (
            (refresh, "http://registry.test/ui/mirror/images?q=app&after=25", "/ui/mirror/images?q=app&after=25"),
            (refresh, "http://registry.test/ui/mirror", "/ui/mirror"),
            ("/ui/mirror/purge", "http://registry.test/ui/mirror/purge", "/ui/mirror"),
            (stop, "http://registry.test/ui/mirror", "/ui/mirror"),
            (stop, "http://registry.test/ui/upkeep/jobs?kind=gc", "/ui/upkeep/jobs?kind=gc"),
            (stop, "http://registry.test/ui/upkeep/start", "/ui/upkeep"),
            (refresh, "http://[", "/ui/mirror"),
            (refresh, "http://registry.test//evil.example/", "/ui/mirror"),
            (refresh, "http://registry.test/ui/mirror/images?q=" + 2000 * "x", "/ui/mirror"),
        ):
            assert await returned_page(anonymous, path, {}, referer=referer) == page, (path, referer)


async def test_a_right_that_is_removed_during_a_body_is_not_used(tmp_path: Path) -> None:
    """An account loses `push` while it sends a description. The API and the page refuse the description with 403."""
    async with site(tmp_path) as server, server.browser() as browser:
        await add_cached(server.store, REPOSITORY, "v1")

        async def take_push() -> None:
            await server.app.accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("*"), by=BY)

        await add_grant(server.app.accounts, "everyone", "*", "pull")
        await add_grant(server.app.accounts, "user:alice", "*", "push")
        login, path = await server.app.token("alice"), f"/repositories/{REPOSITORY}/description"
        answer = await send_json(browser, ("PUT", path), login, {"text": "changed"}, take_push)
        assert answer.status_code == 403, answer.text
        await add_grant(server.app.accounts, "user:alice", "*", "push")
        await server.log_in(browser, "alice")
        form_path, fields = FORMS["/ui/description/{path:path}"]
        assert (await send_form(browser, form_path, fields, take_push)).status_code == 403
        assert (await browser.get(f"/api/v1{path}", headers={"authorization": login})).json()["text"] == ""


@pytest.mark.parametrize("is_form", [False, True], ids=["API", "page"])
async def test_the_first_account_ends_the_rights_of_the_own_machine(tmp_path: Path, is_form: bool) -> None:
    """While there are no accounts, a client on the registry's own machine may add the first one. If another client adds
    the first account before the last bytes of the body arrive, the registry refuses the request."""
    async with site(tmp_path, accounts=False) as server:
        transport = httpx2.ASGITransport(app=server.app.app, client=("127.0.0.1", 1), raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:5000") as browser:

            async def add_first() -> None:
                await add_account(server.app.accounts, "first", admin=True)

            if is_form:
                answer = await send_form(browser, *FORMS["/ui/access"], add_first)
                assert answer.headers["location"].startswith("/ui/login?")
            else:
                document = {"name": "backdoor", "admin": True}
                answer = await send_json(browser, ("POST", "/users"), "", document, add_first)
                assert answer.status_code == 401
            assert account_names(server) == ["first"]


async def test_a_visitor_who_is_disabled_during_a_form_changes_nothing(tmp_path: Path) -> None:
    """For every form that needs an account, an admin whose account is disabled before the last bytes of the form arrive
    is sent to the login page, as for the next request."""
    async with site(tmp_path) as server:
        await add_cached(server.store, REPOSITORY, "v1")
        await server.app.accounts.add_group(AccountName("dev"), by=BY)
        access = server.app.app.service.access
        assert access is not None
        names = account_names(server)

        async def disable() -> None:
            await server.app.accounts.set_enabled(ROOT, False, by=BY)

        for path, fields in FORMS.values():
            await server.app.accounts.set_enabled(ROOT, True, by=BY)
            identity = Identity(ROOT, version=server.app.accounts.account(ROOT).version)
            session = await access.components.login_sessions.start(identity, "password", BY)
            async with server.browser(cookie=f"{SESSION_COOKIE}={session}") as browser:
                answer = await send_form(browser, path, fields, disable)
            assert (answer.status_code, answer.headers.get("location", "")[:15]) == (303, "/ui/login?next="), path
        assert account_names(server) == names
        assert not server.app.accounts.account(ALICE).admin
        assert server.app.accounts.grants() == []
        assert server.app.accounts.groups(None, 10).items == [("dev", ())]
        assert server.app.accounts.tokens(None, None, 10).items == []
        assert (await server.store.jobs.jobs(None, 10)).items == []

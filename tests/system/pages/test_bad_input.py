"""Tests of the web pages with invalid content, with an upstream that does not respond, and against attacks by other
sites, in a real browser."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import expect

from storage.composition import layout_of, open_registry, prepare_data_dir
from tests.fakes.admin_site import PASSWORD
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.page_browser import PageBrowser
from tests.fakes.page_site import HOSTILE
from tests.fakes.page_store import add_cached, add_index
from tests.fakes.plain_client import plain_client
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import RegistryServer, running_server

# The numbers of layers, platforms and tags of the unusual content.
LAYERS = 500
PLATFORMS = 100
TAGS = 100_000


async def _fill(data: Path) -> None:
    """Stores an image with many layers, an index with many platforms, and images that `_spoil` changes later."""
    async with open_registry(data) as store:
        await add_cached(store, "odd/layers", "v1", layers=LAYERS)
        await add_index(store, "odd/wide", "v1", [("linux", f"cpu{n}") for n in range(PLATFORMS)], present=1)
        for repo in ("odd/damaged", "odd/strange", "odd/many"):
            await add_cached(store, repo, "v1", of=repo)
        await add_cached(store, "docker.io/library/ubuntu", "24.04")


def _spoil(data: Path) -> None:
    """Writes rows into the database that no push could write: invalid manifests and 100,000 tags."""
    db = second_connection(layout_of(data).metadata)
    of_repo = "FROM repository r WHERE r.name = ? AND r.id = manifest.repository"
    db.execute(f"UPDATE manifest SET body = ?, size = ? {of_repo}", (HOSTILE.encode(), len(HOSTILE), "odd/damaged"))
    db.execute(f"UPDATE manifest SET media_type = ? {of_repo}", (f"application/{HOSTILE}", "odd/strange"))
    numbers = f"WITH n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {TAGS - 1})"
    many = "FROM n, repository r JOIN manifest m ON m.repository = r.id WHERE r.name = 'odd/many'"
    db.execute(f"{numbers} INSERT INTO tag SELECT r.id, 't' || i, m.id, 1 {many}")
    db.close()


@pytest.fixture(scope="module")
def silent_upstream() -> Iterator[socket.socket]:
    """The listening socket of an upstream that never responds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


@pytest.fixture(scope="module")
def unusual_registry(
    tmp_path_factory: pytest.TempPathFactory, silent_upstream: socket.socket
) -> Iterator[RegistryServer]:
    """Provides a registry without accounts. It has the unusual content of `_fill` and `_spoil`, and an upstream that
    never responds."""
    folder = tmp_path_factory.mktemp("odd")
    prepare_data_dir(folder / "data")
    with ThreadPoolExecutor(1) as pool:  # the browser may have an event loop in this thread
        pool.submit(lambda: asyncio.run(_fill(folder / "data"))).result()
    _spoil(folder / "data")
    url = f"http://127.0.0.1:{silent_upstream.getsockname()[1]}"
    upstream = f'[{{"name": "docker.io", "default": true, "endpoints": ["{url}"]}}]'
    with running_server(folder, workers=1, env={"ENTREPOT_UPSTREAM": upstream}) as server:
        yield server


@pytest.mark.parametrize("javascript", [True, False])
def test_pages_of_unusual_content(unusual_registry: RegistryServer, browser: PageBrowser, javascript: bool) -> None:
    """The content has a manifest that is not JSON, a manifest of an unknown type, and an image, an index and a
    repository with very many layers, platforms and tags. Each page is short, states what it omits, and contains no
    markup from the content."""
    with browser.tab(unusual_registry.url, javascript=javascript) as tab:
        page = tab.page
        for path, expected_text in (
            ("odd/layers:v1", f"There are {LAYERS - 200} more steps."),
            ("odd/wide:v1", "linux/cpu99 not here"),
            ("odd/damaged:v1", "The manifest cannot be read"),
            ("odd/damaged", "v1"),
            ("odd/strange:v1", "odd/strange:v1"),
            ("odd/strange", "v1"),
            ("odd/many", "Show more"),
            ("odd/many?sort=size", "There are too many tags to sort them by size."),
        ):
            tab.open(f"/ui/repositories/{path}")
            assert expected_text in page.locator("main").inner_text(), path
            assert page.locator("main script, main img").count() == 0, path
            assert page.title() != "taken"  # the script in HOSTILE, if it ran, would set this title
            assert page.locator("main tr").count() <= 201, path
        tab.open("/ui/repositories/odd/wide:v1")
        assert page.locator(".platforms .missing").count() == PLATFORMS - 1
        tab.open("/ui/repositories/odd/many?q=t9999&sort=-version")
        expect(page.locator("#rows th a").first).to_have_text("t99999")


def test_pages_are_served_while_the_upstream_hangs(
    unusual_registry: RegistryServer, silent_upstream: socket.socket, browser: PageBrowser
) -> None:
    """While a client waits for a response from the upstream, the pages of mirrored content are served. The request gets
    its response, an error, only after them."""
    with (
        ExitStack() as stack,
        plain_client(unusual_registry.url, timeout=300) as client,
        ThreadPoolExecutor(1) as pool,
        browser.tab(unusual_registry.url) as tab,
    ):
        tab.open("/ui/repositories")  # the first page of a browser takes longer
        waiting = pool.submit(client.get, "/v2/docker.io/library/nginx/manifests/latest")
        upstream_connection = stack.enter_context(silent_upstream.accept()[0])
        assert b" /v2/library/nginx/manifests/latest " in upstream_connection.recv(10_000)
        for path, heading in (
            ("/ui/repositories?in=docker.io", "Repositories"),
            ("/ui/repositories/docker.io/library/ubuntu", "docker.io/library/ubuntu"),
            ("/ui/repositories/docker.io/library/ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
            ("/ui/search?q=ubuntu", "Search"),
        ):
            tab.open(path)
            assert tab.page.locator("h1").inner_text() == heading
        assert not waiting.done()
        assert waiting.result().status_code >= 500


@pytest.mark.parametrize("path", ["/ui/logout", "/ui/login", "/ui/language"])
def test_login_and_language_forms_of_another_site_are_refused(
    site: SiteWithAccounts, browser: PageBrowser, path: str
) -> None:
    """A page of another site submits a form to the registry in the browser of a logged-in user. The server answers 403,
    and nothing changes."""
    name, password = site.user()
    with browser.tab(site.server.url) as tab:
        tab.allowed_errors.append("the server responded with a status of 403")
        tab.log_in(name, password)
        tab.page.goto("about:blank")
        fields = {"user": "root", "password": PASSWORD, "language": "zh-Hans", "next": "/ui/"}
        inputs = "".join(f'<input name="{key}" value="{value}">' for key, value in fields.items())
        url = site.server.url
        tab.page.set_content(f'<form method="post" action="{url}{path}">{inputs}<button>Win</button></form>')
        tab.page.get_by_role("button", name="Win").click()
        assert tab.page.locator(".status").inner_text() == "403"
        tab.open("/ui/repositories")
        assert tab.page.locator("html").get_attribute("lang") == "en"
        assert tab.page.locator(".account").inner_text() == name


def test_set_up_page_shows_the_requests_of_a_client(site: SiteWithAccounts, browser: PageBrowser) -> None:
    """After a client has sent a request from the address of the visitor, the set-up page of this client shows it,
    whichever worker serves the page."""
    with browser.tab(site.server.url) as tab, plain_client(site.server.url) as docker:
        tab.open("/ui/setup?client=buildkit")
        assert "No request of this client" in tab.page.locator("main").inner_text()
        docker.get("/v2/", headers={"user-agent": "buildkit/v0.26"})
        for _ in range(4):
            tab.page.reload()
            assert "came through here from your address, 127.0.0.1" in tab.page.locator("main").inner_text()

"""Fixtures for the tests of single sign-on: a fake OpenID provider, a registry that uses this provider, and the
browsers of two people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.commands import entrepot_output
from tests.fakes.openid_server import CLIENT, SECRET, FakeOpenIDProvider, openid_provider
from tests.fakes.plain_client import plain_client
from tests.fakes.process_resources import eventually
from tests.fakes.server_process import running_server

SESSION, ATTEMPT = "entrepot-session", "entrepot-login"
"""The names of two cookies: one belongs to a session, the other to a login that is in progress."""


@dataclass
class Browser:
    """A client that keeps cookies, as a browser does. It does not follow redirects by itself."""

    registry: AdminSite
    client: httpx2.Client

    def get(self, path: str, **more: Any) -> httpx2.Response:
        """Gets one page of the registry, or of any site if `path` is a URL."""
        return self.client.get(path if path.startswith("http") else self.registry.server.url + path, **more)

    def callback_url(self, path: str = "/login/openid") -> str:
        """Begins a login, and logs in at the provider. Returns the URL to which the provider redirects the browser: the
        registry's `/login/callback`, with the provider's response in the query."""
        redirect = self.get(path)
        assert redirect.status_code == 303, redirect.text
        answer = self.get(redirect.headers["location"])
        assert answer.status_code == 302
        return answer.headers["location"]

    def login(self, path: str = "/login/openid") -> httpx2.Response:
        """Logs in at the provider, and follows its redirect back to the registry. Returns the registry's response."""
        return self.get(self.callback_url(path))

    def submit(self, user: str, password: str, *, origin: str | None = None, **fields: str) -> httpx2.Response:
        """Sends the form of the login page with a user name and a password. `origin`: the site of the page that has the
        form (None: this registry)."""
        headers = {"origin": self.registry_url if origin is None else origin}
        form = {"user": user, "password": password, **fields}
        return self.client.post(f"{self.registry_url}/login", data=form, headers=headers)

    def call(self, method: str, path: str, body: object = None, **headers: str) -> httpx2.Response:
        """Sends a request to the management API, with the cookies of the browser."""
        return self.client.request(method, f"{self.registry.server.url}/api/v1{path}", json=body, headers=headers)

    @property
    def registry_url(self) -> str:
        return self.registry.server.url

    @property
    def session(self) -> str | None:
        """The value of the session cookie, or None without a session."""
        return self.client.cookies.get(SESSION)


def variables(provider: FakeOpenIDProvider, folder: Path, **more: str) -> dict[str, str]:
    """Returns the environment variables for a registry that uses the provider."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(SECRET)
    settings = {"ISSUER": provider.url, "CLIENT_ID": CLIENT, "CLIENT_SECRET_FILE": str(folder / "secret"), **more}
    return {f"ENTREPOT_OIDC__{name}": value for name, value in settings.items()}


def failed_logins(site: AdminSite, reason: str) -> list[dict[str, Any]]:
    """Waits until the audit log has a failed login whose details contain `reason`. Returns all such entries."""

    def found() -> list[dict[str, Any]]:
        lines = site.call_ok("GET", "/audit", action="login", outcome="failed", limit=1000)["items"]
        return [line for line in lines if reason in json.dumps(line["detail"])]

    assert eventually(lambda: bool(found()), patience=60), f"the audit log has no failed login because of: {reason}"
    return found()


def assert_refused(browser: Browser, answer: httpx2.Response, status: int = 403) -> None:
    """Checks that the response is a short error page, and that the browser has no session."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert (
        answer.headers["content-security-policy"]
        == "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    assert '<a href="/ui/login">' in answer.text
    assert len(answer.text) < 1000
    assert browser.session is None
    assert browser.call("GET", "/me").status_code == 401


@pytest.fixture(scope="package")
def made_provider() -> Iterator[FakeOpenIDProvider]:
    """Yields one provider for all tests of this folder."""
    with openid_provider() as running:
        yield running


@pytest.fixture
def provider(made_provider: FakeOpenIDProvider) -> FakeOpenIDProvider:
    """Returns the provider, without the faults and changes of earlier tests."""
    made_provider.clear_faults()
    return made_provider


@pytest.fixture(scope="package")
def site(made_provider: FakeOpenIDProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Yields a registry that uses the provider. It has the admin root and the user alice."""
    folder = tmp_path_factory.mktemp("login")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    entrepot_output("user", "add", "alice", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with running_server(folder, workers=2, env=variables(made_provider, folder, GROUPS_CLAIM="groups")) as server:
        yield AdminSite(server, folder)


@pytest.fixture
def browser(site: AdminSite) -> Iterator[Browser]:
    """Yields a browser without cookies."""
    with plain_client(timeout=60) as client:
        yield Browser(site, client)


@pytest.fixture
def other_browser(site: AdminSite) -> Iterator[Browser]:
    """Yields the browser of another person, without cookies."""
    with plain_client(timeout=60) as client:
        yield Browser(site, client)

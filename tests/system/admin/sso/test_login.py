"""Tests of logins with an OpenID provider: `/login/openid` of a running server, with a client that acts as a
browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.commands import entrepot_output
from tests.fakes.openid_server import SECRET, FakeOpenIDProvider, openid_provider
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.server_process import running_server
from tests.system.admin.sso.conftest import ATTEMPT, SESSION, Browser, failed_logins, variables


def test_login_starts_a_session(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """After a login, the browser is redirected to the documentation of the API. Every worker accepts its session, and
    the audit log has an entry."""
    answer = browser.login()
    assert (answer.status_code, answer.headers["location"]) == (303, "/api/docs")
    assert browser.get("/api/docs").status_code == 200
    assert browser.client.cookies.get(ATTEMPT) is None
    for _ in range(4):  # on new connections, so that every worker gets a request
        with plain_client(cookies={SESSION: browser.session or ""}) as client:
            me = client.get(f"{browser.registry_url}/api/v1/me")
            assert (me.status_code, me.json()["name"], me.json()["admin"]) == (200, "alice", False)
    assert browser.call("GET", "/users").status_code == 403
    lines: list[dict[str, Any]] = []
    while not lines:
        entries = browser.registry.call_ok("GET", "/audit", action="login", actor="alice", outcome="ok", limit=1000)[
            "items"
        ]
        lines = [line for line in entries if line["detail"] == {"how": "openid"}]
    assert lines[0]["address"] == "127.0.0.1"


def test_session_of_an_admin(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """If the account is an admin, its session has admin rights."""
    provider.person = {"preferred_username": ADMIN}
    browser.login()
    assert browser.call("GET", "/users").status_code == 200


def test_each_login_has_its_own_state_and_nonce(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """Each login sends the provider another state, nonce and code challenge. The code verifier is not in the URL to
    which the browser is redirected."""
    provider.login_requests.clear()
    browser.login()
    browser.login()
    first, second = provider.login_requests
    for name in ("state", "nonce", "code_challenge"):
        assert first[name] != second[name]
        assert len(first[name]) >= 43
    assert first["redirect_uri"] == f"{browser.registry_url}/login/callback"
    assert first["scope"] == "openid profile email"
    assert "code_verifier" not in first


def test_cookies(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """The cookies are HttpOnly, SameSite and for this host only. They expire together with the login attempt or session
    that they identify."""
    redirect = browser.get("/login/openid")
    assert_cookie(redirect, ATTEMPT, 600)
    assert redirect.headers["cache-control"] == "no-store"
    logged_in = browser.get(browser.get(redirect.headers["location"]).headers["location"])
    assert_cookie(logged_in, SESSION, 8 * 3600)
    assert logged_in.headers["cache-control"] == "no-store"


def assert_cookie(answer: httpx2.Response, name: str, seconds: int) -> None:
    """Checks that the response sets this cookie, with this lifetime and the right attributes."""
    (line,) = (line for line in answer.headers.get_list("set-cookie") if line.startswith(f"{name}="))
    parts = {part.strip().lower() for part in line.split(";")[1:]}
    assert parts == {"httponly", "samesite=lax", "path=/", f"max-age={seconds}"}


def test_cookies_with_an_https_url(provider: FakeOpenIDProvider, tmp_path: Path) -> None:
    """If `public_url` begins with https, the names of the cookies have the prefix `__Host-`, and cookies without this
    prefix, which can be set over plain HTTP, are not accepted."""
    public = "https://registry.example.com"
    provider.person = {"preferred_username": ADMIN}
    entrepot_output("user", "add", ADMIN, "--admin", "--generate", folder=tmp_path)
    env = {**variables(provider, tmp_path), "ENTREPOT_PUBLIC_URL": public}
    with running_server(tmp_path, workers=1, env=env) as server, plain_client() as client:
        begun = client.get(f"{server.url}/login/openid")
        assert f"__Host-{ATTEMPT}=" in begun.headers["set-cookie"]
        assert "; Secure" in begun.headers["set-cookie"]
        public_callback = client.get(begun.headers["location"]).headers["location"]
        assert public_callback.startswith(f"{public}/login/callback?")
        cookie = begun.headers["set-cookie"].partition(";")[0]
        without_prefix = cookie.removeprefix("__Host-")
        callback = public_callback.replace(public, server.url)
        assert client.get(callback, headers={"cookie": without_prefix}).status_code == 400
        session = client.get(callback, headers={"cookie": cookie}).headers.get_list("set-cookie")[1].partition(";")[0]
        assert session.startswith(f"__Host-{SESSION}=")
        url = f"{server.url}/api/v1/me"
        assert plain_request("GET", url, headers={"cookie": session}).status_code == 200
        assert plain_request("GET", url, headers={"cookie": session.removeprefix("__Host-")}).status_code == 401
        for origin, status in ((public, 201), (server.url, 201), ("https://evil.example.com", 403)):
            headers = {"cookie": session, "origin": origin}
            assert plain_request("POST", f"{server.url}/api/v1/keys", json={}, headers=headers).status_code == status


@pytest.mark.parametrize("next_page", ["/", "/api/docs#/tokens", "/api/v1/me?a=b&c=d", "/%2F/evil.example.com"])
def test_redirects_within_the_registry(browser: Browser, provider: FakeOpenIDProvider, next_page: str) -> None:
    """With the parameter `next`, the browser is redirected to any path of this registry after the login."""
    begun = browser.get("/login/openid", params={"next": next_page})
    answer = browser.get(browser.get(begun.headers["location"]).headers["location"])
    assert answer.headers["location"] == next_page


@pytest.mark.parametrize(
    "next_page",
    [
        "https://evil.example.com",
        "//evil.example.com",
        "/\\evil.example.com",
        "\\\\evil.example.com",
        "/\t/evil.example.com",
        "/\n/evil.example.com",
        " //evil.example.com",
        "javascript:alert(1)",
        "api/docs",
        "/é",
        "/" + "x" * 2000,
    ],
)
def test_redirects_to_other_sites_are_refused(browser: Browser, next_page: str) -> None:
    """If `next` leads to another site, or is no path of this registry, the login is refused."""
    for answer in (
        browser.get("/login", params={"next": next_page}),
        browser.get("/login/openid", params={"next": next_page}),
        browser.submit(ADMIN, PASSWORD, next=next_page),
    ):
        assert answer.status_code == 400
        assert "location" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert "evil" not in answer.text


def test_groups_from_the_provider(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """The session has the rights of the groups that the provider names for the person."""
    group = browser.registry.name("group")
    browser.registry.call_ok("POST", "/groups", {"name": group})
    browser.registry.call_ok(
        "PUT", "/grants", {"subject": f"group:{group}", "pattern": "team/**", "actions": ["admin"]}
    )
    browser.login()
    assert browser.call("GET", "/me").json()["grants"] == []
    provider.person["groups"] = [group, "none"]
    browser.login()
    (grant,) = browser.call("GET", "/me").json()["grants"]
    assert grant["subject"] == f"group:{group}"
    body = {"subject": "user:alice", "pattern": "team/x", "actions": ["pull"]}
    assert browser.call("PUT", "/grants", body, origin=browser.registry_url).status_code == 200
    browser.registry.call_ok("DELETE", "/grants", subject="user:alice", pattern="team/x")


def test_a_provider_that_is_down(tmp_path: Path) -> None:
    """While the provider is down, the server starts and serves other requests. A login gets 502."""
    with openid_provider() as stopped_provider:
        env = variables(stopped_provider, tmp_path)
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=tmp_path, stdin_text=PASSWORD)
    with running_server(tmp_path, workers=1, env=env) as server:
        answer = plain_request("GET", f"{server.url}/login/openid")
        assert answer.status_code == 502
        assert "set-cookie" not in answer.headers
        assert plain_request("GET", f"{server.url}/api/v1/me", auth=(ADMIN, PASSWORD)).status_code == 200


def test_first_login_creates_an_account(provider: FakeOpenIDProvider, tmp_path: Path) -> None:
    """With the setting `create`, the first login of a person creates an account, which is no admin. A registry
    without accounts usually accepts requests without a login. With a provider, it refuses them."""
    with running_server(tmp_path, workers=1, env=variables(provider, tmp_path, CREATE="true")) as server:
        assert plain_request("GET", f"{server.url}/v2/").status_code == 401
        with plain_client(follow_redirects=True) as client:
            assert client.get(f"{server.url}/login/openid?next=/api/v1/me").json()["name"] == "alice"
            assert client.get(f"{server.url}/api/v1/me").json()["account"]["admin"] is False
            assert client.get(f"{server.url}/api/v1/users").status_code == 403
        assert "alice" in entrepot_output("user", "list", folder=tmp_path)


def test_logs_contain_no_secrets(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """After a successful and a failed login, the log and the audit log contain no code, state, token or secret."""
    callbacks = [browser.callback_url()]
    assert browser.get(callbacks[0]).status_code == 303
    provider.change_claims = lambda claims: {**claims, "aud": "other"}
    callbacks.append(browser.callback_url())
    assert browser.get(callbacks[1]).status_code == 403
    assert failed_logins(browser.registry, "a claim aud")
    session = browser.session
    assert session
    text = browser.registry.server.log_text() + browser.registry.command("audit", "--limit", "1000", "--json")
    for callback in callbacks:
        query = parse_qs(urlsplit(callback).query)
        for secret in (query["code"][0], query["state"][0]):
            assert secret not in text
    for secret in (SECRET, session, *provider.tokens[-2:], provider.forms[-1]["code_verifier"]):
        assert secret not in text

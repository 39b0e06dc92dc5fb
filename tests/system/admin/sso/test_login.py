"""`/login` with a browser, a real provider and a real server."""

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
from tests.system.admin.sso.conftest import ATTEMPT, SESSION, Browser, failed, variables


def test_a_login(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """After a login, the browser is at the documentation of the API, and every worker accepts its session at the
    API."""
    answer = browser.login()
    assert (answer.status_code, answer.headers["location"]) == (303, "/api/docs")
    assert browser.get("/api/docs").status_code == 200
    assert browser.client.cookies.get(ATTEMPT) is None
    for _ in range(4):
        with plain_client(cookies={SESSION: browser.session or ""}) as again:
            me = again.get(f"{browser.own}/api/v1/me")
            assert (me.status_code, me.json()["name"], me.json()["admin"]) == (200, "alice", False)
    assert browser.call("GET", "/users").status_code == 403
    lines: list[dict[str, Any]] = []
    while not lines:
        every = browser.site.done("GET", "/audit", action="login", actor="alice", outcome="ok", limit=1000)["items"]
        lines = [line for line in every if line["detail"] == {"how": "openid"}]
    assert lines[0]["address"] == "127.0.0.1"


def test_an_admin(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """An account that is an admin has admin rights in its session."""
    sso.person = {"preferred_username": ADMIN}
    browser.login()
    assert browser.call("GET", "/users").status_code == 200


def test_what_the_provider_is_asked(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """State, nonce and challenge belong to one login. The secret and the verifier are sent to the token endpoint
    only."""
    sso.asked.clear()
    browser.login()
    browser.login()
    first, second = sso.asked
    for name in ("state", "nonce", "code_challenge"):
        assert first[name] != second[name]
        assert len(first[name]) >= 43
    assert first["redirect_uri"] == f"{browser.own}/login/callback"
    assert first["scope"] == "openid profile email"
    assert "code_verifier" not in first


def test_cookies(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The cookies are HttpOnly, SameSite, for this host only, and expire with what they hold."""
    begun = browser.get("/login/openid")
    assert_kept(begun, ATTEMPT, 600)
    assert begun.headers["cache-control"] == "no-store"
    back = browser.get(browser.get(begun.headers["location"]).headers["location"])
    assert_kept(back, SESSION, 8 * 3600)
    assert back.headers["cache-control"] == "no-store"


def assert_kept(answer: httpx2.Response, name: str, seconds: int) -> None:
    (line,) = (line for line in answer.headers.get_list("set-cookie") if line.startswith(f"{name}="))
    parts = {part.strip().lower() for part in line.split(";")[1:]}
    assert parts == {"httponly", "samesite=lax", "path=/", f"max-age={seconds}"}


def test_https(sso: FakeOpenIDProvider, tmp_path: Path) -> None:
    """If `public_url` begins with https, the cookies have the prefix `__Host-`, and cookies that were set over plain
    http do not count."""
    public = "https://registry.example.com"
    sso.person = {"preferred_username": ADMIN}
    entrepot_output("user", "add", ADMIN, "--admin", "--generate", folder=tmp_path)
    env = {**variables(sso, tmp_path), "ENTREPOT_PUBLIC_URL": public}
    with running_server(tmp_path, workers=1, env=env) as server, plain_client() as client:
        begun = client.get(f"{server.url}/login/openid")
        assert f"__Host-{ATTEMPT}=" in begun.headers["set-cookie"]
        assert "; Secure" in begun.headers["set-cookie"]
        back = client.get(begun.headers["location"]).headers["location"]
        assert back.startswith(f"{public}/login/callback?")
        kept = begun.headers["set-cookie"].partition(";")[0]
        plain = kept.removeprefix("__Host-")
        here = back.replace(public, server.url)
        assert client.get(here, headers={"cookie": plain}).status_code == 400
        session = client.get(here, headers={"cookie": kept}).headers.get_list("set-cookie")[1].partition(";")[0]
        assert session.startswith(f"__Host-{SESSION}=")
        url = f"{server.url}/api/v1/me"
        assert plain_request("GET", url, headers={"cookie": session}).status_code == 200
        assert plain_request("GET", url, headers={"cookie": session.removeprefix("__Host-")}).status_code == 401
        for origin, status in ((public, 201), (server.url, 201), ("https://evil.example.com", 403)):
            headers = {"cookie": session, "origin": origin}
            assert plain_request("POST", f"{server.url}/api/v1/keys", json={}, headers=headers).status_code == status


@pytest.mark.parametrize("place", ["/", "/api/docs#/tokens", "/api/v1/me?a=b&c=d", "/%2F/evil.example.com"])
def test_places_to_come_back_to(browser: Browser, sso: FakeOpenIDProvider, place: str) -> None:
    """After the login, the browser can return to any path of this registry."""
    begun = browser.get("/login/openid", params={"next": place})
    answer = browser.get(browser.get(begun.headers["location"]).headers["location"])
    assert answer.headers["location"] == place


@pytest.mark.parametrize(
    "place",
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
def test_other_places(browser: Browser, place: str) -> None:
    """A login never redirects to another site."""
    for answer in (
        browser.get("/login", params={"next": place}),
        browser.get("/login/openid", params={"next": place}),
        browser.submit(ADMIN, PASSWORD, next=place),
    ):
        assert answer.status_code == 400
        assert "location" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert "evil" not in answer.text


def test_groups(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A grant to a group that the provider names counts in the session."""
    group = browser.site.name("group")
    browser.site.done("POST", "/groups", {"name": group})
    browser.site.done("PUT", "/grants", {"subject": f"group:{group}", "pattern": "team/**", "actions": ["admin"]})
    browser.login()
    assert browser.call("GET", "/me").json()["grants"] == []
    sso.person["groups"] = [group, "none"]
    browser.login()
    (grant,) = browser.call("GET", "/me").json()["grants"]
    assert grant["subject"] == f"group:{group}"
    body = {"subject": "user:alice", "pattern": "team/x", "actions": ["pull"]}
    assert browser.call("PUT", "/grants", body, origin=browser.own).status_code == 200
    browser.site.done("DELETE", "/grants", subject="user:alice", pattern="team/x")


def test_a_provider_that_is_down(tmp_path: Path) -> None:
    """The server starts and serves while the provider is down. A login gets an error that says to try again."""
    with openid_provider() as gone:
        env = variables(gone, tmp_path)
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=tmp_path, given=PASSWORD)
    with running_server(tmp_path, workers=1, env=env) as server:
        answer = plain_request("GET", f"{server.url}/login/openid")
        assert answer.status_code == 502
        assert "set-cookie" not in answer.headers
        assert plain_request("GET", f"{server.url}/api/v1/me", auth=(ADMIN, PASSWORD)).status_code == 200


def test_first_login(sso: FakeOpenIDProvider, tmp_path: Path) -> None:
    """With `create`, the first login creates an account, which is no admin. A registry with a provider is closed."""
    with running_server(tmp_path, workers=1, env=variables(sso, tmp_path, CREATE="true")) as server:
        assert plain_request("GET", f"{server.url}/v2/").status_code == 401
        with plain_client(follow_redirects=True) as client:
            assert client.get(f"{server.url}/login/openid?next=/api/v1/me").json()["name"] == "alice"
            assert client.get(f"{server.url}/api/v1/me").json()["account"]["admin"] is False
            assert client.get(f"{server.url}/api/v1/users").status_code == 403
        assert "alice" in entrepot_output("user", "list", folder=tmp_path)


def test_no_secret_is_in_the_log(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """No code, state, token or secret is in the log or the audit log, after logins that succeeded and logins that
    failed."""
    answers = [browser.to_provider().headers["location"]]
    assert browser.get(answers[0]).status_code == 303
    sso.altered = lambda claims: {**claims, "aud": "other"}
    answers.append(browser.to_provider().headers["location"])
    assert browser.get(answers[1]).status_code == 403
    assert failed(browser.site, "a claim aud")
    session = browser.session
    assert session
    text = browser.site.server.log_text() + browser.site.command("audit", "--limit", "1000", "--json")
    for answer in answers:
        query = parse_qs(urlsplit(answer).query)
        for secret in (query["code"][0], query["state"][0]):
            assert secret not in text
    for secret in (SECRET, session, *sso.tokens[-2:], sso.forms[-1]["code_verifier"]):
        assert secret not in text

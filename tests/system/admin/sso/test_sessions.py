"""Tests of the session after a login: who accepts it, and what ends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.openid_server import FakeOpenIDProvider
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.token_issuer import claims_of
from tests.system.admin.sso.conftest import SESSION, Browser


def test_session_is_accepted_only_by_the_management_api(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A session is accepted only as a cookie, and not at `/v2` or `/token`."""
    browser.login()
    assert browser.call("GET", "/me").status_code == 200
    session = browser.session
    assert session is not None
    for path in ("/v2/", "/v2/_catalog"):
        assert browser.get(path).status_code == 401
        assert (
            plain_request(
                "GET", browser.registry_url + path, headers={"authorization": f"Bearer {session}"}
            ).status_code
            == 401
        )
    token = browser.get("/token?scope=repository:team/app:pull&service=entrepot").json()["token"]
    assert claims_of(token)["sub"] == ""
    for auth in (("alice", session), ("entrepot", session)):
        assert plain_request("GET", f"{browser.registry_url}/token", auth=auth).status_code == 401
        assert plain_request("GET", f"{browser.registry_url}/api/v1/me", auth=auth).status_code == 401
    form = {"grant_type": "refresh_token", "refresh_token": session, "service": "entrepot"}
    assert plain_request("POST", f"{browser.registry_url}/token", data=form).status_code == 401
    headers = {"authorization": f"Bearer {session}"}
    assert plain_request("GET", f"{browser.registry_url}/api/v1/me", headers=headers).status_code == 401


def test_tokens_are_refused_as_sessions(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A bearer token, an ID token and an altered session are refused as sessions."""
    browser.login()
    token = plain_request("GET", f"{browser.registry_url}/token", auth=(ADMIN, PASSWORD)).json()["token"]
    session = browser.session or ""
    api_token = browser.registry.token("alice")
    for wrong in (
        token,
        provider.tokens[-1],
        api_token,
        f"{session[:-4]}0000",
        session.partition(".")[0],
        "x",
        "x" * 5000,
    ):
        answer = plain_request("GET", f"{browser.registry_url}/api/v1/me", headers={"cookie": f"{SESSION}={wrong}"})
        assert answer.status_code == 401


def test_changes_of_the_account_end_the_session(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A session ends when its account is disabled, gets a new password or is removed."""
    changes: list[Callable[[str], Any]] = [
        lambda name: browser.registry.call_ok("PATCH", f"/users/{name}", {"enabled": False}),
        lambda name: browser.registry.call_ok("PUT", f"/users/{name}/password", {}),
        lambda name: browser.registry.call_ok("DELETE", f"/users/{name}"),
    ]
    for change in changes:
        name = browser.registry.user()[0]
        provider.person = {"preferred_username": name}
        browser.login()
        assert browser.call("GET", "/me").json()["name"] == name
        change(name)
        for _ in range(3):
            assert browser.call("GET", "/me").status_code == 401


def test_credentials_have_precedence_over_the_session(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """Credentials in the Authorization header have precedence over the session cookie, even if they are wrong."""
    browser.login()
    me = f"{browser.registry_url}/api/v1/me"
    assert browser.client.get(me, auth=(ADMIN, PASSWORD)).json()["name"] == ADMIN
    assert browser.client.get(me, auth=(ADMIN, "wrong")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": ""},
    ],
    ids=str,
)
def test_requests_of_other_sites_are_refused(
    browser: Browser, provider: FakeOpenIDProvider, headers: dict[str, str]
) -> None:
    """Requests from a page of another site are refused and do not end the session."""
    browser.login()
    for method, path, body in (("POST", "/tokens", {}), ("DELETE", "/tokens/none", None), ("PUT", "/grants", {})):
        assert browser.call(method, path, body, **headers).status_code == 403
    refused = browser.client.post(f"{browser.registry_url}/logout", headers=headers)
    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers
    assert browser.call("GET", "/me").status_code == 200


def test_sec_fetch_site_has_precedence_over_origin(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """Sec-Fetch-Site has precedence over Origin."""
    browser.login()
    headers = {"sec-fetch-site": "same-site", "origin": browser.registry_url}
    assert browser.call("POST", "/tokens", {}, **headers).status_code == 403


@pytest.mark.parametrize("how", ["origin", "sec-fetch-site"])
def test_session_can_make_api_tokens(browser: Browser, provider: FakeOpenIDProvider, how: str) -> None:
    """With a session, a page of this registry can make an API token for the person, but not for another account."""
    browser.login()
    headers = {"origin": browser.registry_url} if how == "origin" else {"sec-fetch-site": "same-origin"}
    added_token = browser.call("POST", "/tokens", {"note": "laptop"}, **headers)
    assert added_token.status_code == 201
    assert (
        plain_request("GET", f"{browser.registry_url}/token", auth=("alice", added_token.json()["secret"])).status_code
        == 200
    )
    assert browser.call("POST", "/tokens", {"account": ADMIN}, **headers).status_code == 404
    # A new password still needs the old one.
    assert browser.call("PUT", "/users/alice/password", {"new": "another long one"}, **headers).status_code == 403


def test_logout(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A POST to `/logout` from a page of this registry ends the session on every worker. The page can send its form
    only to this registry. An error page can send no form."""
    browser.login()
    page = browser.get("/logout")
    assert page.status_code == 200
    assert '<form method="post" action="/logout">' in page.text
    assert page.headers["referrer-policy"] == "same-origin"
    from_other_site = browser.client.post(f"{browser.registry_url}/logout", headers={"origin": "https://evil.example"})
    assert from_other_site.status_code == 403
    wrong_method = browser.client.put(f"{browser.registry_url}/logout")
    for answer, allowed_target in ((page, "self"), (from_other_site, "none"), (wrong_method, "none")):
        assert f"form-action '{allowed_target}'" in answer.headers["content-security-policy"]
        for name in ("content-security-policy", "x-frame-options", "x-content-type-options", "cache-control"):
            assert len(answer.headers.get_list(name)) == 1, name
    assert browser.call("GET", "/me").status_code == 200
    cookie = browser.session or ""
    out = browser.client.post(f"{browser.registry_url}/logout", headers={"origin": browser.registry_url})
    assert out.status_code == 200
    assert browser.session is None
    for _ in range(4):  # a copy of the cookie is refused as well, on every worker
        assert (
            plain_request(
                "GET", f"{browser.registry_url}/api/v1/me", headers={"cookie": f"{SESSION}={cookie}"}
            ).status_code
            == 401
        )
    assert browser.call("GET", "/me").status_code == 401
    assert browser.login().status_code == 303


def test_list_and_end_sessions(browser: Browser, other_browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A person can list and end the sessions of their account. An admin can do this for every account. Other accounts
    and API tokens cannot."""
    name, password = browser.registry.user()
    provider.person = {"preferred_username": name}
    browser.login()
    assert other_browser.submit(name, password).status_code == 303
    listed = browser.call("GET", "/sessions").json()
    other_session, own_session = listed["items"]
    assert (own_session["id"], own_session["method"], other_session["method"]) == (
        listed["current"],
        "openid",
        "password",
    )
    assert own_session["address"] == "127.0.0.1"
    assert own_session["user_agent"].startswith("python-httpx")
    stranger = browser.registry.user()
    assert browser.registry.call("GET", "/sessions", auth=stranger, account=name).status_code == 404
    assert browser.registry.call("DELETE", f"/sessions/{own_session['id']}", auth=stranger).status_code == 404
    assert browser.registry.call("DELETE", "/sessions", auth=stranger, account=name).status_code == 404
    token = (name, browser.registry.token(name))
    assert browser.registry.call("DELETE", f"/sessions/{own_session['id']}", auth=token).status_code == 403
    # Without Origin, the request does not come from a page of this registry.
    assert browser.call("DELETE", f"/sessions/{other_session['id']}").status_code == 403
    assert browser.call("DELETE", f"/sessions/{other_session['id']}", origin=browser.registry_url).status_code == 204
    assert browser.call("DELETE", f"/sessions/{other_session['id']}", origin=browser.registry_url).status_code == 404
    for _ in range(4):  # on new connections, so that every worker gets a request
        with plain_client(cookies={SESSION: other_browser.session or ""}) as client:
            assert client.get(f"{browser.registry_url}/api/v1/me").status_code == 401
    assert other_browser.submit(name, password).status_code == 303
    assert browser.call("DELETE", "/sessions", origin=browser.registry_url).json() == {"ended": 1}
    assert other_browser.call("GET", "/me").status_code == 401
    assert browser.call("GET", "/me").status_code == 200
    assert browser.registry.call_ok("DELETE", "/sessions", account=name) == {"ended": 1}
    assert browser.call("GET", "/me").status_code == 401
    assert browser.registry.call_ok("GET", "/sessions", account=name) == {"current": None, "items": []}


def test_sessions_by_command(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """`entrepot user sessions` lists and ends sessions while the server runs."""
    name, password = browser.registry.user()
    empty = browser.registry.command("user", "sessions", name, "--json")
    assert json.loads(empty) == []
    browser.submit(name, password)
    (session,) = json.loads(browser.registry.command("user", "sessions", name, "--json"))
    assert session["id"] in browser.registry.command("user", "sessions", name)
    browser.registry.command("user", "sessions", name, "--end", session["id"])
    assert browser.call("GET", "/me").status_code == 401
    browser.submit(name, password)
    browser.registry.command("user", "sessions", name, "--end-all")
    assert browser.call("GET", "/me").status_code == 401

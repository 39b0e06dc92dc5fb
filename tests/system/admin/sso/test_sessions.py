"""The session after a login: where it counts, what ends it, and that no page of another site can use it."""

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


def test_where_it_counts(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A session is accepted only as a cookie, and only by the management API: not at `/v2` or `/token`."""
    browser.login()
    assert browser.call("GET", "/me").status_code == 200
    session = browser.session
    assert session is not None
    for path in ("/v2/", "/v2/_catalog"):
        assert browser.get(path).status_code == 401
        assert (
            plain_request("GET", browser.own + path, headers={"authorization": f"Bearer {session}"}).status_code == 401
        )
    token = browser.get("/token?scope=repository:team/app:pull&service=entrepot").json()["token"]
    assert claims_of(token)["sub"] == ""
    for auth in (("alice", session), ("entrepot", session)):
        assert plain_request("GET", f"{browser.own}/token", auth=auth).status_code == 401
        assert plain_request("GET", f"{browser.own}/api/v1/me", auth=auth).status_code == 401
    form = {"grant_type": "refresh_token", "refresh_token": session, "service": "entrepot"}
    assert plain_request("POST", f"{browser.own}/token", data=form).status_code == 401
    headers = {"authorization": f"Bearer {session}"}
    assert plain_request("GET", f"{browser.own}/api/v1/me", headers=headers).status_code == 401


def test_a_token_is_no_session(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A bearer token, an ID token and an altered session are refused as sessions."""
    browser.login()
    token = plain_request("GET", f"{browser.own}/token", auth=(ADMIN, PASSWORD)).json()["token"]
    session = browser.session or ""
    api_token = browser.site.token("alice")
    for wrong in (token, sso.tokens[-1], api_token, f"{session[:-4]}0000", session.partition(".")[0], "x", "x" * 5000):
        answer = plain_request("GET", f"{browser.own}/api/v1/me", headers={"cookie": f"{SESSION}={wrong}"})
        assert answer.status_code == 401


def test_what_ends_it(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """After the account was disabled, got a new password or was removed, the next request with the session is
    refused."""
    changes: list[Callable[[str], Any]] = [
        lambda name: browser.site.done("PATCH", f"/users/{name}", {"enabled": False}),
        lambda name: browser.site.done("PUT", f"/users/{name}/password", {}),
        lambda name: browser.site.done("DELETE", f"/users/{name}"),
    ]
    for change in changes:
        name = browser.site.user()[0]
        sso.person = {"preferred_username": name}
        browser.login()
        assert browser.call("GET", "/me").json()["name"] == name
        change(name)
        for _ in range(3):
            assert browser.call("GET", "/me").status_code == 401


def test_a_login_goes_before_it(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """Credentials in a header have precedence over the session, even if they are wrong."""
    browser.login()
    me = f"{browser.own}/api/v1/me"
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
def test_other_sites_change_nothing(browser: Browser, sso: FakeOpenIDProvider, headers: dict[str, str]) -> None:
    """With a session, a request from a page of another site changes nothing, and does not log the person out."""
    browser.login()
    for method, path, body in (("POST", "/tokens", {}), ("DELETE", "/tokens/none", None), ("PUT", "/grants", {})):
        assert browser.call(method, path, body, **headers).status_code == 403
    refused = browser.client.post(f"{browser.own}/logout", headers=headers)
    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers
    assert browser.call("GET", "/me").status_code == 200


def test_another_site_lies_in_neither(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """If Sec-Fetch-Site names another site, the request is refused, whatever Origin says."""
    browser.login()
    headers = {"sec-fetch-site": "same-site", "origin": browser.own}
    assert browser.call("POST", "/tokens", {}, **headers).status_code == 403


@pytest.mark.parametrize("how", ["origin", "sec-fetch-site"])
def test_a_person_makes_api_tokens(browser: Browser, sso: FakeOpenIDProvider, how: str) -> None:
    """With a session, a page of this registry may do what the person may do. docker can log in with an API token made
    there."""
    browser.login()
    headers = {"origin": browser.own} if how == "origin" else {"sec-fetch-site": "same-origin"}
    made = browser.call("POST", "/tokens", {"note": "laptop"}, **headers)
    assert made.status_code == 201
    assert plain_request("GET", f"{browser.own}/token", auth=("alice", made.json()["secret"])).status_code == 200
    assert browser.call("POST", "/tokens", {"account": ADMIN}, **headers).status_code == 404
    # Their password still takes the old one.
    assert browser.call("PUT", "/users/alice/password", {"new": "another long one"}, **headers).status_code == 403


def test_logout(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The logout button ends the session. The person can log in again."""
    browser.login()
    page = browser.get("/logout")
    assert page.status_code == 200
    assert '<form method="post" action="/logout">' in page.text
    assert page.headers["referrer-policy"] == "same-origin"
    foreign = browser.client.post(f"{browser.own}/logout", headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403
    for answer in (page, foreign, browser.client.put(f"{browser.own}/logout")):
        assert "form-action 'self'" in answer.headers["content-security-policy"] or answer is not page
        for name in ("content-security-policy", "x-frame-options", "x-content-type-options", "cache-control"):
            assert len(answer.headers.get_list(name)) == 1, name
    assert browser.call("GET", "/me").status_code == 200
    kept = browser.session or ""
    out = browser.client.post(f"{browser.own}/logout", headers={"origin": browser.own})
    assert out.status_code == 200
    assert browser.session is None
    for _ in range(4):  # also for somebody who has a copy of the cookie
        assert (
            plain_request("GET", f"{browser.own}/api/v1/me", headers={"cookie": f"{SESSION}={kept}"}).status_code == 401
        )
    assert browser.call("GET", "/me").status_code == 401
    assert browser.login().status_code == 303


def test_list_and_end_one_by_one(browser: Browser, other: Browser, sso: FakeOpenIDProvider) -> None:
    """A person sees the browsers in which they are logged in, and can end each session. An admin can do so for others,
    and nobody else can."""
    name, password = browser.site.user()
    sso.person = {"preferred_username": name}
    browser.login()
    assert other.submit(name, password).status_code == 303
    listed = browser.call("GET", "/sessions").json()
    theirs, own = listed["items"]
    assert (own["id"], own["method"], theirs["method"]) == (listed["current"], "openid", "password")
    assert own["address"] == "127.0.0.1"
    assert own["user_agent"].startswith("python-httpx")
    stranger = browser.site.user()
    assert browser.site.call("GET", "/sessions", auth=stranger, account=name).status_code == 404
    assert browser.site.call("DELETE", f"/sessions/{own['id']}", auth=stranger).status_code == 404
    assert browser.site.call("DELETE", "/sessions", auth=stranger, account=name).status_code == 404
    token = (name, browser.site.token(name))
    assert browser.site.call("DELETE", f"/sessions/{own['id']}", auth=token).status_code == 403
    assert browser.call("DELETE", f"/sessions/{theirs['id']}").status_code == 403  # from no page of this registry
    assert browser.call("DELETE", f"/sessions/{theirs['id']}", origin=browser.own).status_code == 204
    assert browser.call("DELETE", f"/sessions/{theirs['id']}", origin=browser.own).status_code == 404
    for _ in range(4):
        with plain_client(cookies={SESSION: other.session or ""}) as again:
            assert again.get(f"{browser.own}/api/v1/me").status_code == 401
    assert other.submit(name, password).status_code == 303
    assert browser.call("DELETE", "/sessions", origin=browser.own).json() == {"ended": 1}
    assert other.call("GET", "/me").status_code == 401
    assert browser.call("GET", "/me").status_code == 200
    assert browser.site.done("DELETE", "/sessions", account=name) == {"ended": 1}
    assert browser.call("GET", "/me").status_code == 401
    assert browser.site.done("GET", "/sessions", account=name) == {"current": None, "items": []}


def test_commands(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """`entrepot user sessions` lists and ends sessions while the server runs."""
    name, password = browser.site.user()
    empty = browser.site.command("user", "sessions", name, "--json")
    assert json.loads(empty) == []
    browser.submit(name, password)
    (session,) = json.loads(browser.site.command("user", "sessions", name, "--json"))
    assert session["id"] in browser.site.command("user", "sessions", name)
    browser.site.command("user", "sessions", name, "--end", session["id"])
    assert browser.call("GET", "/me").status_code == 401
    browser.submit(name, password)
    browser.site.command("user", "sessions", name, "--end-all")
    assert browser.call("GET", "/me").status_code == 401

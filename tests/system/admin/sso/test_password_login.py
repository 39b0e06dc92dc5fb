"""Tests of logins with the form of the login page: people log in with the password of their account."""

from __future__ import annotations

import html
from pathlib import Path

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import running_server
from tests.system.admin.sso.conftest import SESSION, Browser, failed_logins

POLICY = "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


def assert_form_with_error(browser: Browser, answer: httpx2.Response, status: int, text: str) -> None:
    """Checks that the response is the login form with this error, and that the browser has no session."""
    assert answer.status_code == status, answer.text
    assert f'<p role="alert">{html.escape(text)}' in answer.text
    assert '<form method="post" action="/login">' in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert "www-authenticate" not in answer.headers
    assert browser.session is None


def test_login_with_the_form(browser: Browser) -> None:
    """`/login` redirects to the login page. After a failed login, the page offers the form and the login at the
    provider again. After a login with the form, the browser is redirected to the page in `next`, and every worker
    accepts its session."""
    next_page = '/api/v1/me?a=b&c="<d>'
    page = browser.get("/login", params={"next": next_page})
    assert (page.status_code, page.headers["cache-control"]) == (303, "no-store")
    assert page.headers["location"] == "/ui/login?next=/api/v1/me%3Fa%3Db%26c%3D%22%3Cd%3E"
    assert browser.get("/login").headers["location"] == "/ui/login"
    name, password = browser.registry.user()
    form_after_error = browser.submit(name, "wrong", next=next_page).text
    assert 'value="/api/v1/me?a=b&amp;c=&quot;&lt;d&gt;"' in form_after_error
    assert '<a href="/login/openid?next=%2Fapi%2Fv1%2Fme%3Fa%3Db%26c%3D%22%3Cd%3E">' in form_after_error
    answer = browser.submit(name, password, next="/api/v1/me?a=b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/api/v1/me?a=b")
    for _ in range(4):  # on new connections, so that every worker gets a request
        with plain_client(cookies={SESSION: browser.session or ""}) as client:
            assert client.get(f"{browser.registry_url}/api/v1/me").json()["name"] == name
    assert browser.submit(name, password).headers["location"] == "/api/docs"
    # The session may do what a login with the password may do, such as making an API token.
    assert browser.call("POST", "/tokens", {}, origin=browser.registry_url).status_code == 201
    lines = browser.registry.call_ok("GET", "/audit", action="session.start", actor=name)["items"]
    assert [line["detail"]["how"] for line in lines] == ["password", "password"]
    assert password not in browser.registry.server.log_text()


def test_failed_logins(browser: Browser) -> None:
    """A wrong password, an unknown account and an empty form get the same response. The audit log has the reason. After
    too many failures, even the right password is refused for a while, and the page says so."""
    name, password = browser.registry.user()
    error_text = "The user name or the password is not right."
    for user, secret in ((name, "wrong"), ("nobody-at-all", password), ("<b>", "x"), ("", ""), (name, "")):
        answer = browser.submit(user, secret)
        assert_form_with_error(browser, answer, 403, error_text)
        assert "<b>" not in answer.text
    while not any(line["target"] == name for line in failed_logins(browser.registry, "the password is wrong")):
        pass  # the entry is written to the audit log about a second later
    answers = [browser.submit(name, f"guess {number}") for number in range(12)]
    assert_form_with_error(browser, answers[-1], 429, "Too many failed logins; try again later.")
    assert int(answers[-1].headers["retry-after"]) > 0
    assert_form_with_error(browser, browser.submit(name, password), 429, "Too many failed logins; try again later.")


def test_api_tokens_cannot_start_a_session(browser: Browser) -> None:
    """An API token cannot start a session. The session could live longer than the token, and would not have the limits
    of the token."""
    name, _ = browser.registry.user()
    token = browser.registry.token(name, limits=[{"pattern": "team/**", "actions": ["pull"]}])
    robot = browser.registry.robot()
    for user, secret in ((name, token), (robot, browser.registry.token(robot))):
        assert_form_with_error(
            browser, browser.submit(user, secret), 403, "The user name or the password is not right."
        )
    assert failed_logins(browser.registry, "a token cannot start a session")


@pytest.mark.parametrize("origin", ["https://evil.example.com", "null", ""])
def test_form_of_another_site_is_refused(browser: Browser, origin: str) -> None:
    """A form on another site cannot log in at the registry, so that no site can log a browser in to an account that the
    site has chosen."""
    answer = browser.submit(ADMIN, PASSWORD, origin=origin)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_login_starts_a_new_session(browser: Browser, other_browser: Browser) -> None:
    """A login always starts a new session, and ends the old session of the browser. So if an attacker puts the cookie
    of a session into a person's browser, the attacker's session does not become the person's."""
    attacker, victim = browser.registry.user(), browser.registry.user()
    assert other_browser.submit(*attacker).status_code == 303
    attacker_session = other_browser.session or ""
    for session in (attacker_session, "0" * 18 + "." + "0" * 64):
        with plain_client(cookies={SESSION: session}, headers={"origin": browser.registry_url}) as client:
            answer = client.post(f"{browser.registry_url}/login", data={"user": victim[0], "password": victim[1]})
            assert answer.status_code == 303
            assert session not in answer.headers["set-cookie"]
    assert other_browser.call("GET", "/me").status_code == 401
    # A failed login does not end the session of the browser.
    assert other_browser.submit(*attacker).status_code == 303
    assert other_browser.submit(attacker[0], "wrong").status_code == 403
    assert other_browser.call("GET", "/me").json()["name"] == attacker[0]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"user=a&user=b&password=c", "application/x-www-form-urlencoded", 400),
        (b"user=%zz", "application/x-www-form-urlencoded", 400),
        (b'{"user": "a"}', "application/json", 400),
        (b"password=" + b"x" * 70_000, "application/x-www-form-urlencoded", 413),
    ],
    ids=["twice", "escape", "JSON", "large"],
)
def test_invalid_forms(browser: Browser, body: bytes, kind: str, status: int) -> None:
    """A request whose body is not a valid form, or is too long, gets an error page."""
    headers = {"origin": browser.registry_url, "content-type": kind}
    answer = browser.client.post(f"{browser.registry_url}/login", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "set-cookie" not in answer.headers


def test_without_accounts_and_provider(tmp_path: Path) -> None:
    """In a registry without accounts, a login gets a page that says so. Without a provider, the routes for logins at a
    provider get 404. If the web interface is disabled, `/login` shows the form itself."""
    without_pages = {"ENTREPOT_PAGES__ENABLED": "false"}
    with (
        running_server(tmp_path, workers=1, env=without_pages) as server,
        plain_client(headers={"origin": server.url}) as client,
    ):
        answer = client.post(f"{server.url}/login", data={"user": "a", "password": "b"})
        assert answer.status_code == 403
        assert "This registry has no accounts yet" in answer.text
        form = client.get(f"{server.url}/login")
        assert (form.status_code, '<form method="post" action="/login">' in form.text) == (200, True)
        assert "/login/openid" not in form.text
        for path in ("/login/openid", "/login/callback?code=x&state=y"):
            assert client.get(server.url + path).status_code == 404

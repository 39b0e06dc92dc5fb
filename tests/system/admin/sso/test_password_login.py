"""The form of `/login`: people log in with the password of their account."""

from __future__ import annotations

import html
from pathlib import Path

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import running_server
from tests.system.admin.sso.conftest import SESSION, Browser, failed

POLICY = "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


def assert_form_again(browser: Browser, answer: httpx2.Response, status: int, text: str) -> None:
    """Checks that the response has the form again, with an error, and starts no session."""
    assert answer.status_code == status, answer.text
    assert f'<p role="alert">{html.escape(text)}' in answer.text
    assert '<form method="post" action="/login">' in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert "www-authenticate" not in answer.headers
    assert browser.session is None


def test_a_login(browser: Browser) -> None:
    """`/login` leads to the login page, which offers both ways to log in, also when it is shown again. After a login
    with the form, the browser is at the page that it wanted, and every worker accepts its session."""
    wanted = '/api/v1/me?a=b&c="<d>'
    page = browser.get("/login", params={"next": wanted})
    assert (page.status_code, page.headers["cache-control"]) == (303, "no-store")
    assert page.headers["location"] == "/ui/login?next=/api/v1/me%3Fa%3Db%26c%3D%22%3Cd%3E"
    assert browser.get("/login").headers["location"] == "/ui/login"
    name, password = browser.site.user()
    again = browser.submit(name, "wrong", next=wanted).text
    assert 'value="/api/v1/me?a=b&amp;c=&quot;&lt;d&gt;"' in again
    assert '<a href="/login/openid?next=%2Fapi%2Fv1%2Fme%3Fa%3Db%26c%3D%22%3Cd%3E">' in again
    answer = browser.submit(name, password, next="/api/v1/me?a=b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/api/v1/me?a=b")
    for _ in range(4):
        with plain_client(cookies={SESSION: browser.session or ""}) as elsewhere:
            assert elsewhere.get(f"{browser.own}/api/v1/me").json()["name"] == name
    assert browser.submit(name, password).headers["location"] == "/api/docs"
    # A person, who may do what a login with the password allows.
    assert browser.call("POST", "/tokens", {}, origin=browser.own).status_code == 201
    lines = browser.site.done("GET", "/audit", action="session.start", actor=name)["items"]
    assert [line["detail"]["how"] for line in lines] == ["password", "password"]
    assert password not in browser.site.server.log_text()


def test_logins_that_fail(browser: Browser) -> None:
    """A wrong password, an unknown account and an empty form get the same response. The audit log has the reason. After
    too many failures, the page says so, even if the password is right."""
    name, password = browser.site.user()
    wrong = "The user name or the password is not right."
    for user, secret in ((name, "wrong"), ("nobody-at-all", password), ("<b>", "x"), ("", ""), (name, "")):
        answer = browser.submit(user, secret)
        assert_form_again(browser, answer, 403, wrong)
        assert "<b>" not in answer.text
    while not any(line["target"] == name for line in failed(browser.site, "the password is wrong")):
        pass  # the log is written about a second later
    answers = [browser.submit(name, f"guess {number}") for number in range(12)]
    assert_form_again(browser, answers[-1], 429, "Too many failed logins; try again later.")
    assert int(answers[-1].headers["retry-after"]) > 0
    assert_form_again(browser, browser.submit(name, password), 429, "Too many failed logins; try again later.")


def test_tokens_are_no_passwords(browser: Browser) -> None:
    """An API token cannot start a session, because the session could live longer than the token, and would not have its
    limits."""
    name, _ = browser.site.user()
    token = browser.site.token(name, limits=[{"pattern": "team/**", "actions": ["pull"]}])
    robot = browser.site.robot()
    for user, secret in ((name, token), (robot, browser.site.token(robot))):
        assert_form_again(browser, browser.submit(user, secret), 403, "The user name or the password is not right.")
    assert failed(browser.site, "a token cannot start a session")


@pytest.mark.parametrize("origin", ["https://evil.example.com", "null", ""])
def test_a_page_of_another_site_logs_nobody_in(browser: Browser, origin: str) -> None:
    """A form on another site cannot log a browser in to an account that the site has chosen."""
    answer = browser.submit(ADMIN, PASSWORD, origin=origin)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_no_session_is_planted(browser: Browser, other: Browser) -> None:
    """A login always makes a new session and ends the old session of the browser. So an attacker cannot give a person a
    session that the attacker knows, and wait for the person's login."""
    attacker, victim = browser.site.user(), browser.site.user()
    assert other.submit(*attacker).status_code == 303
    planted = other.session or ""
    for text in (planted, "0" * 18 + "." + "0" * 64):
        with plain_client(cookies={SESSION: text}, headers={"origin": browser.own}) as client:
            answer = client.post(f"{browser.own}/login", data={"user": victim[0], "password": victim[1]})
            assert answer.status_code == 303
            assert text not in answer.headers["set-cookie"]
    assert other.call("GET", "/me").status_code == 401
    # A login that fails ends nothing.
    assert other.submit(*attacker).status_code == 303
    assert other.submit(attacker[0], "wrong").status_code == 403
    assert other.call("GET", "/me").json()["name"] == attacker[0]


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
def test_forms_that_cannot_be_read(browser: Browser, body: bytes, kind: str, status: int) -> None:
    """A request whose body is not a form gets a page that says so."""
    headers = {"origin": browser.own, "content-type": kind}
    answer = browser.client.post(f"{browser.own}/login", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "set-cookie" not in answer.headers


def test_without_accounts_and_provider(tmp_path: Path) -> None:
    """A registry without accounts says that nobody needs a login. Without a provider, the routes of its login do not
    exist. Without the pages for people, `/login` shows the form itself."""
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

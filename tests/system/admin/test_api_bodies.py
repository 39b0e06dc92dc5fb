"""Tests of the requests that the management API accepts or refuses, and of secrets, which its responses and the log
must not contain."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.plain_client import plain_client

MARK = "hunter2-was-here"
"""A password that must not appear in any response or log."""


@pytest.fixture
def client(site: AdminSite) -> Iterator[httpx2.Client]:
    """Yields a client of the management API with the login of the admin."""
    with plain_client(f"{site.server.url}/api/v1", auth=(ADMIN, PASSWORD), timeout=60) as api_client:
        yield api_client


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]
)
def test_only_json(client: httpx2.Client, kind: str | None) -> None:
    """A body is refused if its type is not JSON, because a form on another site could send such a body."""
    headers = {} if kind is None else {"content-type": kind}
    for path, body in (("/users", b'{"name": "eve", "admin": true}'), ("/keys", b"{}"), ("/keys", b"")):
        refused = client.post(path, content=body, headers=headers)
        assert refused.status_code == 415, refused.text


def test_requests_of_other_sites_are_refused(client: httpx2.Client) -> None:
    """A request that a browser has sent from a page of another site is refused if it changes something. The header
    Sec-Fetch-Site names the relation of the page to this registry. The API sends no CORS headers."""
    for relation in ("cross-site", "same-site"):
        refused = client.post("/keys", json={}, headers={"sec-fetch-site": relation})
        assert (refused.status_code, code_of(refused)) == (403, "DENIED")
        assert client.delete("/groups/none", headers={"sec-fetch-site": relation}).status_code == 403
    assert client.post("/keys", json={}, headers={"sec-fetch-site": "same-origin"}).status_code == 201
    answer = client.get("/me", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_long_bodies(client: httpx2.Client) -> None:
    """A body of more than 64 KiB is refused, with or without a Content-Length."""
    body = b'{"name": "' + b"x" * 70_000 + b'"}'
    headers = {"content-type": "application/json"}
    assert client.post("/users", content=body, headers=headers).status_code == 413
    pieces = (body[at : at + 1000] for at in range(0, len(body), 1000))
    assert client.post("/users", content=pieces, headers=headers).status_code == 413
    assert client.get("/me").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/users", b'{"name": "x", "password": ["%b"]}'),
        ("/users", b'{"name": "x", "password": {"a": "%b"}}'),
        ("/users", b'{"name": 5, "password": "%b"}'),
        ("/users", b'{"name": "x", "password": "%b", "more": 1}'),
        ("/users", b'{"password": "%b"}'),
        ("/users", b'{"name": "root", "password": "%b"}'),
        ("/users", b'{"name": "X", "password": "%b"}'),
        ("/users", b'{"name": "x", "password": "%b\\u0007"}'),
        ("/users", b'{"name": "x", "password": "%b'),
        ("/users", b'"%b"'),
        ("/tokens", b'{"account": {"password": "%b"}}'),
    ],
)
def test_errors_do_not_repeat_the_body(client: httpx2.Client, site: AdminSite, path: str, body: bytes) -> None:
    """Neither the error for an invalid body nor the log contains the password in the body."""
    answer = client.post(path, content=body % MARK.encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 409, 422)
    code_of(answer)
    assert MARK not in answer.text
    assert MARK not in site.server.log_text()


def test_password_that_is_no_valid_text(client: httpx2.Client) -> None:
    """A password with half of a surrogate pair, which is no valid text, is refused, and causes no internal error."""
    answer = client.post(
        "/users", content=b'{"name":"x","password":"\\ud800abcdefgh"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


def test_secrets_are_in_no_log_file_or_list(site: AdminSite) -> None:
    """After requests with passwords and API tokens, these secrets are in no log, in no file of the data directory, and
    in no list of the API."""
    user, _ = site.user()
    chosen = "a password of mine"
    generated = site.call_ok("PUT", f"/users/{user}/password", {})["password"]
    site.call_ok("PUT", f"/users/{user}/password", {"old": generated, "new": chosen}, auth=(user, generated))
    token = site.call_ok("POST", "/tokens", {"note": "x"}, auth=(user, chosen))["secret"]
    for auth in ((user, chosen), (user, token), (user, "wrong-password-1")):
        site.call("GET", "/me", auth=auth)
    site.call("GET", "/me", auth=None, headers={"authorization": f"Bearer {token}"})
    responses = "".join(
        site.call("GET", path).text
        for path in ("/users?limit=1000", "/tokens?limit=1000", "/audit?limit=1000", "/keys", f"/users/{user}")
    )
    assert user in responses
    responses += site.command("audit", "--limit", "1000", "--json")
    files = [file for file in (site.folder / "data").rglob("*") if file.is_file()]
    for secret in (chosen, generated, token, token.split("_")[2], "wrong-password-1"):
        assert secret not in responses
        assert secret not in site.server.log_text()
        assert [file for file in files if secret.encode() in file.read_bytes()] == []


def test_log_has_a_line_for_each_request(site: AdminSite) -> None:
    """The log has a line for each request, with the path, the status and the account."""
    user = site.user()
    site.call("GET", "/users", auth=user)
    site.call_ok("GET", "/me", auth=user)
    lines = _lines(site, f"principal={user[0]} ", 2)
    for part in ("GET /api/v1/users status=403 ", "GET /api/v1/me status=200 "):
        assert [line for line in lines if part in line], lines


def _lines(site: AdminSite, part: str, count: int) -> list[str]:
    """Waits until `count` lines of the log contain `part`, and returns these lines."""
    while True:
        found = [line for line in site.server.log_text().splitlines() if part in line]
        if len(found) >= count:
            return found
        site.call("GET", "/me", auth=None)


def test_client_disconnects_in_the_middle_of_a_body(site: AdminSite) -> None:
    """If a client disconnects in the middle of its body, other requests are not affected."""
    with socket.create_connection(("127.0.0.1", site.server.port)) as raw:
        raw.sendall(
            b"POST /api/v1/users HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
    assert site.call("GET", "/me").status_code == 200


def test_too_many_parameters(client: httpx2.Client) -> None:
    """A query with more than a thousand parameters is refused before it is parsed."""
    refused = client.get(f"/users?{'a=%61&' * 1000}")
    assert refused.status_code == 400, refused.text
    assert "1000 parameters" in refused.text

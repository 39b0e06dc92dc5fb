"""Which requests the management API accepts, and what its responses and the log never show."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.plain_client import plain_client

MARK = "hunter2-was-here"


@pytest.fixture
def client(site: AdminSite) -> Iterator[httpx2.Client]:
    with plain_client(f"{site.server.url}/api/v1", auth=(ADMIN, PASSWORD), timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]
)
def test_only_json(client: httpx2.Client, kind: str | None) -> None:
    """A body of a type that a form on another site could send is refused."""
    headers = {} if kind is None else {"content-type": kind}
    for path, body in (("/users", b'{"name": "eve", "admin": true}'), ("/keys", b"{}"), ("/keys", b"")):
        refused = client.post(path, content=body, headers=headers)
        assert refused.status_code == 415, refused.text


def test_other_sites(client: httpx2.Client) -> None:
    """Only pages of this registry may change something. The browser's headers tell the origin of the page."""
    for place in ("cross-site", "same-site"):
        refused = client.post("/keys", json={}, headers={"sec-fetch-site": place})
        assert (refused.status_code, code_of(refused)) == (403, "DENIED")
        assert client.delete("/groups/none", headers={"sec-fetch-site": place}).status_code == 403
    assert client.post("/keys", json={}, headers={"sec-fetch-site": "same-origin"}).status_code == 201
    answer = client.get("/me", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_long_bodies(client: httpx2.Client) -> None:
    """A body has at most 64 KiB, with or without a declared length."""
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
def test_errors_do_not_show_what_came(client: httpx2.Client, site: AdminSite, path: str, body: bytes) -> None:
    """A validation error names the field and the reason. Neither the error nor the log shows the password."""
    answer = client.post(path, content=body % MARK.encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 409, 422)
    code_of(answer)
    assert MARK not in answer.text
    assert MARK not in site.server.log_text()


def test_a_password_that_is_no_text(client: httpx2.Client) -> None:
    """A password with half of a surrogate pair is refused, and causes no internal error."""
    answer = client.post(
        "/users", content=b'{"name":"x","password":"\\ud800abcdefgh"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


def test_secrets_are_nowhere(site: AdminSite) -> None:
    """Passwords and API tokens, used in every possible way, are in no log, no file of the data directory, and no list
    of the API."""
    user, _ = site.user()
    given = "a password of mine"
    made = site.done("PUT", f"/users/{user}/password", {})["password"]
    site.done("PUT", f"/users/{user}/password", {"old": made, "new": given}, auth=(user, made))
    token = site.done("POST", "/tokens", {"note": "x"}, auth=(user, given))["secret"]
    for auth in ((user, given), (user, token), (user, "wrong-password-1")):
        site.call("GET", "/me", auth=auth)
    site.call("GET", "/me", auth=None, headers={"authorization": f"Bearer {token}"})
    shown = "".join(
        site.call("GET", path).text
        for path in ("/users?limit=1000", "/tokens?limit=1000", "/audit?limit=1000", "/keys", f"/users/{user}")
    )
    assert user in shown
    shown += site.command("audit", "--limit", "1000", "--json")
    files = [file for file in (site.folder / "data").rglob("*") if file.is_file()]
    for secret in (given, made, token, token.split("_")[2], "wrong-password-1"):
        assert secret not in shown
        assert secret not in site.server.log_text()
        assert [file for file in files if secret.encode() in file.read_bytes()] == []


def test_a_line_for_each_request(site: AdminSite) -> None:
    """The log has a line with path, status and account for each request."""
    user = site.user()
    site.call("GET", "/users", auth=user)
    site.done("GET", "/me", auth=user)
    lines = _lines(site, f"principal={user[0]} ", 2)
    for part in ("GET /api/v1/users status=403 ", "GET /api/v1/me status=200 "):
        assert [line for line in lines if part in line], lines


def _lines(site: AdminSite, part: str, count: int) -> list[str]:
    """Waits for log lines that contain `part`, and returns them."""
    while True:
        found = [line for line in site.server.log_text().splitlines() if part in line]
        if len(found) >= count:
            return found
        site.call("GET", "/me", auth=None)


def test_half_a_request(site: AdminSite) -> None:
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

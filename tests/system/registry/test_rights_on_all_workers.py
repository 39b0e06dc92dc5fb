"""Tests of permissions on a server with two workers: a change applies to the next request on every worker. Some
requests are sent as raw bytes, because HTTP libraries would not send them."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from registry.auth.token import api_tokens
from storage.access import AccountName
from storage.accounts import Accounts
from storage.composition import open_accounts
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.store_accounts import BY, add_account, add_grant

PATH = "/v2/team/app/tags/list"
CONNECTIONS = 20
"""The number of new connections for each check. It is large enough that both workers get some of them."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with running_server(tmp_path) as started:
        yield started


def change(server: RegistryServer, step: str) -> str:
    """Changes accounts and grants in the data directory, like a command in another process. `alice` creates the account
    alice and returns its Authorization header."""
    return asyncio.run(_change(server, step))


async def _change(server: RegistryServer, step: str) -> str:
    alice = AccountName("alice")
    async with open_accounts(server.data) as accounts:
        match step:
            case "alice":
                await add_account(accounts, "alice")
                return await _login(accounts, alice)
            case "push":
                await add_grant(accounts, "user:alice", "team/**", "pull,push")
            case "disable":
                await accounts.set_enabled(alice, False, by=BY)
            case "grant":
                await add_grant(accounts, "user:alice", "team/**", "pull")
            case "revoke":
                for token in accounts.tokens(alice, None, 10).items:
                    await accounts.revoke_token(token.id, by=BY)
    return ""


async def _login(accounts: Accounts, name: AccountName) -> str:
    """Creates an API token. Returns the Authorization header with it."""
    created = api_tokens.make(name, now=time.time())
    await accounts.add_token(created.token, created.secret_hash, by=BY)
    return "Basic " + base64.b64encode(f"{name}:{created.text}".encode()).decode()


def responses(server: RegistryServer, login: str | None) -> set[tuple[int, str]]:
    """Sends the same request on many new connections. Returns the different pairs of status and error message."""
    pairs = set()
    for _ in range(CONNECTIONS):
        with plain_client(server.url) as client:
            answer = client.get(PATH, headers={"authorization": login} if login else {})
            pairs.add((answer.status_code, answer.json()["errors"][0]["message"]))
    return pairs


def bearer(server: RegistryServer, login: str) -> str:
    """Gets a token from `/token`. Returns the Authorization header with it."""
    with plain_client(server.url) as client:
        path = "/token?service=entrepot&scope=repository:team/app:pull"
        return f"Bearer {client.get(path, headers={'authorization': login}).json()['token']}"


def test_changed_permissions_apply_to_the_next_request(server: RegistryServer) -> None:
    """The creation of the first account, a new grant, and the revocation of a token apply to the next request on every
    worker, also to tokens of `/token`. Without a grant, a client gets the same 404 as for missing content."""
    missing = (404, "there is no repository team/app")
    not_logged_in = (401, "log in to pull from team/app")
    revoked = (401, "the credentials are not valid")
    assert responses(server, None) == {missing}
    login = change(server, "alice")
    assert responses(server, None) == {not_logged_in}
    for authorization in (login, bearer(server, login)):
        assert responses(server, authorization) == {missing}
    change(server, "grant")
    token = bearer(server, login)
    for authorization in (login, token):
        assert responses(server, authorization) == {missing}
    change(server, "revoke")
    for authorization in (login, token):
        assert responses(server, authorization) == {revoked}


def status_lines(server: RegistryServer, request: bytes) -> list[bytes]:
    """Returns the status lines of all responses on one connection."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return re.findall(rb"HTTP/1\.1 \d{3} [A-Za-z ]+", answer)


def head(login: str, *lines: str) -> bytes:
    """Returns a request with this Authorization header and these additional header lines."""
    return "\r\n".join(
        [f"GET {PATH} HTTP/1.1", "Host: registry.test", f"Authorization: {login}", *lines, "", ""]
    ).encode()


def test_request_never_gets_the_login_of_another_request(server: RegistryServer) -> None:
    """A request without a login directly follows a request with one, or is hidden in its body by ambiguous framing. It
    gets the permissions of its own login only, or no response of its own."""
    login = change(server, "alice")
    plain = f"GET {PATH} HTTP/1.1\r\nHost: registry.test\r\n\r\n".encode()
    ok, refused = b"HTTP/1.1 404 Not Found", b"HTTP/1.1 401 Unauthorized"
    assert status_lines(server, head(login) + plain) == [ok, refused]
    assert status_lines(server, plain + head(login)) == [refused, ok]
    length = f"Content-Length: {len(plain)}"
    assert status_lines(server, head(login, length) + plain) == [ok]
    bad_request = b"HTTP/1.1 400 Bad Request"
    assert status_lines(server, head(login, length, "Transfer-Encoding: chunked") + b"0\r\n\r\n" + plain) == [
        bad_request
    ]
    assert status_lines(server, head(login, "Content-Length: 0", length) + plain) == [bad_request]
    assert status_lines(server, head(login, " Authorization: Basic x")) in ([bad_request], [refused])
    assert status_lines(server, head("Basic x\r\nauthorization: " + login)) == [refused]
    assert status_lines(server, head("Basic x\r\n\t" + login[6:])) in ([bad_request], [refused])


def test_realm_comes_from_the_absolute_target_or_the_host(server: RegistryServer) -> None:
    """The realm in a login challenge has the host of an absolute request target (RFC 9112, 3.2.2), or else that of the
    Host header. An invalid host is replaced by the address of the server. Two Host headers get a 400."""
    change(server, "alice")
    for target, host, realm in (
        (f"http://registry.test{PATH}", "other.test", "http://registry.test/token"),
        (PATH, "registry.test:5000", "http://registry.test:5000/token"),
        (PATH, "evil$(x)", f"http://127.0.0.1:{server.port}/token"),
        (f"http://a,b{PATH}", "other.test", f"http://127.0.0.1:{server.port}/token"),
    ):
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert f'Bearer realm="{realm}"'.encode() in answer
    assert status_lines(server, f"GET {PATH} HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n".encode()) == [
        b"HTTP/1.1 400 Bad Request"
    ]


def test_refused_push_gets_the_whole_response(server: RegistryServer) -> None:
    """A client without a login sends a large body without waiting for a response. It gets the complete 401, and not a
    broken connection."""
    change(server, "alice")
    body = b"x" * (8 << 20)
    for method, path in (
        ("PUT", "/v2/team/app/manifests/1"),
        ("POST", "/v2/team/app/blobs/uploads/?digest=sha256:" + "0" * 64),
    ):
        with plain_client(server.url) as client:
            answer = client.request(method, path, content=body)
        assert answer.status_code == 401
        assert json.loads(answer.content)["errors"][0]["code"] == "UNAUTHORIZED"
        assert answer.headers["www-authenticate"].startswith("Bearer ")


@pytest.mark.parametrize(("step", "status"), [("revoke", 401), ("disable", 401), ("grant", 403), ("other", 201)])
def test_permission_withdrawn_during_a_push_refuses_it(server: RegistryServer, step: str, status: int) -> None:
    """If the permission to push is withdrawn before the last bytes of a manifest arrive, the push is refused. The step
    `grant` leaves only the permission to pull. The step `other` changes nothing, and the push succeeds."""
    login = change(server, "alice")
    change(server, "push")
    body = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'
    head = (
        f"PUT /v2/team/app/manifests/latest HTTP/1.1\r\nHost: x\r\nAuthorization: {login}\r\n"
        f"Content-Type: application/vnd.oci.image.index.v1+json\r\nContent-Length: {len(body)}\r\n"
        "Expect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as sock:
        sock.sendall(head.encode())
        assert sock.recv(64 * 1024) == b"HTTP/1.1 100 Continue\r\n\r\n"  # the server is reading the body
        change(server, step)
        sock.sendall(body)
        assert sock.recv(64 * 1024).startswith(b"HTTP/1.1 %d " % status)

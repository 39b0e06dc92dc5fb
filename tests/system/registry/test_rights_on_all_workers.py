"""Rights on a server of two workers, over sockets, with requests that no HTTP library would send."""

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
ROUNDS = 20
"""How many new connections are tried: they reach both workers."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with running_server(tmp_path) as started:
        yield started


def change(server: RegistryServer, what: str) -> str:
    """Changes the accounts in another process, as a command does. For `alice`, returns her login."""
    return asyncio.run(_change(server, what))


async def _change(server: RegistryServer, what: str) -> str:
    alice = AccountName("alice")
    async with open_accounts(server.data) as accounts:
        match what:
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
    made = api_tokens.make(name, now=time.time())
    await accounts.add_token(made.token, made.secret_hash, by=BY)
    return "Basic " + base64.b64encode(f"{name}:{made.text}".encode()).decode()


def codes(server: RegistryServer, login: str | None) -> set[tuple[int, str]]:
    """Returns the statuses of many connections."""
    found = set()
    for _ in range(ROUNDS):
        with plain_client(server.url) as client:
            answer = client.get(PATH, headers={"authorization": login} if login else {})
            found.add((answer.status_code, answer.json()["errors"][0]["message"]))
    return found


def bearer(server: RegistryServer, login: str) -> str:
    with plain_client(server.url) as client:
        where = "/token?service=entrepot&scope=repository:team/app:pull"
        return f"Bearer {client.get(where, headers={'authorization': login}).json()['token']}"


def test_a_change_holds_on_every_worker_at_the_next_request(server: RegistryServer) -> None:
    """The first account, a grant and a revoked token count from the next request on, also for tokens of `/token`. With
    or without a grant, missing content looks the same."""
    missing = (404, "there is no repository team/app")
    out = (401, "log in to pull from team/app")
    gone = (401, "the credentials are not valid")
    assert codes(server, None) == {missing}
    login = change(server, "alice")
    assert codes(server, None) == {out}
    for shown in (login, bearer(server, login)):
        assert codes(server, shown) == {missing}
    change(server, "grant")
    token = bearer(server, login)
    for shown in (login, token):
        assert codes(server, shown) == {missing}
    change(server, "revoke")
    for shown in (login, token):
        assert codes(server, shown) == {gone}


def raw(server: RegistryServer, request: bytes) -> list[bytes]:
    """Returns the status lines of all responses on one connection."""
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return re.findall(rb"HTTP/1\.1 \d{3} [A-Za-z ]+", answer)


def head(login: str, *lines: str) -> bytes:
    return "\r\n".join(
        [f"GET {PATH} HTTP/1.1", "Host: registry.test", f"Authorization: {login}", *lines, "", ""]
    ).encode()


def test_no_framing_lends_one_request_the_login_of_another(server: RegistryServer) -> None:
    """A request that follows another one, in its body or between two lengths, gets the rights of its own login, or no
    response."""
    login = change(server, "alice")
    plain = f"GET {PATH} HTTP/1.1\r\nHost: registry.test\r\n\r\n".encode()
    ok, refused = b"HTTP/1.1 404 Not Found", b"HTTP/1.1 401 Unauthorized"
    assert raw(server, head(login) + plain) == [ok, refused]
    assert raw(server, plain + head(login)) == [refused, ok]
    length = f"Content-Length: {len(plain)}"
    assert raw(server, head(login, length) + plain) == [ok]
    bad = b"HTTP/1.1 400 Bad Request"
    assert raw(server, head(login, length, "Transfer-Encoding: chunked") + b"0\r\n\r\n" + plain) == [bad]
    assert raw(server, head(login, "Content-Length: 0", length) + plain) == [bad]
    assert raw(server, head(login, " Authorization: Basic x")) in ([bad], [refused])
    assert raw(server, head("Basic x\r\nauthorization: " + login)) == [refused]
    assert raw(server, head("Basic x\r\n\t" + login[6:])) in ([bad], [refused])


def test_an_absolute_target_decides_the_realm_as_a_host_does(server: RegistryServer) -> None:
    """An absolute target replaces Host (RFC 9112, 3.2.2) and must have the same form; two hosts are refused."""
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
    assert raw(server, f"GET {PATH} HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n".encode()) == [
        b"HTTP/1.1 400 Bad Request"
    ]


def test_a_push_that_is_refused_is_told_so_while_it_sends(server: RegistryServer) -> None:
    """A client that sends a large body without waiting gets the whole response, not a broken connection."""
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


@pytest.mark.parametrize(("what", "status"), [("revoke", 401), ("disable", 401), ("grant", 403), ("other", 201)])
def test_a_body_that_takes_its_time_keeps_no_right(server: RegistryServer, what: str, status: int) -> None:
    """A manifest whose last bytes arrive after the right was withdrawn is not pushed."""
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
        change(server, what)
        sock.sendall(body)
        assert sock.recv(64 * 1024).startswith(b"HTTP/1.1 %d " % status)

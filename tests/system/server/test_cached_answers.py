"""Tests of cached responses. For a request without a body, the server first asks the application for a cached response
(`answer_at_once`), and runs the application only if there is none. The header `x-way` shows which of the two the client
got: `at once` for a cached response, and `called` for a response of the application that the server has called. The
tests use raw sockets, and run with uvloop and with asyncio's event loop."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
from collections.abc import Iterator

import pytest

from tests.fakes.certificate_authority import CertificateAuthority
from tests.system.server.app_process import AppProcess, Start, read_all, read_response
from tests.system.server.tls_client import client_context, tls_connection

# Environment variables that select the event loop of the server.
LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
SIZE = 60_000
"""The size of a large response in bytes."""
LIMITS = {"linger_seconds": 0.3, "timeout_check_seconds": 0.05}
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture(scope="module", params=LOOPS, ids=IDS)
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(request.param)


@pytest.fixture(scope="module")
def ready(env: dict[str, str]) -> Iterator[AppProcess]:
    """A server whose application has cached responses. Checks that it logs no errors."""
    running = AppProcess({"at_once": True, "limits": LIMITS}, env)
    try:
        yield running.wait_until_ready()
        assert running.errors == ""
    finally:
        running.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls(env: dict[str, str], authority: CertificateAuthority) -> Iterator[AppProcess]:
    """The same server over TLS."""
    pair = authority.sign("localhost")
    running = AppProcess({"at_once": True, "limits": LIMITS, "tls": [str(pair.certificate), str(pair.key)]}, env)
    try:
        yield running.wait_until_ready()
        assert running.errors == ""
    finally:
        running.close()


def request(query: str = "", *lines: str, method: str = "GET", version: str = "1.1", path: str = "/ready") -> bytes:
    return "\r\n".join([f"{method} {path}?{query} HTTP/{version}", "Host: test", *lines, "", ""]).encode()


def count_cached_answers(running: AppProcess) -> int:
    """Returns how many cached responses the server has got from the application so far: one for each successful call of
    `answer_at_once`."""
    with running.connect() as sock:
        sock.sendall(request(path="/counted"))
        return int(read_response(sock)[2])


def resident(running: AppProcess) -> int:
    """Returns the resident memory of the process in bytes."""
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# One response


def test_cached_response_is_complete(ready: AppProcess) -> None:
    """A cached response has the usual headers, a request id of its own and the body. The connection stays open."""
    with ready.connect() as sock:
        ids = set()
        for number in range(20):
            sock.sendall(request(f"text={number}"))
            status, headers, body = read_response(sock)
            assert (status, headers["x-way"], body) == (200, "at once", str(number).encode())
            assert {"date", "x-request-id", "content-length"} <= set(headers)
            assert "connection" not in headers
            ids.add(headers["x-request-id"])
        assert len(ids) == 20


def test_cached_response_to_head_has_no_body(ready: AppProcess) -> None:
    """A cached response to HEAD has a Content-Length and no body. The next response on the connection starts right
    after its headers."""
    with ready.connect() as sock:
        sock.sendall(request("size=5", method="HEAD"))
        status, headers, body = read_response(sock, "HEAD")
        assert (status, headers["x-way"], headers["content-length"], body) == (200, "at once", "5", b"")
        sock.sendall(request("text=next"))
        assert read_response(sock)[2] == b"next"


def test_request_head_in_two_pieces_gets_the_cached_response(ready: AppProcess) -> None:
    """A request whose head (request line and headers) arrives in two pieces gets the cached response, wherever the head
    is cut."""
    head = request("text=abc")
    with ready.connect() as sock:
        for cut in range(1, len(head)):
            sock.sendall(head[:cut])
            sock.sendall(head[cut:])
            status, headers, body = read_response(sock)
            assert (status, headers["x-way"], body) == (200, "at once", b"abc")


@pytest.mark.parametrize(
    ("framing_header", "body_bytes"),
    [("Content-Length: 3", b"abc"), ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n")],
)
def test_request_with_a_body_gets_no_cached_response(ready: AppProcess, framing_header: str, body_bytes: bytes) -> None:
    """For a request with a body, the server calls the application instead of using the cached response. The bytes after
    the body are parsed as the next request."""
    with ready.connect() as sock:
        sock.sendall(request("text=first", framing_header) + body_bytes + request("text=second"))
        _, headers, body = read_response(sock)
        assert (headers["x-way"], body) == ("called", b"first")
        assert read_response(sock)[2] == b"second"


def test_cached_response_after_an_ignored_upgrade(ready: AppProcess) -> None:
    """The server ignores an Upgrade header. Later requests on the connection are parsed as HTTP/1.1, also after a
    cached response."""
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    with ready.connect() as sock:
        for number in range(5):
            sock.sendall(request(f"text={number}", *upgrade))
            assert read_response(sock)[2] == str(number).encode()
        sock.sendall(request("text=plain"))
        assert read_response(sock)[2] == b"plain"


# The end of a connection


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_cached_response_to_the_last_request_closes_the_connection(ready: AppProcess, version: str) -> None:
    """After a request with `Connection: close`, the server sends the cached response, closes the connection, and
    ignores further requests. It does the same after a request in HTTP/1.0, even with `Connection: keep-alive`."""
    connection_header = "Connection: close" if version == "1.1" else "Connection: keep-alive"
    data = ready.send_and_read_all(request("text=last", connection_header, version=version) + request("text=never"))
    assert data.count(b"HTTP/1.1") == 1
    assert data.endswith(b"\r\n\r\nlast")
    assert b"connection: close\r\n" in data


def test_half_closed_connection_gets_all_cached_responses(ready: AppProcess) -> None:
    """A client that closes its sending side gets the responses to all its requests. Then the server closes the
    connection."""
    with ready.connect() as sock:
        sock.sendall(request(f"size={SIZE}") + request("text=second"))
        sock.shutdown(socket.SHUT_WR)
        data = read_all(sock)
        assert data.count(b"HTTP/1.1 200") == 2
        assert data.endswith(b"\r\n\r\nsecond")


def test_malformed_request_after_a_cached_response(ready: AppProcess) -> None:
    """If a valid and a malformed request arrive together, the client first gets the cached response and then a 400."""
    data = ready.send_and_read_all(request("text=good") + b"GET /ready HTTP/1.1\r\n\r\n")
    assert [int(status) for status in STATUS.findall(data)] == [200, 400]


def test_keep_alive_timeout_starts_after_a_cached_response(start: Start, env: dict[str, str]) -> None:
    """The server closes a connection that stays idle for the keep-alive timeout after a cached response."""
    running = start(env, at_once=True, limits={"keep_alive_seconds": 0.3, "timeout_check_seconds": 0.05})
    with running.connect() as sock:
        sock.sendall(request())
        assert read_response(sock)[1]["x-way"] == "at once"
        assert sock.recv(1) == b""


def test_stop_completes_a_cached_response(start: Start, env: dict[str, str]) -> None:
    """On SIGTERM, the server sends a cached response to its end, closes the connection, and exits with code 0."""
    running = start(env, at_once=True)
    with running.connect() as sock:
        sock.sendall(request(f"size={SIZE}"))
        assert sock.recv(1) == b"H"
        os.kill(running.pid, signal.SIGTERM)
        assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == SIZE
        assert running.wait_for_exit() == 0


# Many responses


def test_pipelined_cached_responses_keep_their_order(ready: AppProcess) -> None:
    """The responses to pipelined requests come in the order of the requests, whether a response is cached or not, and
    whether a request has a body or not."""
    slow = request("seconds=0.02", path="/slow")
    with ready.connect() as sock:
        for _ in range(3):
            batch = request("text=1") + slow + request("text=2") + request("text=3", "Content-Length: 3") + b"abc"
            sock.sendall(batch + request("text=4") + slow + request("text=5"))
            bodies = [read_response(sock)[2] for _ in range(7)]
            assert bodies == [b"1", b"slow", b"2", b"3", b"4", b"slow", b"5"]


def test_pipelined_requests_do_not_delay_other_clients(ready: AppProcess) -> None:
    """Of the pipelined requests that arrive in one read, only one gets a cached response at once. The application
    answers each of the others in a later iteration of the event loop, so that one client cannot delay the others."""
    count_before = count_cached_answers(ready)
    with ready.connect() as sock:
        sock.sendall(request() * 1000)
        assert [read_response(sock)[0] for _ in range(1000)] == [200] * 1000
    reads = 1 + len(request() * 1000) // 1024  # a read has usually 16 KiB, but can have less
    assert count_cached_answers(ready) - count_before <= reads


def test_no_responses_are_made_while_the_client_does_not_read(ready: AppProcess) -> None:
    """If a client sends requests and does not read the responses, the server makes no more responses than fit into the
    socket buffers. It reads the remaining requests when the client reads again."""
    count_before, memory_before = count_cached_answers(ready), resident(ready)
    with socket.socket() as sock:
        sock.settimeout(15)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(ready.address)
        for _ in range(2000):
            sock.sendall(request(f"size={SIZE}"))
            # This request on another connection is answered only after the server had time for the request above.
            answer_count = count_cached_answers(ready) - count_before
        assert 0 < answer_count < 300
        assert resident(ready) - memory_before < 8 << 20
        sock.shutdown(socket.SHUT_WR)
        data = read_all(sock)
        assert data.count(b"HTTP/1.1 200") == 2000
        assert data.endswith(b"\r\n\r\n" + b"x" * SIZE)


# TLS


@pytest.fixture
def context(authority: CertificateAuthority) -> ssl.SSLContext:
    return client_context(authority.certificate)


def test_cached_responses_over_tls(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Over TLS, small and large cached responses arrive completely."""
    with tls_connection(tls, context) as sock:
        for size in (1, 100, SIZE, 16 * 1024, 1):
            sock.sendall(request(f"size={size}"))
            status, headers, body = read_response(sock)
            assert (status, headers["x-way"], body) == (200, "at once", b"x" * size)


def test_cached_responses_over_tls_keep_their_order(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Over TLS, cached and other responses come in the order of the requests."""
    with tls_connection(tls, context) as sock:
        slow = request("seconds=0.02", path="/slow")
        sock.sendall(request("text=1") + slow + request(f"size={SIZE}") + request("text=2"))
        assert [read_response(sock)[2] for _ in range(4)] == [b"1", b"slow", b"x" * SIZE, b"2"]


def test_no_tls_responses_are_made_while_the_client_does_not_read(tls: AppProcess, context: ssl.SSLContext) -> None:
    """If a client sends requests over TLS and reads nothing, the server encrypts no more responses than fit into the
    buffers."""
    memory_before = resident(tls)
    with tls_connection(tls, context) as control, tls_connection(tls, context, 64 * 1024) as sock:
        for _ in range(1000):
            sock.sendall(request(f"size={SIZE}"))
            control.sendall(request(path="/counted"))
            answer_count = int(read_response(control)[2])
        assert 0 < answer_count < 500
        assert resident(tls) - memory_before < 16 << 20
        for _ in range(answer_count // 2):
            assert read_response(sock)[2] == b"x" * SIZE

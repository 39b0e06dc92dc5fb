"""Responses that the application has cached, over sockets, with each kind of event loop."""

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

LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
SIZE = 60_000
"""Bytes of a large answer."""
LIMITS = {"linger_seconds": 0.3, "timeout_check_seconds": 0.05}
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture(scope="module", params=LOOPS, ids=IDS)
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(request.param)


@pytest.fixture(scope="module")
def ready(env: dict[str, str]) -> Iterator[AppProcess]:
    running = AppProcess({"at_once": True, "limits": LIMITS}, env)
    try:
        yield running.until_ready()
        assert running.errors == ""
    finally:
        running.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls(env: dict[str, str], authority: CertificateAuthority) -> Iterator[AppProcess]:
    pair = authority.sign("localhost")
    running = AppProcess({"at_once": True, "limits": LIMITS, "tls": [str(pair.certificate), str(pair.key)]}, env)
    try:
        yield running.until_ready()
        assert running.errors == ""
    finally:
        running.close()


def request(query: str = "", *lines: str, method: str = "GET", version: str = "1.1", path: str = "/ready") -> bytes:
    return "\r\n".join([f"{method} {path}?{query} HTTP/{version}", "Host: test", *lines, "", ""]).encode()


def counted(running: AppProcess) -> int:
    """Returns how many cached responses were sent so far."""
    with running.connect() as sock:
        sock.sendall(request(path="/counted"))
        return int(read_response(sock)[2])


def resident(running: AppProcess) -> int:
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# One answer


def test_a_ready_answer_is_a_whole_response(ready: AppProcess) -> None:
    """It has the headers of every response, its own request id, and the body; the connection stays open."""
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


def test_the_answer_to_head_has_no_body(ready: AppProcess) -> None:
    """The next response starts right after its head."""
    with ready.connect() as sock:
        sock.sendall(request("size=5", method="HEAD"))
        status, headers, body = read_response(sock, "HEAD")
        assert (status, headers["x-way"], headers["content-length"], body) == (200, "at once", "5", b"")
        sock.sendall(request("text=next"))
        assert read_response(sock)[2] == b"next"


def test_a_head_that_comes_in_pieces_gets_its_ready_answer(ready: AppProcess) -> None:
    """Wherever a head is cut into pieces, it gets the cached response."""
    whole = request("text=abc")
    with ready.connect() as sock:
        for cut in range(1, len(whole)):
            sock.sendall(whole[:cut])
            sock.sendall(whole[cut:])
            status, headers, body = read_response(sock)
            assert (status, headers["x-way"], body) == (200, "at once", b"abc")


@pytest.mark.parametrize(
    ("given", "sent"),
    [("Content-Length: 3", b"abc"), ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n")],
)
def test_a_request_with_a_body_is_not_answered_before_that(ready: AppProcess, given: str, sent: bytes) -> None:
    """The application is called for a request with a body, and the bytes after the body are another request."""
    with ready.connect() as sock:
        sock.sendall(request("text=first", given) + sent + request("text=second"))
        _, headers, body = read_response(sock)
        assert (headers["x-way"], body) == ("called", b"first")
        assert read_response(sock)[2] == b"second"


def test_an_upgrade_that_is_ignored_leaves_the_connection_whole(ready: AppProcess) -> None:
    """What follows is parsed as HTTP/1.1, also after a cached response."""
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    with ready.connect() as sock:
        for number in range(5):
            sock.sendall(request(f"text={number}", *upgrade))
            assert read_response(sock)[2] == str(number).encode()
        sock.sendall(request("text=plain"))
        assert read_response(sock)[2] == b"plain"


# Ends


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_that_ends_after_its_answer_still_does(ready: AppProcess, version: str) -> None:
    """What follows `Connection: close` is ignored, and so is what follows a request in HTTP/1.0, whatever its
    `Connection` says."""
    said = "Connection: close" if version == "1.1" else "Connection: keep-alive"
    data = ready.talk(request("text=last", said, version=version) + request("text=never"))
    assert data.count(b"HTTP/1.1") == 1
    assert data.endswith(b"\r\n\r\nlast")
    assert b"connection: close\r\n" in data


def test_a_client_that_shuts_its_side_gets_the_answers_before_that(ready: AppProcess) -> None:
    """A client that shuts its sending side gets all responses, and then the end of the connection."""
    with ready.connect() as sock:
        sock.sendall(request(f"size={SIZE}") + request("text=second"))
        sock.shutdown(socket.SHUT_WR)
        data = read_all(sock)
        assert data.count(b"HTTP/1.1 200") == 2
        assert data.endswith(b"\r\n\r\nsecond")


def test_what_is_wrong_after_a_ready_answer_is_refused_after_it(ready: AppProcess) -> None:
    """A malformed request is refused after the cached response before it, also if both come in one read."""
    data = ready.talk(request("text=good") + b"GET /ready HTTP/1.1\r\n\r\n")
    assert [int(status) for status in STATUS.findall(data)] == [200, 400]


def test_an_idle_connection_is_ended_after_a_ready_answer_as_after_any(start: Start, env: dict[str, str]) -> None:
    """The keep-alive timeout starts with the cached response."""
    running = start(env, at_once=True, limits={"keep_alive_seconds": 0.3, "timeout_check_seconds": 0.05})
    with running.connect() as sock:
        sock.sendall(request())
        assert read_response(sock)[1]["x-way"] == "at once"
        assert sock.recv(1) == b""


def test_a_stop_ends_connections_that_had_ready_answers(start: Start, env: dict[str, str]) -> None:
    """Cached responses arrive whole, and the server ends with exit code 0."""
    running = start(env, at_once=True)
    with running.connect() as sock:
        sock.sendall(request(f"size={SIZE}"))
        assert sock.recv(1) == b"H"
        os.kill(running.pid, signal.SIGTERM)
        assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == SIZE
        assert running.end() == 0


# Many


def test_answers_keep_the_order_of_their_requests(ready: AppProcess) -> None:
    """Pipelined requests, with cached responses and without, with bodies and without, are answered in their order."""
    slow = request("seconds=0.02", path="/slow")
    with ready.connect() as sock:
        for _ in range(3):
            batch = request("text=1") + slow + request("text=2") + request("text=3", "Content-Length: 3") + b"abc"
            sock.sendall(batch + request("text=4") + slow + request("text=5"))
            found = [read_response(sock)[2] for _ in range(7)]
            assert found == [b"1", b"slow", b"2", b"3", b"4", b"slow", b"5"]


def test_too_many_sent_ahead(ready: AppProcess) -> None:
    """Only a bounded number of pipelined requests is answered, cached or not, so one client cannot hold up the
    others."""
    before = counted(ready)
    data = ready.talk(request() * 1000)
    assert 64 <= data.count(b"HTTP/1.1 200") <= 70
    assert data.lower().count(b"connection: close") == 1
    assert counted(ready) - before <= 3


def test_what_nobody_takes_is_not_prepared(ready: AppProcess) -> None:
    """A client that sends requests without reading gets no more responses than fit into the socket buffers; its other
    requests wait unread."""
    before, memory = counted(ready), resident(ready)
    with socket.socket() as sock:
        sock.settimeout(15)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(ready.address)
        for _ in range(2000):
            sock.sendall(request(f"size={SIZE}"))
            given = counted(ready) - before  # counts the response to another client too: earlier requests were seen
        assert 0 < given < 300
        assert resident(ready) - memory < 8 << 20
        data = read_all(sock)
        assert data.count(b"HTTP/1.1 200") > given
        assert data.endswith(b"\r\n\r\n" + b"x" * SIZE)


# TLS


@pytest.fixture
def context(authority: CertificateAuthority) -> ssl.SSLContext:
    return client_context(authority.certificate)


def test_over_tls(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Small and large cached responses arrive whole."""
    with tls_connection(tls, context) as sock:
        for size in (1, 100, SIZE, 16 * 1024, 1):
            sock.sendall(request(f"size={size}"))
            status, headers, body = read_response(sock)
            assert (status, headers["x-way"], body) == (200, "at once", b"x" * size)


def test_over_tls_answers_keep_their_order(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Cached responses and others keep the order of their requests."""
    with tls_connection(tls, context) as sock:
        slow = request("seconds=0.02", path="/slow")
        sock.sendall(request("text=1") + slow + request(f"size={SIZE}") + request("text=2"))
        assert [read_response(sock)[2] for _ in range(4)] == [b"1", b"slow", b"x" * SIZE, b"2"]


def test_over_tls_what_nobody_takes_is_not_prepared(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A client that reads nothing makes the server encrypt no more than fits into the buffers."""
    memory = resident(tls)
    with tls_connection(tls, context) as other, tls_connection(tls, context, 64 * 1024) as sock:
        for _ in range(1000):
            sock.sendall(request(f"size={SIZE}"))
            other.sendall(request(path="/counted"))
            given = int(read_response(other)[2])
        assert 0 < given < 500
        assert resident(tls) - memory < 16 << 20
        for _ in range(given // 2):
            assert read_response(sock)[2] == b"x" * SIZE

"""Tests of valid HTTP/1.1 requests over raw sockets: targets, pipelining, unread bodies, `Expect`, timeouts, and limits
on the memory that one client can occupy."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time

import pytest

from registry.server.process.free_memory import FULL_COLLECTION_THRESHOLD
from tests.system.server.app_process import (
    TIMEOUT_SECONDS,
    AppProcess,
    Pauses,
    Start,
    read_all,
    read_error,
    read_response,
    repeat_after_stalls,
    wait_for,
)

HEAD = b"GET /echo HTTP/1.1\r\nHost: test\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: test\r\n"


@pytest.mark.parametrize(
    ("target", "path", "raw_path", "query"),
    [
        ("/v2/", "/v2/", "/v2/", ""),
        ("/a%20b%2Fc?x=%20&y", "/a b/c", "/a%20b%2Fc", "x=%20&y"),
        ("//v2//x/", "//v2//x/", "//v2//x/", ""),
        ("//host/path?q", "//host/path", "//host/path", "q"),
        ("/a?b?c", "/a", "/a", "b?c"),
        ("/?", "/", "/", ""),
        ("/a:b@c;d", "/a:b@c;d", "/a:b@c;d", ""),
        ("/%00%ff", "/\0\ufffd", "/%00%ff", ""),
        ("http://other:1/v2/?n=1", "/v2/", "/v2/", "n=1"),
        ("http://other:1?n=1", "/", "/", "n=1"),
    ],
)
def test_targets(server: AppProcess, target: str, path: str, raw_path: str, query: str) -> None:
    """The application gets the raw path and the query as the client sent them, and the path with its percent-encoding
    decoded. The host of an absolute target replaces the Host header."""
    received = server.get(target)
    assert (received["path"], received["raw_path"], received["query"]) == (path, raw_path, query)
    assert received["host"] == ["other:1" if target.startswith("http") else "test"]


def test_options_star(server: AppProcess) -> None:
    """A request `OPTIONS *` reaches the application with the path `*`."""
    assert b'"path": "*"' in server.send_and_read_all(b"OPTIONS * HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")


def test_pipelining(server: AppProcess) -> None:
    """The responses to pipelined requests come in the order of the requests, whether these have bodies or not."""
    with server.connect() as sock:
        requests = [b"GET /slow?seconds=0.05 HTTP/1.1\r\nHost: test\r\n\r\n", POST + b"Content-Length: 3\r\n\r\nabc"]
        requests += [HEAD + b"\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"]
        sock.sendall(b"".join(requests * 4))
        for _ in range(4):
            assert read_response(sock)[2] == b"slow"
            assert [json.loads(read_response(sock)[2])["size"] for _ in range(3)] == [3, 0, 4]


def test_many_pipelined_requests(server: AppProcess) -> None:
    """A client that pipelines 1000 requests gets all responses, in the order of the requests. Some requests have a
    body, and some arrive in two reads."""
    with server.connect() as sock:
        sock.sendall(
            b"".join(
                b"POST /echo?%d HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % (number, number % 3)
                + b"abc"[: number % 3]
                for number in range(1000)
            )
        )
        for number in range(1000):
            received = json.loads(read_response(sock)[2])
            assert (received["query"], received["size"]) == (str(number), number % 3)


def test_requests_after_connection_close_are_ignored(server: AppProcess) -> None:
    """The server ignores requests that follow a request with `Connection: close` or a request in HTTP/1.0."""
    data = server.send_and_read_all(
        HEAD + b"Connection: close\r\n\r\n" + b"DELETE /echo HTTP/1.1\r\nHost: test\r\n\r\n"
    )
    assert data.count(b"HTTP/1.1") == 1
    http_1_0_data = server.send_and_read_all(b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + HEAD + b"\r\n")
    assert http_1_0_data.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("body", [b"", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_upgrade_is_ignored(server: AppProcess, body: bytes) -> None:
    """A request that offers an upgrade to h2c or a websocket is served as HTTP/1.1. Its body is read, and the
    connection stays open."""
    # By the first letter of the framing header: no header, Content-Length, Transfer-Encoding.
    body_bytes = {b"": b"", b"C": b"abc", b"T": b"3\r\nabc\r\n0\r\n\r\n"}[body[:1]]
    for upgrade in (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    ):
        with server.connect() as sock:
            sock.sendall(POST + upgrade + body + b"\r\n" + body_bytes + HEAD + b"\r\n")
            status, headers, answer = read_response(sock)
            assert (status, json.loads(answer)["size"]) == (200, 3 if body else 0)
            assert "connection" not in headers
            assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_responses_without_a_body(server: AppProcess) -> None:
    """A response to HEAD and a 304 can declare a length although they have no body. The next response follows
    directly."""
    with server.connect() as sock:
        sock.sendall(b"HEAD /big?size=100 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock, "HEAD")[1]["content-length"] == "100"
        sock.sendall(b"GET /unmodified HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock)[0] == 304
        sock.sendall(b"HEAD /stream HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock, "HEAD")[0] == 200
        sock.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_response_of_unknown_length(server: AppProcess) -> None:
    """A response of unknown length is chunked in HTTP/1.1. In HTTP/1.0 the server marks its end by closing the
    connection."""
    assert server.send_and_read_all(b"GET /stream HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").endswith(
        b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"
    )
    http_1_0_data = server.send_and_read_all(b"GET /stream HTTP/1.0\r\n\r\n")
    assert http_1_0_data.endswith(b"\r\n\r\nabcd")
    assert b"chunked" not in http_1_0_data


@pytest.mark.parametrize("path", [b"/fail", b"/silent", b"/split"])
def test_failing_application(server: AppProcess, path: bytes) -> None:
    """If the application raises, sends no response or sends an invalid header, the client gets a 500 in the error
    format of the distribution spec."""
    assert read_error(server.send_and_read_all(b"GET " + path + b" HTTP/1.1\r\nHost: test\r\n\r\n")) == (500, "UNKNOWN")


def test_application_that_fails_during_a_response(server: AppProcess) -> None:
    """If the application fails in the middle of a response, the client gets fewer bytes than Content-Length
    declares."""
    with server.connect() as sock:
        sock.sendall(b"GET /fail_late HTTP/1.1\r\nHost: test\r\n\r\n")
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                data += piece
        assert b"content-length: 10\r\n" in data
        assert bytes(data.partition(b"\r\n\r\n")[2]) in (b"", b"abc")


# Bodies that the application does not read


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_refusal_while_the_client_sends_the_body(server: AppProcess, framing: str) -> None:
    """The application answers 403 without reading the body, while the client sends 50 MB. The server stops reading, and
    the client gets the response with `Connection: close` before any reset."""
    size = 50_000_000
    head = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
    piece = bytes(65536) if framing == "length" else b"10000\r\n" + bytes(65536) + b"\r\n"
    with server.connect() as sock:
        sock.sendall(f"PUT /refuse HTTP/1.1\r\nHost: test\r\n{head}\r\n\r\n".encode())
        sent = 0
        sock.settimeout(0.2)
        try:
            while sent < size:
                sent += sock.send(piece)
        except TimeoutError:
            pass  # the server has stopped reading
        assert sent < 20_000_000
        sock.settimeout(10)
        status, headers, body = read_response(sock)
        assert (status, headers["connection"], body) == (403, "close", b"no")


def test_refusal_reaches_a_client_that_stops_sending(server: AppProcess) -> None:
    """A client that has sent only a part of its body gets the 403, and then the server closes its sending side."""
    with server.connect() as sock:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 50000000\r\n\r\n" + bytes(100_000))
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 403")
        assert b"connection: close" in data


def test_short_unread_body_is_discarded(server: AppProcess) -> None:
    """If the application does not read a short body, the server receives and discards the body before it sends the
    response. It never parses the body as a request, and the connection stays open."""
    with server.connect() as sock, server.connect() as other_connection:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 60000\r\n\r\n")
        for _ in range(3):  # the responses show that the server has read the first request
            other_connection.sendall(HEAD + b"\r\n")
            read_response(other_connection)
        assert select.select([sock], [], [], 0)[0] == []
        smuggled = b"DELETE /echo HTTP/1.1\r\nHost: test\r\n\r\n"
        sock.sendall((smuggled * 2000)[:60000] + HEAD + b"\r\n")
        status, headers, _ = read_response(sock)
        assert (status, "connection" in headers) == (403, False)
        assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_unread_body_that_has_arrived_keeps_the_connection(server: AppProcess) -> None:
    """If the application does not read a body that arrived completely with its headers, the connection stays open."""
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(
                b"PUT /refuse HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
            )
            status, headers, _ = read_response(sock)
            assert (status, "connection" in headers) == (403, False)


# Expect: 100-continue


def test_expect_and_read(server: AppProcess) -> None:
    """For a request with `Expect: 100-continue`, the server sends the 100 when the application starts to read the
    body."""
    with server.connect() as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert sock.recv(len(interim), socket.MSG_WAITALL) == interim
        sock.sendall(b"abc")
        status, headers, body = read_response(sock)
        assert (status, json.loads(body)["size"], "connection" in headers) == (200, 3, False)


@pytest.mark.parametrize("next_bytes", [b"abc", b"", HEAD + b"\r\n"])
def test_expect_answered_early(server: AppProcess, next_bytes: bytes) -> None:
    """After `Expect: 100-continue`, the application answers 403 without reading the body. The next bytes of the client
    can then be the body or a new request, so the server ignores them and closes the connection."""
    with server.connect() as sock:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")
        sock.sendall(next_bytes)
        assert sock.recv(1) == b""


def test_expect_in_http_1_0(server: AppProcess) -> None:
    """A client with HTTP/1.0 gets no 100, because HTTP/1.0 does not define this status."""
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc")
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 200")
        assert b'"size": 3' in data


# Clients that disconnect


def test_half_closed_connection_gets_its_response(server: AppProcess) -> None:
    """A client that closes its sending side after a complete request gets the response."""
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).endswith(b"slow")


def test_disconnect_during_a_response(server: AppProcess) -> None:
    """If the client disconnects during a response, the `send` of the application raises."""
    with server.connect() as sock:
        sock.sendall(b"GET /big?size=10000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.recv(1000)
    server.wait_for_line("cut")


def test_disconnect_during_a_request_body(server: AppProcess) -> None:
    """If the client disconnects before the body is complete, the application gets a disconnect message."""
    with server.connect() as sock:
        sock.sendall(POST + b"Content-Length: 2222\r\n\r\nabcde")
    server.wait_for_line("disconnected")


# Timeouts


def test_slow_headers(short_timeout_server: AppProcess) -> None:
    """A client whose headers are not complete after the timeout gets a 408, even if it sends a header every few
    milliseconds."""
    with short_timeout_server.connect_with(b"GET /echo HTTP/1.1\r\n") as sock:
        sock.settimeout(0.05)
        data = b""
        deadline = time.monotonic() + 10
        while not data and time.monotonic() < deadline:
            sock.sendall(b"X: y\r\n")
            try:
                data = sock.recv(65536)
            except TimeoutError:
                continue
        assert read_error(data) == (408, "UNSUPPORTED")


def test_silent_connection(short_timeout_server: AppProcess) -> None:
    """A connection without a request is closed after the timeout, without a response. A connection that is idle after a
    response is closed too."""
    with short_timeout_server.connect() as sock:
        assert sock.recv(1) == b""
    with short_timeout_server.connect_with(HEAD + b"\r\n") as sock:
        assert read_response(sock)[0] == 200
        assert sock.recv(1) == b""


def test_idle_body(short_timeout_server: AppProcess) -> None:
    """If the client stops sending its body, it gets a 408 after the timeout, and the application gets a disconnect
    message."""
    with short_timeout_server.connect_with(POST + b"Content-Length: 777\r\n\r\nabcdef") as sock:
        assert read_error(read_all(sock)) == (408, "UNSUPPORTED")
    short_timeout_server.wait_for_line("disconnected 6")


def test_slow_body(short_timeout_server: AppProcess) -> None:
    """A body may take longer than the timeout in total, as long as the client sends some bytes again and again."""

    def send_slowly(pauses: Pauses) -> None:
        with short_timeout_server.connect_with(POST + b"Content-Length: 15\r\n\r\n") as sock:
            for _ in range(15):
                assert select.select([sock], [], [], 0.1)[0] == []
                sock.sendall(b"a")
                short_timeout_server.get()  # the server does not stall
                pauses.end()
            assert json.loads(read_response(sock)[2])["size"] == 15

    repeat_after_stalls(send_slowly, longest_pause=0.5)


def test_slow_application(short_timeout_server: AppProcess) -> None:
    """The application may take longer than all timeouts to answer."""
    with short_timeout_server.connect_with(b"GET /slow?seconds=2 HTTP/1.1\r\nHost: test\r\n\r\n") as sock:
        assert read_response(sock)[2] == b"slow"


def test_client_that_does_not_read(short_timeout_server: AppProcess) -> None:
    """The server disconnects a client that reads nothing of its response for the timeout."""
    with short_timeout_server.connect_with(b"GET /big?size=1000000000 HTTP/1.1\r\nHost: test\r\n\r\n"):
        short_timeout_server.wait_for_line("cut")


def test_half_closed_connection_times_out(short_timeout_server: AppProcess) -> None:
    """If a client has closed its sending side and the application does not answer, the server closes the connection
    after a timeout."""
    with short_timeout_server.connect_with(b"GET /patient HTTP/1.1\r\nHost: test\r\n\r\n") as sock:
        short_timeout_server.wait_for_line("patient")
        sock.shutdown(socket.SHUT_WR)
        short_timeout_server.wait_for_line("left")


def test_unread_body_is_not_buffered(server: AppProcess) -> None:
    """While the application does not read, the server buffers almost nothing of a body of 200 MB."""
    with server.connect() as sock:
        sock.sendall(b"PUT /slow?seconds=30 HTTP/1.1\r\nHost: test\r\nContent-Length: 200000000\r\n\r\n")
        memory_before = _resident(server)
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(200_000_000))
        assert _resident(server) - memory_before < 8 << 20


def _resident(running: AppProcess) -> int:
    """Returns the resident memory of the process in bytes."""
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# Limits on the memory that clients occupy


def test_number_of_headers_is_limited(server: AppProcess) -> None:
    """A request with 400 short headers is served. A request with 1000 gets a 431 although its headers are small,
    because each header counts as more than its bytes."""
    for count, status in ((400, 200), (1000, 431)):
        request = b"GET /echo HTTP/1.1\r\nHost: test\r\nConnection: close\r\n" + b"a:\r\n" * count + b"\r\n"
        assert server.send_and_read_all(request).startswith(b"HTTP/1.1 %d " % status)


LARGE_GET = b"GET /whole?size=8388608 HTTP/1.1\r\nHost: test\r\n\r\n"
"""A request for a response of 8 MiB, more than the kernel accepts for a client that does not read."""


def _connect_with_small_buffer(running: AppProcess) -> socket.socket:
    """Opens a connection with a small receive buffer, which is full soon if the test does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    sock.settimeout(TIMEOUT_SECONDS)
    sock.connect(running.address)
    return sock


def test_unread_responses_are_limited_over_all_clients(start: Start) -> None:
    """The server limits the total size of the responses that clients do not read: eight slices fit into this limit.
    Beyond the limit, clients get 503 instead of large responses. Once the slow clients have disconnected, large
    responses are sent again."""
    running = start(limits={"unsent_bytes": 2 * 1024 * 1024, "unsent_wait_seconds": 0.05})

    def status() -> int:
        with running.connect() as sock:
            sock.sendall(LARGE_GET)
            return read_response(sock)[0]

    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(32):
            sock = stack.enter_context(_connect_with_small_buffer(running))
            sock.sendall(LARGE_GET)
            statuses.append(sock.recv(12)[-3:])
        assert statuses == [b"200"] * 8 + [b"503"] * 24
        assert status() == 503
    wait_for(lambda: status() == 200)
    wait_for(lambda: "too many responses wait for slow clients" in running.errors)
    assert "Traceback" not in running.errors


def test_large_responses_wait_for_memory(start: Start) -> None:
    """Eight clients do not read their responses, and use up the limit. The responses of twelve other clients wait. They
    are sent when the first clients have disconnected."""
    running = start(limits={"unsent_bytes": 2 * 1024 * 1024, "unsent_wait_seconds": 60.0})
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as slow_clients:
            for _ in range(8):
                sock = slow_clients.enter_context(_connect_with_small_buffer(running))
                sock.sendall(LARGE_GET)
                assert sock.recv(12)[-3:] == b"200"
            socks = [stack.enter_context(running.connect()) for _ in range(12)]
            for sock in socks:
                sock.sendall(b"GET /whole?size=300000 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert select.select(socks, [], [], 0.3)[0] == []
        for sock in socks:
            status, _, body = read_response(sock)
            assert (status, len(body)) == (200, 300_000)


def test_large_response_counts_with_one_slice(start: Start) -> None:
    """A large response counts against the limit of unread responses with one slice of 256 KiB only, because the server
    copies one slice at a time. The rest is memory of the application, which can send the same bytes to many clients."""
    running = start(limits={"unsent_bytes": 4 * 1024 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(7):
            sock = stack.enter_context(_connect_with_small_buffer(running))
            sock.sendall(LARGE_GET)
            assert sock.recv(12)[-3:] == b"200"


def test_streamed_bodies_do_not_count_as_unread_responses(start: Start) -> None:
    """Eight clients do not read streamed responses, such as blobs. Another client still gets its small response, such
    as a manifest, instead of a 503."""
    running = start(limits={"unsent_bytes": 512 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(_connect_with_small_buffer(running))
            sock.sendall(b"GET /big?size=16777216 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"
        assert (
            running.send_and_read_all(b"GET /whole?size=100000 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")[
                9:12
            ]
            == b"200"
        )


def test_objects_of_the_start_are_frozen(start: Start) -> None:
    """Python's garbage collection skips the objects that were created during the start (`gc.freeze`). Otherwise a full
    collection would block the event loop for 50 ms. Automatic full collections are rare."""
    for workers in (1, 2):
        running = start(workers=workers)
        with running.connect() as sock:
            sock.sendall(b"GET /frozen HTTP/1.1\r\nHost: test\r\n\r\n")
            frozen, middle_collections_per_full_one = map(int, read_response(sock)[2].split())
        assert frozen > 10_000
        assert middle_collections_per_full_one == FULL_COLLECTION_THRESHOLD

from __future__ import annotations

import contextlib
import json
import select
import socket
import time

import pytest

from tests.system.server.app_process import (
    TIMEOUT_SECONDS,
    AppProcess,
    Start,
    read_all,
    read_error,
    read_response,
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
    """The path is passed on as it was sent; an absolute target replaces the host."""
    seen = server.get(target)
    assert (seen["path"], seen["raw_path"], seen["query"]) == (path, raw_path, query)
    assert seen["host"] == ["other:1" if target.startswith("http") else "test"]


def test_options_star(server: AppProcess) -> None:
    """`OPTIONS *` reaches the application."""
    assert b'"path": "*"' in server.talk(b"OPTIONS * HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")


def test_pipelining(server: AppProcess) -> None:
    """Pipelined requests, with and without bodies, are answered in their order."""
    with server.connect() as sock:
        requests = [b"GET /slow?seconds=0.05 HTTP/1.1\r\nHost: test\r\n\r\n", POST + b"Content-Length: 3\r\n\r\nabc"]
        requests += [HEAD + b"\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"]
        sock.sendall(b"".join(requests * 4))
        for _ in range(4):
            assert read_response(sock)[2] == b"slow"
            assert [json.loads(read_response(sock)[2])["size"] for _ in range(3)] == [3, 0, 4]


def test_too_many_sent_ahead(server: AppProcess) -> None:
    """A client that sends ahead without limit gets a bounded number of responses, and then the end."""
    one = b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n\r\n"
    data = server.talk(one * 1000)
    assert 64 <= data.count(b"HTTP/1.1 200") <= 70
    assert data.lower().count(b"connection: close") == 1


def test_nothing_after_close(server: AppProcess) -> None:
    """What follows a request with `Connection: close` is not executed."""
    data = server.talk(HEAD + b"Connection: close\r\n\r\n" + b"DELETE /echo HTTP/1.1\r\nHost: test\r\n\r\n")
    assert data.count(b"HTTP/1.1") == 1
    old = server.talk(b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + HEAD + b"\r\n")
    assert old.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("body", [b"", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_upgrade_is_ignored(server: AppProcess, body: bytes) -> None:
    """A request that offers h2c or a websocket is served as HTTP/1.1, its body read, the connection kept."""
    sent = {b"": b"", b"C": b"abc", b"T": b"3\r\nabc\r\n0\r\n\r\n"}[body[:1]]
    for upgrade in (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    ):
        with server.connect() as sock:
            sock.sendall(POST + upgrade + body + b"\r\n" + sent + HEAD + b"\r\n")
            status, headers, answer = read_response(sock)
            assert (status, json.loads(answer)["size"]) == (200, 3 if body else 0)
            assert "connection" not in headers
            assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_head(server: AppProcess) -> None:
    """Responses to HEAD, and a 304, may declare a length and have no body."""
    with server.connect() as sock:
        sock.sendall(b"HEAD /big?size=100 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock, "HEAD")[1]["content-length"] == "100"
        sock.sendall(b"GET /unmodified HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock)[0] == 304
        sock.sendall(b"HEAD /stream HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock, "HEAD")[0] == 200
        sock.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_length_unknown(server: AppProcess) -> None:
    """A response of unknown length is chunked in HTTP/1.1 and ends with the connection in HTTP/1.0."""
    assert server.talk(b"GET /stream HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").endswith(
        b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"
    )
    old = server.talk(b"GET /stream HTTP/1.0\r\n\r\n")
    assert old.endswith(b"\r\n\r\nabcd")
    assert b"chunked" not in old


@pytest.mark.parametrize("path", [b"/fail", b"/silent", b"/split"])
def test_failing_application(server: AppProcess, path: bytes) -> None:
    """A bug in the application gives a 500 in the distribution spec's error format; only the log has the traceback."""
    assert read_error(server.talk(b"GET " + path + b" HTTP/1.1\r\nHost: test\r\n\r\n")) == (500, "UNKNOWN")


def test_failing_late(server: AppProcess) -> None:
    """A client can tell that a response was broken off."""
    with server.connect() as sock:
        sock.sendall(b"GET /fail_late HTTP/1.1\r\nHost: test\r\n\r\n")
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                data += piece
        assert b"content-length: 10\r\n" in data
        assert bytes(data.partition(b"\r\n\r\n")[2]) in (b"", b"abc")


# A body that nobody reads


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_early_answer(server: AppProcess, framing: str) -> None:
    """A client that is sending 50 MB gets an early response at once, with Connection: close, and no reset before it."""
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


def test_early_answer_to_a_client_that_listens(server: AppProcess) -> None:
    """The response comes before the body has been sent, and the server shuts its side right after it."""
    with server.connect() as sock:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 50000000\r\n\r\n" + bytes(100_000))
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 403")
        assert b"connection: close" in data


def test_short_rest_is_drained(server: AppProcess) -> None:
    """A short rest of a declared body is received before the response and dropped, and the connection is kept; it is
    never parsed as a request."""
    with server.connect() as sock, server.connect() as other:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 60000\r\n\r\n")
        for _ in range(3):  # by then the server has read what was sent before
            other.sendall(HEAD + b"\r\n")
            read_response(other)
        assert select.select([sock], [], [], 0)[0] == []
        smuggled = b"DELETE /echo HTTP/1.1\r\nHost: test\r\n\r\n"
        sock.sendall((smuggled * 2000)[:60000] + HEAD + b"\r\n")
        status, headers, _ = read_response(sock)
        assert (status, "connection" in headers) == (403, False)
        assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_unread_body_that_was_whole(server: AppProcess) -> None:
    """A body that was received with its head and not read does not end the connection."""
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(
                b"PUT /refuse HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
            )
            status, headers, _ = read_response(sock)
            assert (status, "connection" in headers) == (403, False)


# Expect: 100-continue


def test_expect_and_read(server: AppProcess) -> None:
    """The server sends a 100 when the application reads the body."""
    with server.connect() as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert sock.recv(len(interim), socket.MSG_WAITALL) == interim
        sock.sendall(b"abc")
        status, headers, body = read_response(sock)
        assert (status, json.loads(body)["size"], "connection" in headers) == (200, 3, False)


@pytest.mark.parametrize("follows", [b"abc", b"", HEAD + b"\r\n"])
def test_expect_answered_early(server: AppProcess, follows: bytes) -> None:
    """After a response without a 100, what follows may be the body or a request: it is ignored, and the connection
    ends."""
    with server.connect() as sock:
        sock.sendall(b"PUT /refuse HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")
        sock.sendall(follows)
        assert sock.recv(1) == b""


def test_expect_in_http_1_0(server: AppProcess) -> None:
    """An HTTP/1.0 client gets no 100, since HTTP/1.0 does not define it."""
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc")
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 200")
        assert b'"size": 3' in data


# Clients that leave


def test_half_closed(server: AppProcess) -> None:
    """A client that shuts its sending side after a whole request gets the answer."""
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).endswith(b"slow")


def test_hang_up_while_sending(server: AppProcess) -> None:
    """The application's `send` raises once the client has left."""
    with server.connect() as sock:
        sock.sendall(b"GET /big?size=10000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.recv(1000)
    server.said("cut")


def test_hang_up_while_receiving(server: AppProcess) -> None:
    """The application gets a disconnect if the client leaves before the body is complete."""
    with server.connect() as sock:
        sock.sendall(POST + b"Content-Length: 2222\r\n\r\nabcde")
    server.said("disconnected")


# Time


def test_slow_headers(impatient: AppProcess) -> None:
    """A head that comes too slowly gets a 408, however steadily it comes."""
    with impatient.connect() as sock:
        sock.sendall(b"GET /echo HTTP/1.1\r\n")
        sock.settimeout(0.05)
        data = b""
        until = time.monotonic() + 10
        while not data and time.monotonic() < until:
            sock.sendall(b"X: y\r\n")
            try:
                data = sock.recv(65536)
            except TimeoutError:
                continue
        assert read_error(data) == (408, "UNSUPPORTED")


def test_silent_connection(impatient: AppProcess) -> None:
    """A connection without a request is closed without a response; so is an idle one after its last response."""
    with impatient.connect() as sock:
        assert sock.recv(1) == b""
    with impatient.connect() as sock:
        sock.sendall(HEAD + b"\r\n")
        assert read_response(sock)[0] == 200
        assert sock.recv(1) == b""


def test_idle_body(impatient: AppProcess) -> None:
    """If a body stops coming, the client gets a 408 and the application a disconnect."""
    with impatient.connect() as sock:
        sock.sendall(POST + b"Content-Length: 777\r\n\r\nabcdef")
        assert read_error(read_all(sock)) == (408, "UNSUPPORTED")
    impatient.said("disconnected 6")


def test_slow_body(impatient: AppProcess) -> None:
    """A body that keeps coming may take longer than any timeout."""
    with impatient.connect() as sock:
        sock.sendall(POST + b"Content-Length: 15\r\n\r\n")
        for _ in range(15):
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.sendall(b"a")
        sock.settimeout(10)
        assert json.loads(read_response(sock)[2])["size"] == 15


def test_slow_application(impatient: AppProcess) -> None:
    """No timeout runs while the application works."""
    with impatient.connect() as sock:
        sock.sendall(b"GET /slow?seconds=2 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock)[2] == b"slow"


def test_client_that_does_not_read(impatient: AppProcess) -> None:
    """A client that takes nothing of its response is cut off."""
    with impatient.connect() as sock:
        sock.sendall(b"GET /big?size=1000000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        impatient.said("cut")


def test_half_closed_and_waiting(impatient: AppProcess) -> None:
    """A half-closed connection ends after a while if the application is slow."""
    with impatient.connect() as sock:
        sock.sendall(b"GET /patient HTTP/1.1\r\nHost: test\r\n\r\n")
        impatient.said("patient")
        sock.shutdown(socket.SHUT_WR)
        impatient.said("left")


def test_memory_stays_flat(server: AppProcess) -> None:
    """200 MB sent to an application that does not read yet are not buffered."""
    with server.connect() as sock:
        sock.sendall(b"PUT /slow?seconds=30 HTTP/1.1\r\nHost: test\r\nContent-Length: 200000000\r\n\r\n")
        before = _resident(server)
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(200_000_000))
        assert _resident(server) - before < 8 << 20


def _resident(running: AppProcess) -> int:
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# What one client may hold


def test_headers_are_bounded_in_number(server: AppProcess) -> None:
    """A short header counts for more than its bytes, so a head of thousands of them is refused."""
    for count, status in ((400, 200), (1000, 431)):
        head = b"GET /echo HTTP/1.1\r\nHost: test\r\nConnection: close\r\n" + b"a:\r\n" * count + b"\r\n"
        assert server.talk(head).startswith(b"HTTP/1.1 %d " % status)


def test_heads_sent_ahead_are_bounded(server: AppProcess) -> None:
    """Fewer large heads than small ones may be sent ahead; those beyond are ignored, and the connection ends."""
    head = b"GET /slow?seconds=0 HTTP/1.1\r\nHost: test\r\n" + b"a:\r\n" * 400 + b"\r\n"
    answers = server.talk(head * 30)
    assert 1 < answers.count(b"HTTP/1.1 200 OK") < 10


def _unread(running: AppProcess) -> socket.socket:
    """Opens a connection with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    sock.settimeout(TIMEOUT_SECONDS)
    sock.connect(running.address)
    return sock


def test_answers_that_clients_do_not_take(start: Start) -> None:
    """Whole responses that clients do not take are bounded together: those beyond get 503 with Retry-After. Once the
    clients are gone, such responses are sent again."""
    running = start(limits={"unsent_bytes": 2 * 1024 * 1024})
    request = b"GET /whole?size=8388608 HTTP/1.1\r\nHost: test\r\n\r\n"

    def status() -> int:
        with running.connect() as sock:
            sock.sendall(request)
            return read_response(sock)[0]

    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(32):
            sock = stack.enter_context(_unread(running))
            sock.sendall(request)
            found.append(sock.recv(12)[-3:])
        assert found[0] == b"200"
        assert found.count(b"503") >= 8
        assert status() == 503
    wait_for(lambda: status() == 200)
    assert "too many responses wait for slow clients" in running.errors
    assert "Traceback" not in running.errors


def test_a_large_answer_counts_with_what_the_server_holds_of_it(start: Start) -> None:
    """A large response counts with one slice of 256 KiB. The whole of it is the application's to count, which may send
    the same bytes to many clients."""
    running = start(limits={"unsent_bytes": 4 * 1024 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(7):
            sock = stack.enter_context(_unread(running))
            sock.sendall(b"GET /whole?size=8388608 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"


def test_a_body_that_streams_takes_no_room_from_answers(start: Start) -> None:
    """Pieces of blobs that clients do not take give no other client a 503 for its manifest."""
    running = start(limits={"unsent_bytes": 512 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(_unread(running))
            sock.sendall(b"GET /big?size=16777216 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"
        assert (
            running.talk(b"GET /whole?size=100000 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")[9:12] == b"200"
        )


def test_what_a_start_leaves_is_not_collected(start: Start) -> None:
    """Objects made during the start are frozen, so a full garbage collection skips them: it would block the loop for 50
    ms."""
    for workers in (1, 2):
        running = start(workers=workers)
        with running.connect() as sock:
            sock.sendall(b"GET /frozen HTTP/1.1\r\nHost: test\r\n\r\n")
            assert int(read_response(sock)[2]) > 10_000

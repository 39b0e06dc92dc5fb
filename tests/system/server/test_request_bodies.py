from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.server.connection.receive_buffers import (
    MAX_BUFFER_BYTES,
    MAX_LARGE_BODIES,
    MIN_BUFFER_BYTES,
    BodyBuffer,
    IncomingBodies,
)
from registry.server.http1.body_framing import MAX_CHUNKS_PER_CALL, ChunkedFraming, LengthFraming
from registry.server.http1.error_responses import RefusedRequest
from tests.system.server.app_process import AppProcess, Start, read_all, read_error, read_response, wait_for
from tests.system.server.test_sendfile import descriptors

POST = b"POST /digest HTTP/1.1\r\nHost: test\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = 1000


def resident(running: AppProcess) -> int:
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def receive(body: BodyBuffer, data: bytes, cuts: list[int]) -> tuple[bytes, bytes]:
    """Parses `data`, received in reads that end at `cuts`. Returns the body's content and what follows it."""
    content: list[memoryview] = []
    for start, stop in pairwise([0, *sorted(set(cuts)), len(data)]):
        at = start
        while at < stop and not body.is_complete:
            room = body.get_memory()
            part = data[at : min(stop, at + len(room))]
            room[: len(part)] = part
            pieces, rest = body.parse_received(len(part))
            content += pieces
            while body.has_unparsed:
                pieces, rest = body.parse_unparsed()
                content += pieces
            at += len(part) - len(rest)
        if body.is_complete:
            return b"".join(content), data[at:]
    return b"".join(content), b""


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.sampled_from([b"", b";x", b';a="b c";d=e']),
    st.sampled_from([b"", b"X-Late: 1\r\n", b"A:\r\nB: c\r\n"]),
    st.binary(max_size=40),
    st.data(),
)
def test_chunks_however_they_come(
    chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, data: st.DataObject
) -> None:
    """The content, and what follows the body, do not depend on where reads end."""
    sent = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    sent += b"0\r\n" + trailers + b"\r\n" + rest
    cuts = data.draw(st.lists(st.integers(1, len(sent) - 1), max_size=30))
    assert receive(BodyBuffer(ChunkedFraming(LIMIT)), sent, cuts) == (b"".join(chunks), rest)


@given(st.binary(min_size=1, max_size=500), st.lists(st.integers(1, 499), max_size=20))
def test_a_length_is_never_exceeded(content: bytes, cuts: list[int]) -> None:
    """There is room for the declared length and no byte more, so nothing after the body is received with it."""
    body = BodyBuffer(LengthFraming(len(content)))
    assert receive(body, content, [cut for cut in cuts if cut < len(content)]) == (content, b"")
    assert body.is_complete


def test_buffers_grow_with_what_fills_them() -> None:
    """A body's first buffer is small, and the next ones grow while the body fills them; a body of a few bytes gets a
    buffer of that size."""
    body, sizes = BodyBuffer(ChunkedFraming(LIMIT)), []
    room = body.get_memory()
    room[:8] = b"8000000\r"
    body.parse_received(8)
    body.get_memory()[:1] = b"\n"
    body.parse_received(1)
    for _ in range(12):
        sizes.append(len(body.get_memory()))
        body.parse_received(len(body.get_memory()))
    assert sizes == [MIN_BUFFER_BYTES - 9, *(min(MIN_BUFFER_BYTES << i, MAX_BUFFER_BYTES) for i in range(1, 12))]
    assert len(BodyBuffer(LengthFraming(10)).get_memory()) == 10


def test_crumbs_are_swept_together() -> None:
    """Thousands of tiny chunks in one read are joined instead of kept as views. They are parsed in several turns of the
    loop, and the next read is not larger."""
    body = BodyBuffer(ChunkedFraming(LIMIT))
    room = body.get_memory()
    data = b"1\r\nx\r\n" * (len(room) // 6)
    room[: len(data)] = data
    content, (pieces, _) = b"", body.parse_received(len(data))
    while body.has_unparsed:
        (piece,) = pieces
        assert 0 < len(piece) <= MAX_CHUNKS_PER_CALL
        content += piece
        pieces, _ = body.parse_unparsed()
    assert content + b"".join(pieces) == b"x" * (len(data) // 6)
    assert body.is_fragmented
    assert len(body.get_memory()) <= MIN_BUFFER_BYTES


MALFORMED = {
    "nothing": b"\r\n",
    "LF after a size": b"3\nabc\r\n0\r\n\r\n",
    "space before a size": b" 3\r\nabc\r\n0\r\n\r\n",
    "space after a size": b"3 \r\nabc\r\n0\r\n\r\n",
    "sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "too many digits": b"0000000000000000003\r\nabc\r\n0\r\n\r\n",
    "larger than a file": b"8000000000000000\r\nabc\r\n0\r\n\r\n",
    "LF in an extension": b"3;x\n\r\nabc\r\n0\r\n\r\n",
    "LF ends an extension": b"3;x\nabc\r\n0\r\n\r\n",
    "CR in an extension": b"3;x\ry\r\nabc\r\n0\r\n\r\n",
    "NUL in an extension": b"3;\0\r\nabc\r\n0\r\n\r\n",
    "LF after a chunk": b"3\r\nabc\n0\r\n\r\n",
    "CR after a chunk": b"3\r\nabc\r0\r\n\r\n",
    "nothing after a chunk": b"3\r\nabc3\r\nabc\r\n0\r\n\r\n",
    "chunk too short": b"4\r\nabc\r\n0\r\n\r\n",
    "trailer without a colon": b"0\r\nabc\r\n\r\n",
    "trailer without a name": b"0\r\n: abc\r\n\r\n",
    "trailer with a space": b"0\r\nX : abc\r\n\r\n",
    "folded trailer": b"0\r\nX: abc\r\n d\r\n\r\n",
    "LF after a trailer": b"0\r\nX: abc\n\r\n",
    "LF for the end": b"0\r\n\n",
    "transfer coding as a trailer": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("bytewise", [False, True])
def test_malformed_chunks(server: AppProcess, body: bytes, bytewise: bool) -> None:
    """A framing that two parsers could read differently is refused, and nothing after it is parsed."""
    smuggled = b"GET /digest HTTP/1.1\r\nHost: test\r\n\r\n"
    if bytewise:
        decoder = BodyBuffer(ChunkedFraming(LIMIT))
        with pytest.raises(RefusedRequest) as refused:
            receive(decoder, body + smuggled, list(range(1, len(body))))
        assert refused.value.status == 400
    else:
        with server.connect() as sock:
            sock.sendall(CHUNKED + body + smuggled)
            sock.shutdown(socket.SHUT_WR)
            assert read_error(read_all(sock)) == (400, "UNSUPPORTED")


@pytest.mark.parametrize("line", [b"3;" + b"a" * 2000, b"0\r\nX: " + b"a" * 2000, b"0\r\n" + b"X: y\r\n" * 400])
def test_lines_are_bounded(line: bytes) -> None:
    """Chunk extensions, trailer lines, and all trailers together have a limit."""
    for cuts in ([], list(range(1, len(line)))):
        with pytest.raises(RefusedRequest) as refused:
            receive(BodyBuffer(ChunkedFraming(LIMIT)), line, cuts)
        assert refused.value.status == 431


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nabcde", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"]
)
def test_a_request_behind_a_body(server: AppProcess, framing: bytes) -> None:
    """Wherever reads cut the bytes, a body ends at its end and the request after it is served."""
    sent = POST + framing + b"\r\n" + POST + framing + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n"
    with server.connect() as sock:
        for cut in range(1, len(sent)):
            sock.sendall(sent[:cut])
            sock.sendall(sent[cut:])
            for _ in range(2):
                assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(b"abcde").hexdigest()
            assert json.loads(read_response(sock)[2])["method"] == "GET"


@pytest.mark.parametrize("way", ["digest", "digest?keep=1", "digest?copied=1"])
@pytest.mark.parametrize("size", [0, 1, 7, 1000, 32768, 300_000])
def test_large_bodies(server: AppProcess, way: str, size: int) -> None:
    """A body arrives unchanged, as views (also if kept to the end) or copied. `size` is that of its chunks; 0: a
    declared length."""
    content = bytes(hashlib.shake_128(way.encode()).digest(400_000 if size == 1 else 4_000_003))
    head = f"POST /{way} HTTP/1.1\r\nHost: test\r\n".encode()
    with server.connect() as sock:
        if size:
            pieces = [content[i : i + size] for i in range(0, len(content), size)]
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            sock.sendall(b"".join(b"%X\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        else:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        seen = json.loads(read_response(sock)[2])
    assert (seen["digest"], seen["size"]) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nabcde", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"]
)
def test_a_received_body_is_taken_at_once(server: AppProcess, framing: bytes) -> None:
    """The application takes a body that arrived together with its head without waiting. Of a body that has not ended
    it takes nothing that way, and receives all of it. The next request on the connection is served in both cases."""
    head = b"POST /digest?whole=1 HTTP/1.1\r\nHost: test\r\n"
    told = {"digest": hashlib.sha256(b"abcde").hexdigest(), "size": 5}
    with server.connect() as sock:
        sock.sendall(head + framing)
        assert json.loads(read_response(sock)[2]) == {**told, "whole": True}
        sock.sendall(head + framing[:-1])
        server.said("not whole")
        sock.sendall(framing[-1:])
        assert json.loads(read_response(sock)[2]) == {**told, "whole": False}
        sock.sendall(head + b"Expect: 100-continue\r\n" + framing)
        assert json.loads(read_response(sock)[2]) == {**told, "whole": True}
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_idle_connections_hold_no_buffers(server: AppProcess) -> None:
    """A body's buffers are freed once nothing refers to them, while the connection stays open."""
    with server.connect() as first:
        first.sendall(POST + b"Content-Length: 4000000\r\n\r\n" + bytes(4_000_000))
        assert read_response(first)[0] == 200
    before = resident(server)
    socks = [server.connect() for _ in range(50)]
    try:
        for sock in socks:
            sock.sendall(POST + b"Content-Length: 2000000\r\n\r\n" + bytes(2_000_000))
            assert read_response(sock)[0] == 200
        assert resident(server) - before < 16 << 20
    finally:
        for sock in socks:
            sock.close()


def test_without_uvloop(start: Start) -> None:
    """Bodies are received the same way in asyncio's own event loop."""
    running = start(env={"NO_UVLOOP": "1"})
    content = bytes(range(256)) * 20_000
    with running.connect() as sock:
        for _ in range(2):
            sock.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
            assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("query", ["", "?keep=1", "?copied=1"])
@pytest.mark.parametrize("half_closed", [True, False])
def test_crumbs_behind_a_large_chunk(server: AppProcess, query: str, half_closed: bool) -> None:
    """A hundred thousand chunks of a byte, received in large reads, are parsed in many turns of the loop and in order.
    The request after them is served, also if the client has shut its sending side by then."""
    content = bytes(range(256)) * 8192
    crumbs = b"".join(b"1\r\n%c\r\n" % (number % 251) for number in range(100_000))
    body = b"%x\r\n%s\r\n%s0\r\n\r\n" % (len(content), content, crumbs)
    head = f"POST /digest{query} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with server.connect() as sock:
        sock.sendall(head + body + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        seen = json.loads(read_response(sock)[2])
        content += bytes(number % 251 for number in range(100_000))
        assert seen == {"digest": hashlib.sha256(content).hexdigest(), "size": len(content)}
        assert read_response(sock)[0] == 200


def test_many_bodies_have_small_buffers() -> None:
    """While many bodies are received, new buffers are small, so clients that stop sending hold little memory."""
    receiving = IncomingBodies()
    bodies = [BodyBuffer(LengthFraming(10 * MAX_BUFFER_BYTES), receiving) for _ in range(MAX_LARGE_BODIES + 1)]
    for body in bodies:
        for _ in range(4):
            body.parse_received(len(body.get_memory()))
    assert len(bodies[-1].get_memory()) == MIN_BUFFER_BYTES
    del body
    bodies.pop()
    assert receiving.count == MAX_LARGE_BODIES
    short = BodyBuffer(LengthFraming(1), receiving)
    short.parse(memoryview(b"x"))
    assert receiving.count == MAX_LARGE_BODIES
    for _ in range(4):
        bodies[0].parse_received(len(bodies[0].get_memory()))
    assert len(bodies[0].get_memory()) > MIN_BUFFER_BYTES


def test_a_client_that_takes_nothing_of_a_large_answer(start: Start) -> None:
    """A client that does not read a slice in time is cut off; one that reads gets the whole response."""
    running = start(limits={"response_slice_seconds": 0.3})
    request = b"GET /whole?size=50000000 HTTP/1.1\r\nHost: test\r\n\r\n"
    with running.connect() as watching:
        before = descriptors(watching)
        with running.connect() as sock:
            sock.sendall(request)
            assert len(read_response(sock)[2]) == 50_000_000
            sock.sendall(request)
            wait_for(lambda: descriptors(watching) == before)
            with contextlib.suppress(ConnectionResetError):
                assert len(read_all(sock)) < 50_000_000


def test_a_short_rest_that_drips_does_not_keep_the_answer(start: Start) -> None:
    """An early response waits for the rest of a short body for a bounded time."""
    running = start(limits={"linger_seconds": 0.2})
    with running.connect() as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nx")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")

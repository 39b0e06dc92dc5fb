"""Tests of how the server receives request bodies: chunked framing, declared lengths, and the sizes of the receive
buffers."""

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
    MAX_BODIES_WITH_LARGE_BUFFERS,
    MAX_BUFFER_BYTES,
    MIN_BUFFER_BYTES,
    BodyBuffer,
    IncomingBodies,
)
from registry.server.http1.body_framing import MAX_CHUNKS_PER_CALL, ChunkedFraming, LengthFraming
from registry.server.http1.error_responses import RefusedRequest
from tests.system.server.app_process import (
    AppProcess,
    Pauses,
    Start,
    read_all,
    read_error,
    read_response,
    repeat_after_stalls,
    wait_for,
)
from tests.system.server.test_sendfile import descriptors

POST = b"POST /digest HTTP/1.1\r\nHost: test\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = 1000
"""The maximum length in bytes of a trailer line, of all chunk extensions together, and of all trailers together."""


def resident(running: AppProcess) -> int:
    """Returns the resident memory of the process in bytes."""
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def receive(body: BodyBuffer, data: bytes, cuts: list[int]) -> tuple[bytes, bytes]:
    """Parses `data` as if it arrived in reads that end at the offsets `cuts`. Returns the content of the body, and the
    bytes after the body."""
    content: list[memoryview] = []
    for start, stop in pairwise([0, *sorted(set(cuts)), len(data)]):
        offset = start
        while offset < stop and not body.is_complete:
            memory = body.get_memory()
            part = data[offset : min(stop, offset + len(memory))]
            memory[: len(part)] = part
            pieces, rest = body.parse_received(len(part))
            content += pieces
            while body.has_unparsed:
                pieces, rest = body.parse_unparsed()
                content += pieces
            offset += len(part) - len(rest)
        if body.is_complete:
            return b"".join(content), data[offset:]
    return b"".join(content), b""


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.sampled_from([b"", b";x", b';a="b c";d=e']),
    st.sampled_from([b"", b"X-Late: 1\r\n", b"A:\r\nB: c\r\n"]),
    st.binary(max_size=40),
    st.data(),
)
def test_chunked_parsing_does_not_depend_on_read_boundaries(
    chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, data: st.DataObject
) -> None:
    """Whatever the sizes of the reads, the parser returns the same content of a chunked body and the same bytes after
    the body."""
    sent = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    sent += b"0\r\n" + trailers + b"\r\n" + rest
    cuts = data.draw(st.lists(st.integers(1, len(sent) - 1), max_size=30))
    assert receive(BodyBuffer(ChunkedFraming(LIMIT)), sent, cuts) == (b"".join(chunks), rest)


@given(st.binary(min_size=1, max_size=500), st.lists(st.integers(1, 499), max_size=20))
def test_buffer_is_not_larger_than_the_declared_length(content: bytes, cuts: list[int]) -> None:
    """The receive buffer has room for the declared length only, so no byte after the body is received together with the
    body."""
    body = BodyBuffer(LengthFraming(len(content)))
    assert receive(body, content, [cut for cut in cuts if cut < len(content)]) == (content, b"")
    assert body.is_complete


def test_receive_buffers_grow_while_the_body_fills_them() -> None:
    """The first receive buffer of a body is small. As long as the body fills its buffers, each next buffer is twice as
    large, up to a maximum. A body of a few bytes gets a buffer of exactly its size."""
    body, sizes = BodyBuffer(ChunkedFraming(LIMIT)), []
    memory = body.get_memory()
    memory[:8] = b"8000000\r"
    body.parse_received(8)
    body.get_memory()[:1] = b"\n"
    body.parse_received(1)
    for _ in range(12):
        sizes.append(len(body.get_memory()))
        body.parse_received(len(body.get_memory()))
    # The line with the size of the chunk has taken 9 bytes of the first buffer.
    assert sizes == [MIN_BUFFER_BYTES - 9, *(min(MIN_BUFFER_BYTES << i, MAX_BUFFER_BYTES) for i in range(1, 12))]
    assert len(BodyBuffer(LengthFraming(10)).get_memory()) == 10


def test_tiny_chunks_are_joined() -> None:
    """Thousands of tiny chunks in one read are joined instead of kept as separate views. One call parses only a limited
    number of them, so that the event loop is not blocked. The next buffer does not grow."""
    body = BodyBuffer(ChunkedFraming(LIMIT))
    memory = body.get_memory()
    data = b"1\r\nx\r\n" * (len(memory) // 6)
    memory[: len(data)] = data
    content, (pieces, _) = b"", body.parse_received(len(data))
    while body.has_unparsed:
        (piece,) = pieces
        assert 0 < len(piece) <= MAX_CHUNKS_PER_CALL
        content += piece
        pieces, _ = body.parse_unparsed()
    assert content + b"".join(pieces) == b"x" * (len(data) // 6)
    assert body.is_fragmented
    assert len(body.get_memory()) <= MIN_BUFFER_BYTES


# By name: bodies that are not valid in chunked transfer coding.
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
    """Chunked framing that two parsers could read differently gets a 400, and the request that follows it is not
    parsed. Otherwise a client could smuggle a request past a proxy."""
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


@pytest.mark.parametrize(
    "line",
    [
        b"3;" + b"a" * 2000,
        b"3;abcdefgh\r\nabc\r\n" * 200,
        b"0\r\nX: " + b"a" * 2000,
        b"0\r\n" + b"X: y\r\n" * 400,
    ],
)
def test_chunk_extensions_and_trailers_are_limited(line: bytes) -> None:
    """A chunk extension or a trailer line that is larger than the limit gets a 431. So do many small ones that are
    larger than the limit together."""
    for cuts in ([], list(range(1, len(line)))):
        with pytest.raises(RefusedRequest) as refused:
            receive(BodyBuffer(ChunkedFraming(LIMIT)), line, cuts)
        assert refused.value.status == 431


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nabcde", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"]
)
def test_request_after_a_body_is_served(server: AppProcess, framing: bytes) -> None:
    """Two requests with bodies and a request without one arrive in two pieces. Wherever the bytes are cut, all three
    requests are served."""
    requests = POST + framing + b"\r\n" + POST + framing + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n"
    with server.connect() as sock:
        for cut in range(1, len(requests)):
            sock.sendall(requests[:cut])
            sock.sendall(requests[cut:])
            for _ in range(2):
                assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(b"abcde").hexdigest()
            assert json.loads(read_response(sock)[2])["method"] == "GET"


@pytest.mark.parametrize("path", ["digest", "digest?keep=1", "digest?copied=1"])
@pytest.mark.parametrize("size", [0, 1, 7, 1000, 32768, 300_000])
def test_large_bodies(server: AppProcess, path: str, size: int) -> None:
    """A large body reaches the application unchanged: as views, as views that are all kept until the end, or as copies.
    `size`: the size of its chunks in bytes, or 0 for a body with a declared length."""
    content = bytes(hashlib.shake_128(path.encode()).digest(400_000 if size == 1 else 4_000_003))
    head = f"POST /{path} HTTP/1.1\r\nHost: test\r\n".encode()
    with server.connect() as sock:
        if size:
            pieces = [content[i : i + size] for i in range(0, len(content), size)]
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            sock.sendall(b"".join(b"%X\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        else:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        result = json.loads(read_response(sock)[2])
    assert (result["digest"], result["size"]) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nabcde", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"]
)
def test_body_that_has_arrived_can_be_taken_at_once(server: AppProcess, framing: bytes) -> None:
    """If a body has arrived together with its headers, the application can take the whole body without waiting. If the
    body is not complete yet, the application gets nothing in this way, and receives the body as usual. The next request
    on the connection is served in both cases."""
    head = b"POST /digest?whole=1 HTTP/1.1\r\nHost: test\r\n"
    expected = {"digest": hashlib.sha256(b"abcde").hexdigest(), "size": 5}
    with server.connect() as sock:
        sock.sendall(head + framing)
        assert json.loads(read_response(sock)[2]) == {**expected, "whole": True}
        sock.sendall(head + framing[:-1])
        server.wait_for_line("not whole")
        sock.sendall(framing[-1:])
        assert json.loads(read_response(sock)[2]) == {**expected, "whole": False}
        sock.sendall(head + b"Expect: 100-continue\r\n" + framing)
        assert json.loads(read_response(sock)[2]) == {**expected, "whole": True}
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        assert json.loads(read_response(sock)[2])["method"] == "GET"


def test_idle_connections_keep_no_buffers(server: AppProcess) -> None:
    """The server frees the buffers of a body that was received, although the connection stays open."""
    with server.connect() as first:
        first.sendall(POST + b"Content-Length: 4000000\r\n\r\n" + bytes(4_000_000))
        assert read_response(first)[0] == 200
    memory_before = resident(server)
    socks = [server.connect() for _ in range(50)]
    try:
        for sock in socks:
            sock.sendall(POST + b"Content-Length: 2000000\r\n\r\n" + bytes(2_000_000))
            assert read_response(sock)[0] == 200
        assert resident(server) - memory_before < 16 << 20
    finally:
        for sock in socks:
            sock.close()


def test_without_uvloop(start: Start) -> None:
    """Without uvloop, in asyncio's own event loop, chunked bodies arrive unchanged too."""
    running = start(env={"NO_UVLOOP": "1"})
    content = bytes(range(256)) * 20_000
    with running.connect() as sock:
        for _ in range(2):
            sock.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
            assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("query", ["", "?keep=1", "?copied=1"])
@pytest.mark.parametrize("half_closed", [True, False])
def test_tiny_chunks_after_a_large_chunk(server: AppProcess, query: str, half_closed: bool) -> None:
    """After a large chunk, 100,000 chunks of one byte arrive in large reads. They are parsed in order. The request
    after the body is served, even if the client has already closed its sending side."""
    content = bytes(range(256)) * 8192
    tiny_chunks = b"".join(b"1\r\n%c\r\n" % (number % 251) for number in range(100_000))
    body = b"%x\r\n%s\r\n%s0\r\n\r\n" % (len(content), content, tiny_chunks)
    head = f"POST /digest{query} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with server.connect() as sock:
        sock.sendall(head + body + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        result = json.loads(read_response(sock)[2])
        content += bytes(number % 251 for number in range(100_000))
        assert result == {"digest": hashlib.sha256(content).hexdigest(), "size": len(content)}
        assert read_response(sock)[0] == 200


def test_many_bodies_have_small_buffers() -> None:
    """While the server receives many bodies, new buffers are small, so that clients that stop sending occupy little
    memory."""
    incoming = IncomingBodies()
    bodies = [
        BodyBuffer(LengthFraming(10 * MAX_BUFFER_BYTES), incoming) for _ in range(MAX_BODIES_WITH_LARGE_BUFFERS + 1)
    ]
    for body in bodies:
        for _ in range(4):
            body.parse_received(len(body.get_memory()))
    assert len(bodies[-1].get_memory()) == MIN_BUFFER_BYTES
    del body  # otherwise this variable would keep the last body alive
    bodies.pop()
    assert incoming.count == MAX_BODIES_WITH_LARGE_BUFFERS
    short = BodyBuffer(LengthFraming(1), incoming)
    short.parse_other_memory(memoryview(b"x"))
    assert incoming.count == MAX_BODIES_WITH_LARGE_BUFFERS
    for _ in range(4):
        bodies[0].parse_received(len(bodies[0].get_memory()))
    assert len(bodies[0].get_memory()) > MIN_BUFFER_BYTES


def test_client_that_does_not_read_a_large_response(start: Start) -> None:
    """The server sends a large response in slices. It disconnects a client that does not read a slice in time. A client
    that reads gets the whole response."""
    running = start(limits={"response_slice_seconds": 2.0})
    request = b"GET /whole?size=50000000 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"

    def receive_all(pauses: Pauses) -> None:
        data = bytearray()
        with running.connect() as sock:
            sock.sendall(request)
            while piece := sock.recv(MAX_BUFFER_BYTES):
                data += piece
                pauses.end()
        assert len(data.partition(b"\r\n\r\n")[2]) == 50_000_000

    repeat_after_stalls(receive_all, longest_pause=1.0)
    with running.connect() as control:
        descriptors_before = descriptors(control)
        with running.connect() as sock:
            sock.sendall(request)
            assert sock.recv(1)
            wait_for(lambda: descriptors(control) <= descriptors_before)
            with contextlib.suppress(ConnectionResetError):
                assert len(read_all(sock)) < 50_000_000


def test_refusal_waits_a_limited_time_for_the_rest_of_the_body(start: Start) -> None:
    """The application answers before it has read a short body, and the client does not send the rest of the body. The
    server waits for the rest only for a limited time, and then sends the response and closes the connection."""
    running = start(limits={"linger_seconds": 0.2})
    with running.connect() as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nx")
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")

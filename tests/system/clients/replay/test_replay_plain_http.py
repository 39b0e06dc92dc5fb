"""Tests of features of HTTP that clients may use: HTTP/1.0, pipelining, Expect, persistent connections."""

from __future__ import annotations

import os

import pytest

from tests.fakes.raw_http import ConnectionClosed, chunked, message
from tests.fakes.raw_pushes import RawPushes, digest_of, image
from tests.system.clients.replay.conftest import Connect


def test_http_1_0(connect: Connect, steps: RawPushes) -> None:
    """An HTTP/1.0 client can pull and push. It gets no chunked responses, and the connection is closed after each
    response."""
    data = os.urandom(300_000)
    path = steps.blob(data)
    for method, body in (("GET", data), ("HEAD", b"")):
        wire = connect()
        wire.send(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
        answer = wire.answer(method)
        assert (answer.status, answer.body) == (200, body)
        assert "transfer-encoding" not in answer
        assert wire.at_end()
    wire = connect()
    other = os.urandom(1000)
    target = f"{steps.root}/blobs/uploads/?digest={digest_of(other)}"
    assert wire.ask("POST", target, body=other, version="1.0").status == 201
    assert wire.at_end()
    assert steps.get(f"{steps.root}/blobs/{digest_of(other)}").body == other


def test_pipelined_requests(connect: Connect, steps: RawPushes) -> None:
    """Pipelined requests get their responses in the same order, even if some of the requests fail."""
    blobs = [os.urandom(50_000 * number + 1) for number in range(6)]
    paths = [steps.blob(data) for data in blobs]
    missing = f"{steps.root}/blobs/{digest_of(b'missing')}"
    wire = connect()
    wire.send(b"".join(message("GET", path) + message("HEAD", path) + message("GET", missing) for path in paths))
    for data in blobs:
        assert wire.answer().body == data
        assert wire.answer("HEAD")["content-length"] == str(len(data))
        assert wire.answer().codes == ["BLOB_UNKNOWN"]


def test_pipelined_pushes(connect: Connect, steps: RawPushes) -> None:
    """Pipelined requests with bodies are processed one after the other."""
    blobs = [os.urandom(10_000 + number) for number in range(5)]
    wire = connect()
    target = f"{steps.root}/blobs/uploads/?digest="
    wire.send(b"".join(message("POST", target + digest_of(data), body=data) for data in blobs))
    for data in blobs:
        assert wire.answer("POST")["docker-content-digest"] == digest_of(data)


def test_expect_with_the_body_after_the_100(connect: Connect, steps: RawPushes) -> None:
    """For a PUT with `Expect: 100-continue`, the server sends 100 before the client sends the body, and the final
    response after the body. The connection stays open."""
    data = os.urandom(200_000)
    target = f"{steps.start()}?digest={digest_of(data)}"
    wire = connect()
    wire.send(message("PUT", target, {"Expect": "100-continue", "Content-Length": str(len(data))}))
    assert wire.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.send(data)
    assert wire.answer("PUT").status == 201
    assert wire.ask("GET", "/v2/").status == 200


def test_expect_with_a_refused_request(connect: Connect, steps: RawPushes) -> None:
    """If a PUT with `Expect: 100-continue` is refused because of its headers, the server sends the final response at
    once, without a 100. It then closes the connection, because it cannot know whether the client sends the body."""
    wire = connect()
    target = f"{steps.root}/blobs/uploads/00000000-0000-4000-8000-000000000000?digest={digest_of(b'')}"
    wire.send(message("PUT", target, {"Expect": "100-continue", "Content-Length": "1000000"}))
    answer = wire.answer("PUT")
    assert answer.status == 404
    assert answer.interim == ()
    assert answer.closes
    assert wire.at_end()


def test_expect_with_the_body_at_once(connect: Connect, steps: RawPushes) -> None:
    """A client may send `Expect: 100-continue` and the body at once, without waiting for the 100."""
    data = os.urandom(100_000)
    target = f"{steps.start()}?digest={digest_of(data)}"
    wire = connect()
    wire.send(message("PUT", target, {"Expect": "100-continue"}, data))
    assert wire.answer("PUT").status == 201


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_large_body_to_an_unknown_session(connect: Connect, steps: RawPushes, framing: str) -> None:
    """A client that sends a large body to an unknown session can read the response 404: the server does not reset the
    connection before."""
    size = 8 << 20
    target = f"{steps.root}/blobs/uploads/00000000-0000-4000-8000-000000000000"
    wire = connect()
    if framing == "length":
        wire.send(message("PATCH", target, {"Content-Length": str(size)}))
    else:
        wire.send(message("PATCH", target, {"Transfer-Encoding": "chunked"}) + b"%x\r\n" % size)
    try:
        for _ in range(size // 65536):
            wire.send(bytes(65536))
    except (BrokenPipeError, ConnectionResetError, TimeoutError):
        pass  # the server has stopped reading; the client must still be able to read the response
    assert wire.answer("PATCH").status == 404


def test_connection_stays_open_after_refused_requests(connect: Connect, steps: RawPushes) -> None:
    """After responses with an error or without a body, and after refused requests with small bodies, the connection can
    be used for the next request."""
    path = steps.blob(b"0123456789")
    steps.blob(b"{}")
    etag = steps.get(path)["etag"]
    session = steps.start()
    wire = connect()
    script: list[tuple[str, str, dict[str, str], bytes, int]] = [
        ("GET", f"{steps.root}/blobs/{digest_of(b'missing')}", {}, b"", 404),
        ("GET", path, {"Range": "bytes=10-"}, b"", 416),
        ("PATCH", session, {"Content-Range": "5-9"}, b"12345", 416),
        ("POST", path, {}, b"a body nobody reads", 405),
        ("GET", path, {"If-None-Match": etag}, b"", 304),
        ("GET", session, {}, b"", 204),
        ("HEAD", path, {}, b"", 200),
        ("HEAD", f"{steps.root}/manifests/missing", {}, b"", 404),
        ("PUT", f"{steps.root}/manifests/x", {"Content-Type": "text/plain"}, image(b"{}"), 400),
        ("GET", path, {}, b"", 200),
        ("DELETE", session, {}, b"", 204),
        ("OPTIONS", path, {}, b"", 204),
    ]
    for round_number in range(3):
        for method, target, headers, body, status in script:
            answer = wire.ask(method, target, headers, body)
            # The DELETE of the first round cancels the session.
            expected = 404 if target == session and round_number > 0 else status
            assert answer.status == expected, (method, target, round_number)
            assert not answer.closes, (method, target, round_number)


def test_connection_close(connect: Connect, steps: RawPushes) -> None:
    """With `Connection: close`, the complete response is sent, and then the connection is closed."""
    data = os.urandom(1 << 20)
    path = steps.blob(data)
    wire = connect()
    answer = wire.ask("GET", path, {"Connection": "close"})
    assert answer.body == data
    assert answer.closes
    with pytest.raises(ConnectionClosed):
        wire.answer()


def test_client_closes_its_sending_side(connect: Connect, steps: RawPushes) -> None:
    """A client that closes its sending side after the request still gets the complete response."""
    data = os.urandom(1 << 20)
    path = steps.blob(data)
    wire = connect()
    wire.send(message("GET", path))
    wire.shut()
    assert wire.answer().body == data


def test_request_that_arrives_byte_by_byte(connect: Connect, steps: RawPushes) -> None:
    """A request that arrives byte by byte is served like any other."""
    data = os.urandom(50)
    target = f"{steps.start()}?digest={digest_of(data)}"
    wire = connect()
    for byte in message("PUT", target, {"Transfer-Encoding": "chunked"}) + chunked(data[:20], data[20:]):
        wire.send(bytes([byte]))
    assert wire.answer("PUT").status == 201


def test_chunk_extensions_and_trailers(connect: Connect, steps: RawPushes) -> None:
    """Chunk extensions and trailers are allowed, and are ignored (RFC 9112, 7.1)."""
    data = b"0123456789"
    target = f"{steps.start()}?digest={digest_of(data)}"
    wire = connect()
    wire.send(message("PUT", target, {"Transfer-Encoding": "chunked", "Trailer": "X-Sum"}))
    wire.send(b"4;name=value\r\n0123\r\n006\r\n456789\r\n0\r\nX-Sum: abc\r\n\r\n")
    assert wire.answer("PUT").status == 201
    assert wire.ask("GET", "/v2/").status == 200


def test_absolute_form(connect: Connect, steps: RawPushes) -> None:
    """A request target may have a scheme and a host, as for a proxy. The server uses only its path (RFC 9112,
    3.2.2)."""
    path = steps.blob(b"absolute")
    wire = connect()
    assert wire.ask("GET", f"http://registry.test{path}").body == b"absolute"


def test_an_upgrade_is_ignored(connect: Connect, steps: RawPushes) -> None:
    """A client that offers an upgrade to h2c is served over HTTP/1.1, and the body of its request is used (RFC 9110,
    7.8)."""
    data = os.urandom(1000)
    target = f"{steps.start()}?digest={digest_of(data)}"
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    wire = connect()
    assert wire.ask("PUT", target, headers, data).status == 201
    assert wire.ask("GET", "/v2/").status == 200

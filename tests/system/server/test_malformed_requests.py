"""Tests of malformed and oversized HTTP requests over raw sockets: which status they get, and that the connection
closes without a reset."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.system.server.app_process import TIMEOUT_SECONDS, AppProcess, read_error, read_response

HEAD = b"GET /echo HTTP/1.1\r\nHost: test\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: test\r\n"

# By name: requests that are not valid HTTP/1.1, or that the server does not support.
MALFORMED = {
    "method": b"FETCH /echo HTTP/1.1\r\nHost: test\r\n\r\n",
    "small method": b"get /echo HTTP/1.1\r\nHost: test\r\n\r\n",
    "connect": b"CONNECT test:443 HTTP/1.1\r\nHost: test:443\r\n\r\n",
    "http2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "version 0.9": b"GET /echo\r\n\r\n",
    "version 1.2": b"GET /echo HTTP/1.2\r\nHost: test\r\n\r\n",
    "version 2.0": b"GET /echo HTTP/2.0\r\nHost: test\r\n\r\n",
    "LF only": b"GET /echo HTTP/1.1\nHost: test\n\n",
    "LF after a header": b"GET /echo HTTP/1.1\r\nHost: test\n\r\n",
    "bare CR": b"GET /echo HTTP/1.1\r\nHost: test\rX: y\r\n\r\n",
    "NUL in a target": b"GET /a\0b HTTP/1.1\r\nHost: test\r\n\r\n",
    "non-ASCII target": b"GET /\xc3\xa9 HTTP/1.1\r\nHost: test\r\n\r\n",
    "non-ASCII query": b"GET /?\xe9 HTTP/1.1\r\nHost: test\r\n\r\n",
    "space in a target": b"GET /a b HTTP/1.1\r\nHost: test\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: test\r\n\r\n",
    "relative target": b"GET a HTTP/1.1\r\nHost: test\r\n\r\n",
    "star": b"GET * HTTP/1.1\r\nHost: test\r\n\r\n",
    "other scheme": b"GET ftp://test/ HTTP/1.1\r\nHost: test\r\n\r\n",
    "user in a target": b"GET http://me@test/ HTTP/1.1\r\nHost: test\r\n\r\n",
    "no Host": b"GET /echo HTTP/1.1\r\n\r\n",
    "two Hosts": HEAD + b"Host: test\r\n\r\n",
    "bad Host": b"GET /echo HTTP/1.1\r\nHost: te/st\r\n\r\n",
    "NUL in a header": HEAD + b"X: a\0b\r\n\r\n",
    "control in a header": HEAD + b"X: a\x01b\r\n\r\n",
    "non-ASCII name": HEAD + b"X\xe9: a\r\n\r\n",
    "no colon": HEAD + b"abc\r\n\r\n",
    "no name": HEAD + b": a\r\n\r\n",
    "space before the colon": HEAD + b"X : a\r\n\r\n",
    "folded header": HEAD + b"X: a\r\n b\r\n\r\n",
    "lengths, equal": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "lengths, unequal": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "length list": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "length with a sign": POST + b"Content-Length: +3\r\n\r\nabc",
    "negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "no length": POST + b"Content-Length: \r\n\r\n",
    "length, then chunked": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, gzip": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "not quite chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
    "huge chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    "chunk too long": POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    "length as a trailer": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 3\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("bytewise", [False, True])
def test_malformed_requests_get_400(server: AppProcess, request_bytes: bytes, bytewise: bool) -> None:
    """A malformed request gets one 400 in the error format of the distribution spec, and the connection closes without
    a reset. This holds also if the request arrives byte by byte."""
    with server.connect() as sock:
        if bytewise:
            for i in range(len(request_bytes)):
                try:
                    sock.send(request_bytes[i : i + 1])
                except (BrokenPipeError, ConnectionResetError):
                    break  # the server has already answered and closed the connection
        else:
            sock.sendall(request_bytes)
        sock.shutdown(socket.SHUT_WR)
        assert read_error(_read(sock)) == (400, "UNSUPPORTED")


def _read(sock: socket.socket) -> bytes:
    """Reads until the server closes the connection."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def test_malformed_requests_do_not_disturb_the_worker(server: AppProcess) -> None:
    """After all malformed requests, the worker still serves valid requests, and has logged no errors."""
    for request_bytes in MALFORMED.values():
        server.send_and_read_all(request_bytes)
    assert server.get()["size"] == 0
    assert "not valid HTTP" not in server.errors
    assert "HttpParserCallbackError" not in server.errors


@pytest.mark.parametrize(
    "request_bytes", [b"GET /echo HTTP/1.1\r\nHos", POST + b"Content-Length: 5\r\n\r\nabc", b"GET"], ids=repr
)
def test_incomplete_request_gets_400(server: AppProcess, request_bytes: bytes) -> None:
    """If the client closes its sending side in the middle of a request, it gets a 400."""
    with server.connect() as sock:
        sock.sendall(request_bytes)
        sock.shutdown(socket.SHUT_WR)
        assert read_error(_read(sock)) == (400, "UNSUPPORTED")


def test_malformed_pipelined_request_is_answered_last(server: AppProcess) -> None:
    """A malformed request behind two pipelined requests gets its 400 after the responses to these requests."""
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n" + HEAD + b"\r\n" + b"nonsense\r\n\r\n")
        assert read_response(sock)[2] == b"slow"
        assert read_response(sock)[0] == 200
        assert read_error(_read(sock))[0] == 400


@pytest.mark.parametrize("malformed", ["bad Host", "no Host", "LF only", "chunk size"])
def test_malformed_after_an_upgrade(server: AppProcess, malformed: str) -> None:
    """If a malformed request follows a request with an ignored Upgrade header, the client gets the response to the
    first request and then a 400."""
    with server.connect() as sock:
        upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc"
        sock.sendall(POST + upgrade + MALFORMED[malformed])
        assert read_response(sock)[0] == 200
        assert read_error(_read(sock))[0] == 400
    assert "HttpParserCallbackError" not in server.errors


def test_malformed_body_of_a_pipelined_request(server: AppProcess) -> None:
    """A pipelined request with malformed chunks arrives while the server answers the request before it. The client gets
    that response first and then a 400."""
    malformed = POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n" + malformed)
        assert read_response(sock)[2] == b"slow"
        assert read_error(_read(sock))[0] == 400


def test_malformed_chunk_in_the_middle_of_a_body(server: AppProcess) -> None:
    """If a malformed chunk arrives while the application reads the body, the client gets a 400, and the application
    gets a disconnect message."""
    with server.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n7\r\nabcdefg\r\n")
        sock.sendall(b"zz\r\n")
        assert read_error(_read(sock))[0] == 400
    server.wait_for_line("disconnected")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_headers_too_large(server: AppProcess, one_by_one: bool) -> None:
    """A request with slightly less than 32 KiB of headers is served. A request with more gets a 431, whether the
    headers arrive together or one by one."""
    line = b"X-Filler: " + b"a" * 990 + b"\r\n"
    with server.connect() as sock:
        sock.sendall(HEAD + line * 31 + b"\r\n")
        assert read_response(sock)[0] == 200
        pieces = [HEAD, *[line] * 100] if one_by_one else [HEAD + line * 100]
        for piece in pieces:
            sock.sendall(piece)
        assert read_error(_read(sock)) == (431, "UNSUPPORTED")


def test_endless_header(server: AppProcess) -> None:
    """A single header of more than 32 KiB gets a 431 too."""
    with server.connect() as sock:
        sock.sendall(HEAD + b"X: " + b"a" * 40_000)
        assert read_error(_read(sock))[0] == 431


def test_eight_mebibytes_of_headers(server: AppProcess) -> None:
    """A client that sends 8 MiB of headers without a pause gets the 431 before any reset of the connection."""
    with server.connect() as sock:
        sock.settimeout(0.5)
        with contextlib.suppress(OSError):  # the server has responded and stopped reading
            sock.sendall(HEAD + b"X: " + b"a" * (8 << 20))
        sock.settimeout(TIMEOUT_SECONDS)
        assert read_error(_until_end(sock))[0] == 431


def _until_end(sock: socket.socket) -> bytes:
    """Reads until the server closes the connection, as `_read` does. A reset of the connection also counts as the
    end."""
    data = bytearray()
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def test_long_target(server: AppProcess) -> None:
    """A request target within 32 KiB reaches the application. A longer target gets a 414."""
    with server.connect() as sock:
        sock.sendall(b"GET /echo/" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock)[0] == 200
        sock.sendall(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_error(_read(sock)) == (414, "UNSUPPORTED")


def test_large_trailers_and_extensions(server: AppProcess) -> None:
    """Trailers, chunk extensions and blank lines before a request have the same size limit as headers: beyond it the
    client gets a 431."""
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert read_error(server.send_and_read_all(chunked + b"0\r\n" + b"X: abcdefgh\r\n" * 4000))[0] == 431
    assert read_error(server.send_and_read_all(b"\r\n" * 20_000))[0] == 431
    with server.connect() as sock:
        sock.sendall(chunked + b"1;")
        # Far more than 32 KiB, because some bytes of the extension do not count: those that the server reads together
        # with the headers.
        for _ in range(60):
            sock.sendall(b"a" * 8192)
        assert read_error(_read(sock))[0] == 431


def test_trailers(server: AppProcess) -> None:
    """Small trailers after a chunked body are accepted, and the application does not see them as headers."""
    with server.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-Late: 1\r\n\r\n")
        status, _, body = read_response(sock)
        assert status == 200
        assert b'"size": 3' in body
        assert b"x-late" not in body

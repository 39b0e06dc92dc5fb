from __future__ import annotations

import contextlib
import socket

import pytest

from tests.system.server.app_process import TIMEOUT_SECONDS, AppProcess, read_error, read_response

HEAD = b"GET /echo HTTP/1.1\r\nHost: test\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: test\r\n"

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
def test_malformed(server: AppProcess, request_bytes: bytes, bytewise: bool) -> None:
    """What is not HTTP/1.1 gets one 400 in the distribution spec's error format, and the connection ends without a
    reset."""
    with server.connect() as sock:
        if bytewise:
            for i in range(len(request_bytes)):
                try:
                    sock.send(request_bytes[i : i + 1])
                except (BrokenPipeError, ConnectionResetError):
                    break  # it has answered and closed already
        else:
            sock.sendall(request_bytes)
        sock.shutdown(socket.SHUT_WR)
        assert read_error(_read(sock)) == (400, "UNSUPPORTED")


def _read(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def test_nothing_is_disturbed(server: AppProcess) -> None:
    """After all of these requests the worker still serves others, and has logged nothing."""
    for request_bytes in MALFORMED.values():
        server.talk(request_bytes)
    assert server.get()["size"] == 0
    assert "not valid HTTP" not in server.errors
    assert "callbacks" not in server.errors


@pytest.mark.parametrize(
    "request_bytes", [b"GET /echo HTTP/1.1\r\nHos", POST + b"Content-Length: 5\r\n\r\nabc", b"GET"], ids=repr
)
def test_ends_early(server: AppProcess, request_bytes: bytes) -> None:
    """A request that ends in the middle gets a 400."""
    with server.connect() as sock:
        sock.sendall(request_bytes)
        sock.shutdown(socket.SHUT_WR)
        assert read_error(_read(sock)) == (400, "UNSUPPORTED")


def test_errors_keep_their_place(server: AppProcess) -> None:
    """A malformed request that was sent ahead is answered after those before it."""
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n" + HEAD + b"\r\n" + b"nonsense\r\n\r\n")
        assert read_response(sock)[2] == b"slow"
        assert read_response(sock)[0] == 200
        assert read_error(_read(sock))[0] == 400


@pytest.mark.parametrize("bad", ["bad Host", "no Host", "LF only", "chunk size"])
def test_malformed_after_an_upgrade(server: AppProcess, bad: str) -> None:
    """A malformed request is also refused in its place after a request whose upgrade was ignored."""
    with server.connect() as sock:
        upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc"
        sock.sendall(POST + upgrade + MALFORMED[bad])
        assert read_response(sock)[0] == 200
        assert read_error(_read(sock))[0] == 400
    assert "callbacks" not in server.errors


def test_broken_body_sent_ahead(server: AppProcess) -> None:
    """A body that breaks while the request before it is being answered is refused after that response."""
    bad = POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with server.connect() as sock:
        sock.sendall(b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: test\r\n\r\n" + bad)
        assert read_response(sock)[2] == b"slow"
        assert read_error(_read(sock))[0] == 400


def test_broken_body(server: AppProcess) -> None:
    """If a body breaks while it is read, the client gets a 400 and the application a disconnect."""
    with server.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n7\r\nabcdefg\r\n")
        sock.sendall(b"zz\r\n")
        assert read_error(_read(sock))[0] == 400
    server.said("disconnected")


@pytest.mark.parametrize("bytewise", [False, True])
def test_headers_too_large(server: AppProcess, bytewise: bool) -> None:
    """More than 32 KiB of headers get a 431, in one piece or in many; a little less is served."""
    line = b"X-Filler: " + b"a" * 990 + b"\r\n"
    with server.connect() as sock:
        sock.sendall(HEAD + line * 31 + b"\r\n")
        assert read_response(sock)[0] == 200
        pieces = [HEAD, *[line] * 100] if bytewise else [HEAD + line * 100]
        for piece in pieces:
            sock.sendall(piece)
        assert read_error(_read(sock)) == (431, "UNSUPPORTED")


def test_endless_header(server: AppProcess) -> None:
    """One endless header gets a 431 as well."""
    with server.connect() as sock:
        sock.sendall(HEAD + b"X: " + b"a" * 40_000)
        assert read_error(_read(sock))[0] == 431


def test_eight_mebibytes_of_headers(server: AppProcess) -> None:
    """A client that keeps sending headers gets its response, and no reset before it."""
    with server.connect() as sock:
        sock.settimeout(0.5)
        with contextlib.suppress(OSError):  # the server has responded and stopped reading
            sock.sendall(HEAD + b"X: " + b"a" * (8 << 20))
        sock.settimeout(TIMEOUT_SECONDS)
        assert read_error(_until_end(sock))[0] == 431


def _until_end(sock: socket.socket) -> bytes:
    data = bytearray()
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def test_long_target(server: AppProcess) -> None:
    """A target within 32 KiB is passed on; a longer one is a 414."""
    with server.connect() as sock:
        sock.sendall(b"GET /echo/" + b"a" * 30_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(sock)[0] == 200
        sock.sendall(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_error(_read(sock)) == (414, "UNSUPPORTED")


def test_large_trailers_and_extensions(server: AppProcess) -> None:
    """Trailers, chunk extensions and leading blank lines have the headers' limit."""
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert read_error(server.talk(chunked + b"0\r\n" + b"X: abcdefgh\r\n" * 4000))[0] == 431
    assert read_error(server.talk(b"\r\n" * 20_000))[0] == 431
    with server.connect() as sock:
        sock.sendall(chunked + b"1;")
        for _ in range(60):  # what is read together with the headers is not counted, so this is more than one read
            sock.sendall(b"a" * 8192)
        assert read_error(_read(sock))[0] == 431


def test_trailers(server: AppProcess) -> None:
    """Small trailers are read and do not count as headers."""
    with server.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-Late: 1\r\n\r\n")
        status, _, body = read_response(sock)
        assert status == 200
        assert b'"size": 3' in body
        assert b"x-late" not in body

"""Tests with hand-written bad requests of each kind. Each gets a 4xx response in the format of the OCI spec, leaves no
files or database rows, and does not disturb the next request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.process_resources import eventually
from tests.fakes.raw_http import RawAnswer, RawConnection, chunked, message
from tests.fakes.raw_pushes import OCI_MANIFEST, RawPushes, digest_of
from tests.fakes.server_process import RegistryServer
from tests.system.fuzz.fuzz_case import FuzzCase
from tests.system.fuzz.fuzz_runner import StoreCounts, check_response, counts_without_sessions, store_counts
from tests.system.fuzz.malformed_content import BLOB, BLOB_DIGEST, REPO, UNKNOWN, valid_manifest

HOST = b"Host: registry.test\r\n"
ROOT = f"/v2/{REPO}"
UNKNOWN_SESSION = f"{ROOT}/blobs/uploads/00000000-0000-4000-8000-000000000000"


@dataclass
class RequestProbe:
    """A connection for bad requests, with helpers that check the responses. `counts_before`: the numbers of files and
    rows before the test."""

    server: RegistryServer
    wire: RawConnection
    counts_before: StoreCounts

    def open(self) -> RawConnection:
        return RawConnection(("127.0.0.1", self.server.port))

    def refuse(self, raw: bytes, *statuses: int, code: str | None = None, kept_alive: bool = True) -> RawAnswer:
        """Sends a bad request. Checks that the response has one of `statuses`, the format of errors, and the error code
        `code`. Then checks that a valid request succeeds: on the same connection if `kept_alive`, or else on a new
        connection, after the server has closed this one. Returns the response."""
        case = FuzzCase("hand-written", raw, frozenset(statuses))
        self.wire.send(raw)
        answer = self.wire.answer(case.method)
        check_response(case, answer)
        assert answer.interim == ()
        if code is not None and case.method != "HEAD":
            assert answer.codes == [code]
        assert answer.closes != kept_alive
        if kept_alive:
            self.check_pull(self.wire)
        else:
            assert self.wire.at_end()
            with self.open() as wire:
                self.check_pull(wire)
        return answer

    @staticmethod
    def check_pull(wire: RawConnection) -> None:
        """Checks that a blob can be pulled on this connection."""
        assert wire.ask("GET", f"{ROOT}/blobs/{BLOB_DIGEST}").body == BLOB

    def start(self) -> str:
        """Starts an upload session. Returns its path."""
        with self.open() as wire:
            return RawPushes(wire, REPO).start()

    def cancel(self, session: str) -> None:
        with self.open() as wire:
            assert wire.ask("DELETE", session).status == 204


@pytest.fixture
def probe(server: RegistryServer) -> Iterator[RequestProbe]:
    """A probe for one test. After the test, checks that the data directory has the same files and database rows as
    before, and that the log has no traceback."""
    counts_before = counts_without_sessions(server)
    probe = RequestProbe(server, RawConnection(("127.0.0.1", server.port)), counts_before)
    try:
        yield probe
    finally:
        probe.wire.close()
    assert eventually(lambda: store_counts(server) == counts_before), f"{counts_before} became {store_counts(server)}"
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("name", ["Team/app", "team//app", "team/.app", "-app", "a" * 256, "team/%C3%A4", "team%2Fapp"])
@pytest.mark.parametrize(("method", "rest"), [("GET", "tags/list"), ("PUT", "manifests/x"), ("POST", "blobs/uploads/")])
def test_a_bad_name(probe: RequestProbe, name: str, method: str, rest: str) -> None:
    """A repository name that the spec does not allow gets NAME_INVALID, and no repository is created."""
    probe.refuse(message(method, f"/v2/{name}/{rest}"), 400, code="NAME_INVALID")


@pytest.mark.parametrize(
    "digest", ["sha256:abc", "sha256:" + "G" * 64, "md5:" + "0" * 32, "sha512:" + "0" * 64, ":", "%00:x"]
)
@pytest.mark.parametrize(
    "form", ["GET blobs/{}", "DELETE blobs/{}", "POST blobs/uploads/?digest={}", "GET referrers/{}"]
)
def test_a_bad_digest(probe: RequestProbe, digest: str, form: str) -> None:
    """An invalid digest is refused in every request that has one."""
    method, _, rest = form.partition(" ")
    probe.refuse(message(method, f"{ROOT}/{rest.format(digest)}"), 400)


@pytest.mark.parametrize("tag", [".x", "-x", "x" * 129, "a%20b", "a%2Fb", "%00", "a+b"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_a_bad_tag(probe: RequestProbe, tag: str, method: str) -> None:
    """An invalid tag is refused, even in a push of a valid manifest."""
    body = valid_manifest() if method == "PUT" else b""
    probe.refuse(message(method, f"{ROOT}/manifests/{tag}", body=body), 400)


@pytest.mark.parametrize("requested_range", ["2-", "-0", "1-0", "99999999999999999999-", "5-9,7-8"])
def test_a_range_outside_the_blob(probe: RequestProbe, requested_range: str) -> None:
    """A range without any byte of the blob gets 416 with the blob's size."""
    answer = probe.refuse(message("GET", f"{ROOT}/blobs/{BLOB_DIGEST}", {"Range": f"bytes={requested_range}"}), 416)
    assert answer["content-range"] == f"bytes */{len(BLOB)}"


def test_manifest_too_deep(probe: RequestProbe) -> None:
    """A manifest that is nested too deeply gets MANIFEST_INVALID, and causes no stack overflow."""
    for depth in (65, 1000, 100_000, 1_000_000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            inner = opening * depth + b"1" + closing * depth
            body = valid_manifest()[:-1] + b',"x":' + inner + b"}"
            raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Type": OCI_MANIFEST}, body)
            probe.refuse(raw, 400, code="MANIFEST_INVALID")


def test_manifest_too_large(probe: RequestProbe) -> None:
    """A manifest with a Content-Length above the limit gets 413 before its body arrives."""
    headers = {"Content-Type": OCI_MANIFEST, "Content-Length": str(1 << 40)}
    probe.refuse(message("PUT", f"{ROOT}/manifests/x", headers), 413, code="MANIFEST_INVALID", kept_alive=False)


def test_manifest_too_large_in_chunks(probe: RequestProbe) -> None:
    """A manifest in chunks, without a Content-Length, gets 413 when it exceeds the limit. The client can read the
    response although it has not sent the whole body."""
    wire = probe.wire
    wire.send(message("PUT", f"{ROOT}/manifests/x", {"Content-Type": OCI_MANIFEST, "Transfer-Encoding": "chunked"}))
    for _ in range(9):
        wire.send(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
    answer = wire.answer("PUT")
    assert answer.status == 413
    assert answer.codes == ["MANIFEST_INVALID"]
    assert answer.closes


@pytest.mark.parametrize(
    "more",
    [b',"schemaVersion":2', b',"annotations":{"a":"1","a":"2"}', b',"config":{}', b',"x":{"y":1,"y":1}'],
)
def test_duplicate_keys(probe: RequestProbe, more: bytes) -> None:
    """A manifest in which an object has the same name twice gets MANIFEST_INVALID, because programs interpret such
    objects differently."""
    body = valid_manifest()[:-1] + more + b"}"
    raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Type": OCI_MANIFEST}, body)
    probe.refuse(raw, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize("declared", ["0-8", "0-10", "0-0", "0-99999"])
def test_wrong_lengths(probe: RequestProbe, declared: str) -> None:
    """A chunk whose length differs from its Content-Range gets SIZE_INVALID, and none of its bytes are stored."""
    session = probe.start()
    probe.refuse(message("PATCH", session, {"Content-Range": declared}, b"0123456789"), 400, code="SIZE_INVALID")
    assert probe.wire.ask("GET", session)["range"] == "0-0"
    probe.cancel(session)


def test_a_body_shorter_than_its_length(probe: RequestProbe) -> None:
    """A body that is shorter than its Content-Length gets 400 and is not stored, even if its digest is right."""
    data = b"0123456789"
    raw = message("POST", f"{ROOT}/blobs/uploads/?digest={digest_of(data)}", {"Content-Length": "11"}, data)
    probe.wire.send(raw)
    probe.wire.shut()
    answer = probe.wire.answer("POST")
    assert answer.status == 400
    with probe.open() as wire:
        assert wire.ask("HEAD", f"{ROOT}/blobs/{digest_of(data)}").status == 404
        probe.check_pull(wire)


def test_a_body_longer_than_its_length(probe: RequestProbe) -> None:
    """If a body is longer than its Content-Length, the bytes after it are read as the next request. Here they are not a
    valid request, so they get 400, and the connection is closed."""
    raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Length": "10"}, valid_manifest())
    probe.wire.send(raw)
    first, second = probe.wire.answer("PUT"), probe.wire.answer("PUT")
    assert (first.status, first.codes) == (400, ["MANIFEST_INVALID"])
    assert (second.status, second.closes) == (400, True)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/..%2f..%2fetc/manifests/passwd", 400, "NAME_INVALID"),
        ("/v2/team/blobs/uploads/..%2f..%2fentrepot.db", 400, "NAME_INVALID"),
        ("/v2/team/manifests/..%2f..%2fx", 400, "NAME_INVALID"),
        ("/v2/team/blobs/..%2fsha256%2fab", 400, "NAME_INVALID"),
        ("/v2/%2e%2e/%2e%2e/tags/list", 400, "NAME_INVALID"),
        ("/v2/../../etc/passwd", 404, "UNSUPPORTED"),
        ("/..%2f..%2fetc%2fpasswd", 404, "UNSUPPORTED"),
        ("/v2//", 404, "UNSUPPORTED"),
        ("//v2/", 404, "UNSUPPORTED"),
        ("/v2/a/b\\c/tags/list", 400, "NAME_INVALID"),
    ],
)
def test_path_tricks(probe: RequestProbe, path: str, status: int, code: str) -> None:
    """Paths with dots, escaped slashes or repeated slashes never reach another resource: whatever the method, they get
    400 if they have the form of a path of the distribution API, and else 404."""
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        probe.refuse(message(method, path), status, code=code)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/%00/tags/list", 400, "NAME_INVALID"),
        (f"{ROOT}/manifests/a%00", 400, "NAME_INVALID"),
        (f"{ROOT}/tags/list?last=%00", 400, "UNSUPPORTED"),
        ("/%00", 404, "UNSUPPORTED"),
    ],
)
def test_escaped_nul(probe: RequestProbe, path: str, status: int, code: str) -> None:
    """A path or query of the distribution API with an escaped NUL gets 400. Another path with one gets 404."""
    probe.refuse(message("GET", path), status, code=code)


def test_a_raw_nul(probe: RequestProbe) -> None:
    """A NUL byte in the request line gets 400, and the connection is closed, because the bytes after it cannot be
    trusted."""
    probe.refuse(b"GET /v2/\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400, kept_alive=False)


@pytest.mark.parametrize("size", [33_000, 1_000_000])
def test_overlong_headers(probe: RequestProbe, size: int) -> None:
    """Headers above the limit get 431, however long they are."""
    raw = b"GET /v2/ HTTP/1.1\r\n" + HOST + b"X: " + b"x" * size + b"\r\n\r\n"
    probe.refuse(raw, 431, kept_alive=False)


def test_headers_within_the_limit(probe: RequestProbe) -> None:
    """Large headers below the limit are accepted, because tokens can be large."""
    assert probe.wire.ask("GET", "/v2/", {"Authorization": "Bearer " + "x" * 30_000}).status == 200


def test_overlong_target(probe: RequestProbe) -> None:
    """A request target above the limit gets 414."""
    probe.refuse(b"GET /v2/" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, kept_alive=False)


@pytest.mark.parametrize("order", [1, -1])
def test_content_length_with_transfer_encoding(probe: RequestProbe, order: int) -> None:
    """A request with both Content-Length and Transfer-Encoding gets 400. The bytes after it are not processed as a
    request (RFC 9112, 6.1)."""
    lines = [b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"][::order]
    smuggled = b"0\r\n\r\nGET /v2/ HTTP/1.1\r\n" + HOST + b"\r\n"
    raw = b"POST /v2/ HTTP/1.1\r\n" + HOST + b"".join(lines) + b"\r\n" + smuggled
    probe.refuse(raw, 400, kept_alive=False)


@pytest.mark.parametrize("length", ["-1", "5, 5", "0x10", "+1", "9" * 30, "a"])
def test_bad_content_lengths(probe: RequestProbe, length: str) -> None:
    """A Content-Length that is not a number gets 400 (RFC 9112, 6.3)."""
    probe.refuse(message("GET", "/v2/", {"Content-Length": length}), 400, kept_alive=False)


@pytest.mark.parametrize("body", [b"g\r\n", b"-1\r\n", b"5\r\nabcdeXX\r\n", b"5\nabcde", b"f" * 20 + b"\r\n"])
def test_bad_chunk_framing(probe: RequestProbe, body: bytes) -> None:
    """An invalid chunk ends the request with 400. The session stays and can be cancelled."""
    session = probe.start()
    probe.refuse(message("PATCH", session, {"Transfer-Encoding": "chunked"}) + body, 400, kept_alive=False)
    probe.cancel(session)


@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
@pytest.mark.parametrize(
    ("upload", "status", "code"),
    [
        ("00000000-0000-4000-8000-000000000000", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("x", 404, "BLOB_UPLOAD_UNKNOWN"),
        ("..%2fx", 400, "NAME_INVALID"),
        ("%00", 400, "NAME_INVALID"),
    ],
)
def test_unknown_upload_ids(probe: RequestProbe, method: str, upload: str, status: int, code: str) -> None:
    """A request with an unknown or invalid upload ID gets 404, with every method. An escaped slash or NUL in the ID
    gets 400."""
    body = b"0123456789" if method in ("PATCH", "PUT") else b""
    target = f"{ROOT}/blobs/uploads/{upload}?digest={BLOB_DIGEST}"
    probe.refuse(message(method, target, body=body), status, code=code)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_chunks_out_of_order(probe: RequestProbe, method: str) -> None:
    """A chunk in the wrong order gets 416. The header Range of this response ends with the last byte that the session
    has received. The right chunk is then accepted."""
    session, data = probe.start(), b"0123456789"
    assert probe.wire.ask("PATCH", session, {"Content-Range": "0-4"}, data[:5]).status == 202
    target = f"{session}?digest={digest_of(data)}" if method == "PUT" else session
    answer = probe.refuse(message(method, target, {"Content-Range": "6-9"}, data[6:]), 416, code="BLOB_UPLOAD_INVALID")
    assert answer["range"] == "0-4"
    assert probe.wire.ask("PATCH", session, {"Content-Range": "5-9"}, data[5:])["range"] == "0-9"
    probe.cancel(session)


@pytest.mark.parametrize("digest", [UNKNOWN, "sha512:" + "0" * 128])
@pytest.mark.parametrize("form", ["POST", "PUT", "PUT in chunks", "PUT after PATCH"])
def test_a_digest_that_differs(probe: RequestProbe, digest: str, form: str) -> None:
    """Content with another digest than the request names gets DIGEST_INVALID. After that, neither the blob nor the
    upload session exists."""
    data = b"not what was promised"
    if form == "POST":
        probe.refuse(message("POST", f"{ROOT}/blobs/uploads/?digest={digest}", body=data), 400, code="DIGEST_INVALID")
    else:
        session = probe.start()
        target = f"{session}?digest={digest}"
        if form == "PUT":
            raw = message("PUT", target, body=data)
        elif form == "PUT in chunks":
            raw = message("PUT", target, {"Transfer-Encoding": "chunked"}) + chunked(data)
        else:
            assert probe.wire.ask("PATCH", session, body=data).status == 202
            raw = message("PUT", target)
        probe.refuse(raw, 400, code="DIGEST_INVALID")
        assert probe.wire.ask("GET", session).status == 404
    for missing in (digest, digest_of(data)):
        assert probe.wire.ask("HEAD", f"{ROOT}/blobs/{missing}").status == 404


@pytest.mark.parametrize("size", [1, 10**4, 10**12])
def test_expect_with_a_refused_request(probe: RequestProbe, size: int) -> None:
    """If the server refuses a request with `Expect: 100-continue` because of its headers, it sends the response without
    a 100. It then closes the connection, because it cannot know whether the body follows."""
    headers = {"Expect": "100-continue", "Content-Length": str(size)}
    for method, target, status in (
        ("PUT", f"{UNKNOWN_SESSION}?digest={UNKNOWN}", 404),
        ("PUT", f"{ROOT}/manifests/.x", 400),
        ("POST", "/x", 404),
    ):
        probe.refuse(message(method, target, headers), status, kept_alive=False)
        probe.wire.close()
        probe.wire = probe.open()


def test_small_body_of_a_refused_request(probe: RequestProbe) -> None:
    """If a request with a small body is refused, the server reads and discards the body, and the connection stays
    open."""
    probe.refuse(message("POST", "/nowhere", body=bytes(60_000)), 404)
    probe.refuse(message("PATCH", UNKNOWN_SESSION, body=bytes(60_000)), 404, code="BLOB_UPLOAD_UNKNOWN")


def test_large_body_of_a_refused_request(probe: RequestProbe) -> None:
    """If a request with a large body is refused, the server sends the response before the client has sent the whole
    body, and closes the connection."""
    raw = message("PATCH", UNKNOWN_SESSION, {"Content-Length": str(1 << 40)}) + bytes(10_000)
    probe.refuse(raw, 404, code="BLOB_UPLOAD_UNKNOWN", kept_alive=False)


@pytest.mark.parametrize("target", ["/v2/%", "/v2/%zz/tags/list", f"{ROOT}/tags/list?n=%f", f"{ROOT}/manifests/%4"])
def test_bad_percent_escapes(probe: RequestProbe, target: str) -> None:
    """A '%' without two hex digits gets 400."""
    probe.refuse(message("GET", target), 400)


@pytest.mark.parametrize(
    "raw", [b"/v2/\xc3\xa4", b"/v2/\xff\xfe", b"/v2/a b", b"/v2/\x7f", b"ftp://x/", b"http:///v2/"]
)
def test_bad_targets(probe: RequestProbe, raw: bytes) -> None:
    """A request target with bytes that are not allowed gets 400 (RFC 9112, 3.2)."""
    probe.refuse(b"GET " + raw + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400, kept_alive=False)


@pytest.mark.parametrize("hosts", [b"", HOST * 2, b"Host: a b\r\n"], ids=["none", "two", "with a space"])
def test_bad_hosts(probe: RequestProbe, hosts: bytes) -> None:
    """An HTTP/1.1 request without exactly one valid Host gets 400 (RFC 9112, 3.2)."""
    probe.refuse(b"GET /v2/ HTTP/1.1\r\n" + hosts + b"\r\n", 400, kept_alive=False)


@pytest.mark.parametrize(
    "raw",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes.fromhex("160301020001000100") + bytes(100),
        b"SSH-2.0-x\r\n",
        b"\r\n\xff\n",
    ],
    ids=["HTTP/2", "TLS", "SSH", "noise"],
)
def test_other_protocols(probe: RequestProbe, raw: bytes) -> None:
    """A client of another protocol gets an HTTP/1.1 response, and the connection is closed."""
    probe.wire.send(raw)
    answer = probe.wire.answer()
    check_response(FuzzCase("other protocol", b"GET /", frozenset({400})), answer)
    assert answer.closes
    assert probe.wire.at_end()


@pytest.mark.parametrize(
    ("method", "status"), [("FOO", 400), ("get", 400), ("CONNECT", 400), ("TRACE", 405), ("PROPFIND", 405)]
)
def test_odd_methods(probe: RequestProbe, method: str, status: int) -> None:
    """A method that HTTP does not have, and CONNECT, get 400, and the connection is closed. Other methods that the
    registry does not support get 405, and the connection stays open. A request on a new connection then succeeds."""
    raw = f"{method} /v2/ HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    probe.refuse(raw, status, code="UNSUPPORTED", kept_alive=status == 405)
    with probe.open() as wire:
        probe.check_pull(wire)


def test_header_injection(probe: RequestProbe) -> None:
    """Line breaks in a request target never become headers of the response."""
    injected = "%0d%0aX-Evil:%201"
    for target, status in (
        (f"/v2/{injected}/tags/list", 400),
        (f"{ROOT}/manifests/{injected}", 400),
        (f"{ROOT}/tags/list?n={injected}", 400),
        (f"/{injected}", 404),
    ):
        answer = probe.refuse(message("GET", target), status)
        assert "x-evil" not in answer


@pytest.mark.parametrize("reset", [False, True])
def test_client_disconnects_in_the_middle_of_a_push(probe: RequestProbe, reset: bool) -> None:
    """If the client disconnects in the middle of a push, no blob and no upload session are left."""
    data = bytes(200_000)
    agent = f"disconnecting/{reset}"
    for target in (f"{ROOT}/blobs/uploads/?digest={digest_of(data)}", f"{ROOT}/manifests/x"):
        method = "POST" if "uploads" in target else "PUT"
        wire = probe.open()
        headers = {"Content-Length": str(len(data)), "User-Agent": agent}
        wire.send(message(method, target, headers) + data[:150_000])
        if reset:
            wire.reset()
        wire.close()
    # The access log has a line for each request that has ended. The fixture then counts what is left.
    assert eventually(lambda: probe.server.log_text().count(f"agent={agent}\n") == 2)
    probe.check_pull(probe.wire)


def test_clients_that_send_nothing_more(probe: RequestProbe) -> None:
    """While 60 connections send nothing, or only a part of a request, other clients are served. The 60 connections stay
    open: when they send the rest of the request, they are served as well."""
    request = message("GET", "/v2/", {"X": "y"})
    sent_first = [0, request.index(b" HTTP"), request.index(b" y")]
    wires = [probe.open() for _ in range(60)]
    try:
        for number, wire in enumerate(wires):
            wire.send(request[: sent_first[number % 3]])
        for _ in range(20):
            with probe.open() as wire:
                probe.check_pull(wire)
        for number, wire in enumerate(wires):
            wire.send(request[sent_first[number % 3] :])
            assert wire.answer().status == 200
    finally:
        for wire in wires:
            wire.close()

"""Bad requests, by kind: each gets a 4xx in the format of the spec, leaves nothing, and does not disturb the next
request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.process_resources import eventually
from tests.fakes.raw_http import RawAnswer, RawConnection, chunked, message
from tests.fakes.raw_pushes import OCI_MANIFEST, RawPushes, digest_of
from tests.fakes.server_process import RegistryServer
from tests.system.fuzz.fuzz_case import FuzzCase
from tests.system.fuzz.fuzz_runner import StoreCounts, judge, settled, store_counts
from tests.system.fuzz.malformed_content import BLOB, BLOB_DIGEST, REPO, UNKNOWN, sound_manifest

HOST = b"Host: registry.test\r\n"
ROOT = f"/v2/{REPO}"
NO_SESSION = f"{ROOT}/blobs/uploads/00000000-0000-4000-8000-000000000000"


@dataclass
class RequestProbe:
    """Sends one bad request, and checks what it leaves."""

    server: RegistryServer
    wire: RawConnection
    before: StoreCounts

    def open(self) -> RawConnection:
        return RawConnection(("127.0.0.1", self.server.port))

    def refuse(self, raw: bytes, *statuses: int, code: str | None = None, kept_alive: bool = True) -> RawAnswer:
        """Returns the response, which must have one of `statuses` and the format of errors. Checks that the next
        request is served: with `kept_alive`, on the same connection; otherwise the connection must be closed, and a new
        one is used."""
        case = FuzzCase("by name", raw, frozenset(statuses))
        self.wire.send(raw)
        answer = self.wire.answer(case.method)
        judge(case, answer)
        assert answer.interim == ()
        if code is not None and case.method != "HEAD":
            assert answer.codes == [code]
        assert answer.closes != kept_alive
        if kept_alive:
            self.serves(self.wire)
        else:
            assert self.wire.at_end()
            with self.open() as wire:
                self.serves(wire)
        return answer

    @staticmethod
    def serves(wire: RawConnection) -> None:
        assert wire.ask("GET", f"{ROOT}/blobs/{BLOB_DIGEST}").body == BLOB

    def start(self) -> str:
        with self.open() as wire:
            return RawPushes(wire, REPO).start()

    def cancel(self, session: str) -> None:
        with self.open() as wire:
            assert wire.ask("DELETE", session).status == 204


@pytest.fixture
def bench(server: RegistryServer) -> Iterator[RequestProbe]:
    """After the test, the data directory has the same files and rows as before, and the log has no failure."""
    before = settled(server)
    bench = RequestProbe(server, RawConnection(("127.0.0.1", server.port)), before)
    try:
        yield bench
    finally:
        bench.wire.close()
    assert eventually(lambda: store_counts(server) == before), f"{before} became {store_counts(server)}"
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("name", ["Team/app", "team//app", "team/.app", "-app", "a" * 256, "team/%C3%A4", "team%2Fapp"])
@pytest.mark.parametrize(("method", "rest"), [("GET", "tags/list"), ("PUT", "manifests/x"), ("POST", "blobs/uploads/")])
def test_a_bad_name(bench: RequestProbe, name: str, method: str, rest: str) -> None:
    """A name that the grammar does not allow is NAME_INVALID, and creates no repository."""
    bench.refuse(message(method, f"/v2/{name}/{rest}"), 400, code="NAME_INVALID")


@pytest.mark.parametrize(
    "digest", ["sha256:abc", "sha256:" + "G" * 64, "md5:" + "0" * 32, "sha512:" + "0" * 64, ":", "%00:x"]
)
@pytest.mark.parametrize(
    "form", ["GET blobs/{}", "DELETE blobs/{}", "POST blobs/uploads/?digest={}", "GET referrers/{}"]
)
def test_a_bad_digest(bench: RequestProbe, digest: str, form: str) -> None:
    """An invalid digest is refused everywhere."""
    method, _, rest = form.partition(" ")
    bench.refuse(message(method, f"{ROOT}/{rest.format(digest)}"), 400)


@pytest.mark.parametrize("tag", [".x", "-x", "x" * 129, "a%20b", "a%2Fb", "%00", "a+b"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_a_bad_tag(bench: RequestProbe, tag: str, method: str) -> None:
    """An invalid tag is refused, with and without a valid manifest."""
    body = sound_manifest() if method == "PUT" else b""
    bench.refuse(message(method, f"{ROOT}/manifests/{tag}", body=body), 400)


@pytest.mark.parametrize("asked", ["2-", "-0", "1-0", "99999999999999999999-", "5-9,7-8"])
def test_a_range_outside_the_blob(bench: RequestProbe, asked: str) -> None:
    """A range without any byte of the blob gets 416 with the blob's size."""
    answer = bench.refuse(message("GET", f"{ROOT}/blobs/{BLOB_DIGEST}", {"Range": f"bytes={asked}"}), 416)
    assert answer["content-range"] == f"bytes */{len(BLOB)}"


def test_json_too_deep(bench: RequestProbe) -> None:
    """A manifest that is nested too deeply is MANIFEST_INVALID. It causes no stack overflow."""
    for depth in (65, 1000, 100_000, 1_000_000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            inner = opening * depth + b"1" + closing * depth
            body = sound_manifest()[:-1] + b',"x":' + inner + b"}"
            raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Type": OCI_MANIFEST}, body)
            bench.refuse(raw, 400, code="MANIFEST_INVALID")


def test_json_too_large(bench: RequestProbe) -> None:
    """A manifest above the limit gets 413 as soon as its length is known, before its body arrives."""
    headers = {"Content-Type": OCI_MANIFEST, "Content-Length": str(1 << 40)}
    bench.refuse(message("PUT", f"{ROOT}/manifests/x", headers), 413, code="MANIFEST_INVALID", kept_alive=False)


def test_json_too_large_in_chunks(bench: RequestProbe) -> None:
    """Without a declared length, it gets 413 when the limit is exceeded. The client can read the response although it
    is still sending."""
    wire = bench.wire
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
def test_duplicate_keys(bench: RequestProbe, more: bytes) -> None:
    """An object with a repeated name is MANIFEST_INVALID, because readers interpret it differently."""
    body = sound_manifest()[:-1] + more + b"}"
    raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Type": OCI_MANIFEST}, body)
    bench.refuse(raw, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize("declared", ["0-8", "0-10", "0-0", "0-99999"])
def test_wrong_lengths(bench: RequestProbe, declared: str) -> None:
    """A chunk with another length than its Content-Range is SIZE_INVALID, and the session stores nothing of it."""
    session = bench.start()
    bench.refuse(message("PATCH", session, {"Content-Range": declared}, b"0123456789"), 400, code="SIZE_INVALID")
    assert bench.wire.ask("GET", session)["range"] == "0-0"
    bench.cancel(session)


def test_a_body_shorter_than_its_length(bench: RequestProbe) -> None:
    """A body that ends before its Content-Length is not stored, whatever its digest is."""
    data = b"0123456789"
    raw = message("POST", f"{ROOT}/blobs/uploads/?digest={digest_of(data)}", {"Content-Length": "11"}, data)
    bench.wire.send(raw)
    bench.wire.shut()
    answer = bench.wire.answer("POST")
    assert answer.status == 400
    with bench.open() as wire:
        assert wire.ask("HEAD", f"{ROOT}/blobs/{digest_of(data)}").status == 404
        bench.serves(wire)


def test_a_body_longer_than_its_length(bench: RequestProbe) -> None:
    """Bytes after a body are the next request. If they are not a valid request, the connection ends with a 400."""
    raw = message("PUT", f"{ROOT}/manifests/x", {"Content-Length": "10"}, sound_manifest())
    bench.wire.send(raw)
    first, second = bench.wire.answer("PUT"), bench.wire.answer("PUT")
    assert (first.status, first.codes) == (400, ["MANIFEST_INVALID"])
    assert (second.status, second.closes) == (400, True)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/..%2f..%2fetc/manifests/passwd",
        "/v2/team/blobs/uploads/..%2f..%2fentrepot.db",
        "/v2/team/manifests/..%2f..%2fx",
        "/v2/team/blobs/..%2fsha256%2fab",
        "/v2/%2e%2e/%2e%2e/tags/list",
        "/v2/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/v2//",
        "//v2/",
        "/v2/a/b\\c/tags/list",
    ],
)
def test_path_tricks(bench: RequestProbe, path: str) -> None:
    """Dots, escaped slashes and repeated slashes in a path lead to no other resource."""
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        bench.refuse(message(method, path), 400, 404, 405)


@pytest.mark.parametrize("path", ["/v2/%00/tags/list", f"{ROOT}/manifests/a%00", f"{ROOT}/tags/list?last=%00", "/%00"])
def test_nul(bench: RequestProbe, path: str) -> None:
    """A name with an escaped NUL is invalid."""
    bench.refuse(message("GET", path), 400, 404)


def test_a_raw_nul(bench: RequestProbe) -> None:
    """A NUL byte in the request line gets 400, and the connection is closed, because the bytes after it cannot be
    trusted."""
    bench.refuse(b"GET /v2/\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400, kept_alive=False)


@pytest.mark.parametrize("size", [33_000, 1_000_000])
def test_overlong_headers(bench: RequestProbe, size: int) -> None:
    """Headers above the limit get 431, however long they are."""
    raw = b"GET /v2/ HTTP/1.1\r\n" + HOST + b"X: " + b"x" * size + b"\r\n\r\n"
    bench.refuse(raw, 431, kept_alive=False)


def test_headers_within_the_limit(bench: RequestProbe) -> None:
    """Large headers below the limit are accepted, because tokens can be large."""
    assert bench.wire.ask("GET", "/v2/", {"Authorization": "Bearer " + "x" * 30_000}).status == 200


def test_an_overlong_target(bench: RequestProbe) -> None:
    """A request target above the limit gets 414."""
    bench.refuse(b"GET /v2/" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, kept_alive=False)


@pytest.mark.parametrize("order", [1, -1])
def test_content_length_with_transfer_encoding(bench: RequestProbe, order: int) -> None:
    """A request with both framings gets 400, and the bytes after it are not run as a request (RFC 9112, 6.1)."""
    lines = [b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"][::order]
    hidden = b"0\r\n\r\nGET /v2/ HTTP/1.1\r\n" + HOST + b"\r\n"
    raw = b"POST /v2/ HTTP/1.1\r\n" + HOST + b"".join(lines) + b"\r\n" + hidden
    bench.refuse(raw, 400, kept_alive=False)


@pytest.mark.parametrize("given", ["-1", "5, 5", "0x10", "+1", "9" * 30, "a"])
def test_bad_content_lengths(bench: RequestProbe, given: str) -> None:
    """A Content-Length that is not a number gets 400 (RFC 9112, 6.3)."""
    bench.refuse(message("GET", "/v2/", {"Content-Length": given}), 400, kept_alive=False)


@pytest.mark.parametrize("body", [b"g\r\n", b"-1\r\n", b"5\r\nabcdeXX\r\n", b"5\nabcde", b"f" * 20 + b"\r\n"])
def test_bad_chunk_framing(bench: RequestProbe, body: bytes) -> None:
    """An invalid chunk ends the request with 400. The session stays and can be cancelled."""
    session = bench.start()
    bench.refuse(message("PATCH", session, {"Transfer-Encoding": "chunked"}) + body, 400, kept_alive=False)
    bench.cancel(session)


@pytest.mark.parametrize("method", ["GET", "PATCH", "PUT", "DELETE"])
@pytest.mark.parametrize("upload", ["00000000-0000-4000-8000-000000000000", "x", "..%2fx", "%00"])
def test_unknown_upload_ids(bench: RequestProbe, method: str, upload: str) -> None:
    """An unknown session gets 404 for every method, and its body is not read."""
    body = b"0123456789" if method in ("PATCH", "PUT") else b""
    target = f"{ROOT}/blobs/uploads/{upload}?digest={BLOB_DIGEST}"
    bench.refuse(message(method, target, body=body), 400, 404)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_chunks_out_of_order(bench: RequestProbe, method: str) -> None:
    """A chunk in the wrong order gets 416, which says where the session ends. The right chunk is then accepted."""
    session, data = bench.start(), b"0123456789"
    assert bench.wire.ask("PATCH", session, {"Content-Range": "0-4"}, data[:5]).status == 202
    target = f"{session}?digest={digest_of(data)}" if method == "PUT" else session
    answer = bench.refuse(message(method, target, {"Content-Range": "6-9"}, data[6:]), 416, code="BLOB_UPLOAD_INVALID")
    assert answer["range"] == "0-4"
    assert bench.wire.ask("PATCH", session, {"Content-Range": "5-9"}, data[5:])["range"] == "0-9"
    bench.cancel(session)


@pytest.mark.parametrize("digest", [UNKNOWN, "sha512:" + "0" * 128])
@pytest.mark.parametrize("form", ["POST", "PUT", "PUT in chunks", "PUT after PATCH"])
def test_a_digest_that_differs(bench: RequestProbe, digest: str, form: str) -> None:
    """Content with another digest is DIGEST_INVALID. Neither the blob nor the session exists after that."""
    data = b"not what was promised"
    if form == "POST":
        bench.refuse(message("POST", f"{ROOT}/blobs/uploads/?digest={digest}", body=data), 400, code="DIGEST_INVALID")
    else:
        session = bench.start()
        target = f"{session}?digest={digest}"
        if form == "PUT":
            raw = message("PUT", target, body=data)
        elif form == "PUT in chunks":
            raw = message("PUT", target, {"Transfer-Encoding": "chunked"}) + chunked(data)
        else:
            assert bench.wire.ask("PATCH", session, body=data).status == 202
            raw = message("PUT", target)
        bench.refuse(raw, 400, code="DIGEST_INVALID")
        assert bench.wire.ask("GET", session).status == 404
    for missing in (digest, digest_of(data)):
        assert bench.wire.ask("HEAD", f"{ROOT}/blobs/{missing}").status == 404


@pytest.mark.parametrize("size", [1, 10**4, 10**12])
def test_expect_answered_early(bench: RequestProbe, size: int) -> None:
    """If the response to a request with `Expect: 100-continue` is known already, the server sends it without a 100 and
    closes the connection, because it cannot know whether a body follows."""
    headers = {"Expect": "100-continue", "Content-Length": str(size)}
    for method, target in (("PUT", f"{NO_SESSION}?digest={UNKNOWN}"), ("PUT", f"{ROOT}/manifests/.x"), ("POST", "/x")):
        bench.refuse(message(method, target, headers), 400, 404, kept_alive=False)
        bench.wire.close()
        bench.wire = bench.open()


def test_a_small_body_answered_early(bench: RequestProbe) -> None:
    """A small unwanted body is read and discarded, and the connection stays open."""
    bench.refuse(message("POST", "/nowhere", body=bytes(60_000)), 404)
    bench.refuse(message("PATCH", NO_SESSION, body=bytes(60_000)), 404, code="BLOB_UPLOAD_UNKNOWN")


def test_a_large_body_answered_early(bench: RequestProbe) -> None:
    """With a large unwanted body, the response is sent before the client has sent the rest, and the connection is
    closed."""
    raw = message("PATCH", NO_SESSION, {"Content-Length": str(1 << 40)}) + bytes(10_000)
    bench.refuse(raw, 404, code="BLOB_UPLOAD_UNKNOWN", kept_alive=False)


@pytest.mark.parametrize("target", ["/v2/%", "/v2/%zz/tags/list", f"{ROOT}/tags/list?n=%f", f"{ROOT}/manifests/%4"])
def test_bad_percent_escapes(bench: RequestProbe, target: str) -> None:
    """A '%' without two hex digits is refused."""
    bench.refuse(message("GET", target), 400, 404)


@pytest.mark.parametrize(
    "raw", [b"/v2/\xc3\xa4", b"/v2/\xff\xfe", b"/v2/a b", b"/v2/\x7f", b"ftp://x/", b"http:///v2/"]
)
def test_bad_targets(bench: RequestProbe, raw: bytes) -> None:
    """A request target with bytes that are not allowed gets 400 (RFC 9112, 3.2)."""
    bench.refuse(b"GET " + raw + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400, kept_alive=False)


@pytest.mark.parametrize("hosts", [b"", HOST * 2, b"Host: a b\r\n"], ids=["none", "two", "with a space"])
def test_bad_hosts(bench: RequestProbe, hosts: bytes) -> None:
    """An HTTP/1.1 request without exactly one valid Host gets 400 (RFC 9112, 3.2)."""
    bench.refuse(b"GET /v2/ HTTP/1.1\r\n" + hosts + b"\r\n", 400, kept_alive=False)


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
def test_other_protocols(bench: RequestProbe, raw: bytes) -> None:
    """A client of another protocol gets an HTTP/1.1 response, and the connection is closed."""
    bench.wire.send(raw)
    answer = bench.wire.answer()
    judge(FuzzCase("other protocol", b"GET /", frozenset({400})), answer)
    assert answer.closes
    assert bench.wire.at_end()


@pytest.mark.parametrize("method", ["FOO", "get", "CONNECT", "TRACE", "PROPFIND"])
def test_odd_methods(bench: RequestProbe, method: str) -> None:
    """A method that the registry does not support gets 405. A text that HTTP does not allow as a method gets 400."""
    raw = f"{method} /v2/ HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    bench.wire.send(raw)
    answer = bench.wire.answer()
    judge(FuzzCase("odd method", b"GET /", frozenset({400, 405})), answer)
    with bench.open() as wire:
        bench.serves(wire)


def test_header_injection(bench: RequestProbe) -> None:
    """Line breaks in text of the client never become headers of a response."""
    evil = "%0d%0aX-Evil:%201"
    for target in (f"/v2/{evil}/tags/list", f"{ROOT}/manifests/{evil}", f"{ROOT}/tags/list?n={evil}", f"/{evil}"):
        answer = bench.refuse(message("GET", target), 400, 404)
        assert "x-evil" not in answer


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_midway(bench: RequestProbe, reset: bool) -> None:
    """If the client disconnects in the middle of a push, neither a blob nor an unknown session is left."""
    data = bytes(200_000)
    for target in (f"{ROOT}/blobs/uploads/?digest={digest_of(data)}", f"{ROOT}/manifests/x"):
        method = "POST" if "uploads" in target else "PUT"
        wire = bench.open()
        wire.send(message(method, target, {"Content-Length": str(len(data))}) + data[:150_000])
        if reset:
            wire.reset()
        wire.close()
    bench.serves(bench.wire)


def test_a_client_that_does_not_go_on(bench: RequestProbe) -> None:
    """Connections that send nothing, or only a part of a request, delay no other client."""
    starts = [b"", b"GET /v2/", b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX:"]
    wires = [bench.open() for _ in range(60)]
    try:
        for number, wire in enumerate(wires):
            wire.send(starts[number % len(starts)])
        for _ in range(20):
            with bench.open() as wire:
                bench.serves(wire)
    finally:
        for wire in wires:
            wire.close()

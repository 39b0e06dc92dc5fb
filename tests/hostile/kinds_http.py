"""What HTTP/1.1 allows, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator

from tests.hostile import sending
from tests.hostile.kinds import KIB, MIB, Kind
from tests.hostile.kinds_manifests import REPO
from tests.hostile.sending import Answer
from tests.hostile.site import Site

PING = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


def _pipelined(target: str, count: int, site: Site) -> Answer:
    login = {"Authorization": site.logins["admin"]}
    one = sending.head("GET", target, login, keep=True)
    return site.talk(one * (count - 1) + sending.head("GET", target, login))


def _head_of(lines: bytes) -> bytes:
    return b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + lines + b"\r\n"


def _dripped(data: bytes, size: int, port: int) -> Answer:
    """In pieces, each a segment of its own."""

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    return sending.talk(port, pieces())


def _upload(coded: bytes, site: Site) -> Answer:
    """A body in chunked coding, into an upload session."""
    started = site.ask("POST", f"/v2/{REPO}/blobs/uploads/")
    headers = {"Transfer-Encoding": "chunked"}
    return site.talk(sending.head("PATCH", started.header(b"location"), headers) + coded)


def _trailers(site: Site) -> Answer:
    coded = b"1\r\na\r\n0\r\n" + b"".join(b"t%d: v\r\n" % number for number in range(3000)) + b"\r\n"
    return _upload(coded, site)


def _huge_chunk(site: Site) -> Answer:
    """A chunk of 2^60 bytes, of which one comes; then the client leaves."""
    started = site.ask("POST", f"/v2/{REPO}/blobs/uploads/")
    with sending.connect(site.port) as sock:
        headers = {"Transfer-Encoding": "chunked"}
        sock.sendall(sending.head("PATCH", started.header(b"location"), headers) + b"f" * 15 + b"\r\na")
    return site.ask("GET", started.header(b"location"))


def _kept_busy(site: Site) -> Answer:
    """A thousand requests on one connection, each after the answer to the last."""
    with sending.connect(site.port) as sock:
        for _ in range(1000):
            sock.sendall(b"GET /v2/none/tags/list HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not sock.recv(64 * KIB):
                break
        sock.sendall(_head_of(b""))
        return sending.read(sock)


KINDS = [
    Kind("http: 32 KiB of headers", "32 KiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (31 * KIB // 6)))),
    Kind("http: 64 KiB of headers", "64 KiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (64 * KIB // 6)))),
    Kind("http: 16 MiB of headers", "16 MiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (16 * MIB // 6)))),
    Kind("http: one long header", "31 KiB", lambda site: site.talk(_head_of(b"a: " + b" " * (31 * KIB) + b"\r\n"))),
    Kind("http: headers byte by byte", "8 KiB", lambda site: _dripped(_head_of(b"a: b\r\n" * 1300), 1, site.port)),
    Kind("http: empty lines", "1 MiB", lambda site: site.talk(b"\r\n" * (MIB // 2) + _head_of(b""))),
    Kind("http: no HTTP", "16 MiB", lambda site: site.talk(b"\0" * (16 * MIB))),
    Kind("http: long method", "1 MiB", lambda site: site.talk(b"A" * MIB + b" / HTTP/1.1\r\n\r\n")),
    Kind("http: pipelined pings", "1,000", lambda site: _pipelined("/v2/", 1000, site)),
    Kind("http: pipelined at the limit", "64", lambda site: _pipelined("/v2/a/tags/list?last=a", 64, site)),
    Kind("http: pipelined catalogs", "64", lambda site: _pipelined("/v2/_catalog?n=10000", 64, site)),
    Kind("http: pipelined docs", "64", lambda site: _pipelined("/api/openapi.json", 64, site)),
    Kind("http: pipelined bundles", "64", lambda site: _pipelined("/api/docs/swagger-ui-bundle.js", 64, site)),
    Kind("http: requests one by one", "1,000", _kept_busy),
    Kind("chunks: one byte each", "2 MiB", lambda site: _upload(sending.chunks(b"a" * (2 * MIB), 1), site)),
    Kind(
        "chunks: long extensions", "31 KiB", lambda site: _upload(sending.chunks(b"a", 1, b";" + b"e" * 31_000), site)
    ),
    Kind(
        "chunks: an extension each",
        "4 MiB",
        lambda site: _upload(sending.chunks(b"a" * 4096, 1, b";" + b"e" * 1000), site),
    ),
    Kind("chunks: long size", "1 MiB", lambda site: _upload(b"0" * MIB + b"1\r\na\r\n0\r\n\r\n", site)),
    Kind("chunks: huge size", "", _huge_chunk),
    Kind("chunks: many trailers", "31 KiB", _trailers),
]

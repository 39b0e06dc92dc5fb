"""Attacks with expensive HTTP/1.1 messages, valid and invalid: many headers, pipelined requests, and chunked bodies."""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.hostile import attack_requests
from tests.system.hostile.attack import KIB, MIB, Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.attacks_manifests import REPO

PING = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


def _pipelined(target: str, count: int, site: AttackedSite) -> AttackAnswer:
    """Sends `count` identical requests at once on one connection."""
    login = {"Authorization": site.logins["admin"]}
    request_head = attack_requests.head("GET", target, login, keep=True)
    return site.talk(request_head * (count - 1) + attack_requests.head("GET", target, login))


def _head_of(lines: bytes) -> bytes:
    """Returns a request with these header lines."""
    return b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + lines + b"\r\n"


def _dripped(data: bytes, size: int, port: int) -> AttackAnswer:
    """Sends the data in pieces of `size` bytes, each in a TCP segment of its own."""

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    return attack_requests.talk(port, pieces())


def _upload(coded: bytes, site: AttackedSite) -> AttackAnswer:
    """Sends a body to a new upload session. `coded`: the body in chunked transfer coding."""
    started = site.ask("POST", f"/v2/{REPO}/blobs/uploads/")
    headers = {"Transfer-Encoding": "chunked"}
    return site.talk(attack_requests.head("PATCH", started.header(b"location"), headers) + coded)


def _trailers(site: AttackedSite) -> AttackAnswer:
    """Sends a chunked body with 3000 trailers."""
    coded = b"1\r\na\r\n0\r\n" + b"".join(b"t%d: v\r\n" % number for number in range(3000)) + b"\r\n"
    return _upload(coded, site)


def _huge_chunk(site: AttackedSite) -> AttackAnswer:
    """Declares a chunk of 2^60 bytes, sends one byte, and disconnects."""
    started = site.ask("POST", f"/v2/{REPO}/blobs/uploads/")
    with attack_requests.connect(site.port) as sock:
        headers = {"Transfer-Encoding": "chunked"}
        sock.sendall(attack_requests.head("PATCH", started.header(b"location"), headers) + b"f" * 15 + b"\r\na")
    return site.ask("GET", started.header(b"location"))


def _kept_busy(site: AttackedSite) -> AttackAnswer:
    """Sends a thousand requests on one connection, each after the response to the previous request."""
    with attack_requests.connect(site.port) as sock:
        for _ in range(1000):
            sock.sendall(b"GET /v2/none/tags/list HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not sock.recv(64 * KIB):
                break
        sock.sendall(_head_of(b""))
        return attack_requests.read(sock)


# The header line `a: b` has 6 bytes.
ATTACKS = [
    Attack("http: 32 KiB of headers", "32 KiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (31 * KIB // 6)))),
    Attack("http: 64 KiB of headers", "64 KiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (64 * KIB // 6)))),
    Attack("http: 16 MiB of headers", "16 MiB", lambda site: site.talk(_head_of(b"a: b\r\n" * (16 * MIB // 6)))),
    Attack("http: one long header", "31 KiB", lambda site: site.talk(_head_of(b"a: " + b" " * (31 * KIB) + b"\r\n"))),
    Attack("http: headers byte by byte", "8 KiB", lambda site: _dripped(_head_of(b"a: b\r\n" * 1300), 1, site.port)),
    Attack("http: empty lines", "1 MiB", lambda site: site.talk(b"\r\n" * (MIB // 2) + _head_of(b""))),
    Attack("http: no HTTP", "16 MiB", lambda site: site.talk(b"\0" * (16 * MIB))),
    Attack("http: long method", "1 MiB", lambda site: site.talk(b"A" * MIB + b" / HTTP/1.1\r\n\r\n")),
    Attack("http: pipelined pings", "1,000", lambda site: _pipelined("/v2/", 1000, site)),
    Attack("http: pipelined at the limit", "64", lambda site: _pipelined("/v2/a/tags/list?last=a", 64, site)),
    Attack("http: pipelined catalogs", "64", lambda site: _pipelined("/v2/_catalog?n=10000", 64, site)),
    Attack("http: pipelined docs", "64", lambda site: _pipelined("/api/openapi.json", 64, site)),
    Attack("http: pipelined bundles", "64", lambda site: _pipelined("/api/docs/swagger-ui-bundle.js", 64, site)),
    Attack("http: requests one by one", "1,000", _kept_busy),
    Attack("chunks: one byte each", "2 MiB", lambda site: _upload(attack_requests.chunks(b"a" * (2 * MIB), 1), site)),
    Attack(
        "chunks: long extensions",
        "31 KiB",
        lambda site: _upload(attack_requests.chunks(b"a", 1, b";" + b"e" * 31_000), site),
    ),
    Attack(
        "chunks: an extension each",
        "4 MiB",
        lambda site: _upload(attack_requests.chunks(b"a" * 4096, 1, b";" + b"e" * 1000), site),
    ),
    Attack("chunks: long size", "1 MiB", lambda site: _upload(b"0" * MIB + b"1\r\na\r\n0\r\n\r\n", site)),
    Attack("chunks: huge size", "", _huge_chunk),
    Attack("chunks: many trailers", "31 KiB", _trailers),
]

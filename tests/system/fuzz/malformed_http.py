"""Generators of requests that are malformed HTTP: request lines, headers, lengths, chunks, other protocols, requests
that end early. Each function in `FRAMINGS` returns one random case of its kind, for the fuzz tests. The field
`FuzzCase.end` of a case says what the client does after it has sent the bytes, such as "read all"."""

from __future__ import annotations

import random

from tests.fakes.raw_http import chunked, message
from tests.fakes.raw_pushes import OCI_MANIFEST, digest_of
from tests.system.fuzz.fuzz_case import SESSION_PLACEHOLDER, End, FuzzCase
from tests.system.fuzz.malformed_content import BLOB_DIGEST, REPO, UNKNOWN, valid_manifest

Random = random.Random
HOST = b"Host: registry.test\r\n"
NOT_FOUND = f"/v2/{REPO}/manifests/missing"
PING = b"GET /v2/ HTTP/1.1\r\n" + HOST
"""The beginning of a valid request. If a wrong header after it were ignored, the response would be 200, and the test
would fail."""


def _statuses(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def bad_length(rng: Random) -> FuzzCase:
    lines = rng.choice(
        [
            [b"Content-Length: -1"],
            [b"Content-Length: +5"],
            [b"Content-Length: 0x5"],
            [b"Content-Length: 5, 5"],
            [b"Content-Length: 5,6"],
            [b"Content-Length: 5", b"Content-Length: 5"],
            [b"Content-Length: 5", b"Content-Length: 6"],
            [b"Content-Length: " + b"9" * 40],
            [b"Content-Length: 18446744073709551616"],
            [b"Content-Length: 1e3"],
            [b"Content-Length: five"],
            [b"Content-Length: 5 5"],
            [b"Content-Length: \xb5"],
            [b"Content-Length: 5\x00"],
        ]
    )
    return FuzzCase("bad Content-Length", PING + b"\r\n".join(lines) + b"\r\n\r\n12345", _statuses(400))


def length_and_coding(rng: Random) -> FuzzCase:
    headers = [b"Content-Length: %d" % rng.choice([0, 5, 100]), b"Transfer-Encoding: chunked"]
    rng.shuffle(headers)
    return FuzzCase(
        "Content-Length with Transfer-Encoding", PING + b"\r\n".join(headers) + b"\r\n\r\n0\r\n\r\n", _statuses(400)
    )


def bad_coding(rng: Random) -> FuzzCase:
    coding = rng.choice(
        [
            b"gzip",
            b"gzip, chunked",
            b"chunked, gzip",
            b"chunked, chunked",
            b"xchunked",
            b"identity",
            b"chunked;q=1",
            b'"chunked"',
            b"chunked\r\nTransfer-Encoding: chunked",
            b"chunked\r\nTransfer-Encoding: identity",
            b"\x0bchunked",
            b"chunke\xe4",
        ]
    )
    return FuzzCase(
        "bad Transfer-Encoding", PING + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n", _statuses(400)
    )


def coding_in_1_0(rng: Random) -> FuzzCase:
    method = rng.choice([b"GET", b"POST"])
    raw = method + b" /v2/ HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    return FuzzCase("Transfer-Encoding in HTTP/1.0", raw, _statuses(400))


def bad_chunk(rng: Random) -> FuzzCase:
    body = rng.choice(
        [
            b"g\r\nx\r\n0\r\n\r\n",
            b"-1\r\n\r\n",
            b"5\r\nabcdeXX\r\n0\r\n\r\n",
            b"5xyz\r\n",
            b"\r\n\r\n",
            b"0x5\r\nabcde\r\n0\r\n\r\n",
            b"f" * 20 + b"\r\n",
            b"fffffffffffffffff\r\nx",
            b"5\nabcde\n0\n\n",
            b"5\r\nabcde0\r\n\r\n",
            b" 5\r\nabcde\r\n0\r\n\r\n",
            b"5;\x00\r\nabcde\r\n0\r\n\r\n",
            b"\xff\xff\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"5\rabcde\r\n0\r\n\r\n",
            b"+5\r\nabcde\r\n",
        ]
    )
    if rng.random() < 0.3:
        body = b"3\r\nabc\r\n" + body
    target = rng.choice([SESSION_PLACEHOLDER.decode(), f"{SESSION_PLACEHOLDER.decode()}?digest={digest_of(b'abc')}"])
    method = "PUT" if "?" in target else "PATCH"
    raw = message(method, target, {"Transfer-Encoding": "chunked"}) + body
    return FuzzCase("bad chunk", raw, _statuses(400))


def large_trailers(rng: Random) -> FuzzCase:
    raw = message("PATCH", SESSION_PLACEHOLDER.decode(), {"Transfer-Encoding": "chunked"})
    if rng.random() < 0.5:
        raw += b"3;" + b"x" * rng.randint(40_000, 90_000)  # a chunk extension instead of a trailer
    else:
        raw += b"3\r\nabc\r\n0\r\nX: " + b"x" * rng.randint(40_000, 90_000) + b"\r\n\r\n"
    return FuzzCase("large trailers", raw, _statuses(400, 431), end="read all")


def bad_header(rng: Random) -> FuzzCase:
    line = rng.choice(
        [
            b"no colon",
            b": no name",
            b"A b: c",
            b"A : c",
            b" A: folded",
            b"\tA: c",
            b"A\x00: c",
            b"A: c\x00d",
            b"A\xe4: c",
            b"A: b\rc",
            b"A: b\r\n\x01: c",
            b"A: \x7f\x08",
            b"(a): b",
            b"A@: b",
            b"=: b",
            b'"a": b',
            b"A\r\n: b",
            b"A: b\nC",
            b"A: \x01",
        ]
    )
    return FuzzCase("bad header", PING + line + b"\r\n\r\n", _statuses(400))


def large_header(rng: Random) -> FuzzCase:
    size = rng.choice([33_000, 40_000, 100_000, 300_000])
    block = rng.choice(
        [
            b"X: " + b"x" * size,
            b"X" * size + b": x",
            b"\r\n".join(b"X-%d: %b" % (number, b"y" * 90) for number in range(size // 90)),
            b"X: " + b"\r\nX: ".join([b"y"] * (size // 4)),
            b"Cookie: " + b"a=b; " * (size // 5),
        ]
    )
    return FuzzCase("large header", PING + block + b"\r\n\r\n", _statuses(431))


def large_target(rng: Random) -> FuzzCase:
    size = rng.choice([33_000, 60_000, 200_000])
    target = rng.choice(
        [b"/v2/" + b"a" * size, b"/v2/?" + b"n=1&" * (size // 4), b"/" * size, b"/v2/" + b"%41" * (size // 3)]
    )
    return FuzzCase("large target", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n", _statuses(414))


def bad_host(rng: Random) -> FuzzCase:
    hosts = rng.choice(
        [b"", HOST + HOST, b"Host: a b\r\n", b"Host: a/b\r\n", b"Host: \xff\r\n", b"Host: a\x01\r\n", b"Host: <x>\r\n"]
    )
    return FuzzCase("bad Host", b"GET /v2/ HTTP/1.1\r\n" + hosts + b"\r\n", _statuses(400))


def bad_version(rng: Random) -> FuzzCase:
    version = rng.choice(
        [
            b"HTTP/2.0",
            b"HTTP/1.2",
            b"HTTP/0.9",
            b"HTTP/3",
            b"HTTP/1.10",
            b"http/1.1",
            b"HTTP/11",
            b"HTTP/1.1x",
        ]
    )
    line = rng.choice(
        [
            b"GET /v2/ " + version,
            b"GET /v2/",
            b"GET  /v2/ HTTP/1.1 x",
            b"GET",
            b"GET /v2/ HTTP /1.1",
            b"GET /v2/ ICE/1.0",
        ]
    )
    return FuzzCase("bad version", line + b"\r\n" + HOST + b"\r\n", _statuses(400), end="read all")


def bad_method(rng: Random) -> FuzzCase:
    method = rng.choice(
        [
            b"get",
            b"GETX",
            b"FOO",
            b"",
            b"G\x00T",
            b"G\xe4T",
            b"A" * 5000,
            b"GET\t",
            b"-",
            b"PRI",
            b"<html>",
            b"\x16\x03",
            b"{}",
            b'"GET"',
            b"CONNECT",
            b"SOURCE",
            b"DESCRIBE",
            b"M-SEARCH",
            b"QUERY",
            b"FLUSH",
            b"PURGE",
        ]
    )
    return FuzzCase("bad method", method + b" /v2/ HTTP/1.1\r\n" + HOST + b"\r\n", _statuses(400, 405, 431, 414))


def bad_target(rng: Random) -> FuzzCase:
    target = rng.choice(
        [
            b"/v2/\xc3\xa4",
            b"/v2/\xff",
            b"/v2/a b",
            b"/v2/#x",
            b"/v2/\x00",
            b"/v2/\x7f",
            b"/v2/\t",
            b"v2/",
            b"*",
            b"",
            b"?",
            b"#",
            b"\\v2\\",
            b"http://",
            b"http:///v2/",
            b"ftp://x/v2/",
            b"http://u@h/v2/",
            b"http://a b/v2/",
            b"//",
            b"file:%s" % b"///etc/passwd",
            b"http:/v2/",
            b"registry.test:443",
            b"http://h\x00/v2/",
            b"javascript:x",
            b"http://h/v2/\xe4",
            b"http://?/v2/",
            b"/v2/\x1b[31m",
            b"/v2/|\xa0",
        ]
    )
    return FuzzCase("bad target", b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n", _statuses(400, 404))


def other_protocol(rng: Random) -> FuzzCase:
    hello = bytes.fromhex("1603010200010001fc0303") + rng.randbytes(rng.randint(30, 500))
    raw = rng.choice(
        [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
            hello,
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"EHLO x\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"\x00\x00\x00\x85\xffSMB",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"USER x\r\nPASS y\r\n",
            b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x04\x01\x00P\x01\x02\x03\x04\x00",
            b"<x/>\n",
        ]
    )
    return FuzzCase("other protocol", raw, _statuses(400), end="read all")


def garbage(rng: Random) -> FuzzCase:
    raw = rng.randbytes(rng.choice([1, 2, 10, 100, 5000]))
    if rng.random() < 0.3:
        raw = bytes(rng.choices(b"GETPOS /v2:.\r\n\t\x00\xff%aHTTP/1", k=rng.randint(1, 300)))
    if raw.strip(b"\r\n\t ").startswith((b"GET", b"PUT", b"POST", b"HEAD")):
        raw = b"\xfe" + raw  # so that the garbage never begins like a valid request
    return FuzzCase("garbage", raw, end="read any")


def garbage_after_a_request(rng: Random) -> FuzzCase:
    """A valid request that gets an error, followed by garbage on the same connection."""
    body = valid_manifest()
    first = rng.choice(
        [
            message("GET", NOT_FOUND),
            message("PUT", f"/v2/{REPO}/manifests/.bad", {"Content-Type": OCI_MANIFEST}, body),
            message("PUT", f"/v2/{REPO}/manifests/x", {"Content-Type": OCI_MANIFEST, "Content-Length": "20"}, body),
            message("GET", NOT_FOUND, {"Connection": "close"}),
        ]
    )
    return FuzzCase("garbage after a request", first + rng.randbytes(rng.randint(1, 200)), end="read all")


def injection(rng: Random) -> FuzzCase:
    evil = rng.choice(
        ["%0d%0aX-Evil:%201", "%0aSet-Cookie:a", "%0d%0a%0d%0a<html>", "%E5%98%8A%E5%98%8DX:1", "\\r\\nX:1"]
    )
    target, method = rng.choice(
        [
            (f"/v2/{REPO}/manifests/{evil}", "GET"),
            (f"/v2/{evil}/tags/list", "GET"),
            (f"/v2/{REPO}/tags/list?n={evil}", "GET"),
            (f"/v2/{REPO}/blobs/uploads/?digest={evil}", "POST"),
            (f"/v2/{REPO}/blobs/uploads/{evil}", "PATCH"),
            (f"/{evil}", "GET"),
        ]
    )
    return FuzzCase("header injection", message(method, target), _statuses(400, 404))


def early_answer(rng: Random) -> FuzzCase:
    """A request that the server can refuse before it receives the body, because the request line is wrong. The client
    never sends the body. Most of the requests have the header `Expect`."""
    method, target = rng.choice(
        [
            ("PUT", f"/v2/{REPO}/blobs/uploads/00000000-0000-4000-8000-000000000000?digest={UNKNOWN}"),
            ("PUT", f"/v2/{REPO}/manifests/.bad"),
            ("POST", f"/v2/{REPO}/blobs/uploads/?digest=bad"),
            ("PATCH", "/v2/NAME/blobs/uploads/x"),
            ("POST", "/nowhere"),
        ]
    )
    headers = {"Content-Length": str(rng.choice([1, 1000, 10**6, 10**12]))}
    if rng.random() < 0.7:
        headers["Expect"] = rng.choice(["100-continue", "100-Continue"])
    return FuzzCase("early answer", message(method, target, headers), _statuses(400, 404), end="read all")


def odd_expect(rng: Random) -> FuzzCase:
    expect = rng.choice(["200-ok", "100-continue, x", "", "\xff", "a" * 1000])
    return FuzzCase(
        "odd Expect", message("PUT", f"/v2/{REPO}/manifests/x", {"Expect": expect}, b"no JSON"), _statuses(400, 417)
    )


def _valid_request(rng: Random) -> bytes:
    """Returns a request that would succeed if it were complete."""
    body = rng.randbytes(rng.choice([1, 100, 70_000]))
    return rng.choice(
        [
            PING + b"\r\n",
            message("GET", f"/v2/{REPO}/blobs/{BLOB_DIGEST}"),
            message("PUT", f"/v2/{REPO}/manifests/cut", {"Content-Type": OCI_MANIFEST}, valid_manifest()),
            message("POST", f"/v2/{REPO}/blobs/uploads/?digest={digest_of(body)}", body=body),
            message("PATCH", SESSION_PLACEHOLDER.decode(), body=body),
            message("PATCH", SESSION_PLACEHOLDER.decode(), {"Transfer-Encoding": "chunked"}) + chunked(body),
            message("PUT", f"{SESSION_PLACEHOLDER.decode()}?digest={digest_of(body)}", body=body),
        ]
    )


def truncated(rng: Random) -> FuzzCase:
    raw = _valid_request(rng)
    session_start = raw.find(SESSION_PLACEHOLDER)
    raw = raw[: rng.randint(1, len(raw) - 1)]
    if session_start >= 0 and len(raw) < session_start + len(SESSION_PLACEHOLDER):
        raw = raw[:session_start]  # a part of the placeholder could not be replaced by the path of a session
    ends: list[End] = ["read any", "leave", "reset", "read any", "leave"]
    return FuzzCase("truncated", raw, end=rng.choice(ends))


def slow(rng: Random) -> FuzzCase:
    """A request that begins and never ends. The connection stays open while other cases run."""
    raw = rng.choice(
        [PING, PING + b"X: y", b"G", b"", b"POST /v2/ HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nabc"]
    )
    return FuzzCase("slow", raw, end="hold")


def left_alone(rng: Random) -> FuzzCase:
    """A valid request, whose client disconnects without reading the response."""
    raw = rng.choice([message("GET", NOT_FOUND), message("GET", f"/v2/{REPO}/blobs/{BLOB_DIGEST}"), PING + b"\r\n"])
    return FuzzCase("left alone", raw * rng.choice([1, 5]), end=rng.choice(["leave", "reset"]))


FRAMINGS = [
    bad_length,
    length_and_coding,
    bad_coding,
    coding_in_1_0,
    bad_chunk,
    large_trailers,
    bad_header,
    large_header,
    large_target,
    bad_host,
    bad_version,
    bad_method,
    bad_target,
    other_protocol,
    garbage,
    garbage_after_a_request,
    injection,
    early_answer,
    odd_expect,
    truncated,
    slow,
    left_alone,
]

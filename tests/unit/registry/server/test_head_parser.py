"""The parser that turns the heads of HTTP requests into ASGI scopes. A head is the request line and the headers. Its
bytes may arrive in any number of pieces."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from dataclasses import replace

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import ConnectionContext, WorkerContext
from registry.server.connection.head_cache import MAX_PARTS, HeadCache
from registry.server.connection.head_parser import HeadParser, RequestHead
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.connection_limit import EvictionCandidate
from registry.server.http1.error_responses import RefusedRequest
from registry.server.http1.request_head import MAX_BODY_BYTES
from registry.server.server_limits import ServerLimits

HEAD = b"PUT /v2/a%20b?x=1 HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that sends no response."""


class NoConnection:
    """A placeholder for a connection. It is never closed to make room for others."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None

    def evict(self) -> None:
        """Does nothing, because there is no connection to close."""


class RequestCounter:
    """The parser's callback for new requests. It counts the requests."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
async def context() -> ConnectionContext:
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(head_bytes=1000), UnsentBudget(0, 0.1, loop.time))
    return ConnectionContext.for_transport(worker, asyncio.Transport(), NoConnection())


def feed(parser: HeadParser, data: bytes) -> list[RequestHead]:
    """Feeds all of `data` to the parser, and returns the heads that are complete."""
    heads, at = [], 0
    while at < len(data):
        at, head = parser.feed(data, at)
        if head is not None:
            heads.append(head)
    return heads


async def test_a_head_in_two_pieces(context: ConnectionContext) -> None:
    """A head that arrives in two pieces becomes the same scope, wherever it is cut."""
    for cut in range(1, len(HEAD)):
        parser = HeadParser(context, RequestCounter())
        (head,) = feed(parser, HEAD[:cut]) + feed(parser, HEAD[cut:])
        assert (head.body_length, head.keep_alive, head.expects_continue) == (5, True, True)
        assert {key: head.scope[key] for key in ("method", "path", "raw_path", "query_string", "http_version")} == {
            "method": "PUT",
            "path": "/v2/a b",
            "raw_path": b"/v2/a%20b",
            "query_string": b"x=1",
            "http_version": "1.1",
        }
        assert not parser.is_in_head


@pytest.mark.parametrize("length", [2**63 - 1, 2**63, 2**64 - 1])
async def test_a_length_beyond_any_blob_is_refused(context: ConnectionContext, length: int) -> None:
    """A request whose Content-Length is larger than any file can be is refused with 413. The size of the largest
    possible file is accepted."""
    request = b"PUT /a HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % length
    parser = HeadParser(context, RequestCounter())
    if length == MAX_BODY_BYTES:
        (head,) = feed(parser, request)
        assert head.body_length == length
        return
    with pytest.raises(RefusedRequest, match=f"at most {MAX_BODY_BYTES} bytes") as refused:
        feed(parser, request)
    assert refused.value.status == 413


async def test_several_heads_in_one_piece(context: ConnectionContext) -> None:
    """If several heads arrive in one piece, each call of `feed` parses one head and stops at its end."""
    requests = RequestCounter()
    get = b"GET /%d HTTP/1.1\r\nHost: test\r\n\r\n"
    heads = feed(HeadParser(context, requests), b"".join(get % number for number in range(5)))
    assert [head.scope["raw_path"] for head in heads] == [b"/%d" % number for number in range(5)]
    assert requests.count == 5


GET = b"GET /v2/a%20b?x=1 HTTP/1.1\r\nHost: test\r\nAccept: */*\r\n\r\n"
"""A head whose headers the head cache accepts. They are added when they arrive for the second time, so tests first send
the head twice."""


async def test_a_repeated_head(context: ConnectionContext) -> None:
    """A head whose headers were parsed before has the same scope, also on another connection, and counts as a request.
    A change of one scope does not change the next one."""
    requests = RequestCounter()
    _, first = feed(HeadParser(context, RequestCounter()), GET * 2)
    assert context.worker.head_cache.find(GET) is not None
    expected = deepcopy(first.scope)
    first.scope["headers"].append((b"x-added", b"1"))
    first.scope["state"]["added"] = True
    parser = HeadParser(context, requests)
    for head in feed(parser, GET * 3):
        assert head.scope == expected
        assert (head.body_length, head.keep_alive, head.expects_continue, head.size) == (0, True, False, first.size)
        head.scope["headers"].clear()
    assert requests.count == 3
    assert not parser.is_in_head


async def test_known_headers_after_another_request_line(context: ConnectionContext) -> None:
    """If the headers of a head were parsed before, the head has the scope that a parser without a cache gives it,
    whatever its request line is."""
    feed(HeadParser(context, RequestCounter()), GET * 2)
    lines = [
        *(b"GET /v2/ HTTP/1.1", b"HEAD /v2/team/app/manifests/v1 HTTP/1.1", b"GET /v2/a%20b?x=2 HTTP/1.1"),
        *(b"GET //host/v2/?a?b HTTP/1.1", b"GET /?x= HTTP/1.1", b"GET /%zz HTTP/1.1", b"GET /a|b HTTP/1.1"),
        *(b"DELETE /v2/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://other/v2/ HTTP/1.1"),
    ]
    for line in lines:
        data = line + GET[GET.index(b"\r\n") :]
        for _ in range(3):  # the line itself is cached at its second arrival
            (head,) = feed(HeadParser(context, RequestCounter()), data)
            uncached = replace(context, worker=replace(context.worker, head_cache=HeadCache()))
            (expected,) = feed(HeadParser(uncached, RequestCounter()), data)
            assert (head.scope, head.size) == (expected.scope, expected.size)


async def test_headers_after_a_target_with_a_host(context: ConnectionContext) -> None:
    """A target in absolute form replaces the Host header of its own request only. The cached headers keep the host that
    the client has sent."""
    block = GET[GET.index(b"\r\n") :]
    for _ in range(3):
        (head,) = feed(HeadParser(context, RequestCounter()), b"GET http://other/v2/ HTTP/1.1" + block)
        assert [value for name, value in head.scope["headers"] if name == b"host"] == [b"other"]
        (head,) = feed(HeadParser(context, RequestCounter()), b"GET /v2/ HTTP/1.1" + block)
        assert [value for name, value in head.scope["headers"] if name == b"host"] == [b"test"]


@pytest.mark.parametrize(
    "line", [b"GET /a#b HTTP/1.1", b"GET /a b HTTP/1.1", b"GET /a HTTP/2.0", b"GET a HTTP/1.1", b"GET /\xff HTTP/1.1"]
)
async def test_known_headers_after_a_malformed_request_line(context: ConnectionContext, line: bytes) -> None:
    """A request line that is not valid is refused, also if its headers were parsed before."""
    feed(HeadParser(context, RequestCounter()), GET * 2)
    with pytest.raises(RefusedRequest) as refused:
        feed(HeadParser(context, RequestCounter()), line + GET[GET.index(b"\r\n") :])
    assert refused.value.status == 400


async def test_known_headers_after_a_line_that_is_too_long(context: ConnectionContext) -> None:
    """A head that is too large with its request line is refused, also if its headers were parsed before."""
    feed(HeadParser(context, RequestCounter()), GET * 2)
    limit = context.worker.limits.head_bytes
    for path_bytes, is_refused in ((limit - 200, False), (limit - 100, True)):
        line = b"GET /" + b"a" * (path_bytes - 1) + b" HTTP/1.1"
        parser = HeadParser(context, RequestCounter())
        if not is_refused:
            feed(parser, line + GET[GET.index(b"\r\n") :])
            continue
        with pytest.raises(RefusedRequest) as refused:
            feed(parser, line + GET[GET.index(b"\r\n") :])
        assert refused.value.status in (414, 431)


@pytest.mark.parametrize("cut", [1, len(GET) - 1])
async def test_a_repeated_head_in_two_pieces(context: ConnectionContext, cut: int) -> None:
    """A cached head that arrives in two pieces is parsed as usual. If an incomplete head has arrived, the next bytes
    continue it, even if they are the bytes of a cached head."""
    whole, _ = feed(HeadParser(context, RequestCounter()), GET * 2)
    (cut_head,) = feed(parser := HeadParser(context, RequestCounter()), GET[:cut]) + feed(parser, GET[cut:])
    assert cut_head.scope == whole.scope
    parser = HeadParser(context, RequestCounter())
    assert feed(parser, b"POST / HTTP/1.1\r\nX: ") == []
    (continued,) = feed(parser, GET)
    assert (continued.scope["method"], continued.scope["raw_path"]) == ("POST", b"/")


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        GET.replace(b"GET", b"DELETE"),
        GET.replace(b"1.1", b"1.0"),
        GET.replace(b"Accept: */*", b"Connection: close"),
        GET.replace(b"Accept: */*", b"Expect: 100-continue"),
        GET.replace(b"Accept: */*", b"Connection: upgrade\r\nUpgrade: websocket"),
        GET.replace(b"Accept: */*", b"Authorization: Basic YTpi"),
        GET.replace(b"*/*", b"a" * 900 + b"\r\nX: " + b"b" * 1200),
        GET.replace(b"Accept: */*", b"\r\n".join([b"X: y"] * 40)),
    ],
    ids=["body", "write", "old", "last", "continue", "upgrade", "password", "long", "many headers"],
)
async def test_heads_that_are_not_cached(context: ConnectionContext, head: bytes) -> None:
    """Only heads of GET and HEAD requests are cached. A head is not cached if it announces a body, expects 100
    (Continue), asks for another protocol, has a password, or ends the connection. A head that is too large is not
    cached either. Each short header counts as 64 bytes, so a head with many headers is too large."""
    for _ in range(2):
        # The context's limit of 1000 bytes would refuse the large heads, so the default limits are used.
        parser = HeadParser(replace(context, worker=replace(context.worker, limits=ServerLimits())), RequestCounter())
        feed(parser, head)
    assert context.worker.head_cache.find(head) is None


@pytest.mark.parametrize("name", ["Authorization: Bearer ", "Cookie: session=", "proxy-authorization: bearer "])
async def test_the_cache_has_no_secrets(context: ConnectionContext, name: str) -> None:
    """A head with a token or a cookie is cached, but the cache does not have the secret. The scope of each request has
    the secret of its own head."""
    heads = [GET.replace(b"Accept: */*", f"{name}{secret}\r\nX: y".encode()) for secret in ("s3cret", "other")]
    first, second, other = feed(HeadParser(context, RequestCounter()), heads[0] * 2 + heads[1])
    cache = context.worker.head_cache
    cached = cache.find(heads[0])
    assert cached is not None
    (repeated,) = feed(HeadParser(context, RequestCounter()), heads[0])
    assert first.scope == second.scope == repeated.scope
    assert [name for name, _ in other.scope["headers"]] == [name for name, _ in first.scope["headers"]]
    assert [value for _, value in repeated.scope["headers"] if b"s3cret" in value]
    assert [value for _, value in other.scope["headers"] if b"other" in value]
    assert "s3cret" not in repr((cache._blocks, cache._lines, cache._seen_hashes))


async def test_the_cache_is_bounded(context: ConnectionContext) -> None:
    """If the cache is full, the headers of each new head take the place of the oldest ones. Headers that arrive once
    are not added."""
    heads = [GET.replace(b"*/*", b"%d" % number) for number in range(MAX_PARTS + 1)]
    feed(HeadParser(context, RequestCounter()), b"".join([*heads, *heads]))
    feed(HeadParser(context, RequestCounter()), GET.replace(b"*/*", b"once"))
    cache = context.worker.head_cache
    assert cache.find(heads[0]) is None
    assert all(cache.find(head) is not None for head in heads[1:])


async def test_the_cached_request_lines_are_bounded(context: ConnectionContext) -> None:
    """Request lines are cached at their second arrival, at most `MAX_PARTS` of them. A line with a query is not cached,
    because the query could be a secret."""
    feed(HeadParser(context, RequestCounter()), GET * 2)
    heads = [GET.replace(b"a%20b?x=1", b"%d" % number) for number in range(MAX_PARTS + 1)]
    feed(HeadParser(context, RequestCounter()), b"".join([*heads, *heads, *[GET] * 3]))
    feed(HeadParser(context, RequestCounter()), GET.replace(b"a%20b?x=1", b"once"))
    lines = [head.partition(b"\r\n")[0] for head in heads]
    assert list(context.worker.head_cache._lines) == lines[1:]


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"GET / HTTP/1.1\r\nX: " + b"a" * 2000, 431), (b"GET /" + b"a" * 2000 + b" HTTP/1.1", 414)],
    ids=["header", "target"],
)
async def test_a_head_that_is_too_large(context: ConnectionContext, head: bytes, status: int) -> None:
    """A head that is too large is refused with 431, or with 414 if the request's target is too long."""
    with pytest.raises(RefusedRequest) as refused:
        feed(HeadParser(context, RequestCounter()), head + b"\r\n\r\n")
    assert refused.value.status == status


async def test_a_malformed_head(context: ConnectionContext) -> None:
    """A malformed head is refused with 400."""
    with pytest.raises(RefusedRequest) as refused:
        feed(HeadParser(context, RequestCounter()), b"GET / HTTP/1.1\nHost: test\n\n")
    assert refused.value.status == 400

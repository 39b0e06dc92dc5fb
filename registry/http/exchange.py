"""One request and its answer, as handlers see them, and the limits of one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from registry.http.asgi import Header, Message, Receive, Scope, Send, new_request_id
from registry.http.body_memory import BodyMemory
from registry.http.disconnect import ClientGone
from registry.http.headers import API_VERSION, EMPTY, NO_SNIFF, REQUEST_ID
from registry.http.query import Query
from registry.memory_budget import MIB
from registry.request import UNAUTHENTICATED, LogCall, RequestContext
from storage.interface import Registry
from storage.names import RepositoryName

_BODY_EXTENSION: Final = "entrepot.body"
"""The ASGI extension by which our server hands over a body without copying it (`receive`), and says whether the client
has disconnected (`left`)."""
_NO_NAME: Final = str.__new__(RepositoryName)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request. The defaults suit the clients that were tested; each says why."""

    manifest: int = 8 * MIB
    """Bytes of a manifest. The spec wants at least 4 MB ("Pushing Manifests"); beyond: 413."""
    tags_per_put: int = 64
    """Tags that one PUT may set. The spec wants at least 10; beyond: 414. Each is a header line of the answer, and
    common HTTP clients refuse answers with more than 100 lines."""
    tags_page: int = 10_000
    """Tags on a page, with or without `n`. Generous, for clients that do not follow Link."""
    catalog_page: int = 1_000
    """Repositories on a page when the client sends no `n`."""
    catalog_most: int = 10_000
    """Repositories on a page, whatever `n` says."""
    referrers_page: int = 1_000
    """Descriptors on a page of referrers."""
    referrers_bytes: int = 4 * MIB - 64 * 1024
    """Bytes of a page of referrers: it has to fit where a manifest of 4 MiB fits ("Listing Referrers")."""
    ranges: int = 1_024
    """Ranges in one request. Clients that read layers in part ask for up to 1024, and for half as many after a 400."""


class Exchange(RequestContext):
    """A request and its answer. It is the request's context as well: see `RequestContext` for its attributes.

    The API sets `kind`, `repo` and `item` (the last part of the path), `allowed` (the methods of this resource) and
    `namespace` (the upstream that the request names by `ns`). `started`: a status has been sent. `headers_read`: the
    names of the headers that were looked up. `sent_messages`: the answer, recorded only while it is a list, and dropped
    where the answer is streamed (`registry.http.answer_cache`)."""

    __slots__ = (
        "_headers",
        "_query",
        "_receive",
        "_send",
        "allowed",
        "base",
        "body_memory",
        "headers_read",
        "item",
        "kind",
        "limits",
        "method",
        "namespace",
        "registry",
        "repo",
        "scope",
        "sent_messages",
        "started",
    )

    def __init__(
        self,
        registry: Registry,
        limits: RequestLimits,
        base: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        body_memory: BodyMemory,
    ) -> None:
        # The base class's fields are set here: its constructor would cost every request a call.
        self.principal = UNAUTHENTICATED
        self.requested_name = _NO_NAME
        client = scope.get("client")
        self.address = client[0] if client else ""
        self.request_id = new_request_id()
        self.notice = None
        self.logged_calls: list[LogCall] | None = None
        self.registry = registry
        self.limits = limits
        self.body_memory = body_memory
        self.base = base
        self.scope = scope
        self.method: str = scope["method"]
        self.started = False
        self.allowed: Sequence[str] = ()
        self.kind = ""
        self.repo: RepositoryName = _NO_NAME
        self.namespace: str | None = None
        self.item = ""
        self.headers_read: set[bytes] = set()
        self.sent_messages: list[Message] | None = None
        self._headers: list[Header] = scope["headers"]
        self._query: Query | None = None
        self._receive = receive
        self._send = send

    # The request

    def headers(self, name: bytes) -> list[bytes]:
        self.headers_read.add(name)
        return [value for key, value in self._headers if key == name]

    def header(self, name: bytes) -> bytes | None:
        """Returns a header's first value. `name` is in lower case."""
        self.headers_read.add(name)
        for key, value in self._headers:
            if key == name:
                return value
        return None

    @property
    def query(self) -> Query:
        """The parameters of the query. Raises RequestInvalid for a query that cannot be parsed."""
        if self._query is None:
            self._query = Query(self.scope.get("query_string", b""))
        return self._query

    @property
    def length(self) -> int | None:
        """The body's length in bytes; None for a body in chunked transfer coding."""
        value = self.header(b"content-length")
        if value is not None and value.isdigit():
            return int(value[:20])
        return None if self.header(b"transfer-encoding") else 0

    @property
    def is_account(self) -> bool:
        """Whether an account acts."""
        return not self.principal.is_anonymous

    async def body(self) -> AsyncIterator[bytes | memoryview]:
        """Yields the body as it arrives. Raises ClientGone when it ends early. The caller may keep the views: their
        memory is not written again."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        receive = extension["receive"] if extension else self._receive_copied
        more = True
        while more:
            received = await receive()
            if received is None:
                raise ClientGone
            chunks, more = received
            for chunk in chunks:
                yield chunk

    def take_whole_body(self) -> bytes | None:
        """Returns the whole body if the server has received all of it; otherwise takes nothing and returns None. Never
        waits. Always None on servers without our body extension."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        take = extension.get("take_whole") if extension else None
        pieces = take() if take else None
        return None if pieces is None else b"".join(pieces)

    async def _receive_copied(self) -> tuple[Sequence[bytes], bool] | None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        data = message.get("body")
        return [data] if data else [], message.get("more_body", False)

    @property
    def is_disconnected(self) -> bool:
        """Whether the server has already seen the client disconnect."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        return bool(extension and extension["left"]())

    async def wait_disconnected(self) -> None:
        """Returns when the client has disconnected. Discards what it still sends."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The answer

    async def send(self, message: Message) -> None:
        """Sends one ASGI message."""
        self.started = True
        await self._send(message)
        if self.sent_messages is not None:
            self.sent_messages.append(message)
            if message.get("more_body"):
                self.sent_messages = None  # a streamed answer is not cached, and must not stay in memory

    async def send_head(self, status: int, headers: Iterable[Header]) -> None:
        """Sends status and headers; a body has to follow."""
        if self.namespace is not None:
            headers = (*headers, (b"oci-namespace", self.namespace.encode("ascii")))
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [API_VERSION, NO_SNIFF, (REQUEST_ID, self.request_id.encode()), *headers],
            }
        )

    async def send_part(self, body: bytes, *, more: bool = False) -> None:
        """Sends a part of the body; the last one unless `more`."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def send_empty(self, status: int, *headers: Header) -> None:
        """Sends an answer without a body. 204 and 304 have no Content-Length (RFC 9110, 8.6)."""
        await self.send_head(status, headers if status in (204, 304) else (*headers, EMPTY))
        await self.send_part(b"")

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends an answer with its whole body at once; to HEAD, without the body."""
        await self.send_head(status, (*headers, (b"content-length", b"%d" % len(body))))
        await self.send_part(b"" if self.method == "HEAD" else body)

    def location(self, *parts: str) -> bytes:
        """Returns the URL of something in this repository, for Location, under the name that the client uses."""
        scope = f"?ns={self.namespace}" if self.namespace else ""
        return f"{self.base}/v2/{self.requested_name}/{'/'.join(parts)}{scope}".encode("ascii")

    def link(self, path: str, parameters: dict[str, str]) -> Header:
        """Returns the Link header to the next page of a list."""
        if self.namespace:
            parameters = {"ns": self.namespace, **parameters}
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return b"link", f'<{path}?{query}>; rel="next"'.encode("ascii")

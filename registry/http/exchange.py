"""`Exchange`: one request and its response, as the handlers of the distribution API use them. `RequestLimits`: the
limits of one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from registry.asgi import Header, Message, Receive, Scope, Send, new_request_id
from registry.http.body_memory import BodyMemory
from registry.http.disconnect import ClientGone
from registry.http.query import Query
from registry.http.response_headers import API_VERSION, NO_SNIFF, REQUEST_ID, ZERO_LENGTH
from registry.memory_budget import MIB
from registry.request import UNAUTHENTICATED, LogCall, RequestContext
from storage.interface import Registry
from storage.names import RepositoryName

_BODY_EXTENSION: Final = "entrepot.body"
"""Key of our server's ASGI extension: a dictionary of three functions. `receive` returns the next pieces of the body
without copying them, `take_whole` returns all pieces of a body that was received already, and `left` returns whether
the client has disconnected."""
_NO_NAME: Final = str.__new__(RepositoryName)
"""An empty repository name, for requests that name no repository."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request. The text below each limit gives the reason for its default."""

    manifest_bytes: int = 8 * MIB
    """Largest manifest in a PUT; a larger one gets 413. The spec asks for at least 4 MB ("Pushing Manifests")."""
    tags_per_put: int = 64
    """Most `tag` parameters in one manifest PUT; more get 414. The spec asks for at least 10. The response has one
    header line for each tag, and common HTTP clients refuse responses with more than 100 header lines."""
    tags_per_page: int = 10_000
    """Most tags on a page, and the number of tags if the client sends no `n`. It is high because some clients do not
    follow the Link to the next page."""
    default_catalog_page: int = 1_000
    """Repositories on a page if the client sends no `n`."""
    max_catalog_page: int = 10_000
    """Most repositories on a page, also if `n` is larger."""
    referrers_per_page: int = 1_000
    """Most descriptors on a page of referrers."""
    referrers_page_bytes: int = 4 * MIB - 64 * 1024
    """Largest page of referrers: a client that takes manifests of 4 MiB can take it ("Listing Referrers")."""
    ranges_per_request: int = 1_024
    """Most ranges in one request; more get 400. Clients that read parts of layers send up to 1024 ranges, and half as
    many after a 400."""


class Exchange(RequestContext):
    """A request and its response. It is the request's context as well: see `RequestContext` for those attributes.

    Set by the API before a handler runs:
    - `kind`: the kind of the resource, such as `manifests` (`registry.http.resource_path.Resource`).
    - `repo`: the repository's name; empty: the request names none. If the request names an upstream, by `ns` or by its
      host, that upstream's name is the first part.
    - `item`: the last segment of the path, a tag, a digest or the id of an upload session; empty: none.
    - `allowed_methods`: the methods of the resource.
    - `namespace`: the value of the query parameter `ns`, if it names a mirrored upstream; otherwise None.

    `base_url`: put before the paths in Location; empty: they have no host. `response_started`: the status has been
    sent. `headers_read`: the names of the request headers that were looked up. `sent_messages`: the ASGI messages of
    the response, recorded for the response cache (`registry.http.answer_cache`); None: they are not recorded."""

    __slots__ = (
        "_headers",
        "_query",
        "_receive",
        "_send",
        "allowed_methods",
        "base_url",
        "body_memory",
        "headers_read",
        "item",
        "kind",
        "limits",
        "method",
        "namespace",
        "registry",
        "repo",
        "response_started",
        "scope",
        "sent_messages",
    )

    def __init__(
        self,
        registry: Registry,
        limits: RequestLimits,
        base_url: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        body_memory: BodyMemory,
    ) -> None:
        # The base class's fields are set here, because a call of its constructor would cost every request time.
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
        self.base_url = base_url
        self.scope = scope
        self.method: str = scope["method"]
        self.response_started = False
        self.allowed_methods: Sequence[str] = ()
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
        """Returns each value of a request header, in order. `name` is in lower case."""
        self.headers_read.add(name)
        return [value for key, value in self._headers if key == name]

    def header(self, name: bytes) -> bytes | None:
        """Returns the first value of a request header; None without the header. `name` is in lower case."""
        self.headers_read.add(name)
        for key, value in self._headers:
            if key == name:
                return value
        return None

    @property
    def query(self) -> Query:
        """The parameters in the query string. Raises RequestInvalid if it cannot be parsed."""
        if self._query is None:
            self._query = Query(self.scope.get("query_string", b""))
        return self._query

    @property
    def length(self) -> int | None:
        """The length of the request's body in bytes; 0: it has none; None: it is in chunked transfer coding."""
        value = self.header(b"content-length")
        if value is not None and value.isdigit():
            return int(value[:20])
        return None if self.header(b"transfer-encoding") else 0

    @property
    def is_account(self) -> bool:
        """Whether the request was authenticated as an account."""
        return not self.principal.is_anonymous

    async def body(self) -> AsyncIterator[bytes | memoryview]:
        """Yields the request's body in pieces, as they arrive. Raises ClientGone if the client disconnects before the
        end of the body. The caller may keep the views, because their memory is not reused."""
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
        """Returns the whole body if the server has received all of it already; otherwise takes nothing and returns
        None. Never waits. Always returns None on a server without the extension `entrepot.body`."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        take = extension.get("take_whole") if extension else None
        pieces = take() if take else None
        return None if pieces is None else b"".join(pieces)

    async def _receive_copied(self) -> tuple[Sequence[bytes], bool] | None:
        """Returns the next pieces of the body by plain ASGI, and whether more follow; None: the client has
        disconnected."""
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
        """Waits until the client has disconnected. Discards everything that the client sends until then."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The response

    async def send(self, message: Message) -> None:
        """Sends one ASGI message, and records it where the response may be cached."""
        self.response_started = True
        await self._send(message)
        if self.sent_messages is not None:
            self.sent_messages.append(message)
            if message.get("more_body"):
                self.sent_messages = None  # a streamed response is not cached, and must not stay in memory

    async def send_head(self, status: int, headers: Iterable[Header]) -> None:
        """Sends the status and the headers. The caller then sends the body, even an empty one."""
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
        """Sends a part of the body. `more`: further parts follow; otherwise this one ends the response."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def send_empty(self, status: int, *headers: Header) -> None:
        """Sends a response without a body. 204 and 304 have no Content-Length (RFC 9110, 8.6)."""
        await self.send_head(status, headers if status in (204, 304) else (*headers, ZERO_LENGTH))
        await self.send_part(b"")

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends a response with its whole body; for HEAD only the headers, with the length of that body."""
        await self.send_head(status, (*headers, (b"content-length", b"%d" % len(body))))
        await self.send_part(b"" if self.method == "HEAD" else body)

    def location(self, *parts: str) -> bytes:
        """Returns a URL below this repository, for Location: `parts` are the segments after the repository's name. The
        URL has the name that the client used, and its `ns`."""
        query = f"?ns={self.namespace}" if self.namespace else ""
        return f"{self.base_url}/v2/{self.requested_name}/{'/'.join(parts)}{query}".encode("ascii")

    def next_page_link(self, path: str, parameters: dict[str, str]) -> Header:
        """Returns the Link header that leads to the next page of a list: `path` with `parameters` as its query."""
        if self.namespace:
            parameters = {"ns": self.namespace, **parameters}
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return b"link", f'<{path}?{query}>; rel="next"'.encode("ascii")

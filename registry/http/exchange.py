"""`Exchange`: one request and its response, as the handlers of the distribution API use them. `RequestLimits`: the
limits of one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from registry.asgi import Header, Message, Receive, Scope, Send, request_id_of
from registry.http.body_memory import BodyMemory
from registry.http.disconnect import ClientGone
from registry.http.query import Query
from registry.http.response_headers import API_VERSION, NO_SNIFF, REQUEST_ID_NAME, ZERO_LENGTH
from registry.memory_budget import MIB
from registry.request import UNAUTHENTICATED, RequestContext
from storage.content import Pull
from storage.interface import Registry
from storage.names import RepositoryName

_BODY_EXTENSION: Final = "entrepot.body"
"""Key of an ASGI extension of our server. The value is a dictionary of three functions:

- `receive` returns the next pieces of the request's body without a copy.
- `take_whole` returns all pieces of the body, or None if the server has not yet received the whole body.
- `is_disconnected` returns whether the client has disconnected."""
_NO_NAME: Final = str.__new__(RepositoryName)
"""An empty repository name, for requests that name no repository. The constructor refuses an empty name."""
CountPull = Callable[[Pull, str, str, str], None]
"""Counts one pull of a manifest. The arguments are the pull, the name of the account (`anonymous` without an account),
the client's IP address, and the request id. A call takes about a microsecond."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request. The quoted titles are sections of the distribution spec."""

    manifest_bytes: int = 8 * MIB
    """Size of the largest manifest that a PUT may send; a larger manifest gets 413. The spec demands at least 4 MB
    ("Pushing Manifests")."""
    tags_per_put: int = 64
    """Largest number of `tag` parameters in one manifest PUT; a request with more tags gets 414. The spec demands at
    least 10. The response has one header line for each tag, and common HTTP clients refuse responses with more than 100
    header lines."""
    tags_per_page: int = 10_000
    """Largest number of tags on a page. A client asks for fewer tags with the query parameter `n`. The limit is high
    because some clients do not follow the Link to the next page."""
    default_repositories_per_page: int = 1_000
    """Number of repositories on a page if the client sends no `n`."""
    max_repositories_per_page: int = 10_000
    """Largest number of repositories on a page. A larger `n` has no effect."""
    referrers_per_page: int = 1_000
    """Largest number of descriptors on a page of referrers."""
    referrers_page_bytes: int = 4 * MIB - 64 * 1024
    """Largest size of a page of referrers in bytes. Clients that accept manifests of up to 4 MiB accept a page of this
    size ("Listing Referrers")."""
    ranges_per_request: int = 1_024
    """Largest number of ranges in one request; a request with more ranges gets 400. Clients that read parts of layers
    request at most 1024 ranges. After a 400, they request half as many."""


class Exchange(RequestContext):
    """A request and its response. An exchange is also the context of the request (`RequestContext`).

    `DistributionAPI` sets these attributes before a handler runs:

    - `kind`: the kind of the resource, such as `manifests` (`registry.http.resource_path.Resource`).
    - `requested_name`: the repository's name in the path; empty if the path names no repository.
    - `repo`: the repository's name for calls of `registry`. If the request names an upstream by `ns` or by the Host
      header, `repo` begins with the upstream's name. Otherwise, `repo` equals `requested_name`.
    - `resource_id`: the tag, the digest or the id of an upload session at the end of the path; empty if there is none.
    - `allowed_methods`: the methods that the resource supports.
    - `namespace`: the value of the query parameter `ns`; None if `ns` does not name a mirrored upstream.

    Other attributes:

    - `base_url`: the start of the URLs in Location headers. If it is empty, these headers have a path without a host.
    - `response_started`: whether the status has been sent.
    - `headers_read`: the names of the request headers that were looked up. The response may depend on these headers.
    - `pull`: the manifest that the request pulls; None until a manifest is found that the client may pull.
    - `sent_messages`: the ASGI messages of the response, recorded for the response cache
      (`registry.http.answer_cache`); None: they are not recorded."""

    __slots__ = (
        "_headers",
        "_query",
        "_receive",
        "_send",
        "allowed_methods",
        "base_url",
        "body_memory",
        "headers_read",
        "kind",
        "limits",
        "method",
        "namespace",
        "pull",
        "registry",
        "repo",
        "resource_id",
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
        # Sets the attributes of the base class here: a call of its constructor would slow down every request.
        self.principal = UNAUTHENTICATED
        self.requested_name = _NO_NAME
        client = scope.get("client")
        self.address = client[0] if client else ""
        self.request_id = request_id_of(scope["headers"])
        self.notice = None
        self.announced_blob = None  # upload handlers set this to what the request states about its blob
        self.cache_state = ""
        self.upstream = ""
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
        self.resource_id = ""
        self.pull: Pull | None = None
        self.headers_read: set[bytes] = set()
        self.sent_messages: list[Message] | None = None
        self._headers: list[Header] = scope["headers"]
        self._query: Query | None = None
        self._receive = receive
        self._send = send

    # The request

    def headers(self, name: bytes) -> list[bytes]:
        """Returns all values of a request header, in the order in which they were sent. `name` is in lower case."""
        self.headers_read.add(name)
        return [value for key, value in self._headers if key == name]

    def header(self, name: bytes) -> bytes | None:
        """Returns the first value of a request header. Returns None if the request does not have the header. `name` is
        in lower case."""
        self.headers_read.add(name)
        for key, value in self._headers:
            if key == name:
                return value
        return None

    @property
    def query(self) -> Query:
        """The parameters in the query string. Raises RequestInvalid if the query string cannot be parsed."""
        if self._query is None:
            self._query = Query(self.scope.get("query_string", b""))
        return self._query

    @property
    def length(self) -> int | None:
        """The length of the request's body in bytes. 0: the request has no body. None: the length is unknown, because
        the body has chunked transfer coding."""
        value = self.header(b"content-length")
        if value is not None and value.isdigit():
            return int(value[:20])  # 20 digits exceed every limit, and `int` refuses texts of thousands of digits
        return None if self.header(b"transfer-encoding") else 0

    @property
    def has_account(self) -> bool:
        """Whether the request was authenticated as an account."""
        return not self.principal.is_anonymous

    async def body(self) -> AsyncIterator[bytes | memoryview]:
        """Yields the request's body in pieces, as they arrive. Raises ClientGone if the client disconnects before the
        end of the body. The caller may store the memoryviews, because the server does not reuse their memory."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        receive = extension["receive"] if extension else self._receive_message
        has_more = True
        while has_more:
            received = await receive()
            if received is None:
                raise ClientGone
            chunks, has_more = received
            for chunk in chunks:
                yield chunk

    def take_whole_body(self) -> bytes | None:
        """Returns the whole body without waiting. Returns None if the server has not received all bytes, or does not
        have the extension `entrepot.body`. If this returns a body, the caller must not call `body` afterwards."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        take = extension.get("take_whole") if extension else None
        pieces = take() if take else None
        return None if pieces is None else b"".join(pieces)

    async def _receive_message(self) -> tuple[Sequence[bytes], bool] | None:
        """Receives one ASGI message, on a server without the extension `entrepot.body`. Returns the message's piece of
        the body in a list, and whether more pieces follow. Returns None if the client has disconnected."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        data = message.get("body")
        return [data] if data else [], message.get("more_body", False)

    @property
    def is_disconnected(self) -> bool:
        """Whether the server has already seen the client disconnect."""
        extension = (self.scope.get("extensions") or {}).get(_BODY_EXTENSION)
        return bool(extension and extension["is_disconnected"]())

    async def wait_disconnected(self) -> None:
        """Waits until the client has disconnected. Discards everything that the client sends until then."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The response

    async def send(self, message: Message) -> None:
        """Sends one ASGI message. Records the message if the response is recorded for the response cache."""
        self.response_started = True
        await self._send(message)
        if self.sent_messages is not None:
            self.sent_messages.append(message)
            if message.get("more_body"):
                self.sent_messages = None  # a streamed response is not cached, and must not stay in memory

    async def send_head(self, status: int, headers: Iterable[Header]) -> None:
        """Sends the status and the headers. If the client has named the upstream by `ns`, the header OCI-Namespace
        repeats `ns`. The caller must send the body next, even if the body is empty."""
        if self.namespace is not None:
            headers = (*headers, (b"oci-namespace", self.namespace.encode("ascii")))
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [API_VERSION, NO_SNIFF, (REQUEST_ID_NAME, self.request_id.encode()), *headers],
            }
        )

    async def send_part(self, body: bytes, *, more: bool = False) -> None:
        """Sends a part of the body. `more`: whether further parts follow. If `more` is False, the response ends."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def send_empty(self, status: int, *headers: Header) -> None:
        """Sends a response without a body. 204 and 304 have no Content-Length (RFC 9110, 8.6)."""
        await self.send_head(status, headers if status in (204, 304) else (*headers, ZERO_LENGTH))
        await self.send_part(b"")

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends a response whose body is `body`. For a HEAD, sends the length of the body, but not the body."""
        await self.send_head(status, (*headers, (b"content-length", b"%d" % len(body))))
        await self.send_part(b"" if self.method == "HEAD" else body)

    def location(self, *parts: str) -> bytes:
        """Returns the value of a Location header: a URL with the repository's name and the `ns` that the client used.
        `parts`: the path segments after the repository's name."""
        query = f"?ns={self.namespace}" if self.namespace else ""
        return f"{self.base_url}/v2/{self.requested_name}/{'/'.join(parts)}{query}".encode("ascii")

    def next_page_link(self, path: str, parameters: dict[str, str]) -> Header:
        """Returns the Link header with the URL of a list's next page: `path`, with `parameters` and the client's `ns`
        as its query."""
        if self.namespace:
            parameters = {"ns": self.namespace, **parameters}
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return b"link", f'<{path}?{query}>; rel="next"'.encode("ascii")

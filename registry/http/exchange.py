"""One request and its answer, as handlers see them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from registry.http.limits import Limits
from registry.http.query import Query
from storage.content import Actor
from storage.interface import Registry
from storage.names import RepositoryName

if TYPE_CHECKING:
    from registry.http.intake import Intake

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

ACTING: ContextVar[Exchange | None] = ContextVar("acting", default=None)
"""The exchange a call on a registry is made for: logs say whose call it was, of reads too."""

_NOBODY: Final = Actor().name
_NO_NAME: Final = str.__new__(RepositoryName)
_USER_AGENT = 256
"""Characters of a User-Agent that are kept."""


def random_id() -> str:
    """A request's id."""
    return os.urandom(8).hex()


class ClientGone(Exception):
    """The client closed the connection before its request was whole. Nobody is left to answer."""


class Exchange:
    """A request, what it is about, and the way back.

    `kind`, `repo` and `item` (the path's last part) are set by the API; `started` says that a status has been sent.
    `asked` is the repository's name as the client wrote it (empty where it speaks of none), `namespace` the upstream
    that it named beside it (`ns`). `name` is who acts; `let_in` says that they have shown who they are, be it nobody in
    particular, or need not. `looked_at` holds the names of the headers that were asked for. `sent` and `calls` are what
    was sent, unless it came in parts, and what tells of the calls that were made, where somebody wants to know
    (`registry.http.ready`).
    """

    __slots__ = (
        "_headers",
        "_query",
        "_receive",
        "_send",
        "allowed",
        "asked",
        "base",
        "calls",
        "intake",
        "item",
        "kind",
        "let_in",
        "limits",
        "looked_at",
        "method",
        "name",
        "namespace",
        "registry",
        "repo",
        "request_id",
        "scope",
        "sent",
        "started",
    )

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        base: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        intake: Intake,
    ) -> None:
        self.registry = registry
        self.limits = limits
        self.intake = intake
        self.base = base
        self.scope = scope
        self.method: str = scope["method"]
        self.request_id = random_id()
        self.started = False
        self.allowed: Sequence[str] = ()
        self.kind = ""
        self.repo: RepositoryName = _NO_NAME
        self.asked: RepositoryName = _NO_NAME
        self.namespace: str | None = None
        self.name = _NOBODY
        self.let_in = True
        self.item = ""
        self.looked_at: set[bytes] = set()
        self.sent: list[Message] | None = None
        self.calls: list[Callable[[str, str, str], None]] | None = None
        self._headers: list[Header] = scope["headers"]
        self._query: Query | None = None
        self._receive = receive
        self._send = send

    # -- what came

    def headers(self, name: bytes) -> list[bytes]:
        """Each value of a header, in order. `name` is in lower case."""
        self.looked_at.add(name)
        return [value for key, value in self._headers if key == name]

    def header(self, name: bytes) -> bytes | None:
        """A header's first value."""
        self.looked_at.add(name)
        for key, value in self._headers:
            if key == name:
                return value
        return None

    @property
    def query(self) -> Query:
        """Raises RequestInvalid for a query that cannot be read."""
        if self._query is None:
            self._query = Query(self.scope.get("query_string", b""))
        return self._query

    @property
    def length(self) -> int | None:
        """The body's length in bytes; None where it is not known before (chunked transfer coding)."""
        value = self.header(b"content-length")
        if value is not None and value.isdigit():
            return int(value[:20])
        return None if self.header(b"transfer-encoding") else 0

    @property
    def named(self) -> bool:
        """An account acts, not just anybody."""
        return self.name != _NOBODY

    @property
    def address(self) -> str:
        """The client's; empty where it has none."""
        client = self.scope.get("client")
        return client[0] if client else ""

    @property
    def actor(self) -> Actor:
        agent = (self.header(b"user-agent") or b"")[:_USER_AGENT].decode("latin-1")
        return Actor(self.name, self.address, self.request_id, agent)

    async def body(self) -> AsyncIterator[bytes | memoryview]:
        """The body as it comes. Raises ClientGone when it ends early. The views are the taker's to keep: nobody writes
        to their memory again."""
        extension = (self.scope.get("extensions") or {}).get("entrepot.body")
        receive = extension["receive"] if extension else self._receive_copied
        more = True
        while more:
            came = await receive()
            if came is None:
                raise ClientGone
            pieces, more = came
            for piece in pieces:
                yield piece

    def take_whole_body(self) -> bytes | None:
        """Takes the whole body at once, if all of it has been received already; else takes nothing and returns None.
        Never waits. Servers without the extension `entrepot.body` cannot tell, so the answer is None."""
        extension = (self.scope.get("extensions") or {}).get("entrepot.body")
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
    def left(self) -> bool:
        """Whether the server knows already that the client has left."""
        extension = (self.scope.get("extensions") or {}).get("entrepot.body")
        return bool(extension and extension["left"]())

    async def gone(self) -> None:
        """Returns when the client has left. What it still sends is thrown away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # -- the way back

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)
        if self.sent is not None:
            self.sent.append(message)
            if message.get("more_body"):
                self.sent = None  # nobody keeps it in parts: they would stay in memory until the last one has left

    def locate(self, *parts: str) -> bytes:
        """The address of something in this repository, for Location: under the name the client uses."""
        scope = f"?ns={self.namespace}" if self.namespace else ""
        return f"{self.base}/v2/{self.asked}/{'/'.join(parts)}{scope}".encode("ascii")

    def link(self, path: str, parameters: dict[str, str]) -> Header:
        """The Link header that leads to a list's next page."""
        if self.namespace:
            parameters = {"ns": self.namespace, **parameters}
        asked = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return b"link", f'<{path}?{asked}>; rel="next"'.encode("ascii")

"""Types of the ASGI interface (ASGI 3.0), and functions that read facts about a request from its scope.

A *scope* is the dictionary in which the server describes a request to the application. The *lifespan state* is a
dictionary that the server passes to the application at the application's start (ASGI Lifespan Protocol 2.0).
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from registry.request import make_actor
from storage.content import Actor

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]
"""Name, in lower case, and value of an HTTP header."""
REQUEST_NOTES_EXTENSION: Final = "entrepot.request"
"""The key of a dictionary in a scope's `extensions`. The application stores facts about the request in this dictionary,
and reads them when the server reports the end of the request (`registry.server.connection.request_reports`). Only our
server provides the dictionary."""
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=-]{1,64}")
"""Matches the request ids that are accepted from clients."""
_TRACEPARENT: Final = re.compile(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
STOPPING_STATE: Final = "entrepot.stopping"
"""The key in the lifespan state under which our server gives the application an `asyncio.Event`. The server sets the
event when it stops, so that responses without an end, such as streams of events, can end."""

ENDS_ON_HALF_CLOSE: Final = "entrepot.ends_on_half_close"
"""A key of the message `http.response.start`, for endless responses such as a stream of events. If its value is True,
the server ends the response when the client shuts down its sending side, because such a client has probably closed the
connection. Otherwise the server would find out only when it sends something."""
COUNTS_STATE: Final = "entrepot.server_counts"
"""The key in the lifespan state under which our server gives the application a function that returns `ServerCounts`."""


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """The numbers of connections and requests of one server process. `connections`: open connections.
    `max_connections`: limit of open connections; None if it is not known yet. `requests`: requests in progress.
    `answered`: responses since the start of the process."""

    connections: int = 0
    max_connections: int | None = None
    requests: int = 0
    answered: int = 0


def request_id_of(headers: Iterable[Header]) -> str:
    """Returns the id of a request: the value of the X-Request-Id header, or 16 random hex digits if the header is
    missing or its value is not accepted. Long values and unusual characters are not accepted, because the id appears in
    logs, in the audit log and in the response."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    # `os.urandom` would cost a system call. Ids need not be secret, and Python seeds `random` anew in a forked process.
    return f"{random.getrandbits(64):016x}"


def trace_id_of(headers: Iterable[Header]) -> str:
    """Returns the trace id in the traceparent header (W3C Trace Context, 3.2): 32 hex digits, or an empty string if
    there is no valid traceparent header."""
    for name, value in headers:
        if name == b"traceparent" and (found := _TRACEPARENT.fullmatch(value)) and found[1] != b"0" * 32:
            return found[1].decode("ascii")
    return ""


def raw_path(scope: Scope) -> bytes:
    """Returns the percent-encoded path of a request. If the scope has `raw_path`, returns `raw_path`, which is the path
    as the client sent it. Otherwise, percent-encodes `path`, in which the server has stored the decoded path."""
    raw: bytes | None = scope.get("raw_path")
    return raw if raw is not None else quote(scope["path"]).encode("ascii")


def is_distribution_path(path: bytes) -> bool:
    """Returns whether a percent-encoded path belongs to the distribution API: `/v2`, or a path that begins with
    `/v2/`."""
    return path.startswith(b"/v2") and (len(path) == 3 or path[3] == 0x2F)  # 0x2F is '/'


def client_address(scope: Scope) -> str:
    """Returns the client's IP address, or an empty string if the scope has none."""
    client = scope.get("client")
    return client[0] if client else ""


def unauthenticated_actor(scope: Scope) -> Actor:
    """Returns the actor that the audit log names for an unauthenticated request outside `/v2`: the name of anonymous
    clients, the client's address, the id of the request and the User-Agent. If the scope has no request id, stores the
    id in the scope."""
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        state["request_id"] = request_id_of(scope["headers"])
    return make_actor(Actor().name, client_address(scope), state["request_id"], agent)

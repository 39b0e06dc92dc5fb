"""ASGI's types, and what a scope says about a request."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from registry.request import make_actor
from storage.content import Actor

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]


def new_request_id() -> str:
    """Returns a random id for a request."""
    return os.urandom(8).hex()


def raw_path(scope: Scope) -> bytes:
    """Returns the path as the client sent it, still percent-encoded."""
    raw: bytes | None = scope.get("raw_path")
    return raw if raw is not None else quote(scope["path"]).encode("ascii")


def is_distribution(path: bytes) -> bool:
    """Returns whether a raw path is `/v2` or below it."""
    return path.startswith(b"/v2") and (len(path) == 3 or path[3] == 0x2F)


def client_address(scope: Scope) -> str:
    """Returns the client's IP address; empty where the connection has none."""
    client = scope.get("client")
    return client[0] if client else ""


def unauthenticated_actor(scope: Scope) -> Actor:
    """Returns where a request beside `/v2` comes from, before its caller is authenticated, with a new request id."""
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    return make_actor(Actor().name, client_address(scope), new_request_id(), agent)

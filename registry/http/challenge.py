"""The interface of authenticators, and the challenge that a client gets with 401.

Sources: RFC 6750, section 3 (Bearer challenges); RFC 9110, 11.6.1; Distribution's "Token Authentication Specification"
for realm, service and scope.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Final, Protocol

from registry.http.asgi import Header, Scope
from registry.http.exchange import Exchange
from registry.request import RequestContext
from storage.errors import RegistryError, Unauthorized
from storage.names import RepositoryName

_HOST: Final = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LONGEST_HOST: Final = 255
_QUOTABLE: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]*")
"""Characters that a quoted string holds without escapes (RFC 9110, 5.6.4)."""
_BY_METHOD: Final = {"GET": "pull", "HEAD": "pull", "DELETE": "delete"}
_WRITES: Final = "pull,push"


class Authenticator(Protocol):
    """Finds out who makes a request."""

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the request's principal from its headers. Raises Unauthorized, TooManyRequests. A cancellation leaves
        nothing."""
        ...

    def credential_key(self, shown: Sequence[bytes], address: str) -> Hashable | None:
        """Returns a key for the principal of requests from `address` with these `Authorization` headers, valid while
        the store does not change. None: the principal has to be found out for each request."""
        ...

    def check_push(self, repo: RepositoryName) -> None:
        """Raises what the registry would refuse a push to `repo` with: Unauthorized, Denied. Called before a body is
        read, where the call on the registry comes after it."""
        ...


class Challenges:
    """Makes `WWW-Authenticate` headers, which say where a client gets a token and for what. `service`: the name that
    tokens are for. Without a `public_url`, the realm is at the host that the client used, if it has the form
    HOST[:PORT]."""

    def __init__(self, public_url: str | None, service: str) -> None:
        """Raises ValueError for a `service` that a header cannot hold."""
        if not _QUOTABLE.fullmatch(service):
            raise ValueError(f"{service!r} cannot be a service's name: it has characters that have to be escaped")
        self._base = public_url.rstrip("/").encode("ascii") if public_url else None
        self._service = service.encode("ascii")

    def header(self, exchange: Exchange, error: Unauthorized) -> Header:
        """Returns the challenge for an exchange that is answered with `error`."""
        value = b'Bearer realm="%b/token",service="%b"' % (self._base or _base_url_of(exchange), self._service)
        if scope := scope_of(exchange):
            value += b',scope="%b"' % scope.encode("ascii")
        if error.reason is not None:
            value += b',error="%b"' % error.reason.encode("ascii")
        return b"www-authenticate", value


def scope_of(exchange: Exchange) -> str:
    """Returns the scope that a token needs for this request; empty: none in particular."""
    if exchange.kind == "catalog":
        return "registry:catalog:*"
    if not exchange.requested_name:
        return ""
    writes = exchange.kind in ("uploads", "session")
    actions = _WRITES if writes else _BY_METHOD.get(exchange.method, _WRITES)
    scope = f"repository:{exchange.requested_name}:{actions}"
    if exchange.kind == "uploads" and (source := _mounted_from(exchange)):
        scope += f" repository:{source}:pull"
    return scope


def _mounted_from(exchange: Exchange) -> str | None:
    try:
        given = exchange.query.one("from") if exchange.query.all("mount") else None
        return None if given is None else RepositoryName(given)
    except RegistryError:  # a request without a token need not be valid otherwise
        return None


def _base_url_of(exchange: Exchange) -> bytes:
    return base_url_of(exchange.scope, exchange.header(b"host"))


def base_url_of(scope: Scope, host: bytes | None) -> bytes:
    """Returns the server's URL, as the client sees it that sent `host`: `https://registry.example.com`."""
    if host is None or len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        host = _own_address(scope)
    return b"%b://%b" % (b"https" if scope.get("scheme") == "https" else b"http", host)


def _own_address(scope: Scope) -> bytes:
    """Returns the address that the connection came to."""
    server = scope.get("server")
    name, port = (server[0], server[1]) if server else ("localhost", None)
    text = f"[{name}]" if ":" in name else name
    return (f"{text}:{port}" if port else text).encode("ascii", "replace")

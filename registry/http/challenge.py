"""Who acts in a request, and what a client is told that has to show more.

Sources: RFC 6750, section 3 (Bearer challenges); RFC 9110, 11.6.1; Distribution's "Token Authentication Specification"
for realm, service and scope.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Final, Protocol

from registry.http.exchange import Exchange, Header, Scope
from storage.errors import RegistryError, Unauthorized
from storage.names import RepositoryName

_HOST: Final = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LONGEST_HOST: Final = 255
_QUOTABLE: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]*")
"""What stands between quotes as it is (RFC 9110, 5.6.4)."""
_BY_METHOD: Final = {"GET": "pull", "HEAD": "pull", "DELETE": "delete"}
_WRITES: Final = "pull,push"


class Authenticator(Protocol):
    """What turns a request into who acts in it."""

    async def authenticate(self, exchange: Exchange) -> None:
        """From here on all that is done for this exchange is done by who it shows to be; sets `exchange.name` and
        `exchange.is_admitted`. Raises Unauthorized, TooManyRequests: what it shows does not count. A cancellation
        leaves nothing."""
        ...

    def known(self, shown: Sequence[bytes], address: str) -> Hashable | None:
        """What stands for who acts in requests from `address` that show these `Authorization` headers, for as long as
        the store stays as it is; None: that has to be found out each time."""
        ...

    def check_push(self, repo: RepositoryName) -> None:
        """Raises what the registry would refuse a push to `repo` with, by who acts: Unauthorized, Denied. Asked where a
        body is read before the registry is."""
        ...


class Challenges:
    """`WWW-Authenticate`: where a token is to be had, and for what. `service` is the name that tokens are for. Without
    a `public_url`, the realm lies at the host the client used; one that is not HOST[:PORT] is not said back."""

    def __init__(self, public_url: str | None, service: str) -> None:
        """Raises ValueError: `service` cannot stand in a header."""
        if not _QUOTABLE.fullmatch(service):
            raise ValueError(f"{service!r} cannot be a service's name: it has characters that have to be escaped")
        self._base = public_url.rstrip("/").encode("ascii") if public_url else None
        self._service = service.encode("ascii")

    def header(self, exchange: Exchange, error: Unauthorized) -> Header:
        """For an answer to `exchange` that is `error`."""
        value = b'Bearer realm="%b/token",service="%b"' % (self._base or _base_url_of(exchange), self._service)
        if scope := scope_of(exchange):
            value += b',scope="%b"' % scope.encode("ascii")
        if error.reason is not None:
            value += b',error="%b"' % error.reason.encode("ascii")
        return b"www-authenticate", value


def scope_of(exchange: Exchange) -> str:
    """What a token has to be granted for this request; empty: nothing in particular."""
    if exchange.kind == "catalog":
        return "registry:catalog:*"
    if not exchange.asked:
        return ""
    writes = exchange.kind in ("uploads", "session")
    actions = _WRITES if writes else _BY_METHOD.get(exchange.method, _WRITES)
    scope = f"repository:{exchange.asked}:{actions}"
    if exchange.kind == "uploads" and (source := _mounted_from(exchange)):
        scope += f" repository:{source}:pull"
    return scope


def _mounted_from(exchange: Exchange) -> str | None:
    try:
        given = exchange.query.one("from") if exchange.query.all("mount") else None
        return None if given is None else RepositoryName(given)
    except RegistryError:  # what is refused for want of a token need not be right otherwise
        return None


def _base_url_of(exchange: Exchange) -> bytes:
    return base_url_of(exchange.scope, exchange.header(b"host"))


def base_url_of(scope: Scope, host: bytes | None) -> bytes:
    """The server's address as this client has it, which says that it is `host`: `https://registry.example.com`."""
    if host is None or len(host) > _LONGEST_HOST or not _HOST.fullmatch(host):
        host = _own_address(scope)
    return b"%b://%b" % (b"https" if scope.get("scheme") == "https" else b"http", host)


def _own_address(scope: Scope) -> bytes:
    """The one the connection came to."""
    server = scope.get("server")
    name, port = (server[0], server[1]) if server else ("localhost", None)
    text = f"[{name}]" if ":" in name else name
    return (f"{text}:{port}" if port else text).encode("ascii", "replace")

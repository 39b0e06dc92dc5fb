"""`Challenges` builds the WWW-Authenticate header of a 401. `Authenticator` is the interface of the object that
authenticates requests.

Two things are called scope here:

- The *ASGI scope* (`Scope`, `exchange.scope`) is the dictionary in which the server describes a request.
- The *token scope* (`scope_of`) is a text that says what a token must allow.

Sources: RFC 6750, section 3 (Bearer challenges); RFC 9110, 11.6.1; Distribution's "Token Authentication Specification"
for realm, service and scope.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Final, Protocol

from registry.asgi import Header, Scope
from registry.http.exchange import Exchange
from registry.request import RequestContext
from storage.errors import RegistryError, Unauthorized
from storage.names import RepositoryName

_HOST: Final = re.compile(rb"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
"""The form of a Host header that may appear in a challenge: a host name, an IPv4 address, or an IPv6 address in
brackets. A port may follow."""
_MAX_HOST_BYTES: Final = 255
"""Length of the longest Host header that may appear in a challenge. A host name has at most 253 characters (RFC 1035,
2.3.4)."""
_QUOTABLE: Final = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]*")
"""Text that a quoted string may contain without escapes (RFC 9110, 5.6.4)."""
_ACTION_BY_METHOD: Final = {"GET": "pull", "HEAD": "pull", "DELETE": "delete"}
"""The action that a token must allow, by the method of the request."""
_PUSH_ACTIONS: Final = "pull,push"
"""The actions that a token must allow for upload requests, and for methods that `_ACTION_BY_METHOD` does not
contain."""


class Authenticator(Protocol):
    """Finds the principal of a request: the account or anonymous client that makes the request."""

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the request's principal from its headers. Raises Unauthorized for a credential that is not valid, and
        TooManyRequests after too many failed logins. A cancellation leaves the principal as it was."""
        ...

    def credential_key(self, authorization: Sequence[bytes], address: str, /) -> Hashable | None:
        """Returns a key for the principal of a request. `authorization`: the values of the request's Authorization
        header. `address`: the client's IP address. While the registry's store does not change, requests with the same
        key have the same principal. Returns None if `authenticate` must be called for each request with these
        values."""
        ...

    def check_push(self, repo: RepositoryName) -> None:
        """Raises Unauthorized or Denied if the current request is not allowed to push to `repo`. Call it for a manifest
        PUT before the body is received. The registry checks the right again when the manifest is complete."""
        ...


class Challenges:
    """Builds WWW-Authenticate headers (challenges). A challenge tells the client the URL that issues tokens (realm),
    and what the token must be valid for (service and scope).

    `public_url`: the URL of this registry, with which the realm begins; None: the realm begins with the URL at which
    the client reached this registry (`base_url_of`). `service`: the name of this registry in tokens."""

    def __init__(self, public_url: str | None, service: str) -> None:
        """Raises ValueError if `service` has characters that must be escaped in a quoted string."""
        if not _QUOTABLE.fullmatch(service):
            raise ValueError(f"{service!r} cannot be a service's name: it has characters that must be escaped")
        self._base_url = public_url.rstrip("/").encode("ascii") if public_url else None
        self._service = service.encode("ascii")

    def header(self, exchange: Exchange, error: Unauthorized) -> Header:
        """Returns the WWW-Authenticate header of the 401 response to a request that failed with `error`."""
        base_url = self._base_url or base_url_of(exchange.scope, exchange.header(b"host"))
        value = b'Bearer realm="%b/token",service="%b"' % (base_url, self._service)
        if scope := scope_of(exchange):
            value += b',scope="%b"' % scope.encode("ascii")
        if error.reason is not None:  # an error code of RFC 6750, such as `invalid_token`
            value += b',error="%b"' % error.reason.encode("ascii")
        return b"www-authenticate", value


def scope_of(exchange: Exchange) -> str:
    """Returns the token scope that this request needs, such as `repository:team/app:pull`. Returns an empty string if a
    token with any token scope is accepted."""
    if exchange.kind == "catalog":
        return "registry:catalog:*"
    if not exchange.requested_name:
        return ""
    # "uploads": a POST that starts an upload or mounts a blob. "session": a request to an upload session.
    is_upload = exchange.kind in ("uploads", "session")
    actions = _PUSH_ACTIONS if is_upload else _ACTION_BY_METHOD.get(exchange.method, _PUSH_ACTIONS)
    scope = f"repository:{exchange.requested_name}:{actions}"
    if exchange.kind == "uploads" and (source := _mount_source(exchange)):
        scope += f" repository:{source}:pull"
    return scope


def _mount_source(exchange: Exchange) -> str | None:
    """Returns the repository from which the request asks to mount a blob. Returns None if the request is no mount,
    names no source repository, or has an invalid query."""
    try:
        source = exchange.query.one("from") if exchange.query.all("mount") else None
        return None if source is None else RepositoryName(source)
    except RegistryError:  # the handler reports the invalid query when the client has a token
        return None


def base_url_of(scope: Scope, host: bytes | None) -> bytes:
    """Returns the URL at which the client reached this server, such as `https://registry.example.com`. `scope`: the
    ASGI scope of the request. `host`: the Host header. If `host` is None, too long, or not of the form HOST[:PORT], the
    URL has the IP address and port of this server."""
    if host is None or len(host) > _MAX_HOST_BYTES or not _HOST.fullmatch(host):
        host = _own_address(scope)
    return b"%b://%b" % (b"https" if scope.get("scheme") == "https" else b"http", host)


def _own_address(scope: Scope) -> bytes:
    """Returns the IP address and port at which the server accepted the client's connection, in the form of a Host
    header. Returns `localhost` if the address is unknown."""
    server = scope.get("server")
    name, port = (server[0], server[1]) if server else ("localhost", None)
    text = f"[{name}]" if ":" in name else name
    return (f"{text}:{port}" if port else text).encode("ascii", "replace")

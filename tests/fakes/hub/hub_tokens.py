"""The fake Hub's token service, and the check of the Authorization header of requests (token specification of CNCF
Distribution)."""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass, field

from .hub_connection import HubRequest
from .switches import Switches


@dataclass
class HubToken:
    """An issued bearer token."""

    scopes: frozenset[str]
    """Scopes such as `repository:library/ubuntu:pull`. Each has one action."""
    expires: float
    """When the token expires, by the monotonic clock."""
    uses: int | None
    """Number of requests that the token still allows; None: no limit."""


@dataclass(frozen=True)
class TokenRefusal:
    """The reason why a request is not authorized."""

    error: str = ""
    """The `error` of the challenge; empty if the request had no token."""
    scope: str = ""


@dataclass
class HubTokens:
    """The token service. `issued`: the issued tokens by their text."""

    issued: dict[str, HubToken] = field(default_factory=dict)

    def issue(self, request: HubRequest, switches: Switches) -> dict[str, object] | None:
        """Issues a token and returns the token service's response; None if the login is wrong."""
        parameters = request.form if request.method == "POST" else request.query
        login = basic(request.headers.get("authorization", ""))
        if request.method == "POST":
            login = (parameters.get("username", ""), parameters.get("password", ""))
        if login is not None and login != (switches.username, switches.password):
            return None
        if login is None and "authorization" in request.headers:
            return None  # the header is not a valid Basic Authorization header
        scopes = frozenset(
            scope for scope in parameters.get("scope", "").split() if login is not None or _public(scope, switches)
        )
        text = secrets.token_urlsafe(24)
        self.issued[text] = HubToken(scopes, time.monotonic() + switches.token_seconds, switches.token_uses)
        seconds = int(switches.token_seconds)
        issued_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {"token": text, "access_token": text, "expires_in": seconds, "issued_at": issued_at}

    def refuse(self, request: HubRequest, repo: str, switches: Switches) -> TokenRefusal | None:
        """Returns the reason why a request is refused; None if it is authorized. `repo`: the requested repository;
        empty for paths outside repositories."""
        authorization = request.headers.get("authorization", "")
        scope = f"repository:{repo}:pull" if repo else ""
        if switches.auth == "off":
            return None
        if switches.auth == "basic":
            login = basic(authorization)
            return None if login == (switches.username, switches.password) else TokenRefusal()
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return TokenRefusal(scope=scope)
        token = self.issued.get(text.strip())
        if token is None or token.expires <= time.monotonic() or token.uses == 0:
            return TokenRefusal("invalid_token", scope)
        if token.uses is not None:
            token.uses -= 1
        if scope and not any(each.startswith(f"repository:{repo}:") for each in token.scopes):
            return TokenRefusal("insufficient_scope", scope)
        return None


def basic(authorization: str) -> tuple[str, str] | None:
    """Returns the user and the password in a Basic Authorization header (RFC 7617); None if it is not a valid one."""
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(text, validate=True).decode().partition(":")
    except ValueError:
        return None
    return (user, password) if colon else None


def _public(scope: str, switches: Switches) -> bool:
    """Returns whether a client without a login gets this scope: it names a repository that is not private."""
    # The second part of a scope is the name of the repository. A scope without a second part is refused.
    return scope.split(":")[1:2] != [] and scope.split(":")[1] not in switches.private

"""Authenticators: find the principal of a request from its headers.

The principal is the account, or anonymous client, that makes the request, with its rights.

`HeaderAuthenticator` serves the distribution API (`/v2`). It usually makes one look-up in the cache of verified
credentials, which holds their principals (`registry.auth.credential_cache`). Each request reads the *epoch*, a number
in the store that every change of rights increases, so a change by any worker takes effect with the next request
(`registry.auth.revocation_across_workers`).

`ManagementAuthenticator` serves the management API. It accepts Basic with a password or an API token, Bearer with an
API token, and the session cookie of a login at the OpenID provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from registry.auth.authorization_header import REFUSED, Basic, Bearer, parse_authorization
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.revocation_across_workers import principal_of
from registry.auth.rights.guard import Guarded
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, UNPRIVILEGED, Identity, Principal, open_principal
from registry.auth.token import api_tokens
from registry.auth.token.login_sessions import SESSION_ENDED, LoginSessions
from registry.request import RequestContext
from storage.content import Actor
from storage.errors import Unauthorized
from storage.names import RepositoryName

INVALID_TOKEN: Final = "invalid_token"
"""The error code in the challenge (`WWW-Authenticate`) if the client needs a new token (RFC 6750, 3.1)."""


class HeaderAuthenticator:
    """Authenticates by the `Authorization` header, and implements `registry.http.www_authenticate.Authenticator`.
    Ignores the header while the registry has no accounts, because some clients send their login for another
    registry."""

    def __init__(
        self,
        guard: Guarded,
        policy: Policy,
        credentials: CredentialVerifier,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock` returns seconds since 1970."""
        self._guard = guard
        self._policy = policy
        self._credentials = credentials
        self._current_epoch = policy.accounts.epoch
        self._clock = clock
        self._cache = credentials.cache
        self._epoch: int | None = None
        """The epoch at the last request; None before the first."""
        self._anonymous = UNPRIVILEGED
        """The principal of requests without credentials, under that epoch."""

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the principal of the request. Raises Unauthorized for a credential that is not valid, TooManyRequests
        after too many failed logins."""
        epoch = self._current_epoch()
        if epoch != self._epoch:
            await self._policy.prepare(ANONYMOUS)
            epoch = self._current_epoch()
            self._anonymous, self._epoch = self._policy.anonymous(), epoch
        principal = self._anonymous
        if not principal.open:
            headers = request.headers(b"authorization")
            if headers:
                found = self._cached(self._cache.key_of(headers[0], request.address))
                principal = await self._verify(headers, request) if found is None or len(headers) > 1 else found
        request.principal = principal

    def credential_key(self, headers: Sequence[bytes], address: str) -> bytes | None:
        """Returns a key under which an answer to these Authorization headers may be cached until the store changes.
        Returns an empty key for a request without credentials. Returns None if no answer may be cached: the credential
        is not in the cache, or also depends on something outside the store."""
        if self._anonymous.open or not headers:
            return b""
        key = self._cache.key_of(headers[0], address)
        found = self._cached(key)
        return None if found is None or found.identity.stamp is not None or len(headers) > 1 else key

    def check_push(self, repo: RepositoryName) -> None:
        """Checks that the principal of the current request may push to `repo`. Raises Unauthorized, Denied."""
        self._guard.check_push(repo)

    def _cached(self, key: bytes) -> Principal | None:
        """Returns the cached principal of a header if it is valid under the epoch of the last request, or None."""
        found = self._cache.get(key)
        if found is None or found.principal is None or found.principal.epoch != self._epoch:
            return None
        if found.until <= self._clock():
            return None
        if found.identity.stamp and not self._credentials.cached_credential_check.is_current(found):
            return None
        return found.principal

    async def _verify(self, headers: list[bytes], request: RequestContext) -> Principal:
        """Returns the principal of a header that is not cached. Raises Unauthorized, TooManyRequests."""
        credential = parse_authorization(headers)
        if credential is None:
            return self._anonymous
        try:
            return await principal_of(self._policy, await self._credentials.verify(credential, request.actor))
        except Unauthorized as error:
            if isinstance(credential, Bearer):
                raise Unauthorized(error.message, reason=INVALID_TOKEN) from None
            raise


class OpenAuthenticator:
    """Authenticator of a registry without a store of accounts. Every request may pull, push and delete, except below
    the `guarded` upstreams (first segments of names)."""

    def __init__(self, guard: Guarded, guarded: Iterable[str] = ()) -> None:
        self._guard = guard
        self._principal = open_principal(guarded)

    def credential_key(self, headers: Sequence[bytes], address: str) -> bytes:
        """Returns an empty key: all requests get the same answers."""
        return b""

    def check_push(self, repo: RepositoryName) -> None:
        """Checks that the current request may push to `repo`. Raises Unauthorized."""
        self._guard.check_push(repo)

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the principal of the request."""
        request.principal = self._principal


class ManagementAuthenticator:
    """Authenticates callers of the management API. While the registry has no accounts, ignores all credentials, and
    every caller is anonymous."""

    def __init__(self, policy: Policy, credentials: CredentialVerifier, sessions: LoginSessions) -> None:
        self._policy = policy
        self._credentials = credentials
        self._sessions = sessions

    async def authenticate(
        self, headers: Sequence[tuple[bytes, bytes]], by: Actor, session: str | None = None
    ) -> Principal:
        """Returns the principal of a caller. `headers` are the request's headers, `session` is the text of the session
        cookie; an Authorization header has precedence. Raises Unauthorized, TooManyRequests."""
        if not self._policy.closed:
            return self._policy.anonymous()
        match parse_authorization([value for name, value in headers if name == b"authorization"]):
            case Bearer(token) if api_tokens.is_well_formed(token):
                return await self._api_token(token, by)
            case Basic() | Bearer() as credential:
                return await principal_of(self._policy, await self._credentials.verify(credential, by))
        return await (self._principal(ANONYMOUS) if session is None else self._session_principal(session))

    async def _principal(self, identity: Identity) -> Principal:
        await self._policy.prepare(identity)
        return self._policy.principal(identity)

    async def _session_principal(self, text: str) -> Principal:
        """Returns the principal of a session. Raises Unauthorized if the session has ended."""
        try:
            return await self._principal(self._sessions.verify(text))
        except Unauthorized:
            raise Unauthorized(SESSION_ENDED) from None

    async def _api_token(self, text: str, by: Actor) -> Principal:
        """Returns the principal of an API token. Raises Unauthorized for a refresh token, which only `/token`
        accepts."""
        identity = await self._credentials.verify_refresh(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(REFUSED)
        return await self._principal(identity)

"""Authenticators find the principal of a request from the headers of the request. The *principal* is the account or
anonymous client that sends the request, together with its rights.

- `HeaderAuthenticator` serves the distribution API (`/v2`). It takes most principals from a cache
  (`registry.auth.credential_cache`).
- `OpenAuthenticator` serves the distribution API of a registry that cannot have accounts.
- `ManagementAuthenticator` serves the management API (`/api/v1`). It accepts all credentials that the distribution API
  accepts. In addition, it accepts an API token as Bearer, and the session cookie of a login with a browser.

The *epoch* is a number in the store that every change of rights increases. A cached principal is used only if its
rights were read at the current epoch. Therefore, a change of rights takes effect with the next request to any worker
(`registry.auth.revocation_across_workers`).

`HeaderAuthenticator` and `ManagementAuthenticator` ignore all credentials while the registry is *open*. The registry is
open if it has never had an account and the settings name no htpasswd file, no token issuer and no OpenID provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from registry.auth.authorization_header import INVALID_CREDENTIALS, Basic, Bearer, parse_authorization
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
"""The error code in the challenge (`WWW-Authenticate`) for a bearer token that is not valid. The code tells the client
to request a new token (RFC 6750, 3.1)."""


class HeaderAuthenticator:
    """Authenticates by the Authorization header. Implements `registry.http.www_authenticate.Authenticator`. While the
    registry is open, ignores the header: some clients send a login that belongs to another registry."""

    def __init__(
        self,
        guard: Guarded,
        policy: Policy,
        credential_verifier: CredentialVerifier,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock` returns seconds since 1970."""
        self._guard = guard
        self._policy = policy
        self._credential_verifier = credential_verifier
        self._read_epoch = policy.accounts.epoch
        self._clock = clock
        self._cache = credential_verifier.cache
        self._last_epoch: int | None = None
        """The epoch that the last request has read; None before the first request."""
        self._anonymous = UNPRIVILEGED
        """The principal of requests without a credential, with its rights at `_last_epoch`."""

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the principal of the request. Raises Unauthorized for a credential that is not valid. Raises
        TooManyRequests after too many failed logins, or if too many passwords wait to be hashed."""
        epoch = self._read_epoch()
        if epoch != self._last_epoch:
            await self._policy.prepare(ANONYMOUS)
            epoch = self._read_epoch()  # the epoch may have changed again during `prepare`
            self._anonymous, self._last_epoch = self._policy.anonymous(), epoch
        principal = self._anonymous
        if not principal.is_registry_open:
            headers = request.headers(b"authorization")
            if headers:
                cached_principal = self._find_cached_principal(self._cache.key_of(headers[0], request.address))
                principal = (
                    await self._verify(headers, request)
                    if cached_principal is None or len(headers) > 1
                    else cached_principal
                )
        request.principal = principal

    def credential_key(self, headers: Sequence[bytes], address: str) -> bytes | None:
        """Returns a key for the principal of a request. The response cache (`registry.http.answer_cache`) uses the key
        as a part of its cache keys. While the store does not change, requests with the same key have the same
        principal. `headers` are the values of the Authorization headers, `address` is the client's address.

        Returns an empty key for all requests without a credential, and for all requests while the registry is open.
        Returns None if the response must not be cached:

        - The cache of verified credentials has no usable principal for the credential.
        - The validity of the credential depends on the htpasswd file or on the settings, which are not in the store.
        - There are several Authorization headers.
        """
        if self._anonymous.is_registry_open or not headers:
            return b""
        key = self._cache.key_of(headers[0], address)
        cached_principal = self._find_cached_principal(key)
        return (
            None if cached_principal is None or cached_principal.identity.stamp is not None or len(headers) > 1 else key
        )

    def check_push(self, repo: RepositoryName) -> None:
        """Raises Unauthorized or Denied if the principal of the current request (`registry.request.current_request`)
        may not push to `repo`."""
        self._guard.check_push(repo)

    def _find_cached_principal(self, key: bytes) -> Principal | None:
        """Returns the cached principal of the credential with the cache key `key`. Returns None if no principal is
        cached, if the principal's rights were read at another epoch than `_last_epoch`, or if the credential is not
        valid any more."""
        cached = self._cache.get(key)
        if cached is None or cached.principal is None or cached.principal.epoch != self._last_epoch:
            return None
        if cached.expires <= self._clock():
            return None
        # The stamp is a hash of the htpasswd file's line, or of the settings, that proved the identity. A change of the
        # file or of the settings does not change the epoch.
        if cached.identity.stamp and not self._credential_verifier.cached_credential_check.is_unexpired_and_unchanged(
            cached
        ):
            return None
        return cached.principal

    async def _verify(self, headers: list[bytes], request: RequestContext) -> Principal:
        """Verifies the credential of a request, and returns its principal. `headers` are the values of the
        Authorization headers. Raises Unauthorized if the credential is not valid, or if there are several headers.
        Raises TooManyRequests as `authenticate` does."""
        credential = parse_authorization(headers)
        if credential is None:
            return self._anonymous
        try:
            return await principal_of(self._policy, await self._credential_verifier.verify(credential, request.actor))
        except Unauthorized as error:
            if isinstance(credential, Bearer):
                raise Unauthorized(error.message, reason=INVALID_TOKEN) from None
            raise


class OpenAuthenticator:
    """The authenticator of a registry that cannot have accounts, because it has no store of accounts. Every request may
    pull, push and delete. `guarded_upstreams`: the names of mirrored registries whose repositories need a grant. This
    registry has no grants, so no request may use these repositories. For example, `ghcr.io` forbids `ghcr.io/app`."""

    def __init__(self, guard: Guarded, guarded_upstreams: Iterable[str] = ()) -> None:
        self._guard = guard
        self._principal = open_principal(guarded_upstreams)

    def credential_key(self, headers: Sequence[bytes], address: str) -> bytes:
        """Returns an empty key for all requests, because the response to a request does not depend on the client."""
        return b""

    def check_push(self, repo: RepositoryName) -> None:
        """Raises Unauthorized if the current request may not push to `repo`."""
        self._guard.check_push(repo)

    async def authenticate(self, request: RequestContext) -> None:
        """Sets the principal of the request, which is the same for all requests."""
        request.principal = self._principal


class ManagementAuthenticator:
    """Authenticates callers of the management API. While the registry is open, ignores all credentials, and every
    caller is anonymous."""

    def __init__(self, policy: Policy, credential_verifier: CredentialVerifier, sessions: LoginSessions) -> None:
        self._policy = policy
        self._credential_verifier = credential_verifier
        self._sessions = sessions

    async def authenticate(
        self, headers: Sequence[tuple[bytes, bytes]], by: Actor, session: str | None = None
    ) -> Principal:
        """Returns the principal of a caller. `headers` are the request's headers, with names in lower case. `by`
        describes the client, for the audit log. `session` is the text of the session cookie, or None if the request has
        no session cookie. Ignores the session cookie if the request has an Authorization header. Raises Unauthorized if
        the credential or the session is not valid. Raises TooManyRequests as `HeaderAuthenticator.authenticate`
        does."""
        if not self._policy.is_closed:
            return self._policy.anonymous()
        match parse_authorization([value for name, value in headers if name == b"authorization"]):
            case Bearer(token) if api_tokens.is_well_formed(token):
                return await self._api_token_principal(token, by)
            case Basic() | Bearer() as credential:
                return await principal_of(self._policy, await self._credential_verifier.verify(credential, by))
        return await (self._principal(ANONYMOUS) if session is None else self._session_principal(session))

    async def _principal(self, identity: Identity) -> Principal:
        await self._policy.prepare(identity)
        return self._policy.principal(identity)

    async def _session_principal(self, text: str) -> Principal:
        """Returns the principal of the session whose cookie contains `text`. Raises Unauthorized if the session is not
        valid, or has ended."""
        try:
            return await self._principal(self._sessions.verify(text))
        except Unauthorized:
            raise Unauthorized(SESSION_ENDED) from None

    async def _api_token_principal(self, text: str, by: Actor) -> Principal:
        """Returns the principal of the API token `text`. Raises Unauthorized if the token is not valid, or if it is a
        refresh token, which only `/token` accepts. `by` describes the client, for the audit log."""
        identity = await self._credential_verifier.verify_api_token(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(INVALID_CREDENTIALS)
        return await self._principal(identity)

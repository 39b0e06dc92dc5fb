"""Authenticators: find the principal of a request from its headers.

On the hot path this is one look-up in the cache of verified credentials, which holds the principal as well
(`registry.auth.credential_cache`). Every request reads the accounts' epoch; after a change the credential is checked
again and the principal is computed anew.

Callers of the management API authenticate by Basic (a password, or an API token in its place), by an API token as
Bearer, or by the session of a login at the OpenID provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from registry.auth.authorization_header import REFUSED, Basic, Bearer, parse_authorization
from registry.auth.credential_cache import VerifiedCredential
from registry.auth.credential_verifier import CredentialVerifier
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


async def principal_of(policy: Policy, verified: VerifiedCredential) -> Principal:
    """Returns the principal of a verified credential: the cached one, unless the store has changed since. Raises
    Unauthorized if the identity is not valid any more."""
    principal = verified.principal
    if principal is None or principal.epoch != policy.accounts.epoch():
        await policy.prepare(verified.identity)
        principal = verified.principal = policy.principal(verified.identity, checked_at=verified.epoch)
    return principal


class HeaderAuthenticator:
    """Authenticates by the `Authorization` header (`registry.http.challenge.Authenticator`). While there are no
    accounts, the header is ignored: some clients send the login for another registry."""

    def __init__(
        self,
        guard: Guarded,
        policy: Policy,
        credentials: CredentialVerifier,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._guard = guard
        self._policy = policy
        self._credentials = credentials
        self._epoch_now = policy.accounts.epoch
        self._clock = clock
        self._cache = credentials.cache
        self._epoch: int | None = None
        self._anonymous = UNPRIVILEGED

    async def authenticate(self, request: RequestContext) -> None:
        epoch = self._epoch_now()
        if epoch != self._epoch:
            await self._policy.prepare(ANONYMOUS)
            epoch = self._epoch_now()
            self._anonymous, self._epoch = self._policy.anonymous(), epoch
        principal = self._anonymous
        if not principal.open:
            shown = request.headers(b"authorization")
            if shown:
                found = self._cached(self._cache.key_of(shown[0], request.address))
                principal = await self._verify(shown, request) if found is None or len(shown) > 1 else found
        request.principal = principal

    def credential_key(self, shown: Sequence[bytes], address: str) -> bytes | None:
        """Returns the cache key of these headers, while their principal is cached and rests on the store alone."""
        if self._anonymous.open or not shown:
            return b""
        key = self._cache.key_of(shown[0], address)
        found = self._cached(key)
        return None if found is None or found.identity.stamp is not None or len(shown) > 1 else key

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    def _cached(self, key: bytes) -> Principal | None:
        """Returns the cached principal of a header, if it is current."""
        found = self._cache.get(key)
        if found is None or found.principal is None or found.principal.epoch != self._epoch:
            return None
        if found.until <= self._clock() or (found.identity.stamp and not self._credentials.is_current(found)):
            return None
        return found.principal

    async def _verify(self, shown: list[bytes], request: RequestContext) -> Principal:
        """Returns the principal of a header that is not cached. Raises Unauthorized, TooManyRequests."""
        credential = parse_authorization(shown)
        if credential is None:
            return self._anonymous
        try:
            return await principal_of(self._policy, await self._credentials.verify(credential, request.actor))
        except Unauthorized as error:
            if isinstance(credential, Bearer):
                raise Unauthorized(error.message, reason=INVALID_TOKEN) from None
            raise


class OpenAuthenticator:
    """Authenticates nobody, for a registry without a store of accounts: every request may do everything, except below
    the `guarded` first segments."""

    def __init__(self, guard: Guarded, guarded: Iterable[str] = ()) -> None:
        self._guard = guard
        self._principal = open_principal(guarded)

    def credential_key(self, shown: Sequence[bytes], address: str) -> bytes:
        return b""

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    async def authenticate(self, request: RequestContext) -> None:
        request.principal = self._principal


class ManagementAuthenticator:
    """Authenticates callers of the management API. While there are no accounts, the header is ignored and every caller
    is anonymous."""

    def __init__(self, policy: Policy, credentials: CredentialVerifier, sessions: LoginSessions) -> None:
        self._policy = policy
        self._credentials = credentials
        self._sessions = sessions

    async def authenticate(
        self, headers: Sequence[tuple[bytes, bytes]], by: Actor, session: str | None = None
    ) -> Principal:
        if not self._policy.closed:
            return self._policy.anonymous()
        match parse_authorization([value for name, value in headers if name == b"authorization"]):
            case Bearer(token) if api_tokens.is_well_formed(token):
                return await self._api_token(token, by)
            case Basic() | Bearer() as credential:
                return await principal_of(self._policy, await self._credentials.verify(credential, by))
        return await (self._principal(ANONYMOUS) if session is None else self._in_session(session))

    async def _principal(self, proof: Identity) -> Principal:
        await self._policy.prepare(proof)
        return self._policy.principal(proof)

    async def _in_session(self, text: str) -> Principal:
        try:
            return await self._principal(self._sessions.verify(text))
        except Unauthorized:
            raise Unauthorized(SESSION_ENDED) from None

    async def _api_token(self, text: str, by: Actor) -> Principal:
        """Returns an API token's principal. Raises Unauthorized for a refresh token: it is valid at `/token` only."""
        proof = await self._credentials.verify_refresh(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(REFUSED)
        return await self._principal(proof)

"""From a request's headers to the principal who acts in it.

On the hot path this is one look-up in the cache of verified credentials, which holds the principal as well
(`registry.auth.credential_cache`). Every request reads the accounts' epoch; after a change the credential is checked
again and the principal is made anew.

Who calls the management API: by Basic (a password, or an API token in its place), by an API token as Bearer, or in the
session of a login at the OpenID provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from registry.auth.authorization_header import REFUSED, Basic, Bearer, parse_authorization
from registry.auth.credential_cache import VerifiedCredential
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.rights.guard import Guarded
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import (
    ANONYMOUS,
    PRINCIPAL,
    REQUESTED_NAME,
    UNPRIVILEGED,
    Identity,
    Principal,
    open_principal,
)
from registry.auth.token import api_tokens
from registry.auth.token.login_sessions import SESSION_ENDED, LoginSessions
from registry.http.exchange import Exchange, Header
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
    """An `Authenticator` by the `Authorization` header. While there are no accounts, the header is not looked at: some
    clients send here what they log in with elsewhere."""

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
        self._nobody = UNPRIVILEGED

    async def authenticate(self, exchange: Exchange) -> None:
        epoch = self._epoch_now()
        if epoch != self._epoch:
            await self._policy.prepare(ANONYMOUS)
            epoch = self._epoch_now()
            self._nobody, self._epoch = self._policy.nobody(), epoch
        principal = self._nobody
        if not principal.open:
            shown = exchange.headers(b"authorization")
            if shown:
                found = self._cached(self._cache.key_of(shown[0], exchange.address))
                principal = await self._verify(shown, exchange) if found is None or len(shown) > 1 else found
        PRINCIPAL.set(principal)
        REQUESTED_NAME.set(exchange.asked)
        exchange.name = principal.name
        exchange.is_admitted = principal.is_admitted

    def known(self, shown: Sequence[bytes], address: str) -> bytes | None:
        """What `authenticate` found out last, if it still counts and there is no more to it than the store holds."""
        if self._nobody.open or not shown:
            return b""
        key = self._cache.key_of(shown[0], address)
        found = self._cached(key)
        return None if found is None or found.identity.stamp is not None or len(shown) > 1 else key

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    def _cached(self, key: bytes) -> Principal | None:
        """Returns the principal that a header made before, if it still counts."""
        found = self._cache.get(key)
        if found is None or found.principal is None or found.principal.epoch != self._epoch:
            return None
        if found.until <= self._clock() or (found.identity.stamp and not self._credentials.is_current(found)):
            return None
        return found.principal

    async def _verify(self, shown: list[bytes], exchange: Exchange) -> Principal:
        """Returns the principal of a header that is not cached. Raises Unauthorized, TooManyRequests."""
        credential = parse_authorization(shown)
        if credential is None:
            return self._nobody
        try:
            return await principal_of(self._policy, await self._credentials.verify(credential, exchange.actor))
        except Unauthorized as error:
            if isinstance(credential, Bearer):
                raise Unauthorized(error.message, reason=INVALID_TOKEN) from None
            raise


class OpenAuthenticator:
    """An `Authenticator` for a registry that keeps no accounts: everybody may do everything, but pull below `guarded`
    first segments."""

    def __init__(self, guard: Guarded, guarded: Iterable[str] = ()) -> None:
        self._guard = guard
        self._principal = open_principal(guarded)

    def known(self, shown: Sequence[bytes], address: str) -> bytes:
        return b""

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    async def authenticate(self, exchange: Exchange) -> None:
        PRINCIPAL.set(self._principal)
        REQUESTED_NAME.set(exchange.asked)


class ManagementAuthenticator:
    """An `Authenticator`. While there are no accounts, the header is not looked at: everybody is nobody."""

    def __init__(self, policy: Policy, credentials: CredentialVerifier, sessions: LoginSessions) -> None:
        self._policy = policy
        self._credentials = credentials
        self._sessions = sessions

    async def authenticate(self, headers: Sequence[Header], by: Actor, session: str | None = None) -> Principal:
        if not self._policy.closed:
            return self._policy.nobody()
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
        """One that a client was given at its login is for `/token` alone."""
        proof = await self._credentials.verify_refresh(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(REFUSED)
        return await self._principal(proof)

"""From a request's headers to the principal who acts in it.

The hot path is one look: what an `Authorization` header proved is remembered by keyed hash, together with the principal
it made and the accounts' `epoch` that was read for it. Every request reads the epoch; under another one the credentials
are asked again, and the principal is made anew.

Who calls the management API: by Basic (a password, or an API token in its place), by an API token as Bearer, or in
the session of a login at the OpenID provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Final

from registry.auth import authorization_header
from registry.auth.authorization_header import REFUSED, Basic, Bearer, parse_authorization
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
_MOST_CACHED: Final = 1024
"""Headers that are remembered in a process."""
_REVERIFY_SECONDS: Final = 600.0
"""Seconds after which the credentials are asked again in any case."""


class CachedPrincipal:
    """What a header proved. Counts until `until` (seconds since 1970). `foreign`: it rests on something that is not in
    the store as well, so no epoch tells of its end."""

    __slots__ = ("epoch", "foreign", "principal", "until")

    def __init__(self, principal: Principal, epoch: int, until: float) -> None:
        self.principal = principal
        self.epoch = epoch
        self.until = until if principal.expires is None else min(until, principal.expires)
        self.foreign = principal.identity.stamp is not None


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
        key: bytes,
    ) -> None:
        """`clock`: seconds since 1970. `key`: 16 to 64 random bytes of this process's own."""
        self._guard = guard
        self._policy = policy
        self._credentials = credentials
        self._epoch_now = policy.accounts.epoch
        self._clock = clock
        self._marking = blake2b(digest_size=16, key=key)  # copying it costs half of what making one does
        self._begun, self._last_address = self._marking, ""  # most requests come from where the one before came from
        self._remembered: dict[bytes, CachedPrincipal] = {}
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
                mark = self._mark(shown[0], exchange.address)
                found = self._remembered.get(mark)
                if found is None or not self._counts(found) or len(shown) > 1:
                    found = await self._look(shown, mark, exchange)
                principal = found.principal
        PRINCIPAL.set(principal)
        REQUESTED_NAME.set(exchange.asked)
        exchange.name = principal.name
        exchange.is_admitted = principal.is_admitted

    def known(self, shown: Sequence[bytes], address: str) -> bytes | None:
        """What `authenticate` found out last, if it still counts and there is no more to it than the store holds."""
        if self._nobody.open or not shown:
            return b""
        mark = self._mark(shown[0], address)
        found = self._remembered.get(mark)
        return None if found is None or not self._counts(found) or len(shown) > 1 else mark

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    def _mark(self, shown: bytes, address: str) -> bytes:
        """What others have shown right is not to be guessed from here, so the address counts as well."""
        if address != self._last_address:
            begun = self._marking.copy()
            begun.update(address.encode() + b"\0")  # no address holds a NUL, so the two are apart
            self._last_address, self._begun = address, begun
        marking = self._begun.copy()
        marking.update(shown)
        return marking.digest()

    def _counts(self, found: CachedPrincipal) -> bool:
        return found.epoch == self._epoch and found.until > self._clock() and not found.foreign

    async def _look(self, shown: list[bytes], mark: bytes, exchange: Exchange) -> CachedPrincipal:
        """What the header proves now. Raises Unauthorized, TooManyRequests."""
        self._remembered.pop(mark, None)
        proof = await self._verify(shown, exchange)
        await self._policy.prepare(proof)
        epoch = self._epoch_now()  # before the rights: what changes between the two is seen the next time
        found = CachedPrincipal(self._policy.principal(proof), epoch, self._clock() + _REVERIFY_SECONDS)
        if len(self._remembered) >= _MOST_CACHED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[mark] = found
        return found

    async def _verify(self, shown: list[bytes], exchange: Exchange) -> Identity:
        credential = parse_authorization(shown)
        if credential is None:
            return ANONYMOUS
        if not isinstance(credential, Bearer):
            return await self._credentials.verify_basic(credential.user, credential.secret, exchange.actor)
        try:
            return await self._credentials.verify_bearer(credential.token, exchange.actor)
        except Unauthorized as error:
            raise Unauthorized(error.message, reason=INVALID_TOKEN) from None


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
        match authorization_header.parse_authorization([value for name, value in headers if name == b"authorization"]):
            case Basic(user, secret):
                return await self._principal(await self._credentials.verify_basic(user, secret, by))
            case Bearer(token) if api_tokens.is_well_formed(token):
                return await self._api_token(token, by)
            case Bearer(token):
                return await self._principal(await self._credentials.verify_bearer(token, by))
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

"""Authenticators: find the principal of a request from its headers.

On the hot path this is one cache look-up: the principal that an `Authorization` header proved is cached under a keyed
hash of the header, with the accounts' epoch that was read for it. Every request reads the epoch; after a change the
credentials are verified again and the principal is computed anew.

Callers of the management API authenticate by Basic (a password, or an API token in its place), by an API token as
Bearer, or by the session of a login at the OpenID provider.
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
from registry.auth.rights.principal import ANONYMOUS, UNPRIVILEGED, Identity, Principal, open_principal
from registry.auth.token import api_tokens
from registry.auth.token.login_sessions import SESSION_ENDED, LoginSessions
from registry.request import RequestContext
from storage.content import Actor
from storage.errors import Unauthorized
from storage.names import RepositoryName

INVALID_TOKEN: Final = "invalid_token"
_MOST_CACHED: Final = 1024
"""Headers whose principals a process caches."""
_REVERIFY_SECONDS: Final = 600.0
"""Seconds after which credentials are verified again in any case."""


class CachedPrincipal:
    """The principal that a header proved. Valid for one epoch, until `until` (seconds since 1970). `foreign`: it also
    rests on something outside the store, whose changes no epoch covers."""

    __slots__ = ("epoch", "foreign", "principal", "until")

    def __init__(self, principal: Principal, epoch: int, until: float) -> None:
        self.principal = principal
        self.epoch = epoch
        self.until = until if principal.expires is None else min(until, principal.expires)
        self.foreign = principal.identity.stamp is not None


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
        key: bytes,
    ) -> None:
        """`clock`: seconds since 1970. `key`: 16 to 64 random bytes of this process's own."""
        self._guard = guard
        self._policy = policy
        self._credentials = credentials
        self._epoch_now = policy.accounts.epoch
        self._clock = clock
        self._keyed_hash = blake2b(digest_size=16, key=key)  # a copy costs half of what a new one does
        self._address_hash, self._last_address = self._keyed_hash, ""  # most requests come from the last one's address
        self._cached: dict[bytes, CachedPrincipal] = {}
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
                key = self._key(shown[0], request.address)
                found = self._cached.get(key)
                if found is None or not self._is_current(found) or len(shown) > 1:
                    found = await self._verify_again(shown, key, request)
                principal = found.principal
        request.principal = principal

    def credential_key(self, shown: Sequence[bytes], address: str) -> bytes | None:
        """Returns the cache key of these headers, while their principal is cached and rests on the store alone."""
        if self._anonymous.open or not shown:
            return b""
        key = self._key(shown[0], address)
        found = self._cached.get(key)
        return None if found is None or not self._is_current(found) or len(shown) > 1 else key

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    def _key(self, shown: bytes, address: str) -> bytes:
        """Returns a keyed hash of the header and the address. A cache hit skips the login throttle, so an address must
        not be able to guess credentials that another one has shown."""
        if address != self._last_address:
            hashed = self._keyed_hash.copy()
            hashed.update(address.encode() + b"\0")  # no address holds a NUL, so the two cannot run together
            self._last_address, self._address_hash = address, hashed
        hashed = self._address_hash.copy()
        hashed.update(shown)
        return hashed.digest()

    def _is_current(self, found: CachedPrincipal) -> bool:
        return found.epoch == self._epoch and found.until > self._clock() and not found.foreign

    async def _verify_again(self, shown: list[bytes], key: bytes, request: RequestContext) -> CachedPrincipal:
        """Verifies the header and caches its principal. Raises Unauthorized, TooManyRequests."""
        self._cached.pop(key, None)
        proof = await self._verify(shown, request)
        await self._policy.prepare(proof)
        epoch = self._epoch_now()  # read before the rights, so that a change meanwhile is noticed the next time
        found = CachedPrincipal(self._policy.principal(proof), epoch, self._clock() + _REVERIFY_SECONDS)
        if len(self._cached) >= _MOST_CACHED:
            del self._cached[next(iter(self._cached))]
        self._cached[key] = found
        return found

    async def _verify(self, shown: list[bytes], request: RequestContext) -> Identity:
        credential = parse_authorization(shown)
        if credential is None:
            return ANONYMOUS
        if not isinstance(credential, Bearer):
            return await self._credentials.verify_basic(credential.user, credential.secret, request.actor)
        try:
            return await self._credentials.verify_bearer(credential.token, request.actor)
        except Unauthorized as error:
            raise Unauthorized(error.message, reason=INVALID_TOKEN) from None


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
    """Authenticates callers of the management API (`registry.admin.caller.CallerAuthenticator`). While there are no
    accounts, the header is ignored and every caller is anonymous."""

    def __init__(self, policy: Policy, credentials: CredentialVerifier, sessions: LoginSessions) -> None:
        self._policy = policy
        self._credentials = credentials
        self._sessions = sessions

    async def authenticate(
        self, headers: Sequence[tuple[bytes, bytes]], by: Actor, session: str | None = None
    ) -> Principal:
        if not self._policy.closed:
            return self._policy.anonymous()
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
        """Returns an API token's principal. Raises Unauthorized for a refresh token: it is valid at `/token` only."""
        proof = await self._credentials.verify_refresh(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(REFUSED)
        return await self._principal(proof)

"""Verifies credentials: passwords, API tokens, tokens of `/token`, and tokens of trusted issuers.

Verified credentials are cached, so a client that sends a password with every request has it hashed once an hour. A
cached credential counts only while it is still valid, which each look-up checks: the store's epoch changes with
everything in the store, and the stamp of an identity with everything else. The error is the same, whatever is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from registry.auth.audit_log import LoginAudit
from registry.auth.authorization_header import REFUSED, Basic, Bearer
from registry.auth.credential_cache import CredentialCache, VerifiedCredential, header_of
from registry.auth.external.issuers import Issuers
from registry.auth.password.password_check import PasswordCheck
from registry.auth.revocation import RevocationCheck
from registry.auth.rights.principal import Identity
from registry.auth.token import api_tokens
from registry.auth.token.bearer_tokens import BearerTokens
from registry.single_flight import SingleFlight
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized

CACHED_SECONDS: Final = 3600.0
"""Lifetime of a cached credential."""
LONGEST_USER: Final = 255
"""Characters of a user name."""
LONGEST_SECRET: Final = 16 * 1024
"""Characters of a secret. A token of an issuer may take a password's place, and some are long."""


class CredentialVerifier:
    """Verifies credentials, for one process and its event loop. `clock` gives seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        bearer_tokens: BearerTokens,
        issuers: Issuers,
        passwords: PasswordCheck,
        revocation_check: RevocationCheck,
        logins: LoginAudit,
        clock: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._bearer_tokens = bearer_tokens
        self._issuers = issuers
        self._passwords = passwords
        self._revocation_check = revocation_check
        self._logins = logins
        self._clock = clock
        self._flights = SingleFlight[VerifiedCredential]()
        self.cache = CredentialCache()

    async def verify(self, credential: Basic | Bearer, by: Actor) -> VerifiedCredential:
        """Returns the verified credential, from the cache or anew. `by` is where it came from.

        May wait for an issuer's key set, or while passwords are hashed; concurrent requests with the same password
        share one hashing. Raises Unauthorized, whatever is wrong with the credential, and TooManyRequests if too many
        attempts failed or too many wait. Cancelled: a hashing goes on.
        """
        key = self.cache.key_of(header_of(credential), by.address)
        found = self.cache.get(key)
        if found is not None:
            if self._is_valid(found):
                return found
            self.cache.drop(key)
        if isinstance(credential, Bearer):
            return await self._verify_bearer(key, credential, by)
        if not credential.user or not credential.secret:
            raise Unauthorized(REFUSED)
        if len(credential.user) > LONGEST_USER or len(credential.secret) > LONGEST_SECRET:
            raise Unauthorized(REFUSED)
        return await self._flights.run(key, lambda: self._verify_basic(key, credential, by))

    async def verify_bearer(self, token: str, by: Actor) -> Identity:
        """Returns the identity that a bearer token proves. See `verify`."""
        return (await self.verify(Bearer(token), by)).identity

    async def verify_basic(self, user: str, secret: str, by: Actor) -> Identity:
        """Returns the identity that a user's password, API token or issuer's token proves. See `verify`."""
        return (await self.verify(Basic(user, secret), by)).identity

    async def verify_refresh(self, text: str, by: Actor) -> Identity:
        """Returns the identity that an API token proves without a user name, as `/token` accepts it for a refresh
        token. Raises Unauthorized."""
        try:
            identity = self._api_token(None, text)
        except Unauthorized as error:
            self._logins.record_failure("", "token", error.message, by)
            raise Unauthorized(REFUSED) from None
        self._logins.record_success(identity, "token", by)
        return identity

    async def aclose(self) -> None:
        """Cancels verifications that are under way."""
        await self._flights.aclose()

    def is_current(self, verified: VerifiedCredential) -> bool:
        """Returns whether a cached credential has not expired, and what it rests on outside the store is the same."""
        return verified.until > self._clock() and self._revocation_check.is_stamp_current(verified.identity)

    def _is_valid(self, verified: VerifiedCredential) -> bool:
        """Returns whether a cached credential still counts. Checks the identity again after a change in the store."""
        if not self.is_current(verified):
            return False
        epoch = self._accounts.epoch()
        if verified.epoch != epoch:
            if verified.key_id is not None and not self._bearer_tokens.is_key_accepted(verified.key_id):
                return False
            try:
                verified.identity = self._revocation_check.check(verified.identity)
            except Unauthorized:
                return False
            verified.epoch = epoch
        return True

    async def _verify_bearer(self, key: bytes, credential: Bearer, by: Actor) -> VerifiedCredential:
        token, epoch = credential.token, self._accounts.epoch()
        is_foreign = self._issuers.knows(token)
        try:
            if is_foreign:
                identity, key_id = await self._issuers.verify(token), None
            else:
                identity, key_id = self._bearer_tokens.verify(token), self._bearer_tokens.key_of(token)
            identity = self._revocation_check.check(identity)
        except Unauthorized as error:
            if is_foreign:
                self._logins.record_failure("", "issuer", error.message, by)
            raise Unauthorized(REFUSED) from None
        if is_foreign:
            self._logins.record_success(identity, "issuer", by)
        return self._store(key, credential, identity, epoch, key_id)

    async def _verify_basic(self, key: bytes, credential: Basic, by: Actor) -> VerifiedCredential:
        user, secret, epoch = credential.user, credential.secret, self._accounts.epoch()
        how = "token" if api_tokens.is_well_formed(secret) else "issuer" if self._issuers.knows(secret) else "password"
        try:
            if how == "token":
                identity = self._api_token(user, secret)
            elif how == "issuer":
                identity = await self._issuers.verify(secret)
                if identity.name != user:
                    raise Unauthorized("the token is another account's")
            else:
                identity = await self._passwords.check(_account_name(user), secret, by.address)
            identity = self._revocation_check.check(identity)
        except TooManyRequests as error:
            self._logins.record_failure(user, how, error.message, by)
            raise
        except Unauthorized as error:
            self._logins.record_failure(user, how, error.message, by)
            raise Unauthorized(REFUSED) from None
        self._logins.record_success(identity, how, by)
        return self._store(key, credential, identity, epoch)

    def _store(
        self, key: bytes, credential: Basic | Bearer, identity: Identity, epoch: int, key_id: str | None = None
    ) -> VerifiedCredential:
        """Caches a verified credential. `epoch` was read before the verification, so a change meanwhile is noticed at
        the next look-up."""
        verified = VerifiedCredential(identity, epoch, self._clock() + CACHED_SECONDS, key_id)
        self.cache.put(key, verified, credential)
        return verified

    def _api_token(self, user: str | None, text: str) -> Identity:
        """Returns the identity that an API token proves. Without `user`, any account's token counts. Raises
        Unauthorized."""
        token = api_tokens.find(self._accounts, text)
        if user is not None and token.account != user:
            raise Unauthorized("the API token is another account's")
        if user is not None and token.purpose != "personal":
            raise Unauthorized("a refresh token is no password")
        try:
            account = self._accounts.account(token.account)
        except AccountUnknown:
            raise Unauthorized("the account is gone") from None
        if not account.enabled:
            raise Unauthorized("the account is disabled")
        self._logins.record_token_use(token)
        return Identity(
            account.name,
            robot=account.kind is AccountKind.ROBOT,
            version=account.version,
            token=token.id,
            limits=token.limits,
            expires=token.expires,
        )


def _account_name(user: str) -> AccountName:
    """Returns `user` as an account's name. Raises Unauthorized without hashing anything: which names are valid is no
    secret."""
    try:
        return AccountName(user)
    except AccountInvalid:
        raise Unauthorized("no account has such a name") from None

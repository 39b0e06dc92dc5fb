"""Verifies credentials: passwords, API tokens, bearer tokens that `/token` issued, and tokens of trusted issuers.

Many clients send their password with every request. Each process caches verified credentials for an hour, so that it
need not hash the password each time. Each lookup in the cache checks whether the credential is still valid
(`registry.auth.revocation_across_workers`). For this check, an entry contains the *epoch* at which the credential was
verified. The epoch is a number in the store that increases when an account, a grant or a signing key changes, or an API
token is revoked.

All wrong credentials get the same error text, so that the text does not reveal what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from registry.auth.audit_log import LoginAudit
from registry.auth.authorization_header import INVALID_CREDENTIALS, Basic, Bearer
from registry.auth.credential_cache import CredentialCache, VerifiedCredential, header_of
from registry.auth.external.issuers import Issuers
from registry.auth.password.password_check import PasswordCheck
from registry.auth.revocation import RevocationCheck
from registry.auth.revocation_across_workers import CachedCredentialCheck
from registry.auth.rights.principal import Identity
from registry.auth.token import api_tokens
from registry.auth.token.bearer_tokens import BearerTokens
from registry.single_flight import SingleFlight
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized

CACHED_SECONDS: Final = 3600.0
"""How long a verified credential is cached."""
MAX_USER_CHARACTERS: Final = 255
"""The longest user name that is accepted."""
MAX_SECRET_CHARACTERS: Final = 16 * 1024
"""The longest secret that is accepted. The limit is high because a client can send the token of an issuer as its
password."""


class CredentialVerifier:
    """Verifies credentials, for one process and its event loop.

    - `revocation_check`: checks whether an identity is still valid. An identity can depend on an account, an API token,
      a signing key, a line of the htpasswd file, and settings. If one of them is not valid any more or has changed, the
      check raises Unauthorized. Otherwise, it returns the identity with the current limits of the API token.
    - `login_audit`: records logins in the audit log.
    - `clock`: returns seconds since 1970.
    """

    def __init__(
        self,
        accounts: Accounts,
        bearer_tokens: BearerTokens,
        issuers: Issuers,
        password_check: PasswordCheck,
        revocation_check: RevocationCheck,
        login_audit: LoginAudit,
        clock: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._bearer_tokens = bearer_tokens
        self._issuers = issuers
        self._password_check = password_check
        self._revocation_check = revocation_check
        self._login_audit = login_audit
        self._clock = clock
        self._verifications = SingleFlight[VerifiedCredential]()
        """The running verifications of Basic credentials, by cache key."""
        self.cache = CredentialCache()
        self.cached_credential_check = CachedCredentialCheck(accounts, revocation_check, clock)
        """Checks whether an entry of the cache has expired, and whether the credential was revoked."""

    async def verify(self, credential: Basic | Bearer, by: Actor) -> VerifiedCredential:
        """Verifies a credential, and returns the identity that it proves. Uses the cached result if there is one. `by`
        describes the client, for the audit log and for the limits on failed logins per address.

        If necessary, waits for the download of an issuer's key set, or for the hashing of a password. Concurrent
        requests with the same Basic credential from the same address share one verification. This verification
        continues if a caller is cancelled.

        Raises Unauthorized if the credential is not valid. Raises TooManyRequests after too many failed logins, or if
        too many logins wait for hashing. Raises StorageFull or StorageFailed if the store cannot count a failed login.
        """
        cache_key = self.cache.key_of(header_of(credential), by.address)
        cached = self.cache.get(cache_key)
        if cached is not None:
            if self.cached_credential_check.revalidate(cached):
                return cached
            self.cache.remove(cache_key)
        if isinstance(credential, Bearer):
            return await self._verify_bearer(cache_key, credential, by)
        if not credential.user or not credential.secret:
            raise Unauthorized(INVALID_CREDENTIALS)
        if len(credential.user) > MAX_USER_CHARACTERS or len(credential.secret) > MAX_SECRET_CHARACTERS:
            raise Unauthorized(INVALID_CREDENTIALS)
        return await self._verifications.run(cache_key, lambda: self._verify_basic(cache_key, credential, by))

    async def verify_bearer(self, token: str, by: Actor) -> Identity:
        """Returns the identity that a bearer token proves. Accepts the tokens of this registry and of trusted issuers.
        Raises the errors of `verify`."""
        return (await self.verify(Bearer(token), by)).identity

    async def verify_basic(self, user: str, secret: str, by: Actor) -> Identity:
        """Returns the identity that a user name and a secret prove. The secret is a password, an API token or an
        issuer's token. Raises the errors of `verify`."""
        return (await self.verify(Basic(user, secret), by)).identity

    async def verify_password(self, user: str, password: str, by: Actor) -> Identity:
        """Returns the identity that a user name and a password prove, for a login with a browser. Refuses
        tokens as passwords, because the login session would not have the token's expiry and limits. Raises the errors
        of `verify`."""
        method = self._login_method(password)
        if method != "password":
            self._login_audit.record_failure(user, method, "a token cannot start a session", by)
            raise Unauthorized(INVALID_CREDENTIALS)
        return await self.verify_basic(user, password, by)

    async def verify_api_token(self, text: str, by: Actor) -> Identity:
        """Returns the identity that an API token proves, if the client sent the token without a user name. Also
        accepts a *refresh token*, which is an API token that `/token` issued to a client for later requests to
        `/token`. Raises Unauthorized if the token is not valid."""
        try:
            identity = self._api_token_identity(user=None, text=text)
        except Unauthorized as error:
            self._login_audit.record_failure("", "token", error.message, by)
            raise Unauthorized(INVALID_CREDENTIALS) from None
        self._login_audit.record_success(identity, "token", by)
        return identity

    async def aclose(self) -> None:
        """Cancels the running verifications of Basic credentials, and waits until they have ended."""
        await self._verifications.aclose()

    async def _verify_bearer(self, cache_key: bytes, credential: Bearer, by: Actor) -> VerifiedCredential:
        """Verifies a bearer token of this registry or of an issuer, and caches the result under `cache_key`."""
        token, epoch = credential.token, self._accounts.epoch()
        is_from_issuer = self._issuers.is_issuer_token(token)
        try:
            if is_from_issuer:
                identity = await self._issuers.verify(token)
            else:
                identity = self._bearer_tokens.verify(token)
            # A client can get a bearer token in exchange for an API token. This check refuses the bearer token if the
            # API token was revoked or the account was disabled. The check also adds the current limits of the API token
            # to the identity. The bearer token does not contain these limits.
            identity = self._revocation_check.check(identity)
        except Unauthorized as error:
            if is_from_issuer:
                self._login_audit.record_failure("", "issuer", error.message, by)
            raise Unauthorized(INVALID_CREDENTIALS) from None
        if is_from_issuer:
            self._login_audit.record_success(identity, "issuer", by)
        return self._add_to_cache(cache_key, credential, identity, epoch)

    async def _verify_basic(self, cache_key: bytes, credential: Basic, by: Actor) -> VerifiedCredential:
        """Verifies a user name and a secret, which is a password, an API token or an issuer's token. Caches the result
        under `cache_key`."""
        user, secret, epoch = credential.user, credential.secret, self._accounts.epoch()
        method = self._login_method(secret)
        try:
            if method == "token":
                identity = self._api_token_identity(user, secret)
            elif method == "issuer":
                identity = await self._issuers.verify(secret)
                if identity.name != user:
                    raise Unauthorized("the token belongs to another account than the user name")
            else:
                identity = await self._password_check.check(_parse_account_name(user), secret, by.address)
            # Refuses the login if the account was changed while the code above waited for hashing or a download.
            identity = self._revocation_check.check(identity)
        except TooManyRequests as error:
            self._login_audit.record_failure(user, method, error.message, by, "throttled")
            raise
        except Unauthorized as error:
            self._login_audit.record_failure(user, method, error.message, by)
            raise Unauthorized(INVALID_CREDENTIALS) from None
        self._login_audit.record_success(identity, method, by)
        return self._add_to_cache(cache_key, credential, identity, epoch)

    def _login_method(self, secret: str) -> str:
        """Returns which kind of secret a client sent with its user name: `token` for an API token, `issuer` for an
        issuer's token, and `password` for everything else. The audit log names this method."""
        if api_tokens.is_well_formed(secret):
            return "token"
        return "issuer" if self._issuers.is_issuer_token(secret) else "password"

    def _add_to_cache(
        self, cache_key: bytes, credential: Basic | Bearer, identity: Identity, epoch: int
    ) -> VerifiedCredential:
        """Caches a verified credential under `cache_key`, and returns the entry.

        `epoch` must be read before the verification. If the epoch changes during the verification, the entry contains
        the old epoch, and the next lookup checks the credential again.
        """
        verified = VerifiedCredential(identity, epoch, self._clock() + CACHED_SECONDS)
        self.cache.put(cache_key, verified, credential)
        return verified

    def _api_token_identity(self, user: str | None, text: str) -> Identity:
        """Returns the identity that the API token `text` proves. Raises Unauthorized if the token is not valid.

        - If `user` is a user name, the token must belong to this account, and must not be a refresh token.
        - If `user` is None (the client sent no user name), the token can belong to any account, and can be a refresh
          token.
        """
        token = api_tokens.find(self._accounts, text)
        if user is not None and token.account != user:
            raise Unauthorized("the API token belongs to another account than the user name")
        if user is not None and token.purpose != "personal":
            raise Unauthorized("a refresh token is not accepted as a password")
        try:
            account = self._accounts.account(token.account)
        except AccountUnknown:
            raise Unauthorized("the account was removed") from None
        if not account.enabled:
            raise Unauthorized("the account is disabled")
        self._login_audit.record_token_use(token)
        return Identity(
            account.name,
            robot=account.kind is AccountKind.ROBOT,
            version=account.version,
            token=token.id,
            limits=token.limits,
            expires=token.expires,
        )


def _parse_account_name(user: str) -> AccountName:
    """Returns `user` as an account's name. Raises Unauthorized if the rules for names do not allow it. This refusal is
    faster than others, because it needs no hashing. Its shorter time reveals only that the name breaks the rules, which
    are public."""
    try:
        return AccountName(user)
    except AccountInvalid:
        raise Unauthorized("no account has such a name") from None

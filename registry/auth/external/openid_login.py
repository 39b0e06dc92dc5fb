"""Login of people at the OpenID provider: the authorization code flow with PKCE.

Sources: OpenID Connect Core 1.0, 3.1; RFC 6749, 4.1; RFC 7636; RFC 9207; RFC 9700, 2.1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlencode

from registry.auth.audit_log import LoginAudit
from registry.auth.external.identity_claims import groups_from_claim, settings_stamp
from registry.auth.external.login_attempts import LoginAttempt, LoginAttemptInvalid, LoginAttempts
from registry.auth.external.openid_provider import (
    CodeRefused,
    IDTokenInvalid,
    OpenIDProvider,
    ProviderUnavailable,
    error_word,
    verify_id_token,
)
from registry.auth.rights.principal import Identity
from registry.auth.token.login_sessions import LoginSessions
from registry.config.auth_settings import OIDCSettings
from registry.request import RequestInvalid
from storage.access import Account, AccountExists, AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import Denied, RegistryError, TooManyRequests, UpstreamUnavailable

log = logging.getLogger(__name__)

LOGIN_METHOD: Final = "openid"
MAX_PARALLEL_LOGINS: Final = 32
"""Logins of this process that may wait for the provider at once."""
MAX_CODE_CHARACTERS: Final = 4096
"""Characters of an authorization code."""
MAX_GROUP_CHARACTERS: Final = 1500
"""Characters of all the group names in a session: a cookie has 4096 bytes."""
_BEGIN_AGAIN: Final = "begin again at /login"


@dataclass(frozen=True, slots=True)
class AuthorizationResponse:
    """The parameters of the provider's redirect back to this registry. Missing ones are empty."""

    state: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    error: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class LoginResult:
    """A finished login. `session` is for the browser's cookie, `return_path` the page to go to."""

    session: str = field(repr=False)
    return_path: str


class LoginFailed(Exception):
    """A login that failed.

    `answer_error` is what the person is shown, `reason` is for the audit log. `user` is the account, if it is known.
    `is_finished` means that the attempt cannot be continued.
    """

    def __init__(self, answer_error: RegistryError, reason: str, *, user: str = "", is_finished: bool = True) -> None:
        self.answer_error = answer_error
        self.reason = reason
        self.user = user
        self.is_finished = is_finished
        super().__init__(reason)


class OpenIDLogin:
    """Logins at the provider, for one process and its event loop. `clock` gives seconds since 1970."""

    def __init__(
        self,
        settings: OIDCSettings,
        accounts: Accounts,
        provider: OpenIDProvider,
        attempts: LoginAttempts,
        sessions: LoginSessions,
        logins: LoginAudit,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._provider = provider
        self._attempts = attempts
        self._sessions = sessions
        self._logins = logins
        self._clock = clock
        self._stamp = provider_stamp(settings)
        self._waiting = 0

    async def begin(self, redirect_uri: str, back: str) -> tuple[str, str]:
        """Begins a login that ends at the path `back`. Returns the URL of the provider's login page and the sealed
        attempt for the browser's cookie. Raises LoginFailed, StorageFull, StorageFailed."""
        attempt = self._attempts.begin(redirect_uri, back)
        parameters = {
            "response_type": "code",
            "client_id": self._provider.client_id,
            "redirect_uri": redirect_uri,
            "scope": self._settings.scopes,
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": attempt.challenge,
            "code_challenge_method": "S256",
        }
        try:
            url = (await self._provider.describe()).authorization
        except ProviderUnavailable as error:
            raise _provider_unavailable(error) from None
        return f"{url}{'&' if '?' in url else '?'}{urlencode(parameters)}", await self._attempts.seal(attempt)

    async def finish(self, answer: AuthorizationResponse, sealed: str, by: Actor) -> LoginResult:
        """Ends a login. `sealed` is the attempt from the browser's cookie. Raises LoginFailed, StorageFull,
        StorageFailed. A failure is in the audit log. Cancelled: the code may be used up."""
        try:
            attempt = self._attempt(answer, sealed)
            claims = await self._claims(answer, attempt)
            identity = await self._identity(claims, by)
        except LoginFailed as failed:
            self._logins.record_failure(failed.user, LOGIN_METHOD, failed.reason, by)
            raise
        self._logins.record_success(identity, LOGIN_METHOD, by)
        return LoginResult(await self._sessions.issue(identity), attempt.back)

    async def aclose(self) -> None:
        """Cancels requests to the provider."""
        await self._provider.aclose()

    def _attempt(self, answer: AuthorizationResponse, sealed: str) -> LoginAttempt:
        """Returns the attempt that the response belongs to. Raises LoginFailed."""
        try:
            attempt = self._attempts.open(sealed, answer.state)
        except LoginAttemptInvalid as error:
            shown = RequestInvalid(
                f"this is not the login that this browser began, or it took too long; {_BEGIN_AGAIN}"
            )
            raise LoginFailed(shown, str(error), is_finished=False) from None
        if answer.issuer and answer.issuer != self._provider.issuer:
            raise _login_invalid("the answer is of another issuer")
        if answer.error:
            given_up = answer.error == "access_denied"
            why = "the login was given up, or the provider does not allow it" if given_up else "the provider failed"
            raise LoginFailed(Denied(f"{why}; {_BEGIN_AGAIN}"), f"the provider says {error_word(answer.error)}")
        if not answer.code or len(answer.code) > MAX_CODE_CHARACTERS:
            raise _login_invalid("the answer holds no code")
        return attempt

    async def _claims(self, answer: AuthorizationResponse, attempt: LoginAttempt) -> Mapping[str, Any]:
        """Returns the claims of the ID token. Raises LoginFailed."""
        if self._waiting >= MAX_PARALLEL_LOGINS:
            raise LoginFailed(TooManyRequests("too many people are logging in", retry_after=5), "too many at once")
        self._waiting += 1
        try:
            if (await self._provider.describe()).sends_issuer and not answer.issuer:
                raise _login_invalid("the answer does not say of which issuer it is")
            text = await self._provider.redeem(answer.code, attempt.verifier, attempt.redirect_uri)
            return await verify_id_token(
                text,
                await self._provider.keys(),
                issuer=self._provider.issuer,
                client_id=self._provider.client_id,
                nonce=attempt.nonce,
                now=self._clock(),
            )
        except ProviderUnavailable as error:
            raise _provider_unavailable(error) from None
        except CodeRefused as error:
            log.warning("the OpenID provider refuses a code: %s", error.reason)
            raise _login_invalid(f"the provider refuses the code: {error.reason}") from None
        except IDTokenInvalid as error:
            log.warning("an ID token of the OpenID provider is refused: %s", error)
            raise _login_invalid(f"the ID token: {error}") from None
        finally:
            self._waiting -= 1

    async def _identity(self, claims: Mapping[str, Any], by: Actor) -> Identity:
        """Returns the identity of the person that the claims name. Raises LoginFailed."""
        account = await self._account(claims.get(self._settings.account_claim), by)
        if account.kind is not AccountKind.USER or not account.enabled:
            reason = "the account is disabled" if account.kind is AccountKind.USER else "the account is a robot's"
            raise LoginFailed(_no_account(account.name), reason, user=account.name)
        claim = self._settings.groups_claim
        groups = self._known_groups(groups_from_claim(claims.get(claim))) if claim else ()
        return Identity(account.name, version=account.version, stamp=self._stamp, groups=groups)

    async def _account(self, named: object, by: Actor) -> Account:
        """Returns the account that the claim names; creates it if the settings say so. Raises LoginFailed."""
        try:
            name = AccountName(named if isinstance(named, str) else "")
        except AccountInvalid:
            shown = Denied("what the provider calls you is no name for an account here; ask an admin of this registry")
            claim = self._settings.account_claim
            raise LoginFailed(shown, f"the claim {claim} is no account's name") from None
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            if not self._settings.create:
                raise LoginFailed(_no_account(name), "there is no such account", user=name) from None
        try:
            return await self._accounts.add_account(
                name, AccountKind.USER, password_hash=None, note="first login by OpenID", by=replace(by, name="system")
            )
        except AccountExists:
            return self._existing(name)

    def _existing(self, name: AccountName) -> Account:
        """Returns the account that another login created meanwhile. Raises LoginFailed if a group has the name."""
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            raise LoginFailed(_no_account(name), "the name is a group's", user=name) from None

    def _known_groups(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the groups that the store has, as far as they fit into a session. Other groups can have no grants."""
        if not groups:
            return ()
        known = self._accounts.known_groups(groups)
        found: list[str] = []
        left = MAX_GROUP_CHARACTERS
        for group in groups:
            if group in known:
                left -= len(group) + 3
                if left < 0:
                    log.warning("a session holds %d groups and no more; the others are left out", len(found))
                    break
                found.append(group)
        return tuple(found)


def provider_stamp(settings: OIDCSettings) -> str:
    """Returns the stamp of the identities that this provider proves."""
    return settings_stamp("openid", settings)


def _provider_unavailable(error: ProviderUnavailable) -> LoginFailed:
    log.warning("logins at the OpenID provider fail: %s", error)
    shown = UpstreamUnavailable("the company's login does not answer; try again in a moment")
    return LoginFailed(shown, f"the provider: {error}")


def _login_invalid(reason: str) -> LoginFailed:
    return LoginFailed(Denied(f"the login is not valid; {_BEGIN_AGAIN}. The registry's log says why"), reason)


def _no_account(name: str) -> Denied:
    return Denied(f"{name} has no account here that may log in; ask an admin of this registry")

"""Logins of people at the OpenID provider: the authorization code flow with PKCE.

`OpenIDLogin.begin` sends the browser to the provider's login page. The provider sends the browser back with an
authorization code; `OpenIDLogin.finish` exchanges the code for an ID token and makes a session. Between the two, the
browser holds an *attempt*, the encrypted state of the login, in a cookie.

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
    loggable_error_code,
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
"""The method that the audit log names for these logins."""
MAX_PARALLEL_LOGINS: Final = 32
"""The most logins of one process that may wait for the provider at the same time."""
MAX_CODE_CHARACTERS: Final = 4096
"""The longest authorization code that is accepted."""
MAX_GROUP_CHARACTERS: Final = 1500
"""The most characters in all group names of a session together, so that it fits into a cookie of 4096 bytes."""
_BEGIN_AGAIN: Final = "begin again at /login"


@dataclass(frozen=True, slots=True)
class AuthorizationResponse:
    """The parameters with which the provider sends the browser back to this registry. A missing parameter is an empty
    text.

    - `state`: the value that `OpenIDLogin.begin` sent.
    - `code`: the authorization code.
    - `error`: the provider's error code.
    - `issuer`: the provider's name (`iss`).
    """

    state: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    error: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class LoginResult:
    """A successful login. `session` is the value of the session cookie, `return_path` the path to which the browser
    goes."""

    session: str = field(repr=False)
    return_path: str


class LoginFailed(Exception):
    """A login failed.

    - `answer_error`: the error that the person sees.
    - `reason`: the cause, for the audit log.
    - `user`: the name of the account; empty if it is not known.
    - `is_finished`: whether the attempt is over, so that its cookie can be deleted.
    """

    def __init__(self, answer_error: RegistryError, reason: str, *, user: str = "", is_finished: bool = True) -> None:
        self.answer_error = answer_error
        self.reason = reason
        self.user = user
        self.is_finished = is_finished
        super().__init__(reason)


class OpenIDLogin:
    """Logins at the OpenID provider, for one process and its event loop. `logins` records them in the audit log.
    `clock` returns seconds since 1970."""

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
        self._waiting_logins = 0

    async def begin(self, redirect_uri: str, back: str) -> tuple[str, str]:
        """Starts a login. Returns the URL of the provider's login page, and the encrypted attempt for a cookie.

        The provider sends the browser to `redirect_uri`, a URL of this registry. After the login, the browser goes to
        the path `back`. Raises LoginFailed, StorageFull, StorageFailed.
        """
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
            url = (await self._provider.metadata()).authorization_url
        except ProviderUnavailable as error:
            raise _provider_unavailable(error) from None
        return f"{url}{'&' if '?' in url else '?'}{urlencode(parameters)}", await self._attempts.seal(attempt)

    async def finish(self, answer: AuthorizationResponse, sealed: str, by: Actor) -> LoginResult:
        """Finishes a login with the provider's response. `sealed` is the encrypted attempt from the cookie. Records the
        login or its failure in the audit log, with `by` as the client. Raises LoginFailed, StorageFull, StorageFailed.
        If the caller is cancelled, the person may have to start the login again, because a code can be used only
        once."""
        try:
            attempt = self._open_attempt(answer, sealed)
            claims = await self._fetch_claims(answer, attempt)
            identity = await self._identity(claims, by)
        except LoginFailed as failed:
            self._logins.record_failure(failed.user, LOGIN_METHOD, failed.reason, by)
            raise
        self._logins.record_success(identity, LOGIN_METHOD, by)
        return LoginResult(await self._sessions.issue(identity), attempt.back)

    async def aclose(self) -> None:
        """Cancels running requests to the provider."""
        await self._provider.aclose()

    def _open_attempt(self, answer: AuthorizationResponse, sealed: str) -> LoginAttempt:
        """Returns the attempt that the provider's response belongs to. Raises LoginFailed if there is none, or if the
        response has an error or no code."""
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
            raise LoginFailed(
                Denied(f"{why}; {_BEGIN_AGAIN}"), f"the provider says {loggable_error_code(answer.error)}"
            )
        if not answer.code or len(answer.code) > MAX_CODE_CHARACTERS:
            raise _login_invalid("the answer holds no code")
        return attempt

    async def _fetch_claims(self, answer: AuthorizationResponse, attempt: LoginAttempt) -> Mapping[str, Any]:
        """Exchanges the code for an ID token and returns the token's verified claims. Raises LoginFailed."""
        if self._waiting_logins >= MAX_PARALLEL_LOGINS:
            raise LoginFailed(TooManyRequests("too many people are logging in", retry_after=5), "too many at once")
        self._waiting_logins += 1
        try:
            if (await self._provider.metadata()).sends_issuer and not answer.issuer:
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
            self._waiting_logins -= 1

    async def _identity(self, claims: Mapping[str, Any], by: Actor) -> Identity:
        """Returns the identity for the account that the claims of an ID token name. Raises LoginFailed if that account
        may not log in."""
        account = await self._account(claims.get(self._settings.account_claim), by)
        if account.kind is not AccountKind.USER or not account.enabled:
            reason = "the account is disabled" if account.kind is AccountKind.USER else "the account is a robot's"
            raise LoginFailed(_no_account(account.name), reason, user=account.name)
        claim = self._settings.groups_claim
        groups = self._session_groups(groups_from_claim(claims.get(claim))) if claim else ()
        return Identity(account.name, version=account.version, stamp=self._stamp, groups=groups)

    async def _account(self, claim_value: object, by: Actor) -> Account:
        """Returns the account that the value of a claim names. Creates it if it does not exist and the settings say so.
        Raises LoginFailed."""
        try:
            name = AccountName(claim_value if isinstance(claim_value, str) else "")
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
            return self._just_created_account(name)

    def _just_created_account(self, name: AccountName) -> Account:
        """Returns the account that a concurrent login has created. Raises LoginFailed if a group has the name."""
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            raise LoginFailed(_no_account(name), "the name is a group's", user=name) from None

    def _session_groups(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Returns those of `groups` that exist in the store, because other groups have no grants. Leaves out the last
        ones if they do not fit into a session."""
        if not groups:
            return ()
        known = self._accounts.known_groups(groups)
        found: list[str] = []
        remaining_characters = MAX_GROUP_CHARACTERS
        for group in groups:
            if group in known:
                remaining_characters -= len(group) + len('"",')  # the name in JSON
                if remaining_characters < 0:
                    log.warning("a session holds %d groups and no more; the others are left out", len(found))
                    break
                found.append(group)
        return tuple(found)


def provider_stamp(settings: OIDCSettings) -> str:
    """Returns the stamp (a hash) of the provider's settings. Identities from this provider hold it, and are refused
    once the settings differ."""
    return settings_stamp("openid", settings)


def _provider_unavailable(error: ProviderUnavailable) -> LoginFailed:
    """Logs that the provider cannot be used, and returns the error for the login."""
    log.warning("logins at the OpenID provider fail: %s", error)
    shown = UpstreamUnavailable("the company's login does not answer; try again in a moment")
    return LoginFailed(shown, f"the provider: {error}")


def _login_invalid(reason: str) -> LoginFailed:
    """Returns the error for a login whose response is refused. The person does not see `reason`."""
    return LoginFailed(Denied(f"the login is not valid; {_BEGIN_AGAIN}. The registry's log says why"), reason)


def _no_account(name: str) -> Denied:
    """Returns the error that the person sees if the account may not log in."""
    return Denied(f"{name} has no account here that may log in; ask an admin of this registry")

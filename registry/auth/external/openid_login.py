"""Logins of people at the OpenID provider: the authorization code flow, with PKCE to protect the code.

1. `OpenIDLogin.begin` starts a login. It returns the URL of the provider's login page, and the encrypted *attempt*,
   which is the state of the login. The caller puts the encrypted attempt into a cookie, and redirects the browser to
   the URL.
2. The person logs in at the provider, which sends the browser back to this registry with an authorization code.
3. `OpenIDLogin.finish` exchanges the code for an ID token, which states who has logged in and is signed by the
   provider. Then it starts a session for the account that the ID token names.

Sources: OpenID Connect Core 1.0, 3.1; RFC 6749, 4.1; RFC 7636; RFC 9207; RFC 9700, 2.1.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from registry.auth.audit_log import LoginAudit
from registry.auth.external.identity_claims import groups_from_claim
from registry.auth.external.login_attempts import LoginAttempt, LoginAttemptInvalid, LoginAttempts, UsedAttempts
from registry.auth.external.openid_provider import OpenIDProvider
from registry.auth.external.openid_settings import (
    CodeRefused,
    IDTokenInvalid,
    ProviderUnavailable,
    loggable_error_code,
    provider_stamp,
)
from registry.auth.password.htpasswd import HtpasswdFile
from registry.auth.password.throttle import LoginThrottle
from registry.auth.rights.principal import Identity
from registry.auth.token.login_sessions import LoginSessions
from registry.client_addresses import visitor_key
from registry.config.auth_settings import OIDCSettings
from registry.request import RequestInvalid
from registry.single_flight import cancel_and_wait, start_detached, wait_for_outcome
from registry.visitor_limits import Limits, VisitorLimits
from storage.access import Account, AccountExists, AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import Denied, RegistryError, TooManyRequests, UpstreamUnavailable

log = logging.getLogger(__name__)

LOGIN_METHOD: Final[Literal["openid"]] = "openid"
"""The method that the audit log records for a login through the OpenID provider."""
EXCHANGE_LIMITS: Final = Limits(max_running=32, max_running_per_visitor=8, max_pending=256, max_pending_per_visitor=64)
"""The limits on exchanges of authorization codes in one process. A *pending* exchange is running or waits until it may
run. A login is refused if there are too many pending exchanges. A *visitor* is a network of clients. The limits per
visitor keep one network from blocking the logins of all others: if the provider is slow, an exchange takes up to ten
seconds."""
MAX_CODE_CHARACTERS: Final = 4096
"""The longest authorization code that is accepted."""
_START_AGAIN: Final = "start again at /login"
"""Tells the person what to do after a failed login. Error texts contain it."""


@dataclass(frozen=True, slots=True)
class AuthorizationResponse:
    """The provider's response to a login: the parameters in the URL with which the provider sends the browser back to
    this registry. A missing parameter is an empty text.

    - `state`: the random value that `OpenIDLogin.begin` put into the URL of the login page.
    - `code`: the authorization code, after a login that succeeded at the provider.
    - `error`: the provider's error code, after a login that failed at the provider.
    - `issuer`: the URL that identifies the provider (`iss`, RFC 9207).
    """

    state: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    error: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class LoginResult:
    """A successful login. `session` is the value of the session cookie. `return_path` is the path on this registry to
    which the browser goes next."""

    session: str = field(repr=False)
    return_path: str


class LoginFailed(Exception):
    """A login failed.

    - `shown_error`: the error that the person sees.
    - `reason`: the cause, for the audit log.
    - `user`: the name of the account; empty if the login failed before the account was known.
    - `ends_attempt`: True: the caller may delete the browser's cookie with the login attempt. False: the caller must
      keep the cookie. There are two such cases:
      - The cookie contains no valid attempt, or the provider's response belongs to another login.
      - Too many logins were running or had failed. The browser can send the same response again.
    """

    def __init__(self, shown_error: RegistryError, reason: str, *, user: str = "", ends_attempt: bool = True) -> None:
        self.shown_error = shown_error
        self.reason = reason
        self.user = user
        self.ends_attempt = ends_attempt
        super().__init__(reason)


class OpenIDLogin:
    """Starts and finishes logins at the OpenID provider, for one process and its event loop.

    - `login_audit` records the logins in the audit log.
    - `throttle` limits the failed logins of each network.
    - `htpasswd` is a file with accounts that are not in `accounts`; None: there is no such file. A login never creates
      an account whose name is in the file.
    - `clock` returns seconds since 1970.
    """

    def __init__(
        self,
        settings: OIDCSettings,
        accounts: Accounts,
        provider: OpenIDProvider,
        attempts: LoginAttempts,
        sessions: LoginSessions,
        login_audit: LoginAudit,
        throttle: LoginThrottle,
        htpasswd: HtpasswdFile | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._provider = provider
        self._attempts = attempts
        self._sessions = sessions
        self._login_audit = login_audit
        self._throttle = throttle
        self._htpasswd = htpasswd
        self._clock = clock
        self._stamp = provider_stamp(settings)  # a hash of the settings; sessions end when it changes
        self._used_attempts = UsedAttempts(accounts)
        self._exchange_limits = VisitorLimits(EXCHANGE_LIMITS, "logins")
        self._running_checks: set[asyncio.Task[tuple[Identity, str]]] = set()

    async def begin(self, redirect_uri: str, return_path: str) -> tuple[str, str]:
        """Starts a login. Returns the URL of the provider's login page, and the encrypted attempt for a cookie.

        - `redirect_uri`: the URL of this registry to which the provider sends the browser with its response.
        - `return_path`: the path on this registry to which the browser goes after the login.

        Raises LoginFailed if the provider's metadata cannot be fetched. Raises StorageFull, StorageFailed.
        """
        attempt = self._attempts.begin(redirect_uri, return_path)
        try:
            url = await self._provider.authorization_url(attempt)
        except ProviderUnavailable as error:
            raise _log_provider_unavailable(error) from None
        return url, await self._attempts.seal(attempt)

    async def finish(self, response: AuthorizationResponse, sealed: str, by: Actor) -> LoginResult:
        """Finishes a login with the provider's response. `sealed` is the encrypted attempt from the browser's cookie.
        Records the login or its failure in the audit log, where `by` describes the client. Raises LoginFailed,
        StorageFull, StorageFailed.

        If the caller is cancelled, no session starts, and the person has to start the login again, because the provider
        accepts a code only once. The check of the code continues, and a refused code still counts as a failed login."""
        # The check runs in its own task, because this call is cancelled when the client closes its connection. An
        # invented code must count as a failed login even then.
        task = start_detached(self._check_response(response, sealed, by))
        self._running_checks.add(task)
        task.add_done_callback(self._on_check_done)
        identity, return_path = await wait_for_outcome(task)
        self._login_audit.record_success(identity, LOGIN_METHOD, by)
        return LoginResult(await self._sessions.start(identity, LOGIN_METHOD, by), return_path)

    async def aclose(self) -> None:
        """Cancels running checks of codes and fetches of the provider's metadata and keys, and waits until they have
        ended."""
        await cancel_and_wait(self._running_checks)
        await self._provider.aclose()

    def _on_check_done(self, task: asyncio.Task[tuple[Identity, str]]) -> None:
        self._running_checks.discard(task)
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, because a cancelled caller does not await the task

    async def _check_response(self, response: AuthorizationResponse, sealed: str, by: Actor) -> tuple[Identity, str]:
        """Checks the provider's response to a login. Returns the identity, and the path to which the browser goes next
        (`LoginAttempt.back`, the argument `return_path` of `begin`). Records a failure in the audit log. Raises
        LoginFailed, StorageFull, StorageFailed."""
        try:
            attempt = self._open_attempt(response, sealed)
            claims = await self._fetch_claims(response, attempt, by)
            return await self._find_identity(claims, by), attempt.back
        except LoginFailed as failed:
            is_throttled = isinstance(failed.shown_error, TooManyRequests)
            self._login_audit.record_failure(
                failed.user, LOGIN_METHOD, failed.reason, by, "throttled" if is_throttled else "failed"
            )
            raise

    def _open_attempt(self, response: AuthorizationResponse, sealed: str) -> LoginAttempt:
        """Decrypts and returns the attempt in the browser's cookie (`sealed`). Raises LoginFailed if the attempt is not
        valid, or if the response belongs to another attempt, names another provider, reports an error or has no valid
        code."""
        try:
            attempt = self._attempts.open(sealed, response.state)
        except LoginAttemptInvalid as error:
            shown_error = RequestInvalid(
                f"this browser did not start this login, or the login took too long; {_START_AGAIN}"
            )
            raise LoginFailed(shown_error, str(error), ends_attempt=False) from None
        if response.issuer and response.issuer != self._provider.issuer:
            raise _login_invalid("the response names another provider")
        if response.error:
            is_denied = response.error == "access_denied"
            failure_text = (
                "the login was cancelled or refused at the provider" if is_denied else "the provider reports an error"
            )
            raise LoginFailed(
                Denied(f"{failure_text}; {_START_AGAIN}"), f"the provider says {loggable_error_code(response.error)}"
            )
        if not response.code or len(response.code) > MAX_CODE_CHARACTERS:
            raise _login_invalid("the response has no authorization code, or one that is too long")
        return attempt

    async def _fetch_claims(
        self, response: AuthorizationResponse, attempt: LoginAttempt, by: Actor
    ) -> Mapping[str, Any]:
        """Exchanges the code for an ID token, and returns the claims of the token. Before the exchange, waits until the
        client's network may exchange a code, and marks the attempt as used, so that no second response can use it. If
        the response, the code or the token is refused, counts a failed login for the network. Raises LoginFailed,
        StorageFull, StorageFailed."""
        try:
            async with self._exchange_limits.slot(visitor_key(None, by.address)):
                self._throttle.check_provider_logins(by.address)
                try:
                    await self._used_attempts.mark_used(attempt)
                    return await self._exchange(response, attempt)
                except LoginFailed as failed:
                    # Denied: the response, the code or the token was refused. Any other error: the provider failed.
                    if isinstance(failed.shown_error, Denied):
                        await self._throttle.record_provider_failure(by.address)
                    raise
        except TooManyRequests as error:
            # The attempt was not used, so the browser can send the same response again.
            raise LoginFailed(error, error.message, ends_attempt=False) from None
        except LoginAttemptInvalid as error:
            raise _login_invalid(str(error)) from None

    async def _exchange(self, response: AuthorizationResponse, attempt: LoginAttempt) -> Mapping[str, Any]:
        """Exchanges the code for an ID token, verifies the token, and returns its claims. Raises LoginFailed."""
        try:
            if (await self._provider.get_metadata()).sends_issuer and not response.issuer:
                raise _login_invalid("the response does not name its issuer, which the provider's metadata requires")
            id_token = await self._provider.redeem(response.code, attempt.verifier, attempt.redirect_uri)
            return await self._provider.verify(id_token, nonce=attempt.nonce, now=self._clock())
        except ProviderUnavailable as error:
            raise _log_provider_unavailable(error) from None
        except CodeRefused as error:
            log.warning("the OpenID provider refuses an authorization code: %s", error.reason)
            raise _login_invalid(f"the provider refuses the code: {error.reason}") from None
        except IDTokenInvalid as error:
            log.warning("an ID token of the OpenID provider is refused: %s", error)
            raise _login_invalid(f"the ID token: {error}") from None

    async def _find_identity(self, claims: Mapping[str, Any], by: Actor) -> Identity:
        """Returns the identity of the account that the claims of an ID token name. Raises LoginFailed if there is no
        such account, or if the account may not log in."""
        account = await self._find_or_create_account(claims.get(self._settings.account_claim), by)
        if account.kind is not AccountKind.USER or not account.enabled:
            reason = "the account is disabled" if account.kind is AccountKind.USER else "the account is a robot's"
            raise LoginFailed(_no_account(account.name), reason, user=account.name)
        claim = self._settings.groups_claim
        named_groups = groups_from_claim(claims.get(claim)) if claim else ()
        # A group that is not in the store can have no grants.
        known_groups = self._accounts.known_groups(named_groups)
        groups = tuple(group for group in named_groups if group in known_groups)
        return Identity(account.name, version=account.version, stamp=self._stamp, groups=groups)

    async def _find_or_create_account(self, claim_value: object, by: Actor) -> Account:
        """Returns the account with the name `claim_value`. If the account does not exist, creates it if the setting
        `oidc.create` allows this. Raises LoginFailed if the name is not valid, or if there is no account and none was
        created."""
        try:
            name = AccountName(claim_value if isinstance(claim_value, str) else "")
        except AccountInvalid:
            shown_error = Denied(
                "your name at the provider cannot be an account's name here; ask an admin of this registry"
            )
            claim = self._settings.account_claim
            raise LoginFailed(shown_error, f"the claim {claim} is not a valid account name") from None
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            if not self._settings.create:
                raise LoginFailed(_no_account(name), "there is no such account", user=name) from None
        if reason := await self._reason_not_to_create(name):
            log.warning("the OpenID login of %s creates no account: %s", name, reason)
            raise LoginFailed(_no_account(name), reason, user=name)
        try:
            return await self._accounts.add_account(
                name,
                AccountKind.USER,
                password_hash=None,
                note="first login by OpenID",
                refuse_name_with_rights=True,  # raises AccountInvalid if the name has rights already
                by=replace(by, name="system"),
            )
        except AccountExists:  # a concurrent login has created the account, or a group has the name
            return self._find_just_created_account(name)
        except AccountInvalid as error:
            log.warning("the OpenID login of %s creates no account: %s", name, error)
            raise LoginFailed(_no_account(name), str(error), user=name) from None

    async def _reason_not_to_create(self, name: AccountName) -> str:
        """Returns why a login must not create the account `name`; empty: the login may create it. A login must not
        create an account whose name is in the htpasswd file. The new account would get the rights of the account in the
        file, but the account in the file may belong to another person."""
        if self._htpasswd is None:
            return ""
        file = await self._htpasswd.read_current()
        if not file.is_readable:
            return "the htpasswd file, which may have this name, cannot be read"
        return (
            "the htpasswd file has a line with this name; change the name in the file or at the provider, or add an "
            "account with this name to the registry"
            if file.has_name(name)
            else ""
        )

    def _find_just_created_account(self, name: AccountName) -> Account:
        """Returns the account that a concurrent login has created. Raises LoginFailed if there is none, because a group
        has the name."""
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            raise LoginFailed(_no_account(name), "a group has this name", user=name) from None


def _log_provider_unavailable(error: ProviderUnavailable) -> LoginFailed:
    """Logs that the provider cannot be used, and returns the error for the login."""
    log.warning("logins at the OpenID provider fail: %s", error)
    shown_error = UpstreamUnavailable(
        "the OpenID provider, which logs people in, does not answer; try again in a moment"
    )
    return LoginFailed(shown_error, f"the provider: {error}")


def _login_invalid(reason: str) -> LoginFailed:
    """Returns the error for a login that is refused because of the provider's response, the code or the ID token. The
    person does not see `reason`."""
    return LoginFailed(Denied(f"the login is not valid; {_START_AGAIN}. The registry's audit log says why"), reason)


def _no_account(name: str) -> Denied:
    """Returns the error that the person sees if the account `name` does not exist or may not log in."""
    return Denied(f"{name} has no account here that may log in; ask an admin of this registry")

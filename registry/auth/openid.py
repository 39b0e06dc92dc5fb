"""The login of people at the OpenID provider: the authorization code flow with PKCE.

Sources: OpenID Connect Core 1.0, 3.1; RFC 6749, 4.1; RFC 7636; RFC 9207; RFC 9700, 2.1.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlencode

from registry.auth import id_token
from registry.auth.attempts import Attempt, AttemptInvalid, Attempts
from registry.auth.id_token import IDTokenInvalid
from registry.auth.issuers import groups_of
from registry.auth.logins import Logins
from registry.auth.proof import Proof
from registry.auth.provider import CodeRefused, Provider, ProviderUnavailable, word
from registry.auth.sessions import Sessions
from registry.config.oidc import OIDC
from registry.http.errors import RequestInvalid
from storage.access import Account, AccountExists, AccountInvalid, AccountName, AccountUnknown, Kind
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import Denied, RegistryError, TooManyRequests, UpstreamUnavailable

log = logging.getLogger(__name__)

HOW: Final = "openid"
AT_ONCE: Final = 32
"""Logins of a process that may wait for the provider."""
LONGEST_CODE: Final = 4096
"""Characters of a code."""
GROUPS: Final = 1500
"""Characters of the names of groups that a session holds: a cookie has 4096 bytes."""
_PAGE: Final = 1000
_AGAIN: Final = "begin again at /login"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the provider sent the browser back with; empty: it did not say."""

    state: str = field(default="", repr=False)
    code: str = field(default="", repr=False)
    error: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody has logged in: what their browser keeps, and where it goes on."""

    text: str = field(repr=False)
    back: str


class LoginFailed(Exception):
    """`said` is what the person is told; `over`: the login that had begun is. `reason` is for the audit log, and
    `user` who it was about, if that is known."""

    def __init__(self, said: RegistryError, reason: str, *, user: str = "", over: bool = True) -> None:
        self.said = said
        self.reason = reason
        self.user = user
        self.over = over
        super().__init__(reason)


class OpenIDLogin:
    """For one process and its event loop. `clock`: seconds since 1970."""

    def __init__(
        self,
        settings: OIDC,
        accounts: Accounts,
        provider: Provider,
        attempts: Attempts,
        sessions: Sessions,
        logins: Logins,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._provider = provider
        self._attempts = attempts
        self._sessions = sessions
        self._logins = logins
        self._clock = clock
        self._stamp = stamp_of(settings)
        self._waiting = 0

    async def begin(self, redirect_uri: str, back: str) -> tuple[str, str]:
        """Where the browser goes, and what it keeps until it comes back. Raises LoginFailed."""
        attempt = self._attempts.begin(redirect_uri, back)
        asked = {
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
            place = (await self._provider.describe()).authorization
        except ProviderUnavailable as error:
            raise _unavailable(error) from None
        return f"{place}{'&' if '?' in place else '?'}{urlencode(asked)}", await self._attempts.seal(attempt)

    async def finish(self, answer: Answer, sealed: str, by: Actor) -> Session:
        """`sealed`: what the browser kept. Raises LoginFailed, StorageFull, StorageFailed; what failed is in the audit
        log. Cancelled: the code may be spent."""
        try:
            attempt = self._attempt(answer, sealed)
            claims = await self._claims(answer, attempt)
            proof = await self._proof(claims, by)
        except LoginFailed as failed:
            self._logins.failed(failed.user, HOW, failed.reason, by)
            raise
        self._logins.succeeded(proof, HOW, by)
        return Session(await self._sessions.issue(proof), attempt.back)

    async def aclose(self) -> None:
        await self._provider.aclose()

    def _attempt(self, answer: Answer, sealed: str) -> Attempt:
        try:
            attempt = self._attempts.open(sealed, answer.state)
        except AttemptInvalid as error:
            said = RequestInvalid(f"this is not the login that this browser began, or it took too long; {_AGAIN}")
            raise LoginFailed(said, str(error), over=False) from None
        if answer.issuer and answer.issuer != self._provider.issuer:
            raise _not_valid("the answer is of another issuer")
        if answer.error:
            given_up = answer.error == "access_denied"
            why = "the login was given up, or the provider does not allow it" if given_up else "the provider failed"
            raise LoginFailed(Denied(f"{why}; {_AGAIN}"), f"the provider says {word(answer.error)}")
        if not answer.code or len(answer.code) > LONGEST_CODE:
            raise _not_valid("the answer holds no code")
        return attempt

    async def _claims(self, answer: Answer, attempt: Attempt) -> Mapping[str, Any]:
        """What the provider says about who logged in."""
        if self._waiting >= AT_ONCE:
            raise LoginFailed(TooManyRequests("too many people are logging in", retry_after=5), "too many at once")
        self._waiting += 1
        try:
            if (await self._provider.describe()).names_itself and not answer.issuer:
                raise _not_valid("the answer does not say of which issuer it is")
            text = await self._provider.redeem(answer.code, attempt.verifier, attempt.redirect_uri)
            return await id_token.check(
                text,
                await self._provider.keys(),
                issuer=self._provider.issuer,
                client_id=self._provider.client_id,
                nonce=attempt.nonce,
                now=self._clock(),
            )
        except ProviderUnavailable as error:
            raise _unavailable(error) from None
        except CodeRefused as error:
            log.warning("the OpenID provider gives nothing for a code: %s", error.reason)
            raise _not_valid(f"the provider refuses the code: {error.reason}") from None
        except IDTokenInvalid as error:
            log.warning("an ID token of the OpenID provider is refused: %s", error)
            raise _not_valid(f"the ID token: {error}") from None
        finally:
            self._waiting -= 1

    async def _proof(self, claims: Mapping[str, Any], by: Actor) -> Proof:
        account = await self._account(claims.get(self._settings.account_claim), by)
        if account.kind is not Kind.USER or not account.enabled:
            reason = "the account is disabled" if account.kind is Kind.USER else "the account is a robot's"
            raise LoginFailed(_no_account(account.name), reason, user=account.name)
        claim = self._settings.groups_claim
        groups = self._known(groups_of(claims.get(claim))) if claim else ()
        return Proof(account.name, version=account.version, stamp=self._stamp, groups=groups)

    async def _account(self, named: object, by: Actor) -> Account:
        try:
            name = AccountName(named if isinstance(named, str) else "")
        except AccountInvalid:
            said = Denied("what the provider calls you is no name for an account here; ask an admin of this registry")
            claim = self._settings.account_claim
            raise LoginFailed(said, f"the claim {claim} is no account's name") from None
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            if not self._settings.create:
                raise LoginFailed(_no_account(name), "there is no such account", user=name) from None
        try:
            return await self._accounts.add_account(
                name, Kind.USER, password_hash=None, note="first login by OpenID", by=replace(by, name="system")
            )
        except AccountExists:
            return self._taken(name)

    def _taken(self, name: AccountName) -> Account:
        """By another login at the same time, or by a group."""
        try:
            return self._accounts.account(name)
        except AccountUnknown:
            raise LoginFailed(_no_account(name), "the name is a group's", user=name) from None

    def _known(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are in the store: nothing is granted to others."""
        if not groups:
            return ()
        known = self._accounts.known_groups(groups)
        found: list[str] = []
        left = GROUPS
        for group in groups:
            if group in known:
                left -= len(group) + 3
                if left < 0:
                    log.warning("a session holds %d groups and no more; the others are left out", len(found))
                    break
                found.append(group)
        return tuple(found)


def stamp_of(settings: OIDC) -> str:
    """Differs for other settings: what was proved under others does not count under these."""
    return "openid:" + hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()


def _unavailable(error: ProviderUnavailable) -> LoginFailed:
    log.warning("nobody can log in at the OpenID provider: %s", error)
    said = UpstreamUnavailable("the company's login does not answer; try again in a moment")
    return LoginFailed(said, f"the provider: {error}")


def _not_valid(reason: str) -> LoginFailed:
    return LoginFailed(Denied(f"the login is not valid; {_AGAIN}. The registry's log says why"), reason)


def _no_account(name: str) -> Denied:
    return Denied(f"{name} has no account here that may log in; ask an admin of this registry")

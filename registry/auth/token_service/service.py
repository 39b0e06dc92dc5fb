"""The token service: issues bearer tokens. `registry.admin.token_endpoint` serves it over HTTP.

Sources: Distribution's "Token Authentication Specification" and "OAuth2 Token Authentication"; RFC 6749 for the latter.

A token grants the requested access as far as its owner has it now; the rest is left out, and the registry refuses what
a token does not cover. Wrong credentials are refused, with one exception: a request for pulls alone, which everyone may
do, gets an anonymous token. Classic docker sends its Docker Hub login to every mirror of Docker Hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from registry.auth.authorization_header import REFUSED, Basic, Bearer
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.rights.principal import ANONYMOUS, CATALOG, Identity
from registry.auth.token import api_tokens
from registry.auth.token.bearer_tokens import BearerTokens, IssuedToken
from registry.auth.token_service.scopes import CONTENT_ACTIONS, RequestedAccess
from registry.request import RequestInvalid
from storage.access import AccountName, Action
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError, TooManyRequests, Unauthorized
from storage.names import shown

MAX_REFRESH_TOKENS: Final = 100
"""Refresh tokens of one account; one more login revokes the least recently used."""
_MAX_CLIENT_CHARACTERS: Final = 64
"""Characters of a client's name that are stored."""


class ScopePolicy(Protocol):
    """Computes the access that a token can have (`registry.auth.rights.policy`)."""

    async def allowed(self, proof: Identity, names: Iterable[str]) -> Mapping[str, Action]:
        """Returns the most that a token can be granted, by each of the requested `names`."""
        ...


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token, sent in place of a login."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request for a token. `service`: the service it names, if any. `offline`: a refresh token is requested as well.
    `client`: the name that the client gives itself."""

    login: Basic | Bearer | RefreshToken | None
    wanted: RequestedAccess
    service: str | None = None
    offline: bool = False
    client: str = ""


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """A token, the access it grants, and the refresh token; None: none was requested, or this login cannot have
    one."""

    token: IssuedToken
    granted: Mapping[str, Action]
    refresh: str | None = field(default=None, repr=False)


class TokenService:
    """Issues the tokens of one process. `refresh_lifetime` is in seconds; `clock` returns seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        credentials: CredentialVerifier,
        tokens: BearerTokens,
        rights: ScopePolicy,
        *,
        refresh_lifetime: float,
        clock: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._credentials = credentials
        self._tokens = tokens
        self._rights = rights
        self._refresh_lifetime = refresh_lifetime
        self._clock = clock

    async def answer(self, ask: TokenRequest, by: Actor) -> TokenResponse:
        """Returns a token. Raises Unauthorized, TooManyRequests (too many failed logins), RequestInvalid (another
        service), StorageFull, StorageFailed. Cancelled: a refresh token may be stored that no client has."""
        if ask.service is not None and ask.service != self._tokens.service:
            raise RequestInvalid(f"tokens are made for {self._tokens.service} here, not for {shown(ask.service)}")
        try:
            proof = await self._prove(ask.login, by)
        except (Unauthorized, TooManyRequests):
            if not await self._everyone_may_pull(ask.wanted):
                raise
            proof = ANONYMOUS
        granted = await self._grant(proof, ask.wanted)
        token = await self._tokens.issue(proof, granted)
        refresh = await self._refresh(proof, ask, by) if ask.offline else None
        return TokenResponse(token, granted, refresh)

    async def _prove(self, login: Basic | Bearer | RefreshToken | None, by: Actor) -> Identity:
        match login:
            case None:
                return ANONYMOUS
            case Basic(user, secret):
                return await self._credentials.verify_basic(user, secret, by)
            case RefreshToken(text):
                return await self._credentials.verify_refresh(text, by)
            case Bearer(text):
                proof = await self._credentials.verify_bearer(text, by)
                if proof.access is not None:  # a token that could be exchanged for the next one would never expire
                    raise Unauthorized(REFUSED)
                return proof

    async def _everyone_may_pull(self, wanted: RequestedAccess) -> bool:
        if not wanted.is_pull_only:
            return False
        found = await self._rights.allowed(ANONYMOUS, wanted.actions)
        return all(Action.PULL in allowed for allowed in found.values())

    async def _grant(self, proof: Identity, wanted: RequestedAccess) -> dict[str, Action]:
        granted = {}
        allowed = await self._rights.allowed(proof, [name for name in wanted.actions if name != CATALOG])
        for name, actions in wanted.actions.items():
            # The list of repositories is open to everyone: it shows only what its reader may pull.
            found = Action.PULL if name == CATALOG else actions & CONTENT_ACTIONS & allowed[name]
            if found:
                granted[name] = found
        return granted

    async def _refresh(self, proof: Identity, ask: TokenRequest, by: Actor) -> str | None:
        """Makes a refresh token for a login with a password of the store. Other logins get none: an API token, since
        its revocation would not revoke the refresh token, and accounts that are not in the store."""
        if proof.name is None or proof.version is None or proof.token is not None or proof.stamp is not None:
            return None
        account, now = AccountName(proof.name), self._clock()
        made = api_tokens.make(
            account,
            now=now,
            purpose="login",
            note=_token_note(ask.client, by.address),
            expires=now + self._refresh_lifetime,
        )
        who = Actor(account, by.address, by.request_id, by.user_agent)
        await self._accounts.add_token(made.token, made.secret_hash, by=who)
        await self._revoke_oldest(account, who)
        return made.text

    async def _revoke_oldest(self, account: AccountName, by: Actor) -> None:
        page = self._accounts.tokens(account, None, 10 * MAX_REFRESH_TOKENS)
        logins = [token for token in page.items if token.purpose == "login"]
        logins.sort(key=lambda token: token.used or token.created)
        for token in logins[: max(0, len(logins) - MAX_REFRESH_TOKENS)]:
            with suppress(RegistryError):  # revoked meanwhile, or the disk is full: the login succeeds all the same
                await self._accounts.revoke_token(token.id, by=by)


def _token_note(client: str, address: str) -> str:
    name = "".join(letter if letter.isprintable() else "?" for letter in client[:_MAX_CLIENT_CHARACTERS])
    return " ".join(filter(None, (name or "a client", f"at {address}" if address else "")))

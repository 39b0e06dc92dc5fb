"""The token service: issues bearer tokens to clients, for requests to the distribution API (`/v2`).
`registry.admin.token_endpoint` serves the token service over HTTP, at `/token`.

A token grants a requested action only if the account may do the action when the token is issued. A client without a
credential gets an *anonymous* token, which grants only what everyone may do.

The token service refuses a wrong credential, and any login after too many failed logins. There is one exception: a
client that only requests pulls which everyone may do gets an anonymous token. Docker needs this exception, because it
sends the user's login for Docker Hub to every mirror of Docker Hub.

Sources: Distribution's "Token Authentication Specification" and "OAuth2 Token Authentication"; RFC 6749 (OAuth 2.0).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from registry.auth.authorization_header import INVALID_CREDENTIALS, Basic, Bearer
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.rights.principal import ANONYMOUS, CATALOG, Identity
from registry.auth.token import api_tokens
from registry.auth.token.bearer_tokens import BearerTokens, IssuedToken
from registry.auth.token_service.scopes import CONTENT_ACTIONS, RequestedAccess
from registry.printable import printable_line
from registry.request import RequestInvalid
from storage.access import AccountName, Action
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import DataDirectoryReplaced, StorageFailed, StorageFull, TooManyRequests, Unauthorized
from storage.names import shown

_MAX_CLIENT_CHARACTERS: Final = 64
"""Largest length of the stored name of a client. Longer names are cut. Clients choose their names themselves."""
log = logging.getLogger(__name__)


class ScopePolicy(Protocol):
    """Computes the access that a token can grant. `registry.auth.rights.policy.Policy` implements this."""

    async def allowed_actions(self, identity: Identity, names: Iterable[str]) -> Mapping[str, Action]:
        """Returns, for each repository in `names`, all actions that a token for `identity` can grant on the repository.
        Raises Unauthorized if the identity is not valid any more."""
        ...


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token that a client sends in place of a user name and a password. Any API token may serve as a refresh
    token."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A client's request for a token.

    - `credential`: the client's credential. None: the client sent none.
    - `requested`: the access that the client requests.
    - `service`: the name of the service that the token is for. None: the client names none.
    - `offline`: whether the client requests a refresh token in addition to the bearer token.
    - `client`: the name that the client gives itself; empty if it gives none.
    """

    credential: Basic | Bearer | RefreshToken | None
    requested: RequestedAccess
    service: str | None = None
    offline: bool = False
    client: str = ""


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """The response to a request for a token.

    - `token`: the bearer token.
    - `granted`: the access that the bearer token grants: actions by repository name.
    - `refresh`: the text of a new refresh token. None: the service issued none, because the client requested none or
      for a reason such as a login with an API token.
    """

    token: IssuedToken
    granted: Mapping[str, Action]
    refresh: str | None = field(default=None, repr=False)


class TokenService:
    """Issues bearer tokens and refresh tokens.

    - `credentials`: verifies the credentials that clients send.
    - `tokens`: issues the bearer tokens.
    - `rights`: computes the access that a token can grant.
    - `refresh_lifetime`: the lifetime of a refresh token, in seconds.
    - `clock`: returns seconds since 1970.
    """

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

    async def answer(self, request: TokenRequest, by: Actor) -> TokenResponse:
        """Returns the response to a request for a token. `by` describes the client, for the audit log. A cancellation
        can leave a refresh token in the store that no client has received. Raises StorageFull, StorageFailed and:

        - Unauthorized: the credential is wrong.
        - TooManyRequests: too many logins have failed, or too many passwords wait to be hashed.
        - RequestInvalid: the client requests a token for another service, or the token would be too long.
        """
        if request.service is not None and request.service != self._tokens.service:
            raise RequestInvalid(f"this registry makes tokens for {self._tokens.service}, not {shown(request.service)}")
        try:
            identity = await self._verify(request.credential, by)
        except (Unauthorized, TooManyRequests, StorageFull, StorageFailed):
            # StorageFull, StorageFailed: the failed login could not be counted.
            if not await self._is_public_pull(request.requested):
                raise
            identity = ANONYMOUS
        granted = await self._granted_actions(identity, request.requested)
        token = await self._tokens.issue(identity, granted)
        refresh = await self._make_refresh_token(identity, request, by) if request.offline else None
        return TokenResponse(token, granted, refresh)

    async def _verify(self, credential: Basic | Bearer | RefreshToken | None, by: Actor) -> Identity:
        """Returns the identity that a credential proves. Raises Unauthorized, TooManyRequests, StorageFull,
        StorageFailed."""
        match credential:
            case None:
                return ANONYMOUS
            case Basic(user, secret):
                return await self._credentials.verify_basic(user, secret, by)
            case RefreshToken(text):
                return await self._credentials.verify_api_token(text, by)
            case Bearer(text):
                identity = await self._credentials.verify_bearer(text, by)
                if identity.access is not None:
                    # This service issued the token. (A token of a trusted *issuer*, another server whose tokens this
                    # registry accepts, has no `access`.) A client that could exchange a token of this service for a
                    # new one could repeat the exchange, and stay logged in for ever.
                    raise Unauthorized(INVALID_CREDENTIALS)
                return identity

    async def _is_public_pull(self, requested: RequestedAccess) -> bool:
        """Returns whether a client requests only pulls, and only from repositories from which everyone may pull."""
        if not requested.is_pull_only:
            return False
        allowed_by_name = await self._rights.allowed_actions(ANONYMOUS, requested.actions)
        return all(Action.PULL in allowed for allowed in allowed_by_name.values())

    async def _granted_actions(self, identity: Identity, requested: RequestedAccess) -> dict[str, Action]:
        """Returns those of the requested actions that `identity` may do, by repository name. Raises Unauthorized if the
        identity is not valid any more."""
        granted = {}
        allowed = await self._rights.allowed_actions(identity, [name for name in requested.actions if name != CATALOG])
        for name, actions in requested.actions.items():
            # Everyone may list the repositories: the list shows only those that the client may pull.
            granted_actions = Action.PULL if name == CATALOG else actions & CONTENT_ACTIONS & allowed[name]
            if granted_actions:
                granted[name] = granted_actions
        return granted

    async def _make_refresh_token(self, identity: Identity, request: TokenRequest, by: Actor) -> str | None:
        """Makes a refresh token, stores it and returns its text. If the account has too many refresh tokens, the store
        revokes some that are probably not in use.

        Returns None in two cases:

        - The client did not send the password of an account in the store. For example, it sent an API token: a refresh
          token would stay valid after the API token was revoked.
        - The disk is full, or the data directory was replaced. The client can still log in with its password.

        Raises Unauthorized if the account has changed since its password was verified, for example because of a new
        password. Raises StorageFailed."""
        if identity.name is None:  # the client has no account
            return None
        if identity.version is None:  # the account is in the htpasswd file
            return None
        if identity.token is not None:  # the client sent an API token
            return None
        # The client sent a token of an issuer. Its `stamp` is a hash of the issuer's settings. All other identities
        # that reach this line have no `stamp`.
        if identity.stamp is not None:
            return None
        account, now = AccountName(identity.name), self._clock()
        new_token = api_tokens.make(
            account,
            now=now,
            purpose="login",
            note=_token_note(request.client, by.address),
            expires=now + self._refresh_lifetime,
        )
        actor = Actor(account, by.address, by.request_id, by.user_agent)
        try:
            await self._accounts.add_token(
                new_token.token, new_token.secret_hash, expected_version=identity.version, by=actor
            )
        except Unauthorized:  # the account has changed since the login was verified, for example its password
            raise Unauthorized(INVALID_CREDENTIALS) from None
        except (StorageFull, DataDirectoryReplaced) as error:
            log.warning("a client gets no refresh token, so it stores the password of its user: %s", error.message)
            return None
        return new_token.text


def _token_note(client: str, address: str) -> str:
    """Returns the note of a refresh token, which people see in the list of API tokens: the client's name and
    address."""
    name = printable_line(client[:_MAX_CLIENT_CHARACTERS])
    return " ".join(filter(None, (name or "a client", f"at {address}" if address else "")))

"""From what a client shows to what it proves: passwords, API tokens, tokens of `/token` and of trusted issuers.

What was verified is remembered by keyed hash, so a client that shows a password with every request has it hashed once.
It counts only while what made it stands, which every look asks: the epoch of the store tells of any change there, the
stamp of a line in an htpasswd file. It counts only for the address that showed it: to whoever guesses from elsewhere
and has been slowed down, the right password looks like a wrong one. Refusals say the same whatever was wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from registry.auth.audit_log import LoginAudit
from registry.auth.authorization_header import REFUSED
from registry.auth.external.issuers import Issuers
from registry.auth.password.password_check import PasswordCheck
from registry.auth.revocation import RevocationCheck
from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.auth.token import api_tokens
from registry.auth.token.bearer_tokens import BearerTokens
from registry.request import detached_context
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized

CACHED_SECONDS: Final = 3600.0
"""Seconds until what is remembered is verified anew."""
LONGEST_USER: Final = 255
LONGEST_SECRET: Final = 16 * 1024
"""Characters: a token of an issuer stands in a password's place, and some are long."""


@dataclass(slots=True)
class _Verified:
    """`proof` held under `epoch`; `until` it need not be verified anew. `key`: which of our keys it was signed with."""

    identity: Identity
    epoch: int
    until: float
    key: str | None = None


class CredentialVerifier:
    """For one process and its event loop. `clock`: seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        tokens: BearerTokens,
        issuers: Issuers,
        passwords: PasswordCheck,
        standing: RevocationCheck,
        logins: LoginAudit,
        clock: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._tokens = tokens
        self._issuers = issuers
        self._passwords = passwords
        self._standing = standing
        self._logins = logins
        self._clock = clock
        self._basic = SecretCache[_Verified]()
        self._bearer = SecretCache[_Verified]()
        self._flights: dict[bytes, asyncio.Task[Identity]] = {}

    async def verify_bearer(self, token: str, by: Actor) -> Identity:
        """What a token proves: one of ours, or an issuer's, whose keys may have to be waited for. `by` is where it came
        from. Raises Unauthorized, whatever is wrong with it."""
        key, epoch = self._bearer.key_of(token), self._accounts.epoch()
        if proof := self._recall(self._bearer, key, epoch):
            return proof
        foreign = self._issuers.knows(token)
        try:
            if foreign:
                proof, signed_with = await self._issuers.verify(token), None
            else:
                proof, signed_with = self._tokens.verify(token), self._tokens.key_of(token)
            proof = self._standing.check(proof)
        except Unauthorized as error:
            if foreign:
                self._logins.failed("", "issuer", error.message, by)
            raise Unauthorized(REFUSED) from None
        if foreign:
            self._logins.record_success(proof, "issuer", by)
        until = self._clock() + CACHED_SECONDS if proof.expires is None else proof.expires
        self._bearer.put(key, _Verified(proof, epoch, until, signed_with), len(token))
        return proof

    async def verify_basic(self, user: str, secret: str, by: Actor) -> Identity:
        """What a user's password, API token, or token of an issuer proves. Waits while passwords are hashed; those who
        show the same at the same time wait for one hashing. Raises Unauthorized, whatever is wrong, and
        TooManyRequests: too many attempts failed, or too many wait. Cancelled: the hashing goes on."""
        if not user or not secret or len(user) > LONGEST_USER or len(secret) > LONGEST_SECRET:
            raise Unauthorized(REFUSED)
        key = self._basic.key_of(user, secret, by.address)
        if proof := self._recall(self._basic, key, self._accounts.epoch()):
            return proof
        return await self._share(key, lambda: self._verify_basic(key, user, secret, by))

    async def verify_refresh(self, text: str, by: Actor) -> Identity:
        """What an API token proves that is shown without a user's name, as `/token` takes it for a refresh token.
        Raises Unauthorized."""
        try:
            proof = self._api_token(None, text)
        except Unauthorized as error:
            self._logins.failed("", "token", error.message, by)
            raise Unauthorized(REFUSED) from None
        self._logins.record_success(proof, "token", by)
        return proof

    async def aclose(self) -> None:
        """Ends what is being verified."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    def _recall(self, kept: SecretCache[_Verified], key: bytes, epoch: int) -> Identity | None:
        verified = kept.get(key)
        if verified is None:
            return None
        if verified.until <= self._clock() or not self._standing.is_stamp_current(verified.identity):
            kept.drop(key)
            return None
        if verified.epoch != epoch:
            try:
                if verified.key is not None and not self._tokens.is_key_accepted(verified.key):
                    raise Unauthorized(REFUSED)
                verified.identity = self._standing.check(verified.identity)
            except Unauthorized:
                kept.drop(key)
                return None
            verified.epoch = epoch
        return verified.identity

    async def _share(self, key: bytes, start: Callable[[], Coroutine[Any, Any, Identity]]) -> Identity:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(start(), context=detached_context())
            flight.add_done_callback(lambda ended: self._land(key, ended))
        return await asyncio.shield(flight)

    def _land(self, key: bytes, ended: asyncio.Task[Identity]) -> None:
        self._flights.pop(key, None)
        if not ended.cancelled():
            ended.exception()  # somebody has looked at it, even if nobody waits any more

    async def _verify_basic(self, key: bytes, user: str, secret: str, by: Actor) -> Identity:
        epoch = self._accounts.epoch()
        how = "token" if api_tokens.is_well_formed(secret) else "issuer" if self._issuers.knows(secret) else "password"
        try:
            if how == "token":
                proof = self._api_token(user, secret)
            elif how == "issuer":
                proof = await self._issuers.verify(secret)
                if proof.name != user:
                    raise Unauthorized("the token is another account's")
            else:
                proof = await self._passwords.check(_name(user), secret, by.address)
            proof = self._standing.check(proof)
        except TooManyRequests as error:
            self._logins.failed(user, how, error.message, by)
            raise
        except Unauthorized as error:
            self._logins.failed(user, how, error.message, by)
            raise Unauthorized(REFUSED) from None
        self._logins.record_success(proof, how, by)
        until = self._clock() + CACHED_SECONDS
        until = until if proof.expires is None else min(until, proof.expires)
        self._basic.put(key, _Verified(proof, epoch, until), len(secret))
        return proof

    def _api_token(self, user: str | None, text: str) -> Identity:
        """`user` None: whosever it is."""
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
        self._logins.used(token)
        return Identity(
            account.name,
            robot=account.kind is AccountKind.ROBOT,
            version=account.version,
            token=token.id,
            limits=token.limits,
            expires=token.expires,
        )


def _name(user: str) -> AccountName:
    """That nobody can have another name is no secret, so nothing is hashed for one."""
    try:
        return AccountName(user)
    except AccountInvalid:
        raise Unauthorized("no account has such a name") from None

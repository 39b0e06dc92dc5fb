"""Tokens of trusted issuers (`[[issuer]]`), such as those that a CI system gives to its jobs.

A token is a JWT (RFC 7519) signed with a key of the issuer's key set. It logs in as a robot that the store has, so its
rights are granted, listed and disabled like those of any other account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import jwt

from registry.auth.external.identity_claims import claim_values, groups_from_claim, settings_stamp
from registry.auth.external.jwks import FetchedKeySet, FileKeySet, KeySet, fetch_key_set
from registry.auth.rights.principal import Identity
from registry.auth.token.signed_tokens import TokenInvalid, check_times, read_claims, read_header
from registry.config.auth_settings import Issuer
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import Unauthorized

LEEWAY_SECONDS: Final = 10.0
"""Seconds by which the issuer's clock may differ."""
MAX_ISSUER_TOKEN_CHARACTERS: Final = 16 * 1024
"""Characters of a token."""
_OTHER_TYPES: Final = {"verify_sub": False, "verify_jti": False}
"""`sub` and `jti` are not used here, so they may be of any type."""


class Issuers:
    """The trusted issuers, for one process and its event loop. `clock` gives seconds since 1970; `monotonic` is for the
    age of key sets."""

    def __init__(
        self,
        settings: Sequence[Issuer],
        accounts: Accounts,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._accounts = accounts
        self._clock = clock
        self._sets: dict[tuple[object, ...], KeySet] = {}
        for each in settings:
            if each.jwks_file is not None:
                self._sets.setdefault(_key_set_id(each), FileKeySet(each.jwks_file))
            elif each.jwks_url is not None:
                fetch = partial(fetch_key_set, ca_file=each.ca_file)
                self._sets.setdefault(_key_set_id(each), FetchedKeySet(each.jwks_url, fetch, monotonic))
        self.stamps: Mapping[str, Issuer] = {issuer_stamp(each): each for each in settings}
        """The issuers' settings, by the stamp of the identities that their tokens prove."""

    def issued(self, text: str) -> bool:
        """Returns whether `text` looks like a token of one of the issuers. Checks nothing."""
        return bool(self._settings) and self._issued_by(text) is not None

    async def verify(self, text: str) -> Identity:
        """Returns the identity that a token proves. May wait for the issuer's key set. Raises Unauthorized. Cancelled:
        leaves nothing behind."""
        found = self._issued_by(text)
        if found is None:
            raise Unauthorized("this is no token of an issuer that is trusted here")
        header, claimed = found
        chosen = self._choose(claimed)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in chosen.algorithms or "crit" in header or not isinstance(key_id, str | None):
            raise Unauthorized("the token is not signed as this issuer's have to be")
        key = await self._sets[_key_set_id(chosen)].find(key_id, algorithm)
        if key is None:
            raise Unauthorized("the token is signed with a key that its issuer does not have")
        try:
            claims = read_claims(
                text,
                key,
                algorithm,
                audience=chosen.audience,
                issuer=chosen.issuer,
                required=("exp", "iss", "aud"),
                options=_OTHER_TYPES,
            )
            expires = check_times(claims, self._clock(), leeway=LEEWAY_SECONDS, expiry_leeway=LEEWAY_SECONDS)
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None
        return self._identity(chosen, claims, expires)

    async def aclose(self) -> None:
        """Cancels fetches that are under way."""
        for each in self._sets.values():
            await each.aclose()

    def _issued_by(self, text: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Returns header and claims of a token of one of the issuers, unchecked; None if it is not one."""
        if text.count(".") != 2:
            return None
        try:
            header = read_header(text, MAX_ISSUER_TOKEN_CHARACTERS)
            claims: dict[str, Any] = jwt.decode(text, options={"verify_signature": False})
        except (TokenInvalid, jwt.InvalidTokenError, ValueError, RecursionError):
            return None
        return (header, claims) if any(claims.get("iss") == each.issuer for each in self._settings) else None

    def _choose(self, claims: Mapping[str, Any]) -> Issuer:
        """Returns the first issuer that fits. The claims are unchecked so far; the signature is checked next, with the
        keys of this issuer."""
        for each in self._settings:
            audience = claims.get("aud")
            named = audience if isinstance(audience, list) else [audience]
            if claims.get("iss") == each.issuer and each.audience in named and _meets(claims, each.required):
                return each
        raise Unauthorized("the token is for another service, or lacks a claim")

    def _identity(self, chosen: Issuer, claims: Mapping[str, Any], expires: float) -> Identity:
        named = chosen.account if chosen.account_claim is None else claims.get(chosen.account_claim)
        try:
            account = self._accounts.account(AccountName(named if isinstance(named, str) else ""))
        except (AccountInvalid, AccountUnknown):
            raise Unauthorized("the token names no robot that is there") from None
        if account.kind is not AccountKind.ROBOT or not account.enabled:
            raise Unauthorized("the token names no robot, or one that is disabled")
        groups = groups_from_claim(claims.get(chosen.groups_claim)) if chosen.groups_claim else ()
        return Identity(
            account.name,
            robot=True,
            version=account.version,
            stamp=issuer_stamp(chosen),
            groups=groups,
            expires=expires + LEEWAY_SECONDS,
        )


def issuer_stamp(settings: Issuer) -> str:
    """Returns the stamp of the identities that an issuer's tokens prove."""
    return settings_stamp("issuer", settings)


def _key_set_id(settings: Issuer) -> tuple[object, ...]:
    return settings.jwks_url, settings.jwks_file, settings.ca_file


def _meets(claims: Mapping[str, Any], required: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether each required claim has one of its allowed values."""
    return all(claim_values(claims.get(name)) & set(allowed) for name, allowed in required.items())

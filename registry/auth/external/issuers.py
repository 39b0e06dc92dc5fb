"""Tokens of others, such as a CI gives its jobs: who they log in as (`[[issuer]]`).

A token is a JWT (RFC 7519) signed with a key of the issuer's key set. It logs in as a robot of the store, which has to
be there: so what it may do is granted, listed and switched off like any other account's.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import jwt

from registry.auth.external.jwks import FetchedKeySet, FileKeySet, KeySet, fetch_key_set
from registry.auth.rights.principal import Identity
from registry.config.auth_settings import Issuer
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import Unauthorized

LEEWAY_SECONDS: Final = 10.0
"""Seconds by which the issuer's clock may differ."""
LONGEST_ISSUER_TOKEN: Final = 16 * 1024
"""Characters of a token."""
MOST_CLAIM_GROUPS: Final = 100
"""Groups that a token may name; beyond, they are left out."""


class Issuers:
    """For one process and its event loop. `clock`: seconds since 1970; `monotonic`: for the age of key sets."""

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
                wanted = partial(fetch_key_set, ca_file=each.ca_file)
                self._sets.setdefault(_key_set_id(each), FetchedKeySet(each.jwks_url, wanted, monotonic))
        self.stamps: Mapping[str, Issuer] = {issuer_stamp(each): each for each in settings}
        """By the stamp that its tokens' proofs have; another one after its settings have changed."""

    def knows(self, text: str) -> bool:
        """Whether this looks like a token of one of them. Nothing is checked."""
        return bool(self._settings) and self._issued_by(text) is not None

    async def verify(self, text: str) -> Identity:
        """Who a token logs in as. May wait for the issuer's key set. Raises Unauthorized. Cancelled: nothing is left
        behind."""
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
            claims: dict[str, Any] = jwt.decode(
                text,
                key,
                algorithms=[algorithm],
                audience=chosen.audience,
                issuer=chosen.issuer,
                options={
                    "require": ["exp", "iss", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,
                    "verify_jti": False,
                },
            )
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, RecursionError):
            raise Unauthorized("the token is not valid") from None
        return self._proof(chosen, claims, self._check_times(claims))

    async def aclose(self) -> None:
        for each in self._sets.values():
            await each.aclose()

    def _issued_by(self, text: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Header and claims of a token of one of them, before anything is checked; None: it is none."""
        if len(text) > LONGEST_ISSUER_TOKEN or text.count(".") != 2:
            return None
        try:
            header: dict[str, Any] = jwt.get_unverified_header(text)
            claims: dict[str, Any] = jwt.decode(text, options={"verify_signature": False})
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            return None
        return (header, claims) if any(claims.get("iss") == each.issuer for each in self._settings) else None

    def _choose(self, claims: Mapping[str, Any]) -> Issuer:
        """The first that fits. What it fits is only claimed so far; the signature is then checked with its keys."""
        for each in self._settings:
            audience = claims.get("aud")
            named = audience if isinstance(audience, list) else [audience]
            if claims.get("iss") == each.issuer and each.audience in named and _has(claims, each.required):
                return each
        raise Unauthorized("the token is for another service, or lacks a claim")

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        """When it expires."""
        now = self._clock()
        expires = _time(claims["exp"])
        if expires + LEEWAY_SECONDS <= now:
            raise Unauthorized("the token has expired")
        for name in ("nbf", "iat"):
            if name in claims and _time(claims[name]) > now + LEEWAY_SECONDS:
                raise Unauthorized("the token is not valid yet")
        return expires

    def _proof(self, chosen: Issuer, claims: Mapping[str, Any], expires: float) -> Identity:
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
    """Differs for other settings: what was proved under others does not count under these."""
    return "issuer:" + hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()


def _key_set_id(settings: Issuer) -> tuple[object, ...]:
    return settings.jwks_url, settings.jwks_file, settings.ca_file


def _has(claims: Mapping[str, Any], required: Mapping[str, Sequence[str]]) -> bool:
    return all(_values(claims.get(name)) & set(allowed) for name, allowed in required.items())


def _values(claim: object) -> set[str]:
    """A claim's value, or each of its values, as settings write them."""
    if isinstance(claim, bool):
        return {str(claim).lower()}
    if isinstance(claim, str | int):
        return {str(claim)}
    return {each for each in claim if isinstance(each, str)} if isinstance(claim, list) else set()


def groups_from_claim(claim: object) -> tuple[str, ...]:
    """Names that no group can have are left out."""
    found = []
    for each in sorted(_values(claim))[: 10 * MOST_CLAIM_GROUPS]:
        try:
            found.append(AccountName(each))
        except AccountInvalid:
            continue
    return tuple(found[:MOST_CLAIM_GROUPS])


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthorized("the token's times are not valid")
    return float(value)

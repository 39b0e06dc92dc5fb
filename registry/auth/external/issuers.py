"""Logins with tokens of trusted issuers, such as the tokens that a CI system gives to its jobs.

The settings list the issuers (`[[issuer]]`). A token is a JWT (RFC 7519), signed with a key of the issuer's key set. It
logs in as a robot: an account for a program. The robot must exist in the store, so admins grant its rights and disable
it like those of any other account.
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
"""How much the issuer's clock may differ from this machine's."""
MAX_ISSUER_TOKEN_CHARACTERS: Final = 16 * 1024
"""The longest token of an issuer that is verified."""
_JWT_OPTIONS: Final = {"verify_sub": False, "verify_jti": False}
"""Options for `jwt.decode`. The claims `sub` and `jti` are not used here, so they may have any type."""


class Issuers:
    """The trusted issuers, for one process and its event loop. `clock` returns seconds since 1970. `monotonic` measures
    the age of key sets, in seconds."""

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
        self._key_sets: dict[tuple[object, ...], KeySet] = {}
        for each in settings:
            if each.jwks_file is not None:
                self._key_sets.setdefault(_key_set_id(each), FileKeySet(each.jwks_file))
            elif each.jwks_url is not None:
                fetch = partial(fetch_key_set, ca_file=each.ca_file)
                self._key_sets.setdefault(_key_set_id(each), FetchedKeySet(each.jwks_url, fetch, monotonic))
        self.stamps: Mapping[str, Issuer] = {issuer_stamp(each): each for each in settings}
        """The settings of each issuer, by their stamp. A stamp is a hash of the settings; the identities that an
        issuer's tokens prove hold it."""

    def issued(self, text: str) -> bool:
        """Returns whether `text` is a token that names one of the issuers. Does not check the signature."""
        return bool(self._settings) and self._read_unverified(text) is not None

    async def verify(self, text: str) -> Identity:
        """Verifies a token and returns the identity that it proves: the robot that it logs in as. May wait until the
        issuer's key set is fetched. Raises Unauthorized if the token is not valid. A cancellation leaves nothing
        behind."""
        found = self._read_unverified(text)
        if found is None:
            raise Unauthorized("this is no token of an issuer that is trusted here")
        header, unverified_claims = found
        issuer = self._choose_issuer(unverified_claims)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in issuer.algorithms or "crit" in header or not isinstance(key_id, str | None):
            raise Unauthorized("the token is not signed as this issuer's have to be")
        key = await self._key_sets[_key_set_id(issuer)].find(key_id, algorithm)
        if key is None:
            raise Unauthorized("the token is signed with a key that its issuer does not have")
        try:
            claims = read_claims(
                text,
                key,
                algorithm,
                audience=issuer.audience,
                issuer=issuer.issuer,
                required=("exp", "iss", "aud"),
                options=_JWT_OPTIONS,
            )
            expires = check_times(claims, self._clock(), leeway=LEEWAY_SECONDS, expiry_leeway=LEEWAY_SECONDS)
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None
        return self._identity(issuer, claims, expires)

    async def aclose(self) -> None:
        """Cancels the running fetches of key sets."""
        for each in self._key_sets.values():
            await each.aclose()

    def _read_unverified(self, text: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Returns the header and the claims of a token, without a check of its signature. Returns None if `text` is no
        token, or names none of the issuers."""
        if text.count(".") != 2:
            return None
        try:
            header = read_header(text, MAX_ISSUER_TOKEN_CHARACTERS)
            claims: dict[str, Any] = jwt.decode(text, options={"verify_signature": False})
        except (TokenInvalid, jwt.InvalidTokenError, ValueError, RecursionError):
            return None
        return (header, claims) if any(claims.get("iss") == each.issuer for each in self._settings) else None

    def _choose_issuer(self, claims: Mapping[str, Any]) -> Issuer:
        """Returns the first issuer in the settings that fits a token's claims: its name, its audience and its required
        claims. The signature is not checked yet; the caller checks it with this issuer's keys. Raises Unauthorized."""
        for each in self._settings:
            audience = claims.get("aud")
            audiences = audience if isinstance(audience, list) else [audience]
            is_named = claims.get("iss") == each.issuer and each.audience in audiences
            if is_named and _has_required_claims(claims, each.required):
                return each
        raise Unauthorized("the token is for another service, or lacks a claim")

    def _identity(self, issuer: Issuer, claims: Mapping[str, Any], expires: float) -> Identity:
        """Returns the identity of the robot that a token logs in as. Raises Unauthorized if there is no such robot."""
        name = issuer.account if issuer.account_claim is None else claims.get(issuer.account_claim)
        try:
            account = self._accounts.account(AccountName(name if isinstance(name, str) else ""))
        except (AccountInvalid, AccountUnknown):
            raise Unauthorized("the token names no robot that is there") from None
        if account.kind is not AccountKind.ROBOT or not account.enabled:
            raise Unauthorized("the token names no robot, or one that is disabled")
        groups = groups_from_claim(claims.get(issuer.groups_claim)) if issuer.groups_claim else ()
        return Identity(
            account.name,
            robot=True,
            version=account.version,
            stamp=issuer_stamp(issuer),
            groups=groups,
            expires=expires + LEEWAY_SECONDS,
        )


def issuer_stamp(settings: Issuer) -> str:
    """Returns the stamp (a hash) of an issuer's settings."""
    return settings_stamp("issuer", settings)


def _key_set_id(settings: Issuer) -> tuple[object, ...]:
    """Returns a key that is equal for issuers with the same key set."""
    return settings.jwks_url, settings.jwks_file, settings.ca_file


def _has_required_claims(claims: Mapping[str, Any], required: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether each claim in `required` has one of the values that `required` allows for it."""
    return all(claim_values(claims.get(name)) & set(allowed) for name, allowed in required.items())

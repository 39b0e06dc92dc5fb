"""Logins with tokens of trusted issuers, such as the tokens that a CI system gives to its jobs.

The settings list the issuers (`[[issuer]]`). A token is a JWT (RFC 7519), signed with a key of the issuer's key set. A
client with such a token logs in as a robot, which is an account for a program. The robot must exist in the store, where
admins can grant it rights and disable it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from joserfc.jws import CompactSignature
from joserfc.jwt import ClaimsOption

from registry.auth.external.identity_claims import claim_values, groups_from_claim, settings_stamp
from registry.auth.external.jwks import (
    FetchedKeySet,
    FileKeySet,
    KeySet,
    KeySetUnavailable,
    fetch_key_set,
    verify_with_key_set,
)
from registry.auth.rights.principal import Identity
from registry.auth.token.signed_tokens import (
    TokenInvalid,
    algorithm_and_key_id,
    check_claims,
    parse_token,
    unverified_claims,
)
from registry.config.auth_settings import Issuer
from storage.access import AccountInvalid, AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import Unauthorized

LEEWAY_SECONDS: Final = 10.0
"""How far the issuer's clock may be ahead of this machine's clock, or behind it."""
MAX_ISSUER_TOKEN_CHARACTERS: Final = 16 * 1024
"""The longest text that is accepted as a token of an issuer."""
_CHECKED_CLAIMS: Final = ("iss", "aud", "exp", "nbf", "iat")
"""The claims that joserfc checks. They do not include `sub` and `jti`, because joserfc would refuse a token in which
one of these claims is not a text."""


class Issuers:
    """Verifies tokens of the trusted issuers in `settings`, for one process and its event loop. `clock` returns seconds
    since 1970. `monotonic` returns monotonic seconds, for the age of the key sets."""

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
        """The key sets, by their `_key_source`. Issuers with equal sources share one key set."""
        for issuer in settings:
            if issuer.jwks_file is not None:
                self._key_sets.setdefault(_key_source(issuer), FileKeySet(issuer.jwks_file))
            elif issuer.jwks_url is not None:
                fetch = partial(fetch_key_set, ca_file=issuer.ca_file)
                self._key_sets.setdefault(_key_source(issuer), FetchedKeySet(issuer.jwks_url, fetch, monotonic))
        self.issuers_by_stamp: Mapping[str, Issuer] = {issuer_stamp(issuer): issuer for issuer in settings}
        """The issuers in the settings, by stamp. A *stamp* is a hash of one issuer's settings. An identity contains the
        stamp of the issuer whose token has proved the identity. A change of the settings invalidates the identity."""

    def is_issuer_token(self, text: str) -> bool:
        """Returns whether `text` is a token that names one of the issuers. Does not check the signature: the token may
        be forged."""
        return bool(self._settings) and self._read_unverified(text) is not None

    async def verify(self, text: str) -> Identity:
        """Verifies a token and returns the identity of the robot that the client logs in as. May wait for a fetch of
        the issuer's key set, which continues if the caller is cancelled. Raises Unauthorized in these cases:

        - The token is not valid.
        - The issuer's keys are not available.
        - The robot does not exist or is disabled."""
        token_and_claims = self._read_unverified(text)
        if token_and_claims is None:
            raise Unauthorized("this is not a token of an issuer in the settings")
        token, claims = token_and_claims
        issuer = self._choose_issuer(claims)
        options = {
            "iss": ClaimsOption(essential=True, value=issuer.issuer),
            "aud": ClaimsOption(essential=True, value=issuer.audience),
            "exp": ClaimsOption(essential=True),
        }
        try:
            algorithm, key_id = algorithm_and_key_id(token, issuer.algorithms)
            await verify_with_key_set(token, self._key_sets[_key_source(issuer)], key_id, algorithm)
            checked_claims: dict[str, Any] = {name: claims[name] for name in _CHECKED_CLAIMS if name in claims}
            check_claims(checked_claims, options, self._clock(), LEEWAY_SECONDS)
            expires = float(claims["exp"])
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None
        except KeySetUnavailable as error:
            raise Unauthorized(f"the token cannot be checked: {error}") from None
        except OverflowError:
            raise Unauthorized("the token has an expiry that is too large") from None
        return self._identity(issuer, claims, expires)

    async def aclose(self) -> None:
        """Cancels all running fetches of key sets, and waits until they have ended."""
        for key_set in self._key_sets.values():
            await key_set.aclose()

    def _read_unverified(self, text: str) -> tuple[CompactSignature, dict[str, Any]] | None:
        """Parses a token, and returns it with its claims. Does not check the signature. Returns None if `text` is not a
        token, or if the token names none of the issuers."""
        if text.count(".") != 2:
            return None
        try:
            token = parse_token(text, MAX_ISSUER_TOKEN_CHARACTERS)
            claims = unverified_claims(token)
        except TokenInvalid:
            return None
        return (token, claims) if any(claims.get("iss") == issuer.issuer for issuer in self._settings) else None

    def _choose_issuer(self, claims: Mapping[str, Any]) -> Issuer:
        """Returns the first issuer in the settings whose name, audience and required claims match a token's claims.
        Raises Unauthorized if no issuer matches. Does not check the token's signature."""
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        for issuer in self._settings:
            has_name_and_audience = claims.get("iss") == issuer.issuer and issuer.audience in audiences
            if has_name_and_audience and _has_required_claims(claims, issuer.required):
                return issuer
        raise Unauthorized("no issuer in the settings accepts the audience and the claims of the token")

    def _identity(self, issuer: Issuer, claims: Mapping[str, Any], expires: float) -> Identity:
        """Returns the identity of the robot that a token logs in as. If the issuer's settings have an `account_claim`,
        this claim of the token names the robot. Otherwise, the setting `account` of the issuer names the robot. Raises
        Unauthorized if the robot does not exist or is disabled. `expires` is the token's expiry, in seconds since
        1970."""
        name = issuer.account if issuer.account_claim is None else claims.get(issuer.account_claim)
        try:
            account = self._accounts.account(AccountName(name if isinstance(name, str) else ""))
        except (AccountInvalid, AccountUnknown):
            raise Unauthorized("the robot that the token logs in as does not exist") from None
        if account.kind is not AccountKind.ROBOT or not account.enabled:
            raise Unauthorized("the account that the token logs in as is disabled, or is not a robot")
        groups = groups_from_claim(claims.get(issuer.groups_claim)) if issuer.groups_claim else ()
        return Identity(
            account.name,
            robot=True,
            version=account.version,
            stamp=issuer_stamp(issuer),
            groups=groups,
            expires=expires + LEEWAY_SECONDS,  # `verify` accepts the token until this time
        )


def issuer_stamp(settings: Issuer) -> str:
    """Returns the stamp of an issuer: a hash of its settings."""
    return settings_stamp("issuer", settings)


def _key_source(settings: Issuer) -> tuple[object, ...]:
    """Returns what identifies the source of an issuer's keys: the URL of the key set, the file of the key set, and the
    file with the CA certificates to trust. Each can be None."""
    return settings.jwks_url, settings.jwks_file, settings.ca_file


def _has_required_claims(claims: Mapping[str, Any], required: Mapping[str, Sequence[str]]) -> bool:
    """Returns whether each claim in `required` has one of the values that `required` allows for it."""
    return all(claim_values(claims.get(name)) & set(allowed) for name, allowed in required.items())

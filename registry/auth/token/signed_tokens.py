"""Signed tokens (JWT, RFC 7519): signing, and the checks that all kinds of tokens share.

`SignedTokens` signs and verifies the tokens of this registry: bearer tokens and login sessions. It uses the functions
`read_header`, `read_claims` and `check_times`. The modules that verify tokens signed by others use these functions as
well: tokens of trusted issuers, and ID tokens of the OpenID provider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jwt

from registry.auth.token.signing_keys import SigningKeys
from storage.access import SigningKey
from storage.accounts import Accounts

ALGORITHM: Final = "HS256"
"""The signature algorithm of this registry's tokens. A token that names another algorithm is refused (RFC 8725,
3.1)."""
LEEWAY_SECONDS: Final = 5.0
"""How far in the future a token's time of issue may be. This time is in the future if the clock of this machine was set
back after the token was issued."""


class TokenInvalid(Exception):
    """A token is refused. The text completes the sentence "the token …", such as "has expired"."""


class SignedTokens:
    """Signs and verifies one kind of token of this registry.

    - `token_type`: the `typ` in the header of a token. Each kind of token has its own.
    - `audience`: the claim `aud`, which names whom the token is for.
    - `required`: the names of the claims that a token must have.
    - `max_characters`: a longer token is refused without verification.

    The claim `iss`, which names the issuer, is the random id of the registry's store. So tokens of another store are
    refused, even if that store has the same signing key.
    """

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        *,
        token_type: str,
        audience: str,
        required: Sequence[str],
        max_characters: int,
    ) -> None:
        self._accounts = accounts
        self._keys = keys
        self._token_type = token_type
        self._audience = audience
        self._required = required
        self._max_characters = max_characters

    async def sign(self, claims: Mapping[str, Any]) -> str:
        """Returns a token with `claims`, and with the claims `iss` and `aud`. If the store has no signing key, creates
        one, and raises StorageFull or StorageFailed if that fails."""
        key = await self._keys.current()
        header = {"kid": key.id, "typ": self._token_type}
        payload = {"iss": self._accounts.instance_id(), "aud": self._audience, **claims}
        return jwt.encode(payload, key.secret, ALGORITHM, headers=header)

    def key_id(self, text: str) -> str:
        """Returns the id of the signing key that the token `text` names. Does not check the signature. Raises
        TokenInvalid if the text is not a token of this kind."""
        header = read_header(text, self._max_characters)
        key_id = header.get("kid")
        if header != {"alg": ALGORITHM, "typ": self._token_type, "kid": key_id} or not isinstance(key_id, str):
            raise TokenInvalid("is not one that this registry issued for this use")
        return key_id

    def verify(self, text: str, now: float) -> dict[str, Any]:
        """Returns the claims of the token `text`. Raises TokenInvalid if this registry did not sign it, or if it is not
        valid at the time `now`, in seconds since 1970."""
        claims = read_claims(
            text,
            self._key(text).secret,
            ALGORITHM,
            audience=self._audience,
            issuer=self._accounts.instance_id(),
            required=self._required,
            options={"strict_aud": True},
        )
        check_times(claims, now, leeway=LEEWAY_SECONDS)
        return claims

    def is_key_accepted(self, key_id: str) -> bool:
        """Returns whether tokens that were signed with the key `key_id` are still accepted."""
        return self._keys.find(key_id) is not None

    def _key(self, text: str) -> SigningKey:
        """Returns the key that the token `text` names. Raises TokenInvalid if there is no such key, or if it is not
        accepted any more."""
        key = self._keys.find(self.key_id(text))
        if key is None:
            raise TokenInvalid("names a signing key that does not exist or is not accepted any more")
        return key


def read_header(text: str, max_characters: int) -> dict[str, Any]:
    """Returns the header of the token `text`. Does not check the signature. Raises TokenInvalid if the text is longer
    than `max_characters`, or is not a JWT."""
    if len(text) > max_characters:
        raise TokenInvalid("is too long")
    try:
        return jwt.get_unverified_header(text)
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        raise TokenInvalid("is not a JWT") from None


def read_claims(
    text: str,
    key: Any,
    algorithm: str,
    *,
    audience: str,
    issuer: str,
    required: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the claims of the token `text`. Raises TokenInvalid if it was not signed with `key` and `algorithm`, if
    it has another `audience` or `issuer`, or if one of the `required` claims is missing. `options` are further options
    of `jwt.decode`. Does not check the times in the claims; `check_times` does."""
    checks: Any = {
        "require": list(required),
        "verify_exp": False,
        "verify_nbf": False,
        "verify_iat": False,
        **(options or {}),
    }
    try:
        claims: dict[str, Any] = jwt.decode(
            text, key, algorithms=[algorithm], audience=audience, issuer=issuer, options=checks
        )
    except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, RecursionError) as error:
        raise TokenInvalid(f"is not valid: {type(error).__name__}") from None
    return claims


def check_times(claims: Mapping[str, Any], now: float, *, leeway: float, expiry_leeway: float = 0.0) -> float:
    """Returns when a token with these claims expires. All times are in seconds since 1970.

    Raises TokenInvalid if the token expired (`exp`) at least `expiry_leeway` seconds before `now`. Also raises it if
    the token was issued (`iat`), or becomes valid (`nbf`), more than `leeway` seconds after `now`. The claims `iat` and
    `nbf` may be missing.
    """
    expires = _time(claims["exp"])
    if expires + expiry_leeway <= now:
        raise TokenInvalid("has expired")
    if any(name in claims and _time(claims[name]) > now + leeway for name in ("nbf", "iat")):
        raise TokenInvalid("is not valid yet")
    return expires


def _time(value: object) -> float:
    """Returns the time in a claim with this value. Raises TokenInvalid if the value is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TokenInvalid("has a time that is not a number")
    return float(value)

"""Signed tokens (JWT, RFC 7519): the checks that all kinds of tokens here share.

`SignedTokens` signs and checks one kind of token with the keys of this store. Tokens of issuers and ID tokens are
signed elsewhere; their checks use the functions of this module.
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
"""The one algorithm of the store's own tokens. A token cannot choose another (RFC 8725, 3.1)."""
LEEWAY_SECONDS: Final = 5.0
"""Seconds by which this machine's clock may have been set back since it signed a token."""


class TokenInvalid(Exception):
    """A token that is refused. The text continues a sentence that begins with the token: "has expired"."""


class SignedTokens:
    """Tokens of one `kind` (`typ`), for one `audience`, with the claims in `required`, of at most `longest` characters.

    The issuer is the store's own random name, so a token of another registry is refused even if it had the same key.
    """

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        *,
        kind: str,
        audience: str,
        required: Sequence[str],
        longest: int,
    ) -> None:
        self._accounts = accounts
        self._keys = keys
        self._kind = kind
        self._audience = audience
        self._required = required
        self._longest = longest

    async def sign(self, claims: Mapping[str, Any]) -> str:
        """Returns a token with these claims, issuer and audience. Raises StorageFull, StorageFailed: the first token of
        a store creates its key."""
        key = await self._keys.current()
        own = {"iss": self._accounts.instance_id(), "aud": self._audience}
        return jwt.encode({**own, **claims}, key.secret, ALGORITHM, headers={"kid": key.id, "typ": self._kind})

    def key_id(self, text: str) -> str:
        """Returns the id of the key that the token names. Raises TokenInvalid."""
        header = read_header(text, self._longest)
        key_id = header.get("kid")
        if header != {"alg": ALGORITHM, "typ": self._kind, "kid": key_id} or not isinstance(key_id, str):
            raise TokenInvalid("is no token of this registry")
        return key_id

    def verify(self, text: str, now: float) -> dict[str, Any]:
        """Returns the claims of a token that is genuine and valid at `now` (seconds since 1970). Raises
        TokenInvalid."""
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
        """Returns whether tokens that this key signed are still accepted."""
        return self._keys.find(key_id) is not None

    def _key(self, text: str) -> SigningKey:
        key = self._keys.find(self.key_id(text))
        if key is None:
            raise TokenInvalid("was signed with a key that is not known")
        return key


def read_header(text: str, longest: int) -> dict[str, Any]:
    """Returns the header of a token of at most `longest` characters. Checks nothing else. Raises TokenInvalid."""
    if len(text) > longest:
        raise TokenInvalid("is too long")
    try:
        return jwt.get_unverified_header(text)
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        raise TokenInvalid("is no token") from None


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
    """Returns the claims of a token whose signature, audience and issuer are right and that has all `required` claims.
    `check_times` checks the times, by the clock of this process. `options` are further options of PyJWT. Raises
    TokenInvalid."""
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
    """Returns when a token expires. Raises TokenInvalid if it has expired by more than `expiry_leeway` seconds, or
    begins more than `leeway` seconds after `now`. `nbf` and `iat` may be missing. Times are seconds since 1970."""
    expires = _time(claims["exp"])
    if expires + expiry_leeway <= now:
        raise TokenInvalid("has expired")
    if any(name in claims and _time(claims[name]) > now + leeway for name in ("nbf", "iat")):
        raise TokenInvalid("is not valid yet")
    return expires


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TokenInvalid("has times that are not valid")
    return float(value)

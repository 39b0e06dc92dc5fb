"""Signed tokens (JWT, RFC 7519): signing, and the checks that all kinds of tokens share.

`SignedTokens` signs and verifies the tokens of this store: bearer tokens and login sessions. The functions of this
module also check tokens that others signed: those of trusted issuers, and ID tokens of the OpenID provider.
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
"""The algorithm of the store's own tokens. A token that names another one is refused (RFC 8725, 3.1)."""
LEEWAY_SECONDS: Final = 5.0
"""A token of this store may begin this much later than now, because this machine's clock may have been set back."""


class TokenInvalid(Exception):
    """A token is refused. The text completes the sentence "the token …", such as "has expired"."""


class SignedTokens:
    """Signs and verifies one kind of token of this store.

    - `token_type`: the `typ` in the header, which differs for each kind.
    - `audience`: the claim `aud`.
    - `required`: the claims that a token must have.
    - `max_characters`: the longest token that is verified.

    The claim `iss` is the random name of the store, so tokens of another registry are refused even if it has the same
    key.
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
        """Returns a token with `claims`, and with the claims for issuer and audience. The first token of a store
        creates its signing key, so this raises StorageFull, StorageFailed."""
        key = await self._keys.current()
        own = {"iss": self._accounts.instance_id(), "aud": self._audience}
        return jwt.encode({**own, **claims}, key.secret, ALGORITHM, headers={"kid": key.id, "typ": self._token_type})

    def key_id(self, text: str) -> str:
        """Returns the id of the signing key that the token names. Does not check the signature. Raises TokenInvalid if
        this is no token of this kind."""
        header = read_header(text, self._max_characters)
        key_id = header.get("kid")
        if header != {"alg": ALGORITHM, "typ": self._token_type, "kid": key_id} or not isinstance(key_id, str):
            raise TokenInvalid("is no token of this registry")
        return key_id

    def verify(self, text: str, now: float) -> dict[str, Any]:
        """Returns the claims of a token. Raises TokenInvalid unless this store signed it and it is valid at `now`, in
        seconds since 1970."""
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
        """Returns whether tokens that the key `key_id` signed are still accepted."""
        return self._keys.find(key_id) is not None

    def _key(self, text: str) -> SigningKey:
        """Returns the key that the token names. Raises TokenInvalid if it is not accepted any more."""
        key = self._keys.find(self.key_id(text))
        if key is None:
            raise TokenInvalid("was signed with a key that is not known")
        return key


def read_header(text: str, max_characters: int) -> dict[str, Any]:
    """Returns the header of a token. Does not check the signature. Raises TokenInvalid if the text is longer than
    `max_characters`, or no token."""
    if len(text) > max_characters:
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
    """Returns the claims of a token. Raises TokenInvalid if the signature, the audience or the issuer is wrong, or if
    one of the `required` claims is missing. Does not check the times; `check_times` does, with the caller's clock.
    `options` are further options of `jwt.decode`."""
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
    """Returns when a token expires. Raises TokenInvalid if it expired at least `expiry_leeway` seconds before `now`, or
    begins more than `leeway` seconds after `now`. The claims `nbf` and `iat` may be missing. Times are in seconds since
    1970."""
    expires = _time(claims["exp"])
    if expires + expiry_leeway <= now:
        raise TokenInvalid("has expired")
    if any(name in claims and _time(claims[name]) > now + leeway for name in ("nbf", "iat")):
        raise TokenInvalid("is not valid yet")
    return expires


def _time(value: object) -> float:
    """Returns the value of a claim that is a time. Raises TokenInvalid if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TokenInvalid("has times that are not valid")
    return float(value)

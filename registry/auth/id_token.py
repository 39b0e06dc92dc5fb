"""The checks of an ID token (OpenID Connect Core 1.0, 3.1.3.7): whose it is, for whom, and of which login."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from typing import Any, Final

import jwt

from registry.auth.key_sets import KeySet
from registry.config.auth import ASYMMETRIC

LEEWAY: Final = 10.0
"""Seconds by which the provider's clock may differ."""
LONGEST: Final = 64 * 1024
"""Characters of a token."""
_REQUIRED: Final = ("iss", "aud", "exp", "iat", "sub", "nonce")


class IDTokenInvalid(Exception):
    """The text is for the log; the person is told nothing of it."""


async def check(text: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, now: float) -> Mapping[str, Any]:
    """Its claims. `now`: seconds since 1970. May wait for the key set. Raises IDTokenInvalid."""
    if len(text) > LONGEST:
        raise IDTokenInvalid("it is too long")
    try:
        header = jwt.get_unverified_header(text)
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        raise IDTokenInvalid("it is no token") from None
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in ASYMMETRIC or "crit" in header or not isinstance(key_id, str | None):
        raise IDTokenInvalid("it is not signed with a key pair")
    key = await keys.find(key_id, algorithm)
    if key is None:
        raise IDTokenInvalid("it is signed with a key that the provider does not have")
    try:
        claims: dict[str, Any] = jwt.decode(
            text,
            key,
            algorithms=[algorithm],
            audience=client_id,
            issuer=issuer,
            options={"require": list(_REQUIRED), "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, RecursionError) as error:
        raise IDTokenInvalid(f"it is not valid: {type(error).__name__}") from None
    _check_party(claims, client_id)
    _check_times(claims, now)
    shown = claims["nonce"]
    if not isinstance(shown, str) or not hmac.compare_digest(shown.encode("utf-8", "replace"), nonce.encode()):
        raise IDTokenInvalid("it is of another login: its nonce differs")
    return claims


def _check_party(claims: Mapping[str, Any], client_id: str) -> None:
    """Where it is for several, it says for which of them it was made."""
    audience, party = claims["aud"], claims.get("azp")
    several = isinstance(audience, list) and len(audience) > 1
    if (several and party is None) or (party is not None and party != client_id):
        raise IDTokenInvalid("it was made for another client: its azp differs")


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    if _time(claims["exp"]) + LEEWAY <= now:
        raise IDTokenInvalid("it has expired")
    if any(name in claims and _time(claims[name]) > now + LEEWAY for name in ("iat", "nbf")):
        raise IDTokenInvalid("it is not valid yet")


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise IDTokenInvalid("its times are not valid")
    return float(value)

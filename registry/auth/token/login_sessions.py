"""Sessions of people who logged in at the OpenID provider: JWTs (RFC 7519) in a cookie, signed by the store's key.

Type and audience differ from those of `/token`'s tokens, so neither is ever taken for the other (RFC 8725, 3.11 and
3.12). What a session proves counts as long as the account stands as it was, and the settings of the provider do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import jwt

from registry.auth.rights.principal import Identity
from registry.auth.token.bearer_tokens import ALGORITHM, LEEWAY_SECONDS
from registry.auth.token.signing_keys import SigningKeys
from storage.accounts import Accounts
from storage.errors import Unauthorized

SESSION_TYPE: Final = "entrepot-session+jwt"
SESSION_SECONDS: Final = 8 * 3600.0
"""Seconds: a day's work. An hour at the most after the key that signed it was replaced."""
LONGEST_COOKIE: Final = 4096
"""Characters of a cookie, the most that every browser keeps (RFC 6265, 6.1)."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"

_REQUIRED: Final = ("exp", "iat", "iss", "aud", "sub", "jti", "version", "stamp")


class LoginSessions:
    """`service` is what tokens are for; `clock`: seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        service: str,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._accounts = accounts
        self._keys = keys
        self._audience = f"{service} session"  # no service's name has a space
        self._clock = clock
        self._random = random

    async def issue(self, proof: Identity) -> str:
        """A session of who logged in. Raises StorageFull, StorageFailed (the first token of a store makes its key)."""
        now = int(self._clock())
        claims: dict[str, Any] = {
            "iss": self._accounts.instance(),
            "aud": self._audience,
            "sub": proof.name,
            "iat": now,
            "exp": now + int(SESSION_SECONDS),
            "jti": self._random(12).hex(),
            "version": proof.version,
            "stamp": proof.stamp,
            "groups": list(proof.groups),
        }
        key = await self._keys.signing()
        return jwt.encode(claims, key.secret, ALGORITHM, headers={"kid": key.id, "typ": SESSION_TYPE})

    def verify(self, text: str) -> Identity:
        """What a session proves, if it is one of ours, whole, and of now. Whether the account still stands is asked
        elsewhere. Raises Unauthorized."""
        claims = self._claims(text)
        now, issued, expires = self._clock(), _time(claims["iat"]), _time(claims["exp"])
        if issued > now + LEEWAY_SECONDS or expires <= now:
            raise Unauthorized(SESSION_ENDED)
        try:
            return Identity(
                str(claims["sub"]),
                version=int(claims["version"]),
                stamp=str(claims["stamp"]),
                groups=tuple(map(str, claims.get("groups", ()))),
                expires=expires,
            )
        except (TypeError, ValueError):  # we signed it, so it is of another version of us
            raise Unauthorized(SESSION_ENDED) from None

    def _claims(self, text: str) -> Mapping[str, Any]:
        try:
            if len(text) > LONGEST_COOKIE:
                raise Unauthorized(SESSION_ENDED)
            header = jwt.get_unverified_header(text)
            key_id = header.get("kid")
            key = self._keys.find(key_id) if isinstance(key_id, str) else None
            if key is None or header != {"alg": ALGORITHM, "typ": SESSION_TYPE, "kid": key_id}:
                raise Unauthorized(SESSION_ENDED)
            claims: dict[str, Any] = jwt.decode(
                text,
                key.secret,
                algorithms=[ALGORITHM],
                audience=self._audience,
                issuer=self._accounts.instance(),
                options={
                    "require": list(_REQUIRED),
                    "strict_aud": True,
                    # Times are checked by this process's clock.
                    "verify_exp": False,
                    "verify_iat": False,
                },
            )
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise Unauthorized(SESSION_ENDED) from None
        return claims


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthorized(SESSION_ENDED)
    return float(value)

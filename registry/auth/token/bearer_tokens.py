"""The tokens of `/token`: JWTs (RFC 7519) that this store alone signs and checks.

HMAC with SHA-256 and nothing else: the algorithm is not chosen by who shows a token (RFC 8725, 3.1). Issuer is the
store's own random name, audience the service, so a token of another registry is not taken here even if a key were the
same. Access has the form that Distribution gives it ("Docker Registry v2 Bearer token specification").
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import jwt

from registry.auth.rights.principal import CATALOG, Identity
from registry.auth.token.signing_keys import SigningKeys
from storage.access import Action
from storage.accounts import Accounts
from storage.errors import Unauthorized

ALGORITHM: Final = "HS256"
TOKEN_TYPE: Final = "JWT"
LEEWAY_SECONDS: Final = 5.0
"""Seconds by which a clock may have been set back since a token was signed here."""
LONGEST_TOKEN: Final = 24 * 1024
"""Characters of a token; with the rest of a request's headers it has to fit into 32 KiB."""

_REQUIRED: Final = ("exp", "iat", "nbf", "iss", "aud", "sub", "jti", "access")
_GRANTABLE: Final = Action.PULL | Action.PUSH | Action.DELETE


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token's text, when it was made (whole seconds since 1970), and how many seconds it lives."""

    text: str = field(repr=False)
    issued_at: int
    lifetime: int


class BearerTokens:
    """`service` is the audience; `lifetime` in seconds."""

    def __init__(
        self,
        accounts: Accounts,
        service: str,
        lifetime: float,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.service = service
        self._accounts = accounts
        self._keys = SigningKeys(accounts, clock)
        self._random = random
        self._lifetime = lifetime
        self._clock = clock

    async def issue(self, proof: Identity, access: Mapping[str, Action]) -> IssuedToken:
        """A token that proves what `proof` does, limited to `access`. It outlives what it was made of by less than a
        minute. Raises StorageFull, StorageFailed (the first one needs a key)."""
        now = int(self._clock())
        expires = now + int(self._lifetime)
        if proof.expires is not None:
            # Clients take a lifetime below a minute for a minute.
            expires = min(expires, max(int(proof.expires), now + 60))
        claims: dict[str, Any] = {
            "iss": self._accounts.instance(),
            "aud": self.service,
            "sub": proof.name or "",
            "exp": expires,
            "nbf": now,
            "iat": now,
            "jti": self._random(12).hex(),
            "access": _access_claim(access),
        }
        claims |= {name: value for name, value in _identity_claims(proof).items() if value}
        key = await self._keys.signing()
        text = jwt.encode(claims, key.secret, ALGORITHM, headers={"kid": key.id, "typ": TOKEN_TYPE})
        return IssuedToken(text, now, expires - now)

    def verify(self, text: str) -> Identity:
        """What a token proves, if it is one of ours, whole, and of now. Whether the account still stands is asked
        elsewhere. Raises Unauthorized."""
        claims = self._claims(text)
        self._check_times(claims)
        try:
            return _identity_of(claims)
        except (KeyError, TypeError, ValueError, AttributeError):  # we signed it, so it is of another version of us
            raise Unauthorized("the token cannot be read") from None

    def key_of(self, text: str) -> str:
        """The id of the key that a token says it was signed with. Raises Unauthorized."""
        if len(text) > LONGEST_TOKEN:
            raise Unauthorized("the token is too long")
        try:
            header = jwt.get_unverified_header(text)
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise Unauthorized("this is no token") from None
        key_id = header.get("kid")
        if header != {"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": key_id} or not isinstance(key_id, str):
            raise Unauthorized("this is no token of this registry")
        return key_id

    def is_key_accepted(self, key_id: str) -> bool:
        """Whether what that key signed is taken."""
        return self._keys.find(key_id) is not None

    def _claims(self, text: str) -> dict[str, Any]:
        key = self._keys.find(self.key_of(text))
        if key is None:
            raise Unauthorized("the token was signed with a key that is not known")
        try:
            claims: dict[str, Any] = jwt.decode(
                text,
                key.secret,
                algorithms=[ALGORITHM],
                audience=self.service,
                issuer=self._accounts.instance(),
                options={
                    "require": list(_REQUIRED),
                    "strict_aud": True,
                    # Times are checked below, by this process's clock.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise Unauthorized("the token is not valid") from None
        return claims

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now = self._clock()
        begins, issued, expires = (_time(claims[name]) for name in ("nbf", "iat", "exp"))
        if max(begins, issued) > now + LEEWAY_SECONDS:
            raise Unauthorized("the token is not valid yet")
        if expires <= now:
            raise Unauthorized("the token has expired")


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unauthorized("the token's times are not valid")
    return float(value)


def _access_claim(access: Mapping[str, Action]) -> list[dict[str, object]]:
    """In Distribution's form."""
    return [
        {"type": "registry", "name": "catalog", "actions": ["*"]}
        if name == CATALOG
        else {"type": "repository", "name": name, "actions": (actions & _GRANTABLE).words}
        for name, actions in access.items()
    ]


def _parse_access(listed: object) -> dict[str, Action]:
    access: dict[str, Action] = {}
    if not isinstance(listed, list):
        raise TypeError("access is a list")
    for entry in listed:
        if entry["type"] == "registry":
            access[f"registry:{entry['name']}"] = Action.PULL
        else:
            access[str(entry["name"])] = Action.parse(",".join(entry["actions"])) & _GRANTABLE
    return access


def _identity_claims(proof: Identity) -> dict[str, object]:
    """What else `Identity` needs. `limits` are the API token's, and found there again."""
    return {
        "robot": proof.robot,
        "version": proof.version,
        "stamp": proof.stamp,
        "token": proof.token,
        "groups": list(proof.groups),
    }


def _identity_of(claims: Mapping[str, Any]) -> Identity:
    return Identity(
        claims["sub"] or None,
        robot=bool(claims.get("robot")),
        version=claims.get("version"),
        stamp=claims.get("stamp"),
        token=claims.get("token"),
        groups=tuple(claims.get("groups", ())),
        access=_parse_access(claims["access"]),
        expires=float(claims["exp"]),
    )

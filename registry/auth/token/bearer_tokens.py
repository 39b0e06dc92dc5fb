"""The bearer tokens that `/token` issues, which only this store signs and checks.

They are signed with HMAC-SHA-256 and list their access as Distribution's "Docker Registry v2 Bearer token
specification" has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from registry.auth.rights.principal import CATALOG, Identity
from registry.auth.token.signed_tokens import SignedTokens, TokenInvalid
from registry.auth.token.signing_keys import SigningKeys
from storage.access import Action
from storage.accounts import Accounts
from storage.errors import Unauthorized

TOKEN_TYPE: Final = "JWT"
LONGEST_TOKEN: Final = 24 * 1024
"""Characters of a token. With the other headers of a request it has to fit into 32 KiB."""
SHORTEST_LIFETIME: Final = 60
"""Seconds. Clients treat a shorter lifetime as this one."""

_REQUIRED: Final = ("exp", "iat", "nbf", "iss", "aud", "sub", "jti", "access")
_GRANTABLE: Final = Action.PULL | Action.PUSH | Action.DELETE


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token. `issued_at` is in whole seconds since 1970, `lifetime` in seconds."""

    text: str = field(repr=False)
    issued_at: int
    lifetime: int


class BearerTokens:
    """Issues and verifies bearer tokens. `service` is their audience; `lifetime` is in seconds."""

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        service: str,
        lifetime: float,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.service = service
        self._signed = SignedTokens(
            accounts, keys, kind=TOKEN_TYPE, audience=service, required=_REQUIRED, longest=LONGEST_TOKEN
        )
        self._random = random
        self._lifetime = lifetime
        self._clock = clock

    async def issue(self, identity: Identity, access: Mapping[str, Action]) -> IssuedToken:
        """Returns a token for `identity`, limited to `access`. It outlives the credential it was made from by less than
        a minute. Raises StorageFull, StorageFailed: the first token of a store creates its key."""
        now = int(self._clock())
        expires = now + int(self._lifetime)
        if identity.expires is not None:
            expires = min(expires, max(int(identity.expires), now + SHORTEST_LIFETIME))
        claims = {
            "sub": identity.name or "",
            "exp": expires,
            "nbf": now,
            "iat": now,
            "jti": self._random(12).hex(),
            "access": _access_claim(access),
        }
        claims |= {name: value for name, value in _identity_claims(identity).items() if value}
        return IssuedToken(await self._signed.sign(claims), now, expires - now)

    def verify(self, text: str) -> Identity:
        """Returns the identity that a genuine and current token proves. Does not check whether the account is still
        valid (`registry.auth.revocation`). Raises Unauthorized."""
        try:
            return _identity_of(self._signed.verify(text, self._clock()))
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError):  # signed here, by another version of this software
            raise Unauthorized("the token cannot be read") from None

    def key_of(self, text: str) -> str:
        """Returns the id of the key that a token names. Raises Unauthorized."""
        try:
            return self._signed.key_id(text)
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None

    def is_key_accepted(self, key_id: str) -> bool:
        """Returns whether tokens that this key signed are still accepted."""
        return self._signed.is_key_accepted(key_id)


def _access_claim(access: Mapping[str, Action]) -> list[dict[str, object]]:
    """Returns `access` in Distribution's format."""
    return [
        {"type": "registry", "name": "catalog", "actions": ["*"]}
        if name == CATALOG
        else {"type": "repository", "name": name, "actions": (actions & _GRANTABLE).words}
        for name, actions in access.items()
    ]


def _parse_access(listed: object) -> dict[str, Action]:
    """Returns the actions by name. Raises KeyError, TypeError, ValueError, AttributeError."""
    access: dict[str, Action] = {}
    if not isinstance(listed, list):
        raise TypeError("access is a list")
    for entry in listed:
        if entry["type"] == "registry":
            access[f"registry:{entry['name']}"] = Action.PULL
        else:
            access[str(entry["name"])] = Action.parse(",".join(entry["actions"])) & _GRANTABLE
    return access


def _identity_claims(identity: Identity) -> dict[str, object]:
    """Returns the claims for the other fields of an identity. `limits` are not among them: the API token has them."""
    return {
        "robot": identity.robot,
        "version": identity.version,
        "stamp": identity.stamp,
        "token": identity.token,
        "groups": list(identity.groups),
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

"""Bearer tokens: the tokens that the endpoint `/token` issues for requests to the distribution API.

A bearer token is a JWT (RFC 7519), signed with HMAC-SHA-256 and a key of this registry. No other registry accepts the
token. Its claim `access` lists the repositories and actions that it grants, in the format of Distribution's "Docker
Registry v2 Bearer token specification".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from registry.auth.rights.principal import CATALOG, Identity
from registry.auth.token.signed_tokens import SignedTokens, TokenInvalid
from registry.auth.token.signing_keys import SigningKeys
from registry.request import RequestInvalid
from storage.access import Action
from storage.accounts import Accounts
from storage.errors import Unauthorized

TOKEN_TYPE: Final = "JWT"
"""The `typ` in the header of a bearer token."""
MAX_TOKEN_CHARACTERS: Final = 24 * 1024
"""A longer token is refused without verification. The server accepts at most 32 KiB for all headers of a request
together."""
MIN_LIFETIME_SECONDS: Final = 60
"""The shortest lifetime of a token. Older clients use every token for 60 seconds, and do not check when it expires
(Distribution's "Token Authentication Specification")."""

_REQUIRED_CLAIMS: Final = ("exp", "iat", "nbf", "iss", "aud", "sub", "jti", "access")
"""The claims that every bearer token must have."""
_GRANTABLE: Final = Action.PULL | Action.PUSH | Action.DELETE
"""The actions that a token can grant on a repository. No token grants `ADMIN`."""


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new bearer token. `issued_at` is in seconds since 1970, `lifetime` in seconds."""

    text: str = field(repr=False)
    issued_at: int
    lifetime: int


class BearerTokens:
    """Issues and verifies bearer tokens.

    - `service`: the name of this registry, which the tokens name as their audience.
    - `lifetime`: the usual lifetime of a token, in seconds.
    - `clock`: returns seconds since 1970.
    - `random`: returns the given number of random bytes.
    """

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
        self._signed_tokens = SignedTokens(
            accounts,
            keys,
            token_type=TOKEN_TYPE,
            audience=service,
            required=_REQUIRED_CLAIMS,
            max_characters=MAX_TOKEN_CHARACTERS,
        )
        self._random = random
        self._lifetime = lifetime
        self._clock = clock

    async def issue(self, identity: Identity, access: Mapping[str, Action]) -> IssuedToken:
        """Returns a token for `identity`. `access`: the actions that the token grants, by repository name or `CATALOG`.

        The token has the usual lifetime. If the credential of `identity` expires earlier, the token expires with the
        credential or after `MIN_LIFETIME_SECONDS`, whichever is later. If the store has no signing key, creates a key.

        Raises RequestInvalid if the token would be longer than `MAX_TOKEN_CHARACTERS`. Raises StorageFull or
        StorageFailed if a new signing key cannot be stored.
        """
        now = int(self._clock())
        expires = now + int(self._lifetime)
        if identity.expires is not None:
            expires = min(expires, max(int(identity.expires), now + MIN_LIFETIME_SECONDS))
        claims = {
            "sub": identity.name or "",
            "exp": expires,
            "nbf": now,
            "iat": now,
            "jti": self._random(12).hex(),
            "access": _access_claim(access),
        }
        claims |= {name: value for name, value in _identity_claims(identity).items() if value}
        text = await self._signed_tokens.sign(claims)
        if len(text) > MAX_TOKEN_CHARACTERS:
            raise RequestInvalid(
                f"the token would have {len(text)} characters, and at most {MAX_TOKEN_CHARACTERS} are possible; "
                "request fewer repositories at once, or let the identity provider name fewer groups"
            )
        return IssuedToken(text, now, expires - now)

    def verify(self, text: str) -> Identity:
        """Returns the identity (account and access) in a token. Raises Unauthorized if this registry did not sign the
        token, or if the token has expired. Does not notice changes of the account, such as its removal:
        `registry.auth.revocation` checks the identity for them."""
        try:
            return _identity_of(*self._signed_tokens.verify(text, self._clock()))
        except TokenInvalid as error:
            raise Unauthorized(f"the token {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError):
            # This registry signed the token, so another version of this software made it.
            raise Unauthorized("the token has claims in an unknown format") from None


def _access_claim(access: Mapping[str, Action]) -> list[dict[str, object]]:
    """Returns the value of the claim `access`, in Distribution's format. The argument `access` maps repository names to
    actions. The key `CATALOG` stands for the list of repositories."""
    return [
        {"type": "registry", "name": "catalog", "actions": ["*"]}
        if name == CATALOG
        else {"type": "repository", "name": name, "actions": (actions & _GRANTABLE).words}
        for name, actions in access.items()
    ]


def _parse_access(claim: object) -> dict[str, Action]:
    """Returns the actions in the claim `access`, by repository name or `CATALOG`. Raises KeyError, TypeError,
    ValueError or AttributeError if the claim is malformed."""
    access: dict[str, Action] = {}
    if not isinstance(claim, list):
        raise TypeError("the claim `access` is not a list")
    for entry in claim:
        if entry["type"] == "registry":
            # For the name "catalog", the key in `access` is `CATALOG`. For any other name, the key has no effect: it is
            # not `CATALOG`, and it is no repository name, because repository names contain no colon.
            access[f"registry:{entry['name']}"] = Action.PULL
        else:
            access[str(entry["name"])] = Action.parse(",".join(entry["actions"])) & _GRANTABLE
    return access


def _identity_claims(identity: Identity) -> dict[str, object]:
    """Returns the claims for the fields of `Identity` that have no standard claim.

    - `version`: the version of the account in the store.
    - `stamp`: a hash of the source outside the store that proved the identity, such as a line of the htpasswd file.

    There is no claim for `limits`, because `registry.auth.revocation` reads the limits from the store. There is no
    claim for `key_id`, because the token's header has the id of the key."""
    return {
        "robot": identity.robot,
        "version": identity.version,
        "stamp": identity.stamp,
        "token": identity.token,
        "groups": list(identity.groups),
    }


def _identity_of(claims: Mapping[str, Any], key_id: str) -> Identity:
    """Returns the identity in a token's claims. `key_id`: the id of the key that signed the token. Raises KeyError,
    TypeError, ValueError or AttributeError if the claims are malformed."""
    return Identity(
        claims["sub"] or None,
        robot=bool(claims.get("robot")),
        version=claims.get("version"),
        stamp=claims.get("stamp"),
        token=claims.get("token"),
        key_id=key_id,
        groups=tuple(claims.get("groups", ())),
        access=_parse_access(claims["access"]),
        expires=float(claims["exp"]),
    )

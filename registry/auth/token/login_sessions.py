"""Browser sessions of people who logged in at the OpenID provider.

A session is a signed token (JWT) in a cookie. Its type and audience differ from those of bearer tokens, so a session is
not accepted as a bearer token, or the reverse (RFC 8725, 3.11 and 3.12). A session ends early if the account or the
settings of the OpenID provider change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from registry.auth.rights.principal import Identity
from registry.auth.token.signed_tokens import SignedTokens, TokenInvalid
from registry.auth.token.signing_keys import SigningKeys
from storage.accounts import Accounts
from storage.errors import Unauthorized

SESSION_TYPE: Final = "entrepot-session+jwt"
"""The `typ` in the header of a session's token."""
SESSION_SECONDS: Final = 8 * 3600.0
"""The lifetime of a session: a working day. It is shorter if the signing key is replaced, because a replaced key is
accepted for about an hour."""
MAX_COOKIE_CHARACTERS: Final = 4096
"""The longest session. Every browser stores a cookie of this size (RFC 6265, 6.1)."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"
"""The error text for every session that is refused."""

_REQUIRED_CLAIMS: Final = ("exp", "iat", "iss", "aud", "sub", "jti", "version", "stamp")


class LoginSessions:
    """Issues and verifies sessions. `service` is the name of this registry, from which the audience is made. `clock`
    returns seconds since 1970; `random(n)` returns n random bytes."""

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        service: str,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        audience = f"{service} session"  # differs from every bearer token's audience, which has no space
        self._signed = SignedTokens(
            accounts,
            keys,
            token_type=SESSION_TYPE,
            audience=audience,
            required=_REQUIRED_CLAIMS,
            max_characters=MAX_COOKIE_CHARACTERS,
        )
        self._clock = clock
        self._random = random

    async def issue(self, identity: Identity) -> str:
        """Returns the text of a new session for a person who has logged in. The first token of a store creates its
        signing key, so this raises StorageFull, StorageFailed."""
        now = int(self._clock())
        return await self._signed.sign(
            {
                "sub": identity.name,
                "iat": now,
                "exp": now + int(SESSION_SECONDS),
                "jti": self._random(12).hex(),
                "version": identity.version,
                "stamp": identity.stamp,
                "groups": list(identity.groups),
            }
        )

    def verify(self, text: str) -> Identity:
        """Returns the identity (the account) in a session. Raises Unauthorized if the signature is wrong or the session
        has expired. Does not check whether the account still exists; `registry.auth.revocation` does."""
        try:
            claims = self._signed.verify(text, self._clock())
            return Identity(
                str(claims["sub"]),
                version=int(claims["version"]),
                stamp=str(claims["stamp"]),
                groups=tuple(map(str, claims.get("groups", ()))),
                expires=float(claims["exp"]),
            )
        except (TokenInvalid, TypeError, ValueError):
            # TypeError and ValueError: another version of this software made the session, with other claims.
            raise Unauthorized(SESSION_ENDED) from None

"""Browser sessions of people who logged in with a password or at the OpenID provider.

A session is a token (JWT, RFC 7519) in a cookie, signed with a key of this registry. Its type and audience differ from
those of the bearer tokens that `/token` issues. So neither is accepted in place of the other (RFC 8725, 3.11 and 3.12).

A session becomes invalid before it expires if the account is removed or disabled, if its password or its admin right
changes, or if the settings of the OpenID provider change.
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
"""The lifetime of a session: a working day. If the signing key is replaced during this time, the session becomes
invalid about an hour later, when the old key is no longer accepted."""
MAX_COOKIE_CHARACTERS: Final = 4096
"""The longest session text that is accepted. Every browser stores a cookie of this size (RFC 6265, 6.1)."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"
"""The error text for every session that is refused."""

_REQUIRED_CLAIMS: Final = ("exp", "iat", "iss", "aud", "sub", "jti", "version", "stamp")
"""The claims that every session must have. `version`: the version of the account, a number that increases when the
account's password or admin right is changed, or when the account is disabled or enabled; `_NONE` for an account outside
the store. `stamp`: a hash of the source of the identity outside the store, such as the OpenID provider's settings; it
changes when they do, and is empty if there is no such source."""
_NONE: Final = -1
"""In the claim `version`: the account is not in the store."""


class LoginSessions:
    """Issues and verifies sessions. `service` is the name of this registry; the audience of the sessions contains it.
    `clock` returns seconds since 1970; `random(n)` returns n random bytes."""

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
        """Returns the text of a new session for a person who has logged in. If the account store has no signing key,
        creates one, and raises StorageFull or StorageFailed if that fails."""
        now = int(self._clock())
        return await self._signed.sign(
            {
                "sub": identity.name,
                "iat": now,
                "exp": now + int(SESSION_SECONDS),
                "jti": self._random(12).hex(),
                "version": _NONE if identity.version is None else identity.version,
                "stamp": identity.stamp or "",
                "groups": list(identity.groups),
            }
        )

    def verify(self, text: str) -> Identity:
        """Returns the identity (the account) in a session. Raises Unauthorized if `text` is not a session that this
        registry signed, or if the session has expired. Does not check whether something else made it invalid, such as
        the removal of the account; `registry.auth.revocation` does."""
        try:
            claims = self._signed.verify(text, self._clock())
            version = int(claims["version"])
            return Identity(
                str(claims["sub"]),
                version=None if version == _NONE else version,
                stamp=str(claims["stamp"]) or None,
                groups=tuple(map(str, claims.get("groups", ()))),
                expires=float(claims["exp"]),
            )
        except (TokenInvalid, TypeError, ValueError):
            # TypeError and ValueError: another version of this software made the session, with other claims.
            raise Unauthorized(SESSION_ENDED) from None

"""Sessions of people who logged in at the OpenID provider: signed tokens in a cookie.

Their type and audience differ from those of bearer tokens, so neither is accepted in place of the other (RFC 8725, 3.11
and 3.12). A session holds as long as the account and the settings of the provider stay as they were.
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
SESSION_SECONDS: Final = 8 * 3600.0
"""Lifetime of a session, a working day. It ends at most an hour after its signing key was replaced."""
LONGEST_COOKIE: Final = 4096
"""Characters of a cookie that every browser stores (RFC 6265, 6.1)."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"

_REQUIRED: Final = ("exp", "iat", "iss", "aud", "sub", "jti", "version", "stamp")


class LoginSessions:
    """Issues and verifies sessions. `service` is the audience of bearer tokens; `clock` gives seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        keys: SigningKeys,
        service: str,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        audience = f"{service} session"  # no service name has a space
        self._signed = SignedTokens(
            accounts, keys, kind=SESSION_TYPE, audience=audience, required=_REQUIRED, longest=LONGEST_COOKIE
        )
        self._clock = clock
        self._random = random

    async def issue(self, identity: Identity) -> str:
        """Returns a session for a person who has logged in. Raises StorageFull, StorageFailed: the first token of a
        store creates its key."""
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
        """Returns the identity that a genuine and current session proves. Does not check whether the account is still
        valid (`registry.auth.revocation`). Raises Unauthorized."""
        try:
            claims = self._signed.verify(text, self._clock())
            return Identity(
                str(claims["sub"]),
                version=int(claims["version"]),
                stamp=str(claims["stamp"]),
                groups=tuple(map(str, claims.get("groups", ()))),
                expires=float(claims["exp"]),
            )
        except (TokenInvalid, TypeError, ValueError):  # the latter two: signed by another version of this software
            raise Unauthorized(SESSION_ENDED) from None

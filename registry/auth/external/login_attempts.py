"""A login at the provider that has begun. The browser keeps it as an encrypted cookie, so that any worker can finish
the login, and nobody can read or forge one.

It holds what ties the provider's response to the browser that began (`state`, RFC 6749, 10.12), to the ID token
(`nonce`, OpenID Connect Core, 3.1.2.1) and to the code (`verifier`, RFC 7636).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from registry.auth.token.signing_keys import SigningKeys
from storage.access import SigningKey

ATTEMPT_SECONDS: Final = 600
"""Time from `/login` to the return: enough to find a second factor."""
MAX_SEALED_CHARACTERS: Final = 4096
"""Characters of a sealed attempt."""
_PURPOSE: Final = b"entrepot: logins at the provider, begun"
_NONCE_BYTES: Final = 12
"""Bytes, as AES-GCM has them (NIST SP 800-38D, 8.2.2)."""


class LoginAttemptInvalid(Exception):
    """The attempt is missing, forged, too old, or belongs to another login. The text is for the audit log."""


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """A login that has begun. `back` is the path to return to afterwards; `begun` is in seconds since 1970."""

    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    redirect_uri: str
    back: str
    begun: float

    @property
    def challenge(self) -> str:
        """The `code_challenge` for the method S256 (RFC 7636, 4.2)."""
        return _encoded(hashlib.sha256(self.verifier.encode("ascii")).digest())


class LoginAttempts:
    """Makes, seals and opens attempts. `clock` gives seconds since 1970."""

    def __init__(
        self, keys: SigningKeys, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._random = random

    def begin(self, redirect_uri: str, back: str) -> LoginAttempt:
        """Returns a new attempt."""
        state, nonce, verifier = (_encoded(self._random(32)) for _ in range(3))
        return LoginAttempt(state, nonce, verifier, redirect_uri, back, self._clock())

    async def seal(self, attempt: LoginAttempt) -> str:
        """Returns the attempt encrypted, for a cookie. Raises StorageFull, StorageFailed: the first token of a store
        creates its key."""
        key = await self._keys.current()
        nonce = self._random(_NONCE_BYTES)
        sealed = _cipher(key).encrypt(nonce, json.dumps(asdict(attempt)).encode(), key.id.encode())
        return f"{key.id}.{_encoded(nonce + sealed)}"

    def open(self, sealed: str, state: str) -> LoginAttempt:
        """Returns the attempt that the provider's response with this `state` belongs to. Raises LoginAttemptInvalid."""
        key_id, _, text = sealed.partition(".")
        key = self._keys.find(key_id) if len(sealed) <= MAX_SEALED_CHARACTERS else None
        if key is None:
            raise LoginAttemptInvalid("there is no login that has begun here")
        try:
            held = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            opened = _cipher(key).decrypt(held[:_NONCE_BYTES], held[_NONCE_BYTES:], key.id.encode())
            attempt = LoginAttempt(**json.loads(opened))
        except (InvalidTag, ValueError, TypeError):
            raise LoginAttemptInvalid("what the browser shows of the login is not valid") from None
        if not hmac.compare_digest(attempt.state.encode(), state.encode("utf-8", "surrogatepass")):
            raise LoginAttemptInvalid("the answer is of another login than the one that this browser began")
        if not attempt.begun - ATTEMPT_SECONDS < self._clock() < attempt.begun + ATTEMPT_SECONDS:
            raise LoginAttemptInvalid("the login took too long")
        return attempt


def _cipher(key: SigningKey) -> AESGCM:
    """Returns the cipher. Its key is derived from a signing key for this purpose alone, so a signed token is useless
    here, and an attempt is useless as a token."""
    return AESGCM(hmac.digest(key.secret, _PURPOSE, "sha256"))


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")

"""A login at the provider that has begun, as the browser keeps it: encrypted, so that any worker can go on with it and
nobody can read or make one.

What ties the provider's answer to the browser that asked (`state`, RFC 6749, 10.12), to the ID token (`nonce`, OpenID
Connect Core, 3.1.2.1) and to the code (`verifier`, RFC 7636) is in there.
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
"""Seconds from `/login` to the way back: long enough to look for a second factor."""
LONGEST_ATTEMPT: Final = 4096
"""Characters."""
_PURPOSE: Final = b"entrepot: logins at the provider, begun"
_NONCE_BYTES: Final = 12
"""Bytes, as AES-GCM has them (NIST SP 800-38D, 8.2.2)."""


class LoginAttemptInvalid(Exception):
    """There is none, it is not ours, it is too old, or it is another one's."""


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """`back`: the path to go to afterwards. `begun`: seconds since 1970."""

    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    redirect_uri: str
    back: str
    begun: float

    @property
    def challenge(self) -> str:
        """`code_challenge` with the method S256 (RFC 7636, 4.2)."""
        return _encoded(hashlib.sha256(self.verifier.encode("ascii")).digest())


class LoginAttempts:
    """`clock`: seconds since 1970."""

    def __init__(
        self, keys: SigningKeys, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._random = random

    def begin(self, redirect_uri: str, back: str) -> LoginAttempt:
        state, nonce, verifier = (_encoded(self._random(32)) for _ in range(3))
        return LoginAttempt(state, nonce, verifier, redirect_uri, back, self._clock())

    async def seal(self, attempt: LoginAttempt) -> str:
        """For a cookie. Raises StorageFull, StorageFailed (the first token of a store makes its key)."""
        key = await self._keys.signing()
        nonce = self._random(_NONCE_BYTES)
        sealed = _cipher(key).encrypt(nonce, json.dumps(asdict(attempt)).encode(), key.id.encode())
        return f"{key.id}.{_encoded(nonce + sealed)}"

    def open(self, sealed: str, state: str) -> LoginAttempt:
        """The one that the provider's answer with this `state` is about. Raises AttemptInvalid."""
        key_id, _, text = sealed.partition(".")
        key = self._keys.find(key_id) if len(sealed) <= LONGEST_ATTEMPT else None
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
    """Under a key made of the store's for this alone, so nothing that it signs is of use here, nor the other way."""
    return AESGCM(hmac.digest(key.secret, _PURPOSE, "sha256"))


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")

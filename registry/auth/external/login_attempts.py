"""Login attempts: the state of a login at the OpenID provider between its start and the provider's response.

The browser stores an attempt as an encrypted cookie, so any worker can finish the login, and nobody can read or forge
an attempt. It contains three random values: `state` ties the provider's response to this browser (RFC 6749, 10.12),
`nonce` ties the ID token to this attempt (OpenID Connect Core, 3.1.2.1), and `verifier` does so for the authorization
code (RFC 7636).
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
"""The longest time from the start of a login to the provider's response: enough to find a second factor."""
MAX_SEALED_CHARACTERS: Final = 4096
"""The longest encrypted attempt that is opened."""
_KEY_PURPOSE: Final = b"entrepot: logins at the provider, begun"
"""The text from which, with a signing key, the encryption key is derived."""
_NONCE_BYTES: Final = 12
"""The length of the nonce of AES-GCM (NIST SP 800-38D, 8.2.2)."""


class LoginAttemptInvalid(Exception):
    """The attempt is missing, forged, too old, or belongs to another login. The text says why, for the audit log."""


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """A login that has started.

    - `state`, `nonce`, `verifier`: random values, which the module describes.
    - `redirect_uri`: the URL of this registry to which the provider sends the browser.
    - `back`: the path to which the browser goes after the login.
    - `begun`: when the login started, in seconds since 1970.
    """

    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    redirect_uri: str
    back: str
    begun: float

    @property
    def challenge(self) -> str:
        """The `code_challenge` for the method S256 (RFC 7636, 4.2)."""
        return _base64url(hashlib.sha256(self.verifier.encode("ascii")).digest())


class LoginAttempts:
    """Makes attempts, and encrypts and decrypts them with the store's signing keys. `clock` returns seconds since 1970;
    `random(n)` returns n random bytes."""

    def __init__(
        self, keys: SigningKeys, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._random = random

    def begin(self, redirect_uri: str, back: str) -> LoginAttempt:
        """Returns a new attempt. `back` is the path to which the browser goes after the login."""
        state, nonce, verifier = (_base64url(self._random(32)) for _ in range(3))
        return LoginAttempt(state, nonce, verifier, redirect_uri, back, self._clock())

    async def seal(self, attempt: LoginAttempt) -> str:
        """Returns the encrypted attempt, for a cookie. The first call for a store creates its signing key, so this
        raises StorageFull, StorageFailed."""
        key = await self._keys.current()
        nonce = self._random(_NONCE_BYTES)
        sealed = _cipher(key).encrypt(nonce, json.dumps(asdict(attempt)).encode(), key.id.encode())
        return f"{key.id}.{_base64url(nonce + sealed)}"

    def open(self, sealed: str, state: str) -> LoginAttempt:
        """Returns the decrypted attempt from a cookie. `state` is the value in the provider's response. Raises
        LoginAttemptInvalid if the response does not belong to this attempt, or if the attempt is too old or forged."""
        key_id, _, text = sealed.partition(".")
        key = self._keys.find(key_id) if len(sealed) <= MAX_SEALED_CHARACTERS else None
        if key is None:
            raise LoginAttemptInvalid("there is no login that has begun here")
        try:
            encrypted = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            plain = _cipher(key).decrypt(encrypted[:_NONCE_BYTES], encrypted[_NONCE_BYTES:], key.id.encode())
            attempt = LoginAttempt(**json.loads(plain))
        except (InvalidTag, ValueError, TypeError):
            raise LoginAttemptInvalid("what the browser shows of the login is not valid") from None
        if not hmac.compare_digest(attempt.state.encode(), state.encode("utf-8", "surrogatepass")):
            raise LoginAttemptInvalid("the answer is of another login than the one that this browser began")
        if not attempt.begun - ATTEMPT_SECONDS < self._clock() < attempt.begun + ATTEMPT_SECONDS:
            raise LoginAttemptInvalid("the login took too long")
        return attempt


def _cipher(key: SigningKey) -> AESGCM:
    """Returns the cipher. Its key is derived from a signing key and used only for attempts, so an attempt cannot be
    made from a token that the signing key signed, or the reverse."""
    return AESGCM(hmac.digest(key.secret, _KEY_PURPOSE, "sha256"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")

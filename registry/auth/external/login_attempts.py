"""Login attempts: the state of a login at the OpenID provider, from its start until the provider's response.

The browser of the person who logs in stores the attempt as an encrypted cookie. All workers have the encryption key, so
any worker can finish the login. Nobody else can read or forge an attempt. An attempt contains three random values:

- `state` is sent to the provider, which returns it in its response. `state` proves that the response belongs to the
  login that this browser started (RFC 6749, 10.12).
- `nonce` is sent to the provider, which writes it into the ID token. `nonce` proves that the token was made for this
  attempt (OpenID Connect Core, 3.1.2.1).
- `verifier` protects the authorization code. At the start of the login, the provider gets only a hash of `verifier`.
  Later the provider accepts the code only together with `verifier` itself, so a stolen code is of no use (RFC 7636).
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
from storage.accounts import Accounts

ATTEMPT_SECONDS: Final = 600
"""The longest time from the start of a login to the provider's response. A person may need minutes for a second
factor."""
MAX_SEALED_CHARACTERS: Final = 4096
"""The largest number of characters of an encrypted attempt. `LoginAttempts.open` refuses a longer one."""
_KEY_PURPOSE: Final = b"entrepot: logins at the provider, begun"
"""The encryption key is derived from a signing key and this text. No other derived key uses this text."""
_GCM_NONCE_BYTES: Final = 12
"""The length of the nonce of AES-GCM (NIST SP 800-38D, 8.2.2). This nonce is not the `nonce` of an attempt."""


class LoginAttemptInvalid(Exception):
    """The attempt in the browser's cookie is missing, forged, too old or already used, or the provider's response
    belongs to another login. The text states the reason, for the audit log."""


@dataclass(frozen=True, slots=True)
class LoginAttempt:
    """A login attempt.

    - `state`, `nonce`, `verifier`: the random values (see the module docstring).
    - `redirect_uri`: the URL of this registry to which the provider sends the browser with its response.
    - `back`: the path on this registry to which the browser goes after the login.
    - `begun`: when the login started, in seconds since 1970.

    The names of the fields must not change, because the cookies of older versions contain them.
    """

    state: str = field(repr=False)
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)
    redirect_uri: str
    back: str
    begun: float


class LoginAttempts:
    """Makes, encrypts and decrypts attempts. The encryption keys are derived from the signing keys `keys`. `clock`
    returns seconds since 1970. `random(n)` returns n random bytes."""

    def __init__(
        self, keys: SigningKeys, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._random = random

    def begin(self, redirect_uri: str, return_path: str) -> LoginAttempt:
        """Returns a new attempt that starts now. `return_path` becomes the field `back` of the attempt."""
        state, nonce, verifier = (_base64url(self._random(32)) for _ in range(3))
        return LoginAttempt(state, nonce, verifier, redirect_uri, return_path, self._clock())

    async def seal(self, attempt: LoginAttempt) -> str:
        """Returns the encrypted attempt as text, for a cookie. If the store has no signing key, creates a signing key.
        Raises StorageFull or StorageFailed if the key cannot be stored."""
        key = await self._keys.current()
        gcm_nonce = self._random(_GCM_NONCE_BYTES)
        plain = json.dumps(asdict(attempt)).encode()
        encrypted = _cipher(key).encrypt(gcm_nonce, plain, associated_data=key.id.encode())
        return f"{key.id}.{_base64url(gcm_nonce + encrypted)}"

    def open(self, sealed: str, state: str) -> LoginAttempt:
        """Decrypts and returns an attempt. `sealed` is the text of the browser's cookie, or an empty text if there is
        no cookie. `state` is the value in the provider's response. Raises LoginAttemptInvalid if the attempt is
        missing, forged or too old, or if the response does not belong to the attempt."""
        key_id, _, text = sealed.partition(".")
        key = self._keys.find(key_id) if len(sealed) <= MAX_SEALED_CHARACTERS else None
        if key is None:
            raise LoginAttemptInvalid("the browser's cookie has no login attempt, or one with an unknown key")
        try:
            nonce_and_encrypted = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            gcm_nonce, encrypted = nonce_and_encrypted[:_GCM_NONCE_BYTES], nonce_and_encrypted[_GCM_NONCE_BYTES:]
            plain = _cipher(key).decrypt(gcm_nonce, encrypted, associated_data=key.id.encode())
            attempt = LoginAttempt(**json.loads(plain))
        except (InvalidTag, ValueError, TypeError):
            raise LoginAttemptInvalid("the login attempt in the browser's cookie cannot be decrypted") from None
        if not hmac.compare_digest(attempt.state.encode(), state.encode("utf-8", "surrogatepass")):
            raise LoginAttemptInvalid("the provider's response belongs to another login than the attempt in the cookie")
        # The start can lie in the future, because the clock may have been set back since the start.
        if not attempt.begun - ATTEMPT_SECONDS < self._clock() < attempt.begun + ATTEMPT_SECONDS:
            raise LoginAttemptInvalid(
                f"the login took too long (more than {ATTEMPT_SECONDS} s), or the clock of this machine was set back"
            )
        return attempt


class UsedAttempts:
    """Stores which attempts were used, so that no worker uses an attempt twice. Otherwise, a client could send many
    invented authorization codes with one attempt, and each code would cause a request to the provider."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def mark_used(self, attempt: LoginAttempt) -> None:
        """Marks the attempt as used until it has expired. Raises LoginAttemptInvalid if the attempt was used before.
        Raises StorageFull, StorageFailed. A cancellation may leave the attempt marked as used."""
        # The mark is a row in the table of throttling keys. No login has this key, so the row throttles no login.
        key = f"attempt {hashlib.sha256(attempt.state.encode()).hexdigest()[:32]}"
        # `LoginAttempts.open` accepts the attempt within `ATTEMPT_SECONDS` before and after its start.
        seconds = 2.0 * ATTEMPT_SECONDS
        # `throttled_until` recognizes most used attempts without a write. `mark_once` also recognizes an attempt that
        # another worker uses at the same moment.
        if self._accounts.throttled_until(key) or not await self._accounts.mark_once(key, seconds):
            raise LoginAttemptInvalid("the login attempt in the browser's cookie was used before")


def _cipher(key: SigningKey) -> AESGCM:
    """Returns the cipher for attempts. Its key is derived from a signing key. The cipher does not use the signing key
    itself, because a key must not be used with two algorithms, and HMAC uses the signing key for tokens."""
    return AESGCM(hmac.digest(key.secret, _KEY_PURPOSE, "sha256"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")

"""Public keys of other services (JSON Web Key Sets, RFC 7517), from a file or a URL.

Only keys that can check a signature but not sign are accepted. A key set at a URL is fetched when a token needs it, and
again when a token names an unknown key, at most once a minute. Meanwhile tokens with known keys do not wait, and tokens
with made-up keys cause no traffic.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from registry.auth.external.fetched_document import FetchedDocument, FetchTimes
from registry.auth.external.identity_http import NoUsableResponse, send_request

log = logging.getLogger(__name__)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

MIN_RSA_BITS: Final = 2048
"""Bits of an RSA key (RFC 7518, 3.3)."""
MAX_KEYS: Final = 100
"""Keys of a set that are read."""
REFRESH_SECONDS: Final = 60.0
"""Least time between two fetches, however many unknown keys tokens name."""
RETRY_SECONDS: Final = 10.0
"""Pause after a fetch that failed."""
FRESH_SECONDS: Final = 3600.0
"""Age after which a key set is fetched again while it is being used: a key may have been withdrawn."""
STALE_SECONDS: Final = 86400.0
"""Age after which a key set that could not be fetched again is not used any more."""

_CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}

FetchBody = Callable[[str], Awaitable[bytes]]


class KeySetUnavailable(Exception):
    """The key set cannot be fetched or read. The text is for the log."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key of a set. `id` and `algorithm` are None if the set does not name them."""

    id: str | None
    algorithm: str | None
    public: PublicKey

    def fits(self, key_id: str | None, algorithm: str) -> bool:
        """Returns whether the key may have signed a token with this header. `key_id` is None if the token names no
        key."""
        if key_id is not None and self.id != key_id:
            return False
        return self.algorithm in (None, algorithm) and _is_key_for(self.public, algorithm)


class KeySet(Protocol):
    """The public keys of an issuer or a provider."""

    async def find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        """Returns the key for a token with this header; None if no key fits, or several do and the token names none."""
        ...

    async def aclose(self) -> None: ...


class FileKeySet:
    """A key set in a file, read again when the file has changed. While the file cannot be read there are no keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: tuple[int, ...] = ()
        self._keys: tuple[VerificationKey, ...] = ()

    async def find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        try:
            now = os.stat(self._path)
            state = (now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_size)
            if state != self._state:
                self._keys, self._state = parse_key_set(self._path.read_bytes()), state
        except (OSError, KeySetUnavailable) as error:
            log.warning("the keys in %s cannot be used: %s", self._path, error)
            self._keys, self._state = (), ()
        return _choose(self._keys, key_id, algorithm)

    async def aclose(self) -> None:
        return


class FetchedKeySet:
    """A key set at a URL. Making one contacts nobody. `clock` is monotonic, in seconds."""

    def __init__(self, url: str, fetch: FetchBody, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._fetch = fetch
        times = FetchTimes(FRESH_SECONDS, STALE_SECONDS, RETRY_SECONDS, REFRESH_SECONDS)
        self._document = FetchedDocument(self._fetch_keys, times, clock)

    async def find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        """See `KeySet`. Waits for a fetch only if no cached key fits. Cancelled: the fetch goes on."""
        found = self._find(key_id, algorithm)
        if found is None:
            await self._document.refresh()
            return self._find(key_id, algorithm)
        if not self._document.is_fresh:
            self._document.start_refresh()
        return found

    async def aclose(self) -> None:
        """Cancels a fetch that is under way."""
        await self._document.aclose()

    def _find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        return _choose(self._document.current or (), key_id, algorithm)

    async def _fetch_keys(self) -> tuple[VerificationKey, ...] | None:
        try:
            return parse_key_set(await self._fetch(self._url))
        except KeySetUnavailable as error:
            log.warning("the keys at %s cannot be used: %s", self._url, error)
            return None


async def fetch_key_set(url: str, ca_file: Path | None = None) -> bytes:
    """Returns the body at `url`. Follows no redirect, and accepts only the status 200. Raises KeySetUnavailable."""
    try:
        status, body = await send_request(url, ca_file)
    except NoUsableResponse as error:
        raise KeySetUnavailable(str(error)) from None
    if status != 200:
        raise KeySetUnavailable(f"the answer is {status}")
    return body


def parse_key_set(body: bytes) -> tuple[VerificationKey, ...]:
    """Returns the usable keys of a set, and ignores all others (RFC 7517, 5). Raises KeySetUnavailable if `body` is no
    key set."""
    try:
        document = json.loads(body)
        entries = document["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeySetUnavailable("it is not a JSON Web Key Set") from None
    if not isinstance(entries, list):
        raise KeySetUnavailable("it is not a JSON Web Key Set")
    return tuple(key for entry in entries[:MAX_KEYS] if (key := _key(entry)) is not None)


def _key(entry: Any) -> VerificationKey | None:
    """Returns the key of an entry; None for a private key, a key for encryption, and one of an unknown kind."""
    if not isinstance(entry, dict) or "d" in entry or entry.get("use", "sig") != "sig":
        return None
    operations = entry.get("key_ops")
    if operations is not None and "verify" not in operations:
        return None
    kinds: dict[object, Callable[[dict[str, Any]], Any]] = {
        "RSA": RSAAlgorithm.from_jwk,
        "EC": ECAlgorithm.from_jwk,
        "OKP": OKPAlgorithm.from_jwk,
    }
    read = kinds.get(entry.get("kty"))
    try:
        public = read(entry) if read is not None else None
    except (jwt.InvalidKeyError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(public, PublicKey) or (isinstance(public, rsa.RSAPublicKey) and public.key_size < MIN_RSA_BITS):
        return None
    return VerificationKey(_text(entry.get("kid")), _text(entry.get("alg")), public)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _choose(keys: tuple[VerificationKey, ...], key_id: str | None, algorithm: str) -> PublicKey | None:
    fitting = [key.public for key in keys if key.fits(key_id, algorithm)]
    return fitting[0] if len(fitting) == 1 or (fitting and key_id is not None) else None


def _is_key_for(public: PublicKey, algorithm: str) -> bool:
    if algorithm.startswith(("RS", "PS")):
        return isinstance(public, rsa.RSAPublicKey)
    if algorithm in _CURVES:
        return isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == _CURVES[algorithm]
    return algorithm == "EdDSA" and isinstance(public, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey)

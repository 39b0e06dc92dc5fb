"""Public keys of others (JSON Web Key Sets, RFC 7517), from a file or from an address.

Only keys that can check a signature and sign none are taken. A key set at an address is fetched when a token needs it,
by one request at a time, and again when a token names a key that is not among them, at most once a minute. Meanwhile
tokens whose keys are known are not held up, and whoever sends tokens with made-up keys causes no traffic.
"""

from __future__ import annotations

import asyncio
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

from registry.auth.external.identity_http import NoAnswer, send_request
from registry.request import detached_context

log = logging.getLogger(__name__)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

SMALLEST_RSA_BITS: Final = 2048
"""Bits of an RSA key (RFC 7518, 3.3)."""
REFRESH_SECONDS: Final = 60.0
"""Seconds between two fetches, however many unknown keys are named."""
RETRY_SECONDS: Final = 10.0
"""Seconds until the next try after one that failed."""
FRESH_SECONDS: Final = 3600.0
"""Seconds after which a key set is fetched again while it is being used: a key may have been withdrawn."""
STALE_SECONDS: Final = 86400.0
"""Seconds after which it is not used any more when that did not succeed."""

_CURVES: Final = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}

FetchBody = Callable[[str], Awaitable[bytes]]


class KeySetUnavailable(Exception):
    """The key set cannot be had, or cannot be read; the text is for the log."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    id: str | None
    algorithm: str | None
    public: PublicKey

    def fits(self, key_id: str | None, algorithm: str) -> bool:
        """Whether it may have signed a token with that header. `key_id` None: the token names no key."""
        if key_id is not None and self.id != key_id:
            return False
        return self.algorithm in (None, algorithm) and _is_key_for(self.public, algorithm)


class KeySet(Protocol):
    async def find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        """None: there is none that fits, or several do for a token that names none."""
        ...

    async def aclose(self) -> None: ...


class FileKeySet:
    """A key set in a file, read again when it has changed. Without a file that can be read there are none."""

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
    """A key set at an address. Made without contacting anybody. `clock` is monotonic, in seconds."""

    def __init__(self, url: str, fetch: FetchBody, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._fetch = fetch
        self._clock = clock
        self._keys: tuple[VerificationKey, ...] = ()
        self._fetched = -STALE_SECONDS
        self._next = -STALE_SECONDS
        self._flight: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        """Cancelled: a fetch that has begun goes on for the others."""
        found = self._find(key_id, algorithm)
        if found is None:
            await self._refresh()
            return self._find(key_id, algorithm)
        if self._clock() - self._fetched > FRESH_SECONDS:
            self._launch()
        return found

    async def aclose(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.gather(self._flight, return_exceptions=True)

    def _find(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        if self._clock() - self._fetched > STALE_SECONDS:
            return None
        return _choose(self._keys, key_id, algorithm)

    async def _refresh(self) -> None:
        self._launch()
        if self._flight is not None:
            # Raises nothing of the flight's, not even its cancellation, which is not that of who waits.
            await asyncio.wait([self._flight])

    def _launch(self) -> None:
        if self._flight is None and self._clock() >= self._next:
            self._flight = asyncio.create_task(self._renew(), context=detached_context())

    async def _renew(self) -> None:
        pause = RETRY_SECONDS
        try:
            self._keys = parse_key_set(await self._fetch(self._url))
            self._fetched = self._clock()
            pause = REFRESH_SECONDS
        except KeySetUnavailable as error:
            log.warning("the keys at %s cannot be used: %s", self._url, error)
        finally:
            self._next = self._clock() + pause
            self._flight = None


async def fetch_key_set(url: str, ca_file: Path | None = None) -> bytes:
    """What is at an address: the body of a 200, from there and nowhere else. Raises KeysUnavailable."""
    try:
        status, body = await send_request(url, ca_file)
    except NoAnswer as error:
        raise KeySetUnavailable(str(error)) from None
    if status != 200:
        raise KeySetUnavailable(f"the answer is {status}")
    return body


def parse_key_set(body: bytes) -> tuple[VerificationKey, ...]:
    """The keys of a set that are good for something here; others are left out, as RFC 7517, 5 wants. Raises
    KeysUnavailable: it is no key set."""
    try:
        document = json.loads(body)
        entries = document["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeySetUnavailable("it is not a JSON Web Key Set") from None
    if not isinstance(entries, list):
        raise KeySetUnavailable("it is not a JSON Web Key Set")
    return tuple(key for entry in entries[:100] if (key := _key(entry)) is not None)


def _key(entry: Any) -> VerificationKey | None:
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
    if not isinstance(public, PublicKey) or (
        isinstance(public, rsa.RSAPublicKey) and public.key_size < SMALLEST_RSA_BITS
    ):
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

"""Public keys of token issuers and OpenID providers (JSON Web Key Sets, RFC 7517), from a file or a URL.

Only public keys are accepted. They can verify signatures but not create them.

A key set at a URL is fetched when the first token needs it, and then cached. It is fetched again in these cases:

- A token needs the key set, and the key set is at least an hour old.
- No cached key fits a token. The issuer may have added a key.
- The cached key that fits a token does not verify it. The issuer may have replaced the key and kept its id.

After a successful fetch, no fetch starts for a minute. After a failed fetch, no fetch starts for ten seconds. These
pauses limit the traffic that forged tokens can cause. A token that a cached key verifies does not wait for a fetch.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Protocol

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey
from joserfc.jws import CompactSignature, JWSRegistry

from registry.auth.external.fetched_document import FetchedDocument, FetchTimes
from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.auth.token.signed_tokens import TokenInvalid, verify_signature

log = logging.getLogger(__name__)

MIN_RSA_BITS: Final = 2048
"""The shortest RSA key that is accepted (RFC 7518, 3.3)."""
MAX_FILE_BYTES: Final = 256 * 1024
"""The largest size of a file with a key set. A larger file is not parsed, because parsing it would block the event
loop."""
MAX_KEYS: Final = 100
"""The largest number of entries that are read from one key set. Further entries are ignored."""
PAUSE_SECONDS: Final = 60.0
"""The shortest time between a successful fetch of a key set and the next fetch."""
RETRY_SECONDS: Final = 10.0
"""The shortest time between a failed fetch of a key set and the next fetch."""
REFRESH_AGE_SECONDS: Final = 3600.0
"""A key set of this age or older is fetched again at its next use, because the issuer could have withdrawn a key. The
cached key set is used until the fetch succeeds."""
MAX_AGE_SECONDS: Final = 86400.0
"""A cached key set that is older than this is not used."""

_KEY_CLASSES: Final[dict[object, type[RSAKey] | type[ECKey] | type[OKPKey]]] = {
    "RSA": RSAKey,
    "EC": ECKey,
    "OKP": OKPKey,
}
"""joserfc's class for each type of key (`kty`) that can verify signatures."""
_SIGNATURE_CURVES: Final = ("Ed25519", "Ed448")
"""The curves of the key type OKP that are for signatures (RFC 8037, 3.1). The other curves of this type are for key
agreement."""

FetchBody = Callable[[str], Awaitable[bytes]]
"""A function that returns the document at a URL. The function raises KeySetUnavailable if it cannot fetch the
document."""


class KeySetUnavailable(Exception):
    """The key set cannot be fetched, or is malformed. The text says why, for the log."""


class KeySet(Protocol):
    """The public keys of a token issuer or an OpenID provider."""

    async def find(self, key_id: str | None, algorithm: str) -> Key | None:
        """Returns the key for a token whose header names `key_id` and `algorithm`. `key_id` is None if the header names
        no key. `_fits` defines which keys fit the token:

        - One key fits: returns this key.
        - Several keys fit: returns the first of them, or None if `key_id` is None.
        - No key fits: returns None.

        If the last fetch of the keys failed, raises KeySetUnavailable instead of returning None.
        """
        ...

    async def find_replacement(self, key: Key, key_id: str | None, algorithm: str) -> Key | None:
        """Call this if `find` has returned `key`, but `key` does not verify the token's signature. May fetch a newer
        version of the key set. Returns the key in the newer version, chosen as in `find`. Returns None if there is no
        newer version, or if no key in the newer version fits."""
        ...

    async def aclose(self) -> None:
        """Cancels a running fetch and waits until it has ended."""
        ...


async def verify_with_key_set(
    token: CompactSignature, keys: KeySet, key_id: str | None, algorithm: str
) -> dict[str, Any]:
    """Checks the signature of a token with a key of its issuer, and returns the claims of the token. `keys` is the key
    set of the issuer. `key_id` and `algorithm` come from the token's header. May wait until the keys are fetched.
    Raises TokenInvalid if no key fits or the signature is wrong, KeySetUnavailable if the keys cannot be fetched."""
    key = await keys.find(key_id, algorithm)
    if key is None:
        raise TokenInvalid("fits no key in the key set of its issuer")
    try:
        return verify_signature(token, key, algorithm)
    except TokenInvalid:
        replacement = await keys.find_replacement(key, key_id, algorithm)
        if replacement is None:
            raise
        return verify_signature(token, replacement, algorithm)


class FileKeySet:
    """A key set in the file at `path`. `find` reads the file again if the file has changed. While the file cannot be
    read, is too large or is malformed, the key set has no keys. An error that repeats is logged once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_state: tuple[int, ...] | None = None
        """The file's times, inode and size at the last read. An empty tuple if there was no file. None before the first
        read, and after an error that may be temporary: the next call of `find` then reads the file."""
        self._logged_error = ""
        """The text of the last error that was logged. Empty if there was none, or if a later read succeeded."""
        self._keys: tuple[Key, ...] = ()

    async def find(self, key_id: str | None, algorithm: str) -> Key | None:
        """Returns a key as `KeySet.find` does."""
        state = self._read_state()
        if state != self._file_state:
            try:
                self._keys, self._file_state, self._logged_error = parse_key_set(self._read()), state, ""
            except (OSError, KeySetUnavailable) as error:
                # A malformed file is not read again until it changes. An OSError, such as that for too many open files,
                # can be temporary.
                is_temporary = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                self._keys, self._file_state = (), None if is_temporary else state
                self._log_once(error)
        return _choose_key(self._keys, key_id, algorithm)

    async def find_replacement(self, key: Key, key_id: str | None, algorithm: str) -> Key | None:
        """Returns None, because `find` has already used the current version of the file."""
        return None

    def _log_once(self, error: Exception) -> None:
        if str(error) != self._logged_error:
            self._logged_error = str(error)
            log.warning("tokens cannot be verified with the key set in %s: %s", self._path, error)

    def _read_state(self) -> tuple[int, ...]:
        try:
            status = os.stat(self._path)
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size

    def _read(self) -> bytes:
        """Returns the content of the file. Raises OSError, and KeySetUnavailable if the file is too large."""
        with self._path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise KeySetUnavailable(f"the file has more than {MAX_FILE_BYTES} bytes")
        return content

    async def aclose(self) -> None:
        """Does nothing, because a `FileKeySet` never fetches."""


class FetchedKeySet:
    """A key set at `url`, which `fetch` gets. The constructor fetches nothing. `clock` returns monotonic seconds."""

    def __init__(self, url: str, fetch: FetchBody, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._fetch = fetch
        times = FetchTimes(
            refresh_age=REFRESH_AGE_SECONDS,
            max_age=MAX_AGE_SECONDS,
            pause_after_failure=RETRY_SECONDS,
            pause_after_success=PAUSE_SECONDS,
        )
        self._document = FetchedDocument(self._fetch_keys, times, clock)

    async def find(self, key_id: str | None, algorithm: str) -> Key | None:
        """Returns a key as `KeySet.find` does. Waits for a fetch only if no cached key fits. If the caller is
        cancelled, the fetch continues."""
        key = self._find_cached(key_id, algorithm)
        if key is None:
            await self._document.refresh()
            key = self._find_cached(key_id, algorithm)
            if key is None and self._document.last_fetch_failed:
                raise KeySetUnavailable(f"the key set at {self._url} could not be fetched")
            return key
        if not self._document.is_fresh:
            self._document.start_refresh()
        return key

    async def find_replacement(self, key: Key, key_id: str | None, algorithm: str) -> Key | None:
        """Returns a key as `KeySet.find_replacement` does. Fetches no keys during the pause after a fetch."""
        if self._find_cached(key_id, algorithm) is key:  # no fetch has replaced the key since `find` returned it
            await self._document.refresh()
        found = self._find_cached(key_id, algorithm)
        return None if found is key else found

    async def aclose(self) -> None:
        """Cancels a running fetch and waits until it has ended."""
        await self._document.aclose()

    def _find_cached(self, key_id: str | None, algorithm: str) -> Key | None:
        return _choose_key(self._document.current or (), key_id, algorithm)

    async def _fetch_keys(self) -> tuple[Key, ...] | None:
        """Fetches the key set and returns its keys. After a failure, logs a warning and returns None."""
        try:
            return parse_key_set(await self._fetch(self._url))
        except KeySetUnavailable as error:
            log.warning("could not fetch the key set at %s: %s", self._url, error)
            return None


async def fetch_key_set(url: str, ca_file: Path | None = None) -> bytes:
    """Returns the document at `url`. `ca_file` contains the certificates of the trusted authorities; None: those of the
    system are trusted. Follows no redirects. Raises KeySetUnavailable if the request fails or the status of the
    response is not 200."""
    try:
        status, body = await send_request(url, ca_file)
    except NoUsableResponse as error:
        raise KeySetUnavailable(str(error)) from None
    if status != 200:
        raise KeySetUnavailable(f"the response has the status {status}")
    return body


def parse_key_set(body: bytes) -> tuple[Key, ...]:
    """Parses the JSON document `body` and returns its public keys that are for signatures. Ignores all other keys (RFC
    7517, 5). Raises KeySetUnavailable if `body` is not a key set."""
    try:
        document = json.loads(body)
        entries = document["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeySetUnavailable("it is not a JSON Web Key Set") from None
    if not isinstance(entries, list):
        raise KeySetUnavailable("it is not a JSON Web Key Set")
    return tuple(key for entry in entries[:MAX_KEYS] if (key := _parse_key(entry)) is not None)


def _parse_key(entry: Any) -> Key | None:
    """Returns the key in an entry of a key set. Returns None for a private key, a key that is not for signatures, an
    RSA key shorter than `MIN_RSA_BITS`, and a key that is malformed or of an unknown type."""
    # `d` is the private part of a key. `use` is `sig` for signatures and `enc` for encryption (RFC 7517, 4.2).
    if not isinstance(entry, dict) or "d" in entry or entry.get("use", "sig") != "sig":
        return None
    try:
        key_class = _KEY_CLASSES[entry.get("kty")]
        key_class.validate_dict_key(entry)
        # `import_key` would do the same, and write a warning to stderr for a short RSA key.
        key = key_class(key_class.binding.import_from_dict(entry), entry)
        key.check_key_op("verify")
    except (JoseError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if isinstance(key, RSAKey) and key.public_key.key_size < MIN_RSA_BITS:
        return None
    return None if isinstance(key, OKPKey) and key.curve_name not in _SIGNATURE_CURVES else key


def _choose_key(keys: tuple[Key, ...], key_id: str | None, algorithm: str) -> Key | None:
    """Returns the key for a token by the rules of `KeySet.find`, or None."""
    fitting = [key for key in keys if _fits(key, key_id, algorithm)]
    return fitting[0] if len(fitting) == 1 or (fitting and key_id is not None) else None


def _fits(key: Key, key_id: str | None, algorithm: str) -> bool:
    """Returns whether a key fits a token whose header names `key_id` and `algorithm`:

    - The key has the id `key_id`. If `key_id` is None, every id fits.
    - The key has the type and the curve that the algorithm needs (RFC 7518, 3.1; RFC 8037).
    - The key has no `alg`, or its `alg` is `algorithm`."""
    if key_id is not None and key.kid != key_id:
        return False
    try:
        JWSRegistry.algorithms[algorithm].check_key(key)
    except JoseError:
        return False
    return True

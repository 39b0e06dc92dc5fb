"""The OpenID provider: its metadata, the exchange of a code for an ID token, and the checks of the ID token.

Sources: OpenID Connect Discovery 1.0, 4; OpenID Connect Core 1.0, 3.1.3; RFC 6749, 2.3.1 and 4.1.3; RFC 7636. The
provider is first contacted by a login.
"""

from __future__ import annotations

import base64
import hmac
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote_plus

from registry.auth.external.fetched_document import FetchedDocument, FetchTimes
from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.auth.external.jwks import FetchedKeySet, KeySet, fetch_key_set
from registry.auth.token.signed_tokens import TokenInvalid, check_times, read_claims, read_header
from registry.config.auth_settings import ASYMMETRIC_ALGORITHMS, OIDCSettings, check_identity_url

log = logging.getLogger(__name__)

METADATA_FRESH_SECONDS: Final = 3600.0
"""Age after which the provider's metadata is fetched again."""
METADATA_STALE_SECONDS: Final = 86400.0
"""Age after which metadata that could not be fetched again is not used any more."""
METADATA_RETRY_SECONDS: Final = 10.0
"""Pause between two fetches."""
ID_TOKEN_LEEWAY_SECONDS: Final = 10.0
"""Seconds by which the provider's clock may differ."""
MAX_ID_TOKEN_CHARACTERS: Final = 64 * 1024
"""Characters of an ID token."""
_REQUIRED_CLAIMS: Final = ("iss", "aud", "exp", "iat", "sub", "nonce")
_METADATA_PATH: Final = "/.well-known/openid-configuration"
_ERROR_WORD: Final = re.compile(r"[a-z0-9_.-]{1,60}")


class ProviderInvalid(Exception):
    """The settings of the provider cannot be used. The text is one line for the operator and holds no secret."""


class ProviderUnavailable(Exception):
    """The provider does not answer, or not as it should. The text is for the log."""


class CodeRefused(Exception):
    """The provider refuses a code. `reason` is the provider's error code."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class IDTokenInvalid(Exception):
    """The ID token is refused. The text is for the log; the person is not shown it."""


@dataclass(frozen=True, slots=True)
class ProviderMetadata:
    """The used parts of the provider's metadata.

    `authorization`, `token` and `keys` are URLs. `takes_basic` means that the client logs in with Basic; `sends_issuer`
    that responses hold `iss` (RFC 9207).
    """

    authorization: str
    token: str
    keys: str
    takes_basic: bool
    sends_issuer: bool


class OpenIDProvider:
    """The provider, for one process and its event loop. Making one contacts nobody. `monotonic` gives seconds."""

    def __init__(self, settings: OIDCSettings, monotonic: Callable[[], float]) -> None:
        assert settings.issuer is not None
        self.issuer = settings.issuer
        self.client_id = settings.client_id or ""
        self._settings = settings
        self._clock = monotonic
        times = FetchTimes(
            METADATA_FRESH_SECONDS, METADATA_STALE_SECONDS, retry=METADATA_RETRY_SECONDS, pause=METADATA_RETRY_SECONDS
        )
        self._metadata = FetchedDocument(self._fetch_metadata, times, monotonic)
        self._keys: dict[str, FetchedKeySet] = {}

    async def describe(self) -> ProviderMetadata:
        """Returns the provider's metadata. Concurrent callers share one fetch. Raises ProviderUnavailable. Cancelled:
        the fetch goes on."""
        if not self._metadata.is_fresh:
            await self._metadata.refresh()
        metadata = self._metadata.current
        if metadata is None:
            raise ProviderUnavailable("its metadata is not available")
        return metadata

    async def keys(self) -> FetchedKeySet:
        """Returns the provider's public keys, from the URL in its current metadata. Raises ProviderUnavailable."""
        url = (await self.describe()).keys
        if url not in self._keys:
            for other in self._keys.values():
                await other.aclose()
            self._keys = {url: FetchedKeySet(url, partial(fetch_key_set, ca_file=self._settings.ca_file), self._clock)}
        return self._keys[url]

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """Returns the ID token for an authorization code. Raises ProviderUnavailable, CodeRefused."""
        metadata = await self.describe()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        headers = {}
        secret = self._secret()
        if secret is not None and metadata.takes_basic:
            headers["Authorization"] = _basic(self.client_id, secret)
        else:
            form |= {"client_id": self.client_id} | ({} if secret is None else {"client_secret": secret})
        try:
            status, body = await send_request(metadata.token, self._settings.ca_file, form=form, headers=headers)
        except NoUsableResponse as error:
            raise ProviderUnavailable(str(error)) from None
        answer = _json_object(body)
        if status in (400, 401, 403):
            raise CodeRefused(error_word(answer.get("error")))
        token = answer.get("id_token")
        if status != 200 or not isinstance(token, str):
            raise ProviderUnavailable(f"its answer to a code is {status}, without an ID token")
        return token

    async def aclose(self) -> None:
        """Cancels fetches that are under way."""
        await self._metadata.aclose()
        for each in self._keys.values():
            await each.aclose()

    def _secret(self) -> str | None:
        try:
            return read_client_secret(self._settings)
        except ProviderInvalid as error:
            raise ProviderUnavailable(str(error)) from None

    async def _fetch_metadata(self) -> ProviderMetadata | None:
        try:
            status, body = await send_request(self.issuer.rstrip("/") + _METADATA_PATH, self._settings.ca_file)
            if status != 200:
                raise NoUsableResponse(f"the answer is {status}")
            return _parse_metadata(_json_object(body), self.issuer)
        except (NoUsableResponse, ProviderUnavailable) as error:
            log.warning("the OpenID provider %s cannot be used: %s", self.issuer, error)
            return None


def check_provider(settings: OIDCSettings) -> None:
    """Checks at the start that the settings are complete and the secret can be read. Contacts nobody. Raises
    ProviderInvalid."""
    if (settings.issuer is None) != (settings.client_id is None):
        missing = "issuer" if settings.issuer is None else "client_id"
        raise ProviderInvalid(f"oidc.{missing} is not set; the login at a provider needs issuer and client_id")
    if settings.issuer is not None:
        read_client_secret(settings)


def read_client_secret(settings: OIDCSettings) -> str | None:
    """Returns the client's secret, or None for a public client. Reads it anew each time, so that it can be changed at
    any time. Raises ProviderInvalid."""
    if settings.client_secret_env is not None:
        secret, where = os.environ.get(settings.client_secret_env, ""), settings.client_secret_env
    elif settings.client_secret_file is not None:
        where = str(settings.client_secret_file)
        try:
            secret = settings.client_secret_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ProviderInvalid(f"cannot read the client's secret for OpenID from {where}: {reason}") from None
    else:
        return None
    if not secret.strip():
        raise ProviderInvalid(f"the client's secret for OpenID is not in {where}")
    return secret.strip()


def error_word(value: object) -> str:
    """Returns an error code of the provider, or `unnamed` if it is not fit for a log."""
    return value if isinstance(value, str) and _ERROR_WORD.fullmatch(value) else "unnamed"


def _parse_metadata(document: Mapping[str, Any], issuer: str) -> ProviderMetadata:
    """Returns the metadata. Raises ProviderUnavailable if it is another issuer's, or one of its URLs is not safe."""
    if document.get("issuer") != issuer:
        raise ProviderUnavailable("its metadata is that of another issuer")
    methods = document.get("token_endpoint_auth_methods_supported")
    return ProviderMetadata(
        _endpoint_url(document, "authorization_endpoint", issuer),
        _endpoint_url(document, "token_endpoint", issuer),
        _endpoint_url(document, "jwks_uri", issuer),
        takes_basic=not isinstance(methods, list) or "client_secret_basic" in methods,
        sends_issuer=document.get("authorization_response_iss_parameter_supported") is True,
    )


def _endpoint_url(document: Mapping[str, Any], name: str, issuer: str) -> str:
    """Returns a URL of the metadata. Raises ProviderUnavailable if it is not safe: a remote provider may not direct
    requests to services on this machine."""
    value = document.get(name)
    try:
        if not isinstance(value, str) or not (value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("it is no address")
        check_identity_url(value, "https://sso.example.com/token", "can log in")
        if issuer.startswith("https:") and not value.startswith("https:"):
            raise ValueError("it must begin with https://, as the issuer does")
    except ValueError as error:
        raise ProviderUnavailable(f"its {name} cannot be used: {error}") from None
    return value


def _json_object(body: bytes) -> Mapping[str, Any]:
    """Returns the JSON object in `body`, or an empty one if there is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _basic(client_id: str, secret: str) -> str:
    """Returns the Authorization header, with both parts form-encoded first (RFC 6749, 2.3.1)."""
    return "Basic " + base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()


async def verify_id_token(
    text: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, now: float
) -> Mapping[str, Any]:
    """Returns the claims of a valid ID token (OpenID Connect Core 1.0, 3.1.3.7). `now` is in seconds since 1970. May
    wait for the key set. Raises IDTokenInvalid."""
    try:
        header = read_header(text, MAX_ID_TOKEN_CHARACTERS)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in ASYMMETRIC_ALGORITHMS or "crit" in header or not isinstance(key_id, str | None):
            raise TokenInvalid("is not signed with a key pair")
        key = await keys.find(key_id, algorithm)
        if key is None:
            raise TokenInvalid("is signed with a key that the provider does not have")
        claims = read_claims(text, key, algorithm, audience=client_id, issuer=issuer, required=_REQUIRED_CLAIMS)
        _check_party(claims, client_id)
        check_times(claims, now, leeway=ID_TOKEN_LEEWAY_SECONDS, expiry_leeway=ID_TOKEN_LEEWAY_SECONDS)
    except TokenInvalid as error:
        raise IDTokenInvalid(f"it {error}") from None
    shown = claims["nonce"]
    if not isinstance(shown, str) or not hmac.compare_digest(shown.encode("utf-8", "replace"), nonce.encode()):
        raise IDTokenInvalid("it is of another login: its nonce differs")
    return claims


def _check_party(claims: Mapping[str, Any], client_id: str) -> None:
    """Raises TokenInvalid if the token was made for another client. A token with several audiences has to name the
    client in `azp`."""
    audience, party = claims["aud"], claims.get("azp")
    several = isinstance(audience, list) and len(audience) > 1
    if (several and party is None) or (party is not None and party != client_id):
        raise TokenInvalid("was made for another client: its azp differs")

"""Requests to the OpenID provider, and the checks of its ID tokens.

For a login, `OpenIDProvider` fetches the provider's metadata (its URLs) and its public keys, and exchanges an
authorization code for an ID token. `verify_id_token` verifies that token. No request is sent before the first login.

Sources: OpenID Connect Discovery 1.0, 4; OpenID Connect Core 1.0, 3.1.3; RFC 6749, 2.3.1 and 4.1.3; RFC 7636.
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
"""From this age on, the next login fetches the provider's metadata again."""
METADATA_STALE_SECONDS: Final = 86400.0
"""Above this age, metadata is not used. Younger metadata is used if it cannot be fetched again."""
METADATA_RETRY_SECONDS: Final = 10.0
"""The shortest time between two fetches of the metadata."""
ID_TOKEN_LEEWAY_SECONDS: Final = 10.0
"""How far the provider's clock may be ahead of this machine's clock, or behind it."""
MAX_ID_TOKEN_CHARACTERS: Final = 64 * 1024
"""The longest ID token that is verified."""
_REQUIRED_CLAIMS: Final = ("iss", "aud", "exp", "iat", "sub", "nonce")
"""The claims that every ID token must have."""
_METADATA_PATH: Final = "/.well-known/openid-configuration"
"""The path of the metadata, below the provider's URL (OpenID Connect Discovery 1.0, 4)."""
_ERROR_CODE: Final = re.compile(r"[a-z0-9_.-]{1,60}")
"""The error codes of the provider that may be written to a log."""


class ProviderInvalid(Exception):
    """The settings of the provider cannot be used. The text says why, in one line for the operator. It contains no
    secret."""


class ProviderUnavailable(Exception):
    """The provider sends no response, or one that cannot be used, or the client secret cannot be read. The text says
    which of these, for the log."""


class CodeRefused(Exception):
    """The provider refuses an authorization code. `reason` is the error code that the provider sends."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class IDTokenInvalid(Exception):
    """The ID token is refused. The text says why, for the log and not for the person who logs in."""


@dataclass(frozen=True, slots=True)
class ProviderMetadata:
    """The parts of the provider's metadata that this registry uses.

    - `authorization_url`: the provider's login page.
    - `token_url`: the URL at which an authorization code is exchanged for an ID token.
    - `keys_url`: the URL of the provider's key set.
    - `accepts_basic`: whether the provider accepts the client secret in a header, with Basic authentication. If not,
      this registry sends the secret in the form.
    - `sends_issuer`: whether the provider's response to a login names the provider, in the parameter `iss` (RFC 9207).
    """

    authorization_url: str
    token_url: str
    keys_url: str
    accepts_basic: bool
    sends_issuer: bool


class OpenIDProvider:
    """Sends requests to the OpenID provider, for one process and its event loop. The constructor sends none. `settings`
    must name an issuer. `monotonic` returns monotonic seconds."""

    def __init__(self, settings: OIDCSettings, monotonic: Callable[[], float]) -> None:
        assert settings.issuer is not None
        self.issuer = settings.issuer
        self.client_id = settings.client_id or ""
        self._settings = settings
        self._clock = monotonic
        times = FetchTimes(
            refresh_age=METADATA_FRESH_SECONDS,
            max_age=METADATA_STALE_SECONDS,
            pause_after_failure=METADATA_RETRY_SECONDS,
            pause_after_success=METADATA_RETRY_SECONDS,
        )
        self._metadata = FetchedDocument(self._fetch_metadata, times, monotonic)
        self._key_sets: dict[str, FetchedKeySet] = {}
        """The key set of the provider, by its URL. At most one: it is replaced when the metadata names another URL."""

    async def metadata(self) -> ProviderMetadata:
        """Returns the provider's metadata. If the cached metadata is not fresh, first fetches it again and waits for
        the fetch. Concurrent callers share one fetch, and it continues if a caller is cancelled. For
        `METADATA_RETRY_SECONDS` after the end of a fetch, no other fetch starts. Raises ProviderUnavailable if there
        is then no metadata, or only metadata that is too old (`METADATA_STALE_SECONDS`)."""
        if not self._metadata.is_fresh:
            await self._metadata.refresh()
        metadata = self._metadata.current
        if metadata is None:
            raise ProviderUnavailable("its metadata is not available")
        return metadata

    async def keys(self) -> FetchedKeySet:
        """Returns the provider's key set, at the URL that its current metadata names. Raises ProviderUnavailable if
        there is no metadata. Does not fetch the keys; `FetchedKeySet.find` does."""
        url = (await self.metadata()).keys_url
        if url not in self._key_sets:
            for outdated in self._key_sets.values():
                await outdated.aclose()
            fetch = partial(fetch_key_set, ca_file=self._settings.ca_file)
            self._key_sets = {url: FetchedKeySet(url, fetch, self._clock)}
        return self._key_sets[url]

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """Exchanges an authorization code for an ID token, and returns the token, which the caller must verify.

        `verifier` is the secret whose hash was sent at the start of the login (PKCE, RFC 7636). `redirect_uri` is the
        URL of this registry that was sent at the start of the login. Raises ProviderUnavailable, CodeRefused.
        """
        metadata = await self.metadata()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        headers = {}
        secret = self._secret()
        if secret is not None and metadata.accepts_basic:
            headers["Authorization"] = _basic_header(self.client_id, secret)
        else:
            form |= {"client_id": self.client_id} | ({} if secret is None else {"client_secret": secret})
        try:
            status, body = await send_request(metadata.token_url, self._settings.ca_file, form=form, headers=headers)
        except NoUsableResponse as error:
            raise ProviderUnavailable(str(error)) from None
        document = _json_object(body)
        if status in (400, 401, 403):
            raise CodeRefused(loggable_error_code(document.get("error")))
        token = document.get("id_token")
        if status != 200 or not isinstance(token, str):
            raise ProviderUnavailable(f"it sent no ID token for an authorization code (status {status})")
        return token

    async def aclose(self) -> None:
        """Cancels running fetches of the metadata and the key set, and waits until they have ended."""
        await self._metadata.aclose()
        for each in self._key_sets.values():
            await each.aclose()

    def _secret(self) -> str | None:
        """Returns the client secret, or None if the settings have none. Raises ProviderUnavailable if it cannot be
        read."""
        try:
            return read_client_secret(self._settings)
        except ProviderInvalid as error:
            raise ProviderUnavailable(str(error)) from None

    async def _fetch_metadata(self) -> ProviderMetadata | None:
        """Fetches the metadata and returns it. After a failure, logs a warning and returns None."""
        try:
            status, body = await send_request(self.issuer.rstrip("/") + _METADATA_PATH, self._settings.ca_file)
            if status != 200:
                raise NoUsableResponse(f"the response has the status {status}")
            return _parse_metadata(_json_object(body), self.issuer)
        except (NoUsableResponse, ProviderUnavailable) as error:
            log.warning("could not fetch the metadata of the OpenID provider %s: %s", self.issuer, error)
            return None


def check_provider(settings: OIDCSettings) -> None:
    """Checks that the settings of the provider are complete, and that the client secret can be read. The server calls
    this when it starts. Sends no request. Raises ProviderInvalid if a check fails."""
    if (settings.issuer is None) != (settings.client_id is None):
        missing = "issuer" if settings.issuer is None else "client_id"
        raise ProviderInvalid(f"oidc.{missing} is not set; logins at an OpenID provider need issuer and client_id")
    if settings.issuer is not None:
        read_client_secret(settings)


def read_client_secret(settings: OIDCSettings) -> str | None:
    """Returns the client secret with which this registry authenticates at the provider. Returns None if the settings
    have none (a public client). Reads the secret at each call, so that a changed file takes effect without a restart.
    Raises ProviderInvalid if the secret cannot be read or is empty."""
    if settings.client_secret_env is not None:
        secret, source = os.environ.get(settings.client_secret_env, ""), settings.client_secret_env
    elif settings.client_secret_file is not None:
        source = str(settings.client_secret_file)
        try:
            secret = settings.client_secret_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ProviderInvalid(
                "cannot read the client's secret, which this registry sends to the OpenID provider, "
                f"from {source}: {reason}"
            ) from None
    else:
        return None
    if not secret.strip():
        raise ProviderInvalid(
            f"the client's secret, which this registry sends to the OpenID provider, is not in {source}, or is empty"
        )
    return secret.strip()


def loggable_error_code(value: object) -> str:
    """Returns `value`, an error code that the provider sent. Returns `unnamed` instead if it is not a text, is too long
    for a log, or has characters that error codes do not have."""
    return value if isinstance(value, str) and _ERROR_CODE.fullmatch(value) else "unnamed"


def _parse_metadata(document: Mapping[str, Any], issuer: str) -> ProviderMetadata:
    """Returns the metadata in a JSON document of the provider `issuer`. Raises ProviderUnavailable if the document
    names another issuer, or if one of its URLs is missing or not safe."""
    if document.get("issuer") != issuer:
        raise ProviderUnavailable("its metadata names another issuer")
    methods = document.get("token_endpoint_auth_methods_supported")
    return ProviderMetadata(
        authorization_url=_endpoint_url(document, "authorization_endpoint", issuer),
        token_url=_endpoint_url(document, "token_endpoint", issuer),
        keys_url=_endpoint_url(document, "jwks_uri", issuer),
        # Without a list of methods, the provider accepts Basic (OpenID Connect Discovery 1.0, 3).
        accepts_basic=not isinstance(methods, list) or "client_secret_basic" in methods,
        sends_issuer=document.get("authorization_response_iss_parameter_supported") is True,
    )


def _endpoint_url(document: Mapping[str, Any], name: str, issuer: str) -> str:
    """Returns the URL under `name` in the metadata of the provider `issuer`. Raises ProviderUnavailable if it is
    missing, malformed or not safe. An http URL is accepted only if it is on this machine, and if the provider's own URL
    is an http URL too. Otherwise a remote provider, whose own URL is https, could make this registry send requests to
    services on this machine."""
    value = document.get(name)
    try:
        if not isinstance(value, str) or not (value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("it is not a URL")
        # `attacker_gains` is the end of the error text: "whoever can change its answers can log in".
        check_identity_url(value, example="https://sso.example.com/token", attacker_gains="can log in")
        if issuer.startswith("https:") and not value.startswith("https:"):
            raise ValueError("it must begin with https://, as the provider's own URL does")
    except ValueError as error:
        raise ProviderUnavailable(f"its {name} cannot be used: {error}") from None
    return value


def _json_object(body: bytes) -> Mapping[str, Any]:
    """Returns the JSON object in `body`, or an empty object if `body` contains none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _basic_header(client_id: str, secret: str) -> str:
    """Returns the value of an Authorization header for Basic. The client id and the secret are form-encoded before they
    are joined (RFC 6749, 2.3.1)."""
    return "Basic " + base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()


async def verify_id_token(
    text: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, now: float
) -> Mapping[str, Any]:
    """Verifies the ID token `text` and returns its claims (OpenID Connect Core 1.0, 3.1.3.7).

    - `keys`: the provider's keys. If they are not cached, this function waits until they are fetched.
    - `issuer`, `client_id`: the provider that must have made the token, and the client that it must be for.
    - `nonce`: the random value that was sent to the provider at the start of the login, which the token must repeat.
    - `now`: seconds since 1970.

    Raises IDTokenInvalid.
    """
    try:
        header = read_header(text, MAX_ID_TOKEN_CHARACTERS)
        algorithm, key_id = header.get("alg"), header.get("kid")
        # `crit` names extensions that a verifier must support (RFC 7515, 4.1.11). This registry supports none.
        if algorithm not in ASYMMETRIC_ALGORITHMS or "crit" in header or not isinstance(key_id, str | None):
            raise TokenInvalid("has a header that names an algorithm or an extension that is not accepted")
        key = await keys.find(key_id, algorithm)
        if key is None:
            raise TokenInvalid("fits no key in the provider's key set")
        claims = read_claims(text, key, algorithm, audience=client_id, issuer=issuer, required=_REQUIRED_CLAIMS)
        _check_authorized_party(claims, client_id)
        check_times(claims, now, leeway=ID_TOKEN_LEEWAY_SECONDS, expiry_leeway=ID_TOKEN_LEEWAY_SECONDS)
    except TokenInvalid as error:
        raise IDTokenInvalid(f"it {error}") from None
    received = claims["nonce"]
    if not isinstance(received, str) or not hmac.compare_digest(received.encode("utf-8", "replace"), nonce.encode()):
        raise IDTokenInvalid("it belongs to another login: its nonce differs")
    return claims


def _check_authorized_party(claims: Mapping[str, Any], client_id: str) -> None:
    """Checks the claim `azp` (authorized party), which names the client that the token was made for. It must be
    `client_id`; it may be missing if the token has only one audience. Raises TokenInvalid if it is wrong."""
    audience, party = claims["aud"], claims.get("azp")
    has_several_audiences = isinstance(audience, list) and len(audience) > 1
    if (has_several_audiences and party is None) or (party is not None and party != client_id):
        raise TokenInvalid("was made for another client: its azp differs")

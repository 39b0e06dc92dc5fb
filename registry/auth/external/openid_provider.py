"""The OpenID provider: where it is, what it gives for a code, and whom its ID tokens are about.

Sources: OpenID Connect Discovery 1.0, 4; OpenID Connect Core 1.0, 3.1.3; RFC 6749, 2.3.1 and 4.1.3; RFC 7636.
Nothing is asked before somebody logs in. What it says of itself is kept for an hour.

The checks of an ID token (OpenID Connect Core 1.0, 3.1.3.7): whose it is, for whom, and of which login.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from urllib.parse import quote_plus

import jwt

from registry.auth.external.identity_http import NoAnswer, send_request
from registry.auth.external.jwks import FetchedKeySet, KeySet, fetch_key_set
from registry.config.auth_settings import ASYMMETRIC_ALGORITHMS, OIDCSettings, check_identity_url
from registry.request import detached_context

log = logging.getLogger(__name__)

METADATA_FRESH_SECONDS: Final = 3600.0
"""Seconds for which its description counts."""
METADATA_STALE_SECONDS: Final = 86400.0
"""Seconds for which it does when it cannot be had anew."""
METADATA_RETRY_SECONDS: Final = 10.0
"""Seconds until the next try after one that failed."""
_METADATA_PATH: Final = "/.well-known/openid-configuration"
_ERROR_WORD: Final = re.compile(r"[a-z0-9_.-]{1,60}")


class ProviderInvalid(Exception):
    """The settings of the provider cannot be used; the text is one line for a person and holds no secret."""


class ProviderUnavailable(Exception):
    """It does not answer, or not as it should; the text is for the log."""


class CodeRefused(Exception):
    """It gives nothing for a code: `reason` is its word for why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class ProviderMetadata:
    """What it says of itself, as far as it is used. `sends_issuer`: its answers have `iss` (RFC 9207)."""

    authorization: str
    token: str
    keys: str
    basic: bool
    sends_issuer: bool


@dataclass(slots=True)
class _CachedMetadata:
    description: ProviderMetadata | None = None
    fetched: float = -METADATA_STALE_SECONDS
    next: float = -METADATA_STALE_SECONDS
    flight: asyncio.Task[None] | None = field(default=None, repr=False)


class OpenIDProvider:
    """For one process and its event loop. Made without contacting anybody. `monotonic`: in seconds."""

    def __init__(self, settings: OIDCSettings, monotonic: Callable[[], float]) -> None:
        assert settings.issuer is not None
        self.issuer = settings.issuer
        self.client_id = settings.client_id or ""
        self._settings = settings
        self._clock = monotonic
        self._kept = _CachedMetadata()
        self._keys: dict[str, FetchedKeySet] = {}

    async def describe(self) -> ProviderMetadata:
        """Raises ProviderUnavailable. Those who ask at the same time wait for one answer. Cancelled: it is fetched all
        the same."""
        kept = self._kept
        if self._clock() - kept.fetched >= METADATA_FRESH_SECONDS:
            if kept.flight is None and self._clock() >= kept.next:
                kept.flight = asyncio.create_task(self._renew(), context=detached_context())
            if kept.flight is not None:
                await asyncio.wait([kept.flight])  # what came of it is kept, or is not
        if kept.description is None or self._clock() - kept.fetched > METADATA_STALE_SECONDS:
            raise ProviderUnavailable("it does not say where it is to be asked")
        return kept.description

    async def keys(self) -> FetchedKeySet:
        """Its public keys, wherever they are now. Raises ProviderUnavailable."""
        url = (await self.describe()).keys
        if url not in self._keys:
            for other in self._keys.values():
                await other.aclose()
            self._keys = {url: FetchedKeySet(url, partial(fetch_key_set, ca_file=self._settings.ca_file), self._clock)}
        return self._keys[url]

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """The ID token for an authorization code. Raises ProviderUnavailable, CodeRefused."""
        described = await self.describe()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        headers = {}
        secret = self._secret()
        if secret is not None and described.basic:
            headers["Authorization"] = _basic(self.client_id, secret)
        else:
            form |= {"client_id": self.client_id} | ({} if secret is None else {"client_secret": secret})
        try:
            status, body = await send_request(described.token, self._settings.ca_file, form=form, headers=headers)
        except NoAnswer as error:
            raise ProviderUnavailable(str(error)) from None
        answer = _json_object(body)
        if status in (400, 401, 403):
            raise CodeRefused(error_word(answer.get("error")))
        token = answer.get("id_token")
        if status != 200 or not isinstance(token, str):
            raise ProviderUnavailable(f"its answer to a code is {status}, without an ID token")
        return token

    async def aclose(self) -> None:
        """Ends what is being asked."""
        if self._kept.flight is not None:
            self._kept.flight.cancel()
            await asyncio.gather(self._kept.flight, return_exceptions=True)
        for each in self._keys.values():
            await each.aclose()

    def _secret(self) -> str | None:
        try:
            return read_client_secret(self._settings)
        except ProviderInvalid as error:
            raise ProviderUnavailable(str(error)) from None

    async def _renew(self) -> None:
        kept = self._kept
        try:
            status, body = await send_request(self.issuer.rstrip("/") + _METADATA_PATH, self._settings.ca_file)
            if status != 200:
                raise NoAnswer(f"the answer is {status}")
            kept.description = _parse_metadata(_json_object(body), self.issuer)
            kept.fetched = self._clock()
        except (NoAnswer, ProviderUnavailable) as error:
            log.warning("the OpenID provider %s cannot be used: %s", self.issuer, error)
        finally:
            kept.next = self._clock() + METADATA_RETRY_SECONDS
            kept.flight = None


def check_provider(settings: OIDCSettings) -> None:
    """For the start: whether the settings are whole, and the secret can be read. Contacts nobody. Raises
    ProviderInvalid."""
    if (settings.issuer is None) != (settings.client_id is None):
        missing = "issuer" if settings.issuer is None else "client_id"
        raise ProviderInvalid(f"oidc.{missing} is not set; the login at a provider needs issuer and client_id")
    if settings.issuer is not None:
        read_client_secret(settings)


def read_client_secret(settings: OIDCSettings) -> str | None:
    """None: a public client. Raises ProviderInvalid. Read each time, so that it can be changed at any."""
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
    """An error as the provider names it, if that is fit for a log."""
    return value if isinstance(value, str) and _ERROR_WORD.fullmatch(value) else "unnamed"


def _parse_metadata(document: Mapping[str, Any], issuer: str) -> ProviderMetadata:
    """Raises ProviderUnavailable: it is another's, or one of its addresses is not safe."""
    if document.get("issuer") != issuer:
        raise ProviderUnavailable("its description is that of another issuer")
    methods = document.get("token_endpoint_auth_methods_supported")
    return ProviderMetadata(
        _endpoint_url(document, "authorization_endpoint", issuer),
        _endpoint_url(document, "token_endpoint", issuer),
        _endpoint_url(document, "jwks_uri", issuer),
        basic=not isinstance(methods, list) or "client_secret_basic" in methods,
        sends_issuer=document.get("authorization_response_iss_parameter_supported") is True,
    )


def _endpoint_url(document: Mapping[str, Any], name: str, issuer: str) -> str:
    """This machine's own services are for a provider on this machine: one elsewhere does not lead us to them."""
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
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _basic(client_id: str, secret: str) -> str:
    """RFC 6749, 2.3.1: both are encoded as in a form before."""
    return "Basic " + base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()


ID_TOKEN_LEEWAY_SECONDS: Final = 10.0
"""Seconds by which the provider's clock may differ."""
LONGEST_ID_TOKEN: Final = 64 * 1024
"""Characters of a token."""
_REQUIRED_CLAIMS: Final = ("iss", "aud", "exp", "iat", "sub", "nonce")


class IDTokenInvalid(Exception):
    """The text is for the log; the person is told nothing of it."""


async def verify_id_token(
    text: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, now: float
) -> Mapping[str, Any]:
    """Its claims. `now`: seconds since 1970. May wait for the key set. Raises IDTokenInvalid."""
    if len(text) > LONGEST_ID_TOKEN:
        raise IDTokenInvalid("it is too long")
    try:
        header = jwt.get_unverified_header(text)
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        raise IDTokenInvalid("it is no token") from None
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in ASYMMETRIC_ALGORITHMS or "crit" in header or not isinstance(key_id, str | None):
        raise IDTokenInvalid("it is not signed with a key pair")
    key = await keys.find(key_id, algorithm)
    if key is None:
        raise IDTokenInvalid("it is signed with a key that the provider does not have")
    try:
        claims: dict[str, Any] = jwt.decode(
            text,
            key,
            algorithms=[algorithm],
            audience=client_id,
            issuer=issuer,
            options={"require": list(_REQUIRED_CLAIMS), "verify_exp": False, "verify_nbf": False, "verify_iat": False},
        )
    except (jwt.InvalidTokenError, jwt.InvalidKeyError, ValueError, RecursionError) as error:
        raise IDTokenInvalid(f"it is not valid: {type(error).__name__}") from None
    _check_party(claims, client_id)
    _check_times(claims, now)
    shown = claims["nonce"]
    if not isinstance(shown, str) or not hmac.compare_digest(shown.encode("utf-8", "replace"), nonce.encode()):
        raise IDTokenInvalid("it is of another login: its nonce differs")
    return claims


def _check_party(claims: Mapping[str, Any], client_id: str) -> None:
    """Where it is for several, it says for which of them it was made."""
    audience, party = claims["aud"], claims.get("azp")
    several = isinstance(audience, list) and len(audience) > 1
    if (several and party is None) or (party is not None and party != client_id):
        raise IDTokenInvalid("it was made for another client: its azp differs")


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    if _time(claims["exp"]) + ID_TOKEN_LEEWAY_SECONDS <= now:
        raise IDTokenInvalid("it has expired")
    if any(name in claims and _time(claims[name]) > now + ID_TOKEN_LEEWAY_SECONDS for name in ("iat", "nbf")):
        raise IDTokenInvalid("it is not valid yet")


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise IDTokenInvalid("its times are not valid")
    return float(value)

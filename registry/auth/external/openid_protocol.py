"""The messages of the OpenID Connect protocol. For a login, this module creates the requests to the provider and parses
the provider's responses, with the library Authlib. `registry.auth.external.openid_provider` sends the requests.

Import this module only if the settings name a provider, because Authlib takes memory and time to import.

Sources: OpenID Connect Discovery 1.0, 4; OpenID Connect Core 1.0, 3.1.2, 3.1.3; RFC 6749, 2.3.1 and 4.1.3; RFC 7636.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote_plus

import httpx2
from authlib.common.errors import AuthlibBaseError
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.client import OAuth2Client
from authlib.oauth2.rfc6749.parameters import prepare_token_request
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import get_well_known_url
from joserfc.errors import JoseError

from registry.auth.external.jwks import KeySet, KeySetUnavailable, verify_with_key_set
from registry.auth.external.openid_settings import CodeRefused, IDTokenInvalid, ProviderUnavailable, loggable_error_code
from registry.auth.token.signed_tokens import TokenInvalid, algorithm_and_key_id, claim_fault, parse_token
from registry.config.auth_settings import ASYMMETRIC_ALGORITHMS, check_identity_url

ID_TOKEN_LEEWAY_SECONDS: Final = 10.0
"""How far the provider's clock may be ahead of this machine's clock, or behind it."""
MAX_ID_TOKEN_CHARACTERS: Final = 64 * 1024
"""The longest ID token that is verified."""
_REFUSAL_STATUSES: Final = (400, 401, 403)
"""The HTTP statuses with which a provider refuses an authorization code or the client authentication of this registry
(400 and 401: RFC 6749, 5.2)."""


@dataclass(frozen=True, slots=True)
class ProviderMetadata:
    """The parts of the provider's metadata that this registry uses.

    - `authorization_url`: the provider's login page.
    - `token_url`: the URL at which an authorization code is exchanged for an ID token.
    - `keys_url`: the URL of the provider's key set.
    - `accepts_basic`: True if the provider accepts the client secret in a header, with Basic authentication; False if
      this registry has to send the secret in the form.
    - `sends_issuer`: whether the provider's response to a login names the provider, in the parameter `iss` (RFC 9207).
    """

    authorization_url: str
    token_url: str
    keys_url: str
    accepts_basic: bool
    sends_issuer: bool


def metadata_url(issuer: str) -> str:
    """Returns the URL at which a provider publishes its metadata. `issuer`: the URL of the provider."""
    url: str = get_well_known_url(issuer, external=True)
    return url


def parse_metadata(body: bytes, issuer: str) -> ProviderMetadata:
    """Returns the metadata in `body`, a JSON document of the provider `issuer`. Raises ProviderUnavailable if the
    document names another issuer, or if one of its URLs is missing or not safe.

    Does not use Authlib's check of metadata. That check requires fields that no login needs, and accepts URLs with a
    user name."""
    document = _json_object(body)
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


def authorization_url(
    metadata: ProviderMetadata,
    *,
    client_id: str,
    redirect_uri: str,
    scope: str,
    state: str,
    nonce: str,
    verifier: str,
) -> str:
    """Returns the authorization URL, to which the browser goes for a login. The URL contains the S256 hash of
    `verifier`, but not `verifier` itself (RFC 7636, 4.2)."""
    client = OAuth2Client(None, client_id=client_id, scope=scope, code_challenge_method="S256")
    url: str
    url, _ = client.create_authorization_url(
        metadata.authorization_url, state=state, code_verifier=verifier, redirect_uri=redirect_uri, nonce=nonce
    )
    return url


def token_request(
    metadata: ProviderMetadata, *, client_id: str, secret: str | None, code: str, verifier: str, redirect_uri: str
) -> tuple[str, dict[str, str]]:
    """Returns the form and the headers of the POST that exchanges an authorization code for an ID token. `secret` is
    the client secret; None for a public client."""
    form = prepare_token_request("authorization_code", code=code, redirect_uri=redirect_uri, code_verifier=verifier)
    if secret is None:
        auth = ClientAuth(client_id, None, "none")
    elif metadata.accepts_basic:
        # The id and the secret are form-encoded before they are joined (RFC 6749, 2.3.1). Authlib does not do that.
        auth = ClientAuth(quote_plus(client_id), quote_plus(secret), "client_secret_basic")
    else:
        auth = ClientAuth(client_id, secret, "client_secret_post")
    _, headers, body = auth.prepare("POST", metadata.token_url, {}, form)
    return body, headers


def parse_token_response(status: int, body: bytes) -> str:
    """Returns the ID token in the provider's response to `token_request`. The caller must verify the token. Raises
    CodeRefused if the provider refuses the authorization code or the client authentication of this registry. If the
    response is not usable for another reason, raises ProviderUnavailable."""
    unusable_error = ProviderUnavailable(f"it sent no ID token for an authorization code (status {status})")
    if status not in (200, *_REFUSAL_STATUSES):
        raise unusable_error
    client = OAuth2Client(None)
    # Authlib's default class raises ValueError if the provider's `error_description` contains non-ASCII characters.
    client.oauth_error_class = AuthlibBaseError
    try:
        # httpx2 needs a request with a URL. The URL appears in no message.
        request = httpx2.Request("POST", "https://provider.invalid/")
        tokens = client.parse_response_token(httpx2.Response(status, content=body, request=request))
    except AuthlibBaseError as error:
        raise CodeRefused(loggable_error_code(error.error)) from None
    except (httpx2.HTTPStatusError, ValueError, TypeError, RecursionError):
        tokens = {}
    if status in _REFUSAL_STATUSES:
        raise CodeRefused(loggable_error_code(None))
    token = tokens.get("id_token")
    if not isinstance(token, str):
        raise unusable_error
    return token


async def verify_id_token(
    text: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, now: float
) -> Mapping[str, Any]:
    """Verifies the ID token `text` and returns its claims (OpenID Connect Core 1.0, 3.1.3.7).

    - `keys`: the provider's keys. If the keys are not cached, this function waits until they are fetched.
    - `issuer`: the provider that must have made the token.
    - `client_id`: the client for which the provider must have made the token.
    - `nonce`: the random value that the token must contain, and that the authorization URL contained
      (`authorization_url`).
    - `now`: seconds since 1970.

    Raises IDTokenInvalid if the token is not valid, and ProviderUnavailable if the keys cannot be fetched.
    """
    try:
        token = parse_token(text, MAX_ID_TOKEN_CHARACTERS)
        algorithm, key_id = algorithm_and_key_id(token, ASYMMETRIC_ALGORITHMS)
        claims = await verify_with_key_set(token, keys, key_id, algorithm)
        options = {
            "iss": {"essential": True, "value": issuer},
            "aud": {"essential": True, "value": client_id},
            "nonce": {"essential": True},
        }
        id_token = CodeIDToken(claims, token.headers(), options, {"client_id": client_id, "nonce": nonce})
        id_token.validate(now=now, leeway=ID_TOKEN_LEEWAY_SECONDS)
    except KeySetUnavailable as error:
        raise ProviderUnavailable(str(error)) from None
    except TokenInvalid as error:
        raise IDTokenInvalid(f"it {error}") from None  # the text of TokenInvalid has no subject: "has expired"
    except JoseError as error:
        raise IDTokenInvalid(f"it {claim_fault(error)}") from None
    return claims


def _endpoint_url(document: Mapping[str, Any], name: str, issuer: str) -> str:
    """Returns the URL under `name` in the metadata of the provider `issuer`. Raises ProviderUnavailable if the URL is
    missing, malformed or not safe. An http URL is safe only under two conditions:

    - The URL names this machine. Otherwise an attacker could change the responses in transit.
    - `issuer` is an http URL too, and so names this machine. A remote provider must not make this registry send
      requests to services on this machine."""
    value = document.get(name)
    try:
        if not isinstance(value, str) or not (value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("it is not a URL")
        # `attacker_can` is the end of the error message for a URL with plain http: "... an attacker ... can log in".
        check_identity_url(value, example="https://sso.example.com/token", attacker_can="log in")
        if issuer.startswith("https:") and not value.startswith("https:"):
            raise ValueError("it must begin with https://, as the provider's own URL does")
    except ValueError as error:
        raise ProviderUnavailable(f"its {name} cannot be used: {error}") from None
    return value


def _json_object(body: bytes) -> Mapping[str, Any]:
    """Returns the JSON object in `body`, or an empty object if `body` is not a JSON object."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}

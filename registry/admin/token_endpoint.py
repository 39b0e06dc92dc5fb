"""The token endpoint `/token`, where registry clients exchange a login for a bearer token.

A *login* is an account name with a secret: the account's password, an API token or a token of a trusted issuer. In a
POST, a refresh token from an earlier response can replace the login.

GET follows Distribution's "Token Authentication Specification", POST follows OAuth 2.0 (RFC 6749) as in Distribution's
"OAuth2 Token Authentication". Error responses have the format of the OCI distribution spec. For OAuth clients, error
responses to a POST also have the fields of RFC 6749, 5.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.asgi import unauthenticated_actor
from registry.auth.authorization_header import Basic, parse_authorization
from registry.auth.token_service import scopes
from registry.auth.token_service.service import RefreshToken, TokenRequest, TokenResponse, TokenService
from registry.http.error_statuses import FormInvalid, FormTooLarge, error_json, status_of
from registry.http.query import Query
from registry.http.response_headers import API_VERSION
from storage.content import Actor
from storage.errors import RegistryError, TooManyRequests

MAX_FORM_BYTES: Final = 64 * 1024
"""Maximum size of the form in a POST, in bytes."""
_FORM_TYPE: Final = "application/x-www-form-urlencoded"
_HEADERS: Final = {
    "cache-control": "no-store",
    "pragma": "no-cache",  # RFC 6749, 5.1
    "x-content-type-options": "nosniff",
    API_VERSION[0].decode(): API_VERSION[1].decode(),
}
"""Headers of every response. They forbid caches to store the token."""
_OAUTH_ERRORS: Final = {401: "invalid_grant", 400: "invalid_request", 413: "invalid_request", 429: "slow_down"}
"""OAuth error codes by HTTP status (RFC 6749, 5.2; RFC 8628, 3.5)."""


def token_router(get_service: Callable[[Request], TokenService]) -> APIRouter:
    """Returns a router with GET and POST of `/token`. `get_service` returns the token service of the application that
    received the request."""
    router = APIRouter(tags=["token"])

    @router.get("/token", summary="A token for clients of the registry")
    async def get_token(request: Request) -> Response:
        """Query parameters: `service`, `scope` (may be repeated, or hold several scopes separated by spaces),
        `offline_token` (`true` to get a refresh token as well), `client_id`. Clients send a login by Basic
        authentication: an account name, and as the password the account's password, an API token or a token of a
        trusted issuer. A client without an Authorization header gets a token for anonymous access."""
        actor = unauthenticated_actor(request.scope)
        try:
            query = Query(request.scope.get("query_string", b""))
            token_request = TokenRequest(
                credential=parse_authorization(_authorization(request)),
                requested=scopes.parse_scopes(query.all("scope")),
                service=_first_value(query, "service"),
                offline=_first_value(query, "offline_token") == "true",
                client=_first_value(query, "client_id") or "",
            )
            return _success_response(await get_service(request).answer(token_request, actor))
        except RegistryError as error:
            return _error_response(error, actor)

    @router.post("/token", summary="A token for clients that use OAuth 2.0")
    async def post_token(request: Request) -> Response:
        """Form fields: `grant_type` (`password` or `refresh_token`), `service`, `client_id`, `scope`, `access_type`
        (`offline` to get a refresh token), and either `username` and `password` or `refresh_token`."""
        actor = unauthenticated_actor(request.scope)
        try:
            token_request = _token_request_from_form(await read_form(request))
            issued = await get_service(request).answer(token_request, actor)
            return _success_response(issued, scope=scopes.format_scopes(issued.granted))
        except RegistryError as error:
            return _error_response(error, actor, oauth=True)

    return router


async def read_form(request: Request) -> Query:
    """Returns the form in the request's body. Raises FormInvalid if the Content-Type is not that of a form,
    FormTooLarge if the body has more than MAX_FORM_BYTES, and RequestInvalid if the body cannot be parsed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM_TYPE:
        raise FormInvalid(f"the body has to be {_FORM_TYPE}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise FormTooLarge(f"the form has more than {MAX_FORM_BYTES} bytes")
    return Query(bytes(body))


def _token_request_from_form(form: Query) -> TokenRequest:
    """Returns the token request that a form contains. Raises FormInvalid for a missing or unknown `grant_type`, and
    RequestInvalid for a repeated field or an invalid scope."""
    credential: Basic | RefreshToken
    match form.one("grant_type"):
        case "password":
            credential = Basic(form.one("username") or "", form.one("password") or "")
        case "refresh_token":
            credential = RefreshToken(form.one("refresh_token") or "")
        case None:
            raise FormInvalid("the form has no grant_type")
        case _:
            raise FormInvalid("grant_type must be password or refresh_token", oauth_code="unsupported_grant_type")
    return TokenRequest(
        credential=credential,
        requested=scopes.parse_scopes(form.all("scope")),
        service=form.one("service") or None,
        offline=form.one("access_type") == "offline",
        client=form.one("client_id") or "",
    )


def _first_value(query: Query, name: str) -> str | None:
    """Returns a parameter's first value, or None if the parameter is missing or empty."""
    return next(iter(query.all(name)), None) or None


def _authorization(request: Request) -> list[bytes]:
    """Returns the values of all Authorization headers."""
    return [value for name, value in request.scope["headers"] if name == b"authorization"]


def _success_response(issued: TokenResponse, **extra_fields: str) -> Response:
    """Returns the JSON response with the issued tokens and `extra_fields`. The fields `token` and `access_token` have
    the same value: clients of Distribution's specification read `token`, and OAuth clients read `access_token`."""
    token = issued.token
    document: dict[str, object] = {
        "token": token.text,
        "access_token": token.text,
        "token_type": "Bearer",
        "expires_in": token.lifetime,
        "issued_at": datetime.fromtimestamp(token.issued_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **extra_fields,
    }
    if issued.refresh is not None:
        document["refresh_token"] = issued.refresh
    return Response(json.dumps(document), 200, _HEADERS, "application/json")


def _error_response(error: RegistryError, actor: Actor, *, oauth: bool = False) -> Response:
    """Returns the JSON response for an error. `oauth`: whether to add the fields of RFC 6749, 5.2."""
    status = status_of(error)
    headers = {**_HEADERS, "x-request-id": actor.request_id}
    if status == 401:
        headers["www-authenticate"] = 'Basic realm="entrepot", charset="UTF-8"'
    if isinstance(error, TooManyRequests):
        headers["retry-after"] = str(error.retry_after)
    body = error_json(error.code, error.message, error.detail)
    if oauth:
        oauth_code = error.oauth_code if isinstance(error, FormInvalid) else _OAUTH_ERRORS.get(status, "server_error")
        body = _add_fields(body, {"error": oauth_code, "error_description": error.message})
    return Response(body, status, headers, "application/json")


def _add_fields(body: bytes, fields: Mapping[str, str]) -> bytes:
    """Returns the JSON object `body` with `fields` added."""
    return json.dumps({**json.loads(body), **fields}).encode()

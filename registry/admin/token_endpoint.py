"""The token endpoint `/token`: GET in the form of Distribution, POST in the form of OAuth 2.0 (RFC 6749).

Errors have the OCI spec's shape; those of POST have RFC 6749's fields as well, so that both kinds of clients read them.
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

LARGEST_FORM: Final = 64 * 1024
"""Bytes of a POST's body."""
_FORM: Final = "application/x-www-form-urlencoded"
_NEVER_STORE: Final = {
    "cache-control": "no-store",
    "pragma": "no-cache",  # RFC 6749, 5.1
    "x-content-type-options": "nosniff",
    API_VERSION[0].decode(): API_VERSION[1].decode(),
}
_OAUTH: Final = {401: "invalid_grant", 400: "invalid_request", 413: "invalid_request", 429: "slow_down"}


def token_router(service_of: Callable[[Request], TokenService]) -> APIRouter:
    """Returns the routes. `service_of` returns the service that answers a request."""
    router = APIRouter(tags=["token"])

    @router.get("/token", summary="A token for clients of the registry")
    async def get_token(request: Request) -> Response:
        """Query: `service`, `scope` (repeated, or several separated by spaces), `offline_token`, `client_id`. A login
        is sent by Basic; it is optional."""
        actor = unauthenticated_actor(request.scope)
        try:
            query = Query(request.scope.get("query_string", b""))
            ask = TokenRequest(
                parse_authorization(_authorization(request)),
                scopes.parse_scopes(query.all("scope")),
                _first(query, "service"),
                _first(query, "offline_token") == "true",
                _first(query, "client_id") or "",
            )
            return _token_response(await service_of(request).answer(ask, actor))
        except RegistryError as error:
            return _error_response(error, actor)

    @router.post("/token", summary="The same, as OAuth 2.0 has it")
    async def post_token(request: Request) -> Response:
        """Form: `grant_type` (`password` or `refresh_token`), `service`, `client_id`, `scope`, `access_type`
        (`offline`), `username` and `password`, or `refresh_token`."""
        actor = unauthenticated_actor(request.scope)
        try:
            reply = await service_of(request).answer(_token_request(await _read_form(request)), actor)
            return _token_response(reply, scope=scopes.format_scopes(reply.granted))
        except RegistryError as error:
            return _error_response(error, actor, oauth=True)

    return router


async def _read_form(request: Request) -> Query:
    """Raises RequestInvalid, FormTooLarge."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise FormInvalid(f"the body has to be {_FORM}")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_FORM:
            raise FormTooLarge(f"the form has more than {LARGEST_FORM} bytes")
    return Query(bytes(body))


def _token_request(form: Query) -> TokenRequest:
    """Raises FormInvalid, RequestInvalid."""
    login: Basic | RefreshToken
    match form.one("grant_type"):
        case "password":
            login = Basic(form.one("username") or "", form.one("password") or "")
        case "refresh_token":
            login = RefreshToken(form.one("refresh_token") or "")
        case None:
            raise FormInvalid("the form has no grant_type")
        case _:
            raise FormInvalid("grant_type is password or refresh_token here", oauth="unsupported_grant_type")
    offline = form.one("access_type") == "offline"
    return TokenRequest(
        login, scopes.parse_scopes(form.all("scope")), form.one("service") or None, offline, form.one("client_id") or ""
    )


def _first(query: Query, name: str) -> str | None:
    """A parameter's first value; None: it is missing or empty."""
    return next(iter(query.all(name)), None) or None


def _authorization(request: Request) -> list[bytes]:
    return [value for name, value in request.scope["headers"] if name == b"authorization"]


def _token_response(reply: TokenResponse, **more: str) -> Response:
    token = reply.token
    document: dict[str, object] = {
        "token": token.text,
        "access_token": token.text,
        "token_type": "Bearer",
        "expires_in": token.lifetime,
        "issued_at": datetime.fromtimestamp(token.issued_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **more,
    }
    if reply.refresh is not None:
        document["refresh_token"] = reply.refresh
    return Response(json.dumps(document), 200, _NEVER_STORE, "application/json")


def _error_response(error: RegistryError, actor: Actor, *, oauth: bool = False) -> Response:
    status = status_of(error)
    headers = {**_NEVER_STORE, "x-request-id": actor.request_id}
    if status == 401:
        headers["www-authenticate"] = 'Basic realm="entrepot", charset="UTF-8"'
    if isinstance(error, TooManyRequests):
        headers["retry-after"] = str(error.retry_after)
    body = error_json(error.code, error.message, error.detail)
    if oauth:
        word = error.oauth if isinstance(error, FormInvalid) else _OAUTH.get(status, "server_error")
        body = _with(body, {"error": word, "error_description": error.message})
    return Response(body, status, headers, "application/json")


def _with(body: bytes, fields: Mapping[str, str]) -> bytes:
    return json.dumps({**json.loads(body), **fields}).encode()

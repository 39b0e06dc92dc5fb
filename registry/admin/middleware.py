"""Error handlers and security headers for every answer outside `/v2`.

Errors, also those of the web framework, get the format of the OCI spec. Every answer gets headers for browsers and
caches, unless its route has set them.

Sources: OWASP, "HTTP Security Response Headers"; CSP level 3; RFC 6797 (HSTS); RFC 9111, 5.2.2.5 (no-store).
"""

from __future__ import annotations

import logging
from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.http.error_statuses import error_json, status_of
from registry.http.response_headers import API_VERSION
from storage.errors import RegistryError, StorageFailed, TooManyOpenFiles, TooManyRequests

log = logging.getLogger("registry.management")


def _error_response(status: int, code: str, message: str, detail: object = None) -> Response:
    version = {API_VERSION[0].decode(): API_VERSION[1].decode()}
    return Response(error_json(code, message, detail), status, version, "application/json")


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {401: "UNAUTHORIZED", 403: "DENIED", 429: "TOOMANYREQUESTS"}
    answer = _error_response(error.status_code, codes.get(error.status_code, "UNSUPPORTED"), str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _on_registry_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    status = status_of(error)
    answer = _error_response(status, error.code, error.message, error.detail)
    if status == 401:
        answer.headers["www-authenticate"] = 'Basic realm="Entrepot", charset="UTF-8"'
    if isinstance(error, TooManyRequests | TooManyOpenFiles):
        answer.headers["retry-after"] = str(error.retry_after)
    if status >= 500:
        cause = error if isinstance(error, StorageFailed) and not isinstance(error, TooManyOpenFiles) else None
        log.error("answered %d %s: %s", status, error.code, error, exc_info=cause)
    return answer


async def _on_validation(_: Request, error: Exception) -> Response:
    """Names the field and the reason, never the value: it may be a password."""
    assert isinstance(error, RequestValidationError)
    wrong = [{"where": ".".join(map(str, part["loc"])), "message": part["msg"]} for part in error.errors()]
    return _error_response(422, "UNSUPPORTED", "the request is not valid", wrong)


async def _on_failure(_: Request, error: Exception) -> Response:
    return _error_response(500, "UNKNOWN", "the registry failed; its log says how")


def add_error_handlers(app: FastAPI) -> None:
    """Makes `app` answer all errors in the format of the OCI spec."""
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RegistryError, _on_registry_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _on_failure)


_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
_HTTPS_HEADER: Final = (b"strict-transport-security", b"max-age=31536000")


class SecurityHeaders:
    """Adds the headers to the answers of `app`. `https` means that clients use https, whatever a request's scheme
    is."""

    def __init__(self, app: ASGIApp, *, https: bool) -> None:
        self._app = app
        self._https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = (*_SECURITY_HEADERS, _HTTPS_HEADER) if self._https or scope["scheme"] == "https" else _SECURITY_HEADERS

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [header for header in wanted if header[0] not in present]}
            await send(message)

        await self._app(scope, receive, send_with_headers)

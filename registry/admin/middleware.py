"""Error responses, security headers and responses to HEAD, for all paths outside `/v2`.

All error responses have the format of the OCI distribution spec. A security header that a route sets stays as it is. A
HEAD gets the same response as a GET, without the body.

Sources: OWASP, "HTTP Security Response Headers"; CSP level 3; RFC 6797 (HSTS); RFC 9111, 5.2.2.5 (no-store); RFC 9110,
9.3.2 (HEAD).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.http.error_statuses import error_json, status_of
from registry.http.response_headers import API_VERSION
from storage.errors import (
    DataDirectoryReplaced,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    TooManyOpenFiles,
    TooManyRequests,
)

log = logging.getLogger("registry.management")

MAX_LISTED_ERRORS: Final = 20
"""Largest number of invalid fields that a response lists."""
MAX_ERROR_CHARACTERS: Final = 300
"""Largest number of characters of each `where` and `message` in the list of invalid fields. The name of a field can be
of any length, because the client sends it."""


def _error_response(status: int, code: str, message: str, detail: object = None) -> Response:
    """Returns a JSON response in the format of the OCI distribution spec."""
    api_version = {API_VERSION[0].decode(): API_VERSION[1].decode()}
    return Response(error_json(code, message, detail), status, api_version, "application/json")


async def _on_http_exception(_: Request, error: Exception) -> Response:
    """Answers with the status of an HTTPException. FastAPI raises one for an unknown path, for example."""
    assert isinstance(error, HTTPException)
    codes = {401: "UNAUTHORIZED", 403: "DENIED", 429: "TOOMANYREQUESTS"}
    response = _error_response(error.status_code, codes.get(error.status_code, "UNSUPPORTED"), str(error.detail))
    response.headers.update(error.headers or {})
    if "GET" in (allowed := response.headers.get("allow", "").split(", ")):
        response.headers["allow"] = ", ".join([*allowed, "HEAD"])  # `HeadRequests` answers HEAD for each GET route
    _drop_references(error)
    return response


async def _on_registry_error(_: Request, error: Exception) -> Response:
    """Answers with the status for the error's class. Logs the error if the status is 500 or above."""
    assert isinstance(error, RegistryError)
    status = status_of(error)
    response = _error_response(status, error.code, error.message, error.detail)
    if status == 401:
        response.headers["www-authenticate"] = 'Basic realm="Entrepot", charset="UTF-8"'
    if isinstance(error, TooManyRequests | TooManyOpenFiles):
        response.headers["retry-after"] = str(error.retry_after)
    if isinstance(error, RangeInvalid) and error.size is not None:
        response.headers["content-range"] = f"bytes */{error.size}"
    if status >= 500:
        # A StorageFailed needs a traceback, unless its message explains the failure.
        is_explained = isinstance(error, TooManyOpenFiles | DataDirectoryReplaced)
        needs_traceback = isinstance(error, StorageFailed) and not is_explained
        log.error("answered %d %s: %s", status, error.code, error, exc_info=error if needs_traceback else None)
    else:
        _drop_references(error)
    return response


async def _on_validation_error(_: Request, error: Exception) -> Response:
    """Answers 422 and lists the first invalid fields. Leaves out their values, because these may be passwords."""
    assert isinstance(error, RequestValidationError)
    invalid_fields = [
        {"where": _shortened(".".join(map(str, invalid["loc"]))), "message": _shortened(str(invalid["msg"]))}
        for invalid in error.errors()[:MAX_LISTED_ERRORS]
    ]
    # These attributes refer to the values of the fields. `_drop_references` does not remove them.
    vars(error).clear()
    error.args = ()
    _drop_references(error)
    return _error_response(422, "UNSUPPORTED", "the request is not valid", invalid_fields)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + "…"


def _drop_references(error: Exception) -> None:
    """Removes the traceback of `error` and its references to other errors. Tracebacks refer to the body of the request,
    and Starlette keeps `error` until the client has received the response. A slow client would keep the body in
    memory."""
    error.__traceback__ = error.__cause__ = error.__context__ = None


async def _on_unexpected_exception(_: Request, error: Exception) -> Response:
    """Answers 500. Starlette then raises the exception again, so that the server logs it."""
    return _error_response(500, "UNKNOWN", "the registry failed; the server's log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Gives all error responses of `app` the format of the OCI distribution spec."""
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RegistryError, _on_registry_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_unexpected_exception)


_SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
_HSTS_HEADER: Final = (b"strict-transport-security", b"max-age=31536000")
"""Tells browsers to use only https for this host name, on all its ports, for a year (RFC 6797, 8.3)."""


class SecurityHeaders:
    """ASGI middleware that adds the security headers to the responses of `app`.

    `public_url`: the registry's URL for clients; None if the settings have no such URL. The HSTS header is sent only if
    `public_url` is an https URL with the port 443. If the registry has another port, other services on the same host
    name may use http. HSTS applies to all ports of a host name, so with HSTS, browsers could not reach these services.
    Without `public_url`, the port is not known, because a reverse proxy may remove it from Host."""

    def __init__(self, app: ASGIApp, *, public_url: str | None) -> None:
        self._app = app
        url = urlsplit(public_url or "")
        has_hsts = url.scheme == "https" and url.port in (None, 443)
        self._hsts_host = _without_default_port(url.netloc) if has_hsts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        security_headers = (*_SECURITY_HEADERS, _HSTS_HEADER) if self._needs_hsts(scope) else _SECURITY_HEADERS

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names_set_by_route = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in security_headers if name not in names_set_by_route]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _needs_hsts(self, scope: Scope) -> bool:
        """Returns whether to send HSTS in the response to a request.

        - If `public_url` is not an https URL with the port 443: no.
        - Otherwise, for a request over https: only if the request is for the host of `public_url`.
        - Otherwise, for a request over http: yes, because a reverse proxy may have received it over https. Host is
          not compared, because the proxy may have changed it. Browsers ignore HSTS over http (RFC 6797, 8.1)."""
        if self._hsts_host is None or scope["scheme"] != "https":
            return self._hsts_host is not None
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return _without_default_port(host.decode("latin-1")) == self._hsts_host


def _without_default_port(host: str) -> str:
    """Returns a host in lower case, without the port 443."""
    return host.lower().removesuffix(":443")


class _HeadComplete(Exception):
    """Stops the application after the response to a HEAD is complete."""


class HeadRequests:
    """ASGI middleware that passes a HEAD request to `app` as a GET, and sends the response without the body. Stops
    `app` after the first part of the body, because an event stream never ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_complete = False

        async def send_without_body(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                await send(message)
            elif not is_complete:
                is_complete = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            if message.get("more_body", False):
                raise _HeadComplete

        # The original scope keeps the method HEAD, because the server needs it to frame the response.
        with suppress(_HeadComplete):
            await self._app({**scope, "method": "GET"}, receive, send_without_body)

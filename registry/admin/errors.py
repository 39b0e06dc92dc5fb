"""The framework's own errors, in the shape the OCI spec gives to errors."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from registry.http.errors import body_of, status_of
from storage.errors import RegistryError, StorageFailed, TooManyOpenFiles, TooManyRequests

log = logging.getLogger("registry.management")


def _answer(status: int, code: str, message: str, detail: object = None) -> Response:
    headers = {
        "docker-distribution-api-version": "registry/2.0",
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
    }
    return Response(body_of(code, message, detail), status, headers, "application/json")


async def _on_status(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {401: "UNAUTHORIZED", 403: "DENIED", 429: "TOOMANYREQUESTS"}
    answer = _answer(error.status_code, codes.get(error.status_code, "UNSUPPORTED"), str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _on_registry_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    status = status_of(error)
    answer = _answer(status, error.code, error.message, error.detail)
    if status == 401:
        answer.headers["www-authenticate"] = 'Basic realm="Entrepot", charset="UTF-8"'
    if isinstance(error, TooManyRequests | TooManyOpenFiles):
        answer.headers["retry-after"] = str(error.retry_after)
    if status >= 500:
        cause = error if isinstance(error, StorageFailed) and not isinstance(error, TooManyOpenFiles) else None
        log.error("answered %d %s: %s", status, error.code, error, exc_info=cause)
    return answer


async def _on_validation(_: Request, error: Exception) -> Response:
    """Says where and why, never what came: it may be a password."""
    assert isinstance(error, RequestValidationError)
    wrong = [{"where": ".".join(map(str, part["loc"])), "message": part["msg"]} for part in error.errors()]
    return _answer(422, "UNSUPPORTED", "the request is not valid", wrong)


async def _on_failure(_: Request, error: Exception) -> Response:
    return _answer(500, "UNKNOWN", "the registry failed; its log says how")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _on_status)
    app.add_exception_handler(RegistryError, _on_registry_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _on_failure)

"""How requests of the management API come in and how answers leave: JSON alone, small, logged with a line each.

A form on another site can make a browser that is logged in here send a POST, but not one whose Content-Type is JSON
(Fetch, 2.2.2, "CORS-safelisted request-header"); and the browser says where a request comes from (Fetch Metadata).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from registry.http.asgi import Message, Receive, raw_path
from registry.http.query import check_parameter_count
from storage.content import Actor
from storage.errors import Denied, RegistryError

LARGEST_BODY: Final = 64 * 1024
"""Bytes of a body, the most."""
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_LONGEST_TARGET: Final = 200
"""Characters of a path that are kept."""
ANSWER_HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
log = logging.getLogger("registry.management")


class ManagementRoute(APIRoute):
    """A route of the management API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        name = self.name

        async def handle(request: Request) -> Response:
            outcome, begun = "OK", time.perf_counter()
            try:
                _check_request(request)
                response = await answer(Request(request.scope, _limit_body(request.receive)))
                response.headers.update(ANSWER_HEADERS)
                return response
            except RegistryError as error:
                outcome = error.code
                if isinstance(error, Denied):
                    _audit_denial(request, name)
                raise
            except (HTTPException, RequestValidationError) as error:
                if isinstance(error.__cause__, RegistryError):  # FastAPI takes what reading a body raises for bad JSON
                    outcome = error.__cause__.code
                    raise error.__cause__ from None
                outcome = "INVALID"
                raise
            except BaseException as error:
                outcome = type(error).__name__
                raise
            finally:
                _log_call(request, name, outcome, time.perf_counter() - begun)

        return handle


def _check_request(request: Request) -> None:
    """Raises HTTPException: 403, 413, 415; RequestInvalid."""
    check_parameter_count(request.scope.get("query_string", b""))
    if request.method in _SAFE:
        return
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(403, "a page of another site may change nothing here")
    if request.method == "POST" or _has_body(request):  # without a body, only a POST comes from a form
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "the body has to be JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or len(length) > 9 or int(length) > LARGEST_BODY:
        raise HTTPException(413, f"the body may have {LARGEST_BODY} bytes")


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _limit_body(receive: Receive) -> Receive:
    """For bodies that do not say their length."""
    left = LARGEST_BODY

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body may have {LARGEST_BODY} bytes")
        return message

    return counted


def _audit_denial(request: Request, name: str) -> None:
    """A denial's line in the audit log, with the path as it came: decoded, it might hold what steers a terminal."""
    actor: Actor | None = getattr(request.state, "actor", None)
    if actor is not None:
        place = raw_path(request.scope).decode("ascii", "replace").removeprefix("/api/v1/")[:_LONGEST_TARGET]
        request.app.service.access.management.denied(actor, f"management.{name}", place)


def _log_call(request: Request, name: str, outcome: str, seconds: float) -> None:
    """Of what was asked only the name: never a query or a body."""
    actor: Actor = getattr(request.state, "actor", Actor(address=request.client.host if request.client else ""))
    log.info(
        "operation=%s outcome=%s ms=%.1f actor=%s address=%s request=%s",
        name,
        outcome,
        seconds * 1000,
        actor.name,
        actor.address or "-",
        actor.request_id or "-",
    )

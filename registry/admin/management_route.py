"""The route class of the management API: checks each request, logs each call, and audits denials. Parameters that
several routes share are here as well.

A form on another site can make a browser that is logged in here send a POST, but not one whose Content-Type is JSON
(Fetch, 2.2.2, "CORS-safelisted request-header"); and the browser names the origin of a request (Fetch Metadata).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from registry.admin.cookies import SAFE_METHODS
from registry.asgi import Message, Receive, raw_path
from registry.http.query import check_parameter_count
from storage.access import AccountName
from storage.content import Actor
from storage.errors import Denied, RegistryError

LARGEST_BODY: Final = 64 * 1024
"""Bytes of a request body."""
_LONGEST_TARGET: Final = 200
"""Characters of a path that the audit log keeps."""
AfterQuery = Annotated[str | None, Query(description="`next` of the page before", max_length=80)]
LimitQuery = Annotated[int, Query(description="Entries at the most", ge=1, le=1000)]
log = logging.getLogger("registry.management")


async def path_name(name: Annotated[str, Path(examples=["alice"])]) -> AccountName:
    """Returns the account or group that the path names. Raises AccountInvalid."""
    return AccountName(name)


async def path_member(member: Annotated[str, Path(examples=["alice"])]) -> AccountName:
    """Returns the member that the path names. Raises AccountInvalid."""
    return AccountName(member)


PathName = Annotated[AccountName, Depends(path_name)]
PathMember = Annotated[AccountName, Depends(path_member)]


class ManagementRoute(APIRoute):
    """A route of the management API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        name = self.name

        async def handle(request: Request) -> Response:
            outcome, begun = "OK", time.perf_counter()
            try:
                _check_request(request)
                return await answer(Request(request.scope, _limit_body(request.receive)))
            except RegistryError as error:
                outcome = error.code
                if isinstance(error, Denied):
                    _audit_denial(request, name)
                raise
            except (HTTPException, RequestValidationError) as error:
                if isinstance(error.__cause__, RegistryError):  # FastAPI reports errors of reading a body as bad JSON
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
    """Raises HTTPException (403, 413, 415) or RequestInvalid if the request is not acceptable."""
    check_parameter_count(request.scope.get("query_string", b""))
    if request.method in SAFE_METHODS:
        return
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(403, "a page of another site may change nothing here")
    if request.method == "POST" or _has_body(request):  # a form without a body sends a POST
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "the body has to be JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or len(length) > 9 or int(length) > LARGEST_BODY:
        raise HTTPException(413, f"the body may have {LARGEST_BODY} bytes")


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _limit_body(receive: Receive) -> Receive:
    """Limits bodies that do not declare their length."""
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
    """Adds a denial to the audit log, with the path as it came: a decoded path might hold terminal control
    characters."""
    actor: Actor | None = getattr(request.state, "actor", None)
    if actor is not None:
        place = raw_path(request.scope).decode("ascii", "replace").removeprefix("/api/v1/")[:_LONGEST_TARGET]
        request.app.service.access.management.on_denied(actor, f"management.{name}", place)


def _log_call(request: Request, name: str, outcome: str, seconds: float) -> None:
    """Logs the operation, never the query or the body."""
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

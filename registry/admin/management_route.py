"""`ManagementRoute`: the route class of the management API. It checks each request, logs each call, and writes denied
calls to the audit log. The module also defines the parameters that several routes share.

Two checks prevent cross-site request forgery:

- The API accepts only JSON bodies. A form on another site cannot send JSON (Fetch, 2.2.2, "CORS-safelisted
  request-header").
- The API refuses a change if the header Sec-Fetch-Site says that a page of another origin sent it (Fetch Metadata).
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

from registry.admin.body_limits import MAX_BODY_BYTES, BoundedRequest, too_long_error
from registry.admin.caller import forget_caller, identify_caller, require_login
from registry.admin.cookies import SAFE_METHODS
from registry.asgi import raw_path
from registry.http.query import check_parameter_count
from storage.access import AccountHidden, AccountName
from storage.content import Actor
from storage.errors import Denied, NameHidden, RegistryError

_MAX_TARGET_CHARACTERS: Final = 200
"""Maximum length of a path in the audit log. Longer paths are cut off."""
AfterQuery = Annotated[str | None, Query(description="The field `next` of the previous page", max_length=80)]
"""The parameter `after`: the list continues after the entry that the previous response named in its field `next`."""
LimitQuery = Annotated[int, Query(description="Maximum number of entries", ge=1, le=1000)]
log = logging.getLogger("registry.management")


async def path_name(name: Annotated[str, Path(examples=["alice"])]) -> AccountName:
    """Returns the name of the account or group in the path. Raises AccountInvalid for an invalid name."""
    return AccountName(name)


async def path_member(member: Annotated[str, Path(examples=["alice"])]) -> AccountName:
    """Returns the name of the group member in the path. Raises AccountInvalid for an invalid name."""
    return AccountName(member)


PathName = Annotated[AccountName, Depends(path_name)]
PathMember = Annotated[AccountName, Depends(path_member)]


class ManagementRoute(APIRoute):
    """A route of the management API. The logs name the *operation*: the name of the route's function.
    `max_body_bytes`: maximum size of a request's body."""

    max_body_bytes = MAX_BODY_BYTES

    async def check_rights(self, request: Request) -> None:
        """Checks the caller's rights before the registry receives and parses a body. Is not called if the route has no
        body. This implementation requires only an account (`require_login`); a subclass may check other rights. The
        route's function must check the rights again. Raises the errors of `identify_caller` and `require_login`."""
        await require_login(await identify_caller(request))

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns FastAPI's handler of the route, wrapped in the checks and the logging."""
        run_handler = super().get_route_handler()
        operation, max_body_bytes = self.name, self.max_body_bytes

        async def handle(request: Request) -> Response:
            outcome, start_time = "OK", time.perf_counter()
            try:
                _check_request(request, max_body_bytes)
                if self.body_field is not None:
                    await self.check_rights(request)
                    # FastAPI has to identify the caller again after it has received the body, because an admin may
                    # remove the caller's rights meanwhile.
                    forget_caller(request)
                return await run_handler(BoundedRequest(request, max_body_bytes))
            except RegistryError as error:
                outcome = error.code
                if isinstance(error, Denied | AccountHidden | NameHidden):
                    audit_denial(request, f"management.{operation}", "/api/v1/")
                raise
            except (HTTPException, RequestValidationError) as error:
                # If a RegistryError occurs while FastAPI reads the body, FastAPI raises another exception with the
                # RegistryError as its cause. Raise the RegistryError.
                if isinstance(error.__cause__, RegistryError):
                    outcome = error.__cause__.code
                    raise error.__cause__ from None
                outcome = "INVALID"
                raise
            except BaseException as error:
                outcome = type(error).__name__
                raise
            finally:
                _log_call(request, operation, outcome, time.perf_counter() - start_time)

        return handle


def _check_request(request: Request, max_body_bytes: int) -> None:
    """Raises RequestInvalid if the query has too many parameters. If the method is not in `SAFE_METHODS`, raises
    HTTPException with one of these statuses:

    - 403: a page of another origin sent the request.
    - 413: the body is too long.
    - 415: the Content-Type is not JSON."""
    check_parameter_count(request.scope.get("query_string", b""))
    if request.method in SAFE_METHODS:
        return
    # `none` means that no page caused the request. Only browsers send the header.
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(403, "a page of another site sent this request; such a page may not change anything here")
    # A POST needs the right Content-Type even without a body, because a form on another site can send an empty POST.
    if request.method == "POST" or _has_body(request):
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise HTTPException(415, "the body has to be JSON, with Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    # A number of more than nine digits is always too large, so it is not parsed.
    if not length.isdigit() or len(length) > 9 or int(length) > max_body_bytes:
        raise too_long_error(max_body_bytes)


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def audit_denial(request: Request, action: str, base: str = "") -> None:
    """Writes a denied call to the audit log. Does nothing if the caller was not identified. `action`: the operation
    that was denied, such as `management.add_user`. The entry's target is the request's path without the prefix `base`.
    The path stays percent-encoded: control characters could act on the terminal of a person who reads the log."""
    actor: Actor | None = getattr(request.state, "actor", None)
    if actor is not None:
        target = raw_path(request.scope).decode("ascii", "replace").removeprefix(base)[:_MAX_TARGET_CHARACTERS]
        request.app.service.access.management.on_denied(actor, action, target)


def _log_call(request: Request, operation: str, outcome: str, seconds: float) -> None:
    """Logs a call at DEBUG: its operation, outcome, duration and actor. Logs neither the query nor the body, because
    they may contain secrets."""
    actor: Actor = getattr(request.state, "actor", Actor(address=request.client.host if request.client else ""))
    log.debug(
        "operation=%s outcome=%s ms=%.1f actor=%s address=%s request=%s",
        operation,
        outcome,
        seconds * 1000,
        actor.name,
        actor.address or "-",
        actor.request_id or "-",
    )

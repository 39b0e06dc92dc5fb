"""`/login`, `/login/callback` and `/logout`: a person with a browser logs in at the OpenID provider.

The pages are short and show nothing of what came with a request.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from registry.admin import cookies
from registry.auth.external import login_attempts
from registry.auth.external.openid_login import AuthorizationResponse, LoginFailed, OpenIDLogin
from registry.auth.token import login_sessions
from registry.http.asgi import unauthenticated_actor
from registry.http.errors import status_of
from registry.http.query import Query
from registry.request import RequestInvalid
from storage.errors import RegistryError, TooManyRequests

log = logging.getLogger(__name__)

CALLBACK: Final = "/login/callback"
HOME: Final = "/api/docs"
"""Where one comes to who was nowhere before."""
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
"""A path of this registry. Browsers take '//' and '/\\' for the beginning of another host's address, and leave out tabs
and line feeds (URL Standard, 4.4)."""
_HEADERS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    # Browsers leave Origin out of a form's POST under no-referrer, and the button to log out needs it.
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    # As everywhere beside `/v2`, but for the button to log out.
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_BUTTON: Final = '<form method="post" action="/logout"><button>Log out of this registry</button></form>'

router = APIRouter(include_in_schema=False)


@router.get("/login")
async def begin(request: Request) -> Response:
    """To the provider. Query: `next`, the path to come back to."""
    try:
        back = Query(request.scope.get("query_string", b"")).one("next") or HOME
        if not _LOCAL_PATH.fullmatch(back):
            raise RequestInvalid("next has to be a path of this registry, such as /api/docs")
        place, kept = await _login(request).begin(_origin(request) + CALLBACK, back)
    except LoginFailed as failed:
        return _error_page(failed.said)
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(place, 303, _HEADERS)
    cookies.set_cookie(
        request, response, cookies.ATTEMPT_COOKIE, kept, login_attempts.ATTEMPT_SECONDS, _public(request)
    )
    return response


@router.get(CALLBACK)
async def finish(request: Request) -> Response:
    """Back from the provider."""
    kept = cookies.read_cookie(request, cookies.ATTEMPT_COOKIE, _public(request))
    try:
        session = await _login(request).finish(_answer(request), kept, unauthenticated_actor(request.scope))
    except LoginFailed as failed:
        refused = _error_page(failed.said)
        if failed.is_finished:
            cookies.delete_cookie(request, refused, cookies.ATTEMPT_COOKIE, _public(request))
        return refused
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(session.back, 303, _HEADERS)
    cookies.delete_cookie(request, response, cookies.ATTEMPT_COOKIE, _public(request))
    cookies.set_cookie(
        request, response, cookies.SESSION_COOKIE, session.text, login_sessions.SESSION_SECONDS, _public(request)
    )
    return response


@router.get("/logout")
async def offer(request: Request) -> Response:
    """A button, since a link of another site must log nobody out."""
    return _page(200, "Log out", _BUTTON)


@router.post("/logout")
async def end(request: Request) -> Response:
    """Makes the browser forget the session. At the provider one stays logged in."""
    cookies.check_same_origin(request, _public(request))
    response = _page(200, "Logged out", '<p><a href="/login">Log in again</a></p>')
    cookies.delete_cookie(request, response, cookies.SESSION_COOKIE, _public(request))
    return response


def _login(request: Request) -> OpenIDLogin:
    login: OpenIDLogin | None = request.app.service.access.components.openid
    assert login is not None  # without it there are no such routes
    return login


def _public(request: Request) -> str | None:
    public_url: str | None = request.app.service.access.management.public_url
    return public_url


def _origin(request: Request) -> str:
    return cookies.origin_of(request, _public(request))


def _answer(request: Request) -> AuthorizationResponse:
    """Raises RequestInvalid: it can be read in two ways, or not at all."""
    query = Query(request.scope.get("query_string", b""))
    state, code, error, issuer = (query.one(name) or "" for name in ("state", "code", "error", "iss"))
    return AuthorizationResponse(state, code, error, issuer)


def _error_page(error: RegistryError) -> HTMLResponse:
    """What is wrong, and what to do."""
    status = status_of(error)
    if status >= 500:
        log.error("a login is answered %d: %s", status, error)
    text = html.escape(error.message[:1].upper() + error.message[1:])
    response = _page(status, "Not logged in", f'<p>{text}.</p>\n<p><a href="/login">Log in</a></p>')
    if isinstance(error, TooManyRequests):
        response.headers["retry-after"] = str(error.retry_after)
    return response


def _page(status: int, title: str, body: str) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, body=body), status, _HEADERS)

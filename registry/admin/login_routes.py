"""`/login`, `/login/callback` and `/logout`: login of people with a browser at the OpenID provider.

The pages are short and repeat nothing of what came with a request.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from registry.admin.cookies import ATTEMPT_COOKIE, SESSION_COOKIE, BrowserCookies
from registry.asgi import unauthenticated_actor
from registry.auth.external.login_attempts import ATTEMPT_SECONDS
from registry.auth.external.openid_login import AuthorizationResponse, LoginFailed, OpenIDLogin
from registry.auth.token.login_sessions import SESSION_SECONDS
from registry.http.error_statuses import status_of
from registry.http.query import Query
from registry.request import RequestInvalid
from storage.errors import RegistryError, TooManyRequests

log = logging.getLogger(__name__)

CALLBACK: Final = "/login/callback"
HOME: Final = "/api/docs"
"""The page after a login that began at no other page."""
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
"""A path of this registry. Browsers read `//` and `/\\` as the beginning of another host's address, and ignore tabs and
line feeds (URL Standard, 4.4)."""
_HEADERS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    # Under no-referrer, browsers omit Origin from a form's POST. The logout button needs it.
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    # As for all pages, but with the logout button's form allowed.
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
    """Redirects to the provider. The query may hold `next`, the path to return to."""
    browser = _cookies(request)
    try:
        path = Query(request.scope.get("query_string", b"")).one("next") or HOME
        if not _LOCAL_PATH.fullmatch(path):
            raise RequestInvalid("next has to be a path of this registry, such as /api/docs")
        url, attempt = await _login(request).begin(browser.origin + CALLBACK, path)
    except LoginFailed as failed:
        return _error_page(failed.answer_error)
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(url, 303, _HEADERS)
    browser.set(response, ATTEMPT_COOKIE, attempt, ATTEMPT_SECONDS)
    return response


@router.get(CALLBACK)
async def finish(request: Request) -> Response:
    """Ends the login when the browser comes back from the provider."""
    browser = _cookies(request)
    try:
        actor = unauthenticated_actor(request.scope)
        result = await _login(request).finish(_answer(request), browser.read(ATTEMPT_COOKIE), actor)
    except LoginFailed as failed:
        response: Response = _error_page(failed.answer_error)
        if failed.is_finished:
            browser.delete(response, ATTEMPT_COOKIE)
        return response
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(result.return_path, 303, _HEADERS)
    browser.delete(response, ATTEMPT_COOKIE)
    browser.set(response, SESSION_COOKIE, result.session, SESSION_SECONDS)
    return response


@router.get("/logout")
async def offer(request: Request) -> Response:
    """Shows a logout button. A GET changes nothing, so a link on another site logs nobody out."""
    return _page(200, "Log out", _BUTTON)


@router.post("/logout")
async def end(request: Request) -> Response:
    """Deletes the session cookie. The login at the provider stays."""
    browser = _cookies(request)
    browser.check_same_origin()
    response = _page(200, "Logged out", '<p><a href="/login">Log in again</a></p>')
    browser.delete(response, SESSION_COOKIE)
    return response


def _login(request: Request) -> OpenIDLogin:
    login: OpenIDLogin | None = request.app.service.access.components.openid_login
    assert login is not None  # these routes exist only with a provider
    return login


def _cookies(request: Request) -> BrowserCookies:
    return BrowserCookies(request, request.app.service.access.management.public_url)


def _answer(request: Request) -> AuthorizationResponse:
    """Reads the provider's answer from the query. Raises RequestInvalid if a parameter is repeated or malformed."""
    query = Query(request.scope.get("query_string", b""))
    state, code, error, issuer = (query.one(name) or "" for name in ("state", "code", "error", "iss"))
    return AuthorizationResponse(state, code, error, issuer)


def _error_page(error: RegistryError) -> HTMLResponse:
    """Returns a page that says what is wrong and links to a new login."""
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

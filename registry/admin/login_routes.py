"""Routes of `/login`, `/login/callback` and `/logout`: people log in with a browser at the OpenID Connect provider.

The pages are short and never repeat text from a request, so no request can make them contain a script.
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

CALLBACK_PATH: Final = "/login/callback"
"""The path to which the provider redirects the browser after a login."""
DEFAULT_RETURN_PATH: Final = "/api/docs"
"""The path to which the browser returns after the login if the request to `/login` named none."""
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
"""Matches a path of this registry, and no text that a browser takes for a URL of another host. Browsers read `//` and
`/\\` as the beginning of a host name, and ignore tabs and line feeds (URL Standard, 4.4)."""
_HEADERS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    # Under no-referrer, browsers send `Origin: null` with a form's POST, and the logout button would not work.
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    # Forbids everything except the form of the logout button.
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
_LOGOUT_FORM: Final = '<form method="post" action="/logout"><button>Log out of this registry</button></form>'

router = APIRouter(include_in_schema=False)


@router.get("/login")
async def begin_login(request: Request) -> Response:
    """Redirects the browser to the provider. The query may contain `next`, the path to which the browser returns after
    the login."""
    cookies = _cookies(request)
    try:
        return_path = Query(request.scope.get("query_string", b"")).one("next") or DEFAULT_RETURN_PATH
        if not _LOCAL_PATH.fullmatch(return_path):
            raise RequestInvalid("next has to be a path of this registry, such as /api/docs")
        redirect_uri = cookies.origin + CALLBACK_PATH
        provider_url, attempt_cookie = await _openid_login(request).begin(redirect_uri, return_path)
    except LoginFailed as failed:
        return _error_page(failed.shown_error)
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(provider_url, 303, _HEADERS)
    cookies.set(response, ATTEMPT_COOKIE, attempt_cookie, ATTEMPT_SECONDS)
    return response


@router.get(CALLBACK_PATH)
async def finish_login(request: Request) -> Response:
    """Finishes the login when the provider redirects the browser back. Sets the session cookie, and redirects the
    browser to the path that `/login` stored in the attempt cookie."""
    cookies = _cookies(request)
    try:
        actor = unauthenticated_actor(request.scope)
        result = await _openid_login(request).finish(
            _authorization_response(request), cookies.read(ATTEMPT_COOKIE), actor
        )
    except LoginFailed as failed:
        response: Response = _error_page(failed.shown_error)
        if failed.is_finished:  # the attempt cannot continue
            cookies.delete(response, ATTEMPT_COOKIE)
        return response
    except RegistryError as error:
        return _error_page(error)
    response = RedirectResponse(result.return_path, 303, _HEADERS)
    cookies.delete(response, ATTEMPT_COOKIE)
    cookies.set(response, SESSION_COOKIE, result.session, SESSION_SECONDS)
    return response


@router.get("/logout")
async def offer_logout(request: Request) -> Response:
    """Shows a logout button. A GET must not log out, because a link on another site can cause a GET."""
    return _page(200, "Log out", _LOGOUT_FORM)


@router.post("/logout")
async def log_out(request: Request) -> Response:
    """Deletes the session cookie of this registry. The person stays logged in at the provider. Raises HTTPException
    (403) if the request comes from a page of another site."""
    cookies = _cookies(request)
    cookies.check_same_origin()
    response = _page(200, "Logged out", '<p><a href="/login">Log in again</a></p>')
    cookies.delete(response, SESSION_COOKIE)
    return response


def _openid_login(request: Request) -> OpenIDLogin:
    login: OpenIDLogin | None = request.app.service.access.components.openid_login
    assert login is not None  # the application has these routes only if the settings name a provider
    return login


def _cookies(request: Request) -> BrowserCookies:
    return BrowserCookies(request, request.app.service.access.management.public_url)


def _authorization_response(request: Request) -> AuthorizationResponse:
    """Reads the provider's authorization response from the query; a missing parameter becomes an empty string. Raises
    RequestInvalid if a parameter is repeated or malformed."""
    query = Query(request.scope.get("query_string", b""))
    state, code, error, issuer = (query.one(name) or "" for name in ("state", "code", "error", "iss"))
    return AuthorizationResponse(state, code, error, issuer)  # RFC 6749, 4.1.2; `iss` is from RFC 9207


def _error_page(error: RegistryError) -> HTMLResponse:
    """Returns a page with the error's message and a link to log in. Logs the error if its status is 500 or above."""
    status = status_of(error)
    if status >= 500:
        log.error("a login at the OpenID provider failed with status %d: %s", status, error)
    text = html.escape(error.message[:1].upper() + error.message[1:])
    response = _page(status, "Not logged in", f'<p>{text}.</p>\n<p><a href="/login">Log in</a></p>')
    if isinstance(error, TooManyRequests):
        response.headers["retry-after"] = str(error.retry_after)
    return response


def _page(status: int, title: str, body: str) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, body=body), status, _HEADERS)

"""The routes with which people log in and out in a browser: `/login` by password, `/login/openid` and
`/login/callback` at the OpenID Connect *provider*, and `/logout`.

If the registry has web pages (`/ui`), GET `/login` redirects to the login page there. Otherwise GET `/login` shows a
short page of this module. The only text that this page takes from the request is the *return path*, to which the
browser returns after the login. `_return_path` checks the return path, and the page escapes it.

The *attempt cookie* holds the state of a login at the provider, until the provider redirects the browser back.
"""

from __future__ import annotations

import html
from typing import Final
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from registry.admin.browser_login import LOGIN_PAGE_PATH, BrowserLogin, local_path, login_problem
from registry.admin.cookies import ATTEMPT_COOKIE, SESSION_COOKIE, BrowserCookies
from registry.admin.token_endpoint import read_form
from registry.asgi import unauthenticated_actor
from registry.auth.external.login_attempts import ATTEMPT_SECONDS
from registry.auth.external.openid_login import AuthorizationResponse, LoginFailed
from registry.auth.token.login_sessions import SESSION_SECONDS
from registry.http.query import Query
from storage.errors import RegistryError

CALLBACK_PATH: Final = "/login/callback"
"""The path to which the provider redirects the browser after a login."""
DEFAULT_RETURN_PATH: Final = "/api/docs"
"""The return path if the request has no parameter `next`."""
_HEADERS: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    # With `no-referrer`, browsers would send `Origin: null` with a form. Over plain http, browsers omit the header
    # Sec-Fetch-Site, so `check_same_origin` checks the header Origin, and would refuse the form.
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    # Forbids everything except the forms of the pages.
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
_LOGIN_FORM: Final = """<form method="post" action="/login">
<input type="hidden" name="next" value="{return_path}">
<p><label>User name <input name="user" autocomplete="username" autocapitalize="none" required autofocus></label></p>
<p><label>Password <input name="password" type="password" autocomplete="current-password" required></label></p>
<p><button>Log in</button></p>
</form>"""
_LOGOUT_FORM: Final = '<form method="post" action="/logout"><button>Log out of this registry</button></form>'

router = APIRouter(include_in_schema=False)


@router.get("/login")
async def show_login(request: Request) -> Response:
    """Shows the login form or, if the registry has web pages, redirects to their login page. The query may contain the
    return path as `next`."""
    try:
        query = _query(request)
        return_path = _return_path(query)
    except RegistryError as error:
        return _error_page(request, error)
    if request.app.pages is None:
        return _login_page(request, return_path)
    # Without `next`, the web pages open their start page after the login, and not DEFAULT_RETURN_PATH.
    parameters = f"?{urlencode({'next': return_path}, safe='/')}" if query.one("next") else ""
    return RedirectResponse(LOGIN_PAGE_PATH + parameters, 303, _HEADERS)


@router.post("/login")
async def log_in(request: Request) -> Response:
    """Logs in with the form's fields `user` and `password`. Sets the session cookie and redirects the browser to the
    return path, which is the field `next`. Shows the form again if the login fails. Raises HTTPException (403) if the
    form comes from a page of another site, because an attacker's page must not log the browser in."""
    cookies = _cookies(request)
    cookies.check_same_origin()
    try:
        form = await read_form(request)
        return_path = _return_path(form)
    except RegistryError as error:
        return _error_page(request, error)
    try:
        session = await _browser_login(request).start_with_password(
            form.one("user") or "",
            form.one("password") or "",
            unauthenticated_actor(request.scope),
            replaces=cookies.session,
        )
    except RegistryError as error:
        return _login_page(request, return_path, error)
    response = RedirectResponse(return_path, 303, _HEADERS)
    cookies.set(response, SESSION_COOKIE, session, SESSION_SECONDS)
    return response


@router.get("/login/openid")
async def begin_login(request: Request) -> Response:
    """Redirects the browser to the provider, and sets the attempt cookie. The query may contain the return path as
    `next`."""
    cookies = _cookies(request)
    try:
        return_path = _return_path(_query(request))
        redirect_uri = cookies.origin + CALLBACK_PATH
        provider_url, attempt_cookie = await _browser_login(request).begin_at_provider(redirect_uri, return_path)
    except LoginFailed as failed:
        return _error_page(request, failed.shown_error)
    except RegistryError as error:
        return _error_page(request, error)
    response = RedirectResponse(provider_url, 303, _HEADERS)
    cookies.set(response, ATTEMPT_COOKIE, attempt_cookie, ATTEMPT_SECONDS)
    return response


@router.get(CALLBACK_PATH)
async def finish_login(request: Request) -> Response:
    """Finishes the login when the provider redirects the browser back. Sets the session cookie, and redirects the
    browser to the return path in the attempt cookie."""
    cookies = _cookies(request)
    try:
        result = await _browser_login(request).finish_at_provider(
            _authorization_response(request),
            cookies.read(ATTEMPT_COOKIE),
            unauthenticated_actor(request.scope),
            replaces=cookies.session,
        )
    except LoginFailed as failed:
        response: Response = _error_page(request, failed.shown_error)
        if failed.ends_attempt:
            cookies.delete(response, ATTEMPT_COOKIE)
        return response
    except RegistryError as error:
        return _error_page(request, error)
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
    """Ends the session and deletes the session cookie. The person stays logged in at the provider. Raises HTTPException
    (403) if the request comes from a page of another site."""
    cookies = _cookies(request)
    cookies.check_same_origin()
    try:
        await _browser_login(request).end(cookies.session or "", unauthenticated_actor(request.scope))
    except RegistryError as error:
        return _error_page(request, error)
    response = _page(200, "Logged out", f'<p><a href="{_login_path(request)}">Log in again</a></p>')
    cookies.delete(response, SESSION_COOKIE)
    return response


def _browser_login(request: Request) -> BrowserLogin:
    login: BrowserLogin = request.app.service.access.management.browser_login
    return login


def _cookies(request: Request) -> BrowserCookies:
    return BrowserCookies(request, request.app.service.access.management.public_url)


def _query(request: Request) -> Query:
    """Returns the parameters of the query. Raises RequestInvalid if the query is malformed."""
    return Query(request.scope.get("query_string", b""))


def _return_path(parameters: Query) -> str:
    """Returns the parameter `next`; DEFAULT_RETURN_PATH if `next` is missing. Raises RequestInvalid if `next` is not a
    path of this registry."""
    return local_path(parameters.one("next"), DEFAULT_RETURN_PATH)


def _authorization_response(request: Request) -> AuthorizationResponse:
    """Reads the provider's authorization response from the query. A missing parameter becomes an empty string. Raises
    RequestInvalid if a parameter is repeated or malformed."""
    query = _query(request)
    state, code, error, issuer = (query.one(name) or "" for name in ("state", "code", "error", "iss"))
    return AuthorizationResponse(state, code, error, issuer)  # RFC 6749, 4.1.2; `iss` is from RFC 9207


def _login_page(request: Request, return_path: str, error: RegistryError | None = None) -> HTMLResponse:
    """Returns the page with the login form. If the registry has an OpenID provider, the page also has a link to log in
    at the provider. `error`: why a login has failed; None for a page without an error."""
    body = _LOGIN_FORM.format(return_path=html.escape(return_path))
    if _browser_login(request).has_provider:
        target = html.escape(f"/login/openid?{urlencode({'next': return_path})}")
        body += f'\n<p><a href="{target}">Log in with OpenID Connect</a></p>'
    return _page(200, "Log in", body) if error is None else _failure_page(error, "Log in", body)


def _login_path(request: Request) -> str:
    """Returns the path of the login page."""
    return "/login" if request.app.pages is None else LOGIN_PAGE_PATH


def _error_page(request: Request, error: RegistryError) -> HTMLResponse:
    """Returns a page with the error's message and a link to log in."""
    return _failure_page(error, "Not logged in", f'<p><a href="{_login_path(request)}">Log in</a></p>')


def _failure_page(error: RegistryError, title: str, body: str) -> HTMLResponse:
    """Returns a page that says why a login failed, followed by `body`."""
    problem = login_problem(error)
    response = _page(problem.status, title, f'<p role="alert">{html.escape(problem.text)}</p>\n{body}')
    if problem.retry_after is not None:
        response.headers["retry-after"] = str(problem.retry_after)
    return response


def _page(status: int, title: str, body: str) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, body=body), status, _HEADERS)

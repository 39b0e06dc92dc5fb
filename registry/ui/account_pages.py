"""The login page, and the routes that log in, log out and store the visitor's language."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from registry.admin.browser_login import LOGIN_PAGE_PATH, BrowserLogin, local_path
from registry.admin.cookies import SESSION_COOKIE
from registry.asgi import unauthenticated_actor
from registry.auth.token.login_sessions import SESSION_SECONDS
from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.languages import LANGUAGES, translatable
from registry.ui.page_route import (
    LANGUAGE_COOKIE,
    FormRoute,
    PageRoute,
    caller_of,
    cookies_of,
    page_response,
    page_slot,
    query_of,
    read_form,
    redirect,
)
from storage.errors import TooManyRequests, Unauthorized

HOME_PATH: Final = "/ui/"
LOGOUT_PATH: Final = "/ui/logout"
LANGUAGE_PATH: Final = "/ui/language"
_LANGUAGE_SECONDS: Final = 365 * 86400
"""How long a browser keeps the visitor's choice of language."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes that receive forms. A form may arrive slowly, so their handlers run without a *slot* (the permit to render
a page). A handler acquires a slot before it renders a page (`page_slot`)."""


@router.get(LOGIN_PAGE_PATH)
async def login_form(request: Request) -> Response:
    """Shows the login page. `next` in the query is the path to which the visitor returns after the login. If the
    registry has no accounts, redirects to the home page."""
    if caller_of(request).is_registry_open:
        return redirect(HOME_PATH)
    return await _login_page(request, 200, _next_path(query_of(request)))


@_forms.post(LOGIN_PAGE_PATH)
async def log_in(request: Request) -> Response:
    """Checks the user name and password in the form. If they are right, sets the session cookie and redirects to
    `next`. If not, shows the login page with the problem. If the registry has no accounts, redirects to the home
    page."""
    form = await read_form(request)
    if caller_of(request).is_registry_open:
        return redirect(HOME_PATH)
    user, password, next_path = form.one("user") or "", form.one("password") or "", _next_path(form)
    retry_after = None
    if not user or not password:
        status, problem = 400, translatable("Fill in both fields.")
    else:
        try:
            session = await _start_session(request, user, password)
        except Unauthorized:
            # A 401 needs a challenge (RFC 9110, 15.5.2), and browsers open their own login dialog for a challenge.
            status, problem = 403, translatable("The user name or the password is wrong.")
        except TooManyRequests as error:
            status, problem = 429, translatable("Too many attempts. Wait a while, and then try again.")
            retry_after = error.retry_after
        else:
            redirection = redirect(next_path)
            cookies_of(request).set(redirection, SESSION_COOKIE, session, SESSION_SECONDS)
            return redirection
    async with page_slot(request):
        response = await _login_page(request, status, next_path, user, problem)
    if retry_after is not None:
        response.headers["retry-after"] = str(retry_after)
    return response


@_forms.post(LOGOUT_PATH)
async def log_out(request: Request) -> Response:
    """Ends the session of this browser."""
    await read_form(request)
    cookies = cookies_of(request)
    if cookies.session is not None:
        # `unauthenticated_actor` does not read the session, so it returns an actor with the name of anonymous clients.
        # For the audit log, `BrowserLogin.end` replaces this name by the name of the session's account.
        await _browser_login(request).end(cookies.session, unauthenticated_actor(request.scope))
    response = redirect(HOME_PATH)
    cookies.delete(response, SESSION_COOKIE)
    return response


@_forms.post(LANGUAGE_PATH)
async def choose_language(request: Request) -> Response:
    """Stores the visitor's language in a cookie, and redirects to `next`. Raises RequestInvalid."""
    form = await read_form(request)
    language = form.one("language")
    if language not in LANGUAGES:
        raise RequestInvalid("there is no such language here")
    response = redirect(_next_path(form))
    is_https = cookies_of(request).origin.startswith("https:")
    response.set_cookie(
        LANGUAGE_COOKIE, language, _LANGUAGE_SECONDS, path="/", secure=is_https, httponly=True, samesite="lax"
    )
    return response


async def _start_session(request: Request, user: str, password: str) -> str:
    """Checks the password, ends the browser's old session, and returns the cookie value of a new session. Raises the
    errors of `BrowserLogin.start_with_password`."""
    actor = unauthenticated_actor(request.scope)
    return await _browser_login(request).start_with_password(
        user, password, actor, replaces=cookies_of(request).session
    )


async def _login_page(request: Request, status: int, next_path: str, user: str = "", problem: str = "") -> Response:
    """Returns the login page. `user`: the user name that the form shows. `problem`: why the last login failed; empty if
    no login failed."""
    query = f"?next={quote(next_path, safe='/')}"
    return await page_response(
        request,
        "login.html",
        status_code=status,
        section="login",
        # The path that the browser loads after a change of the language.
        here=LOGIN_PAGE_PATH + query,
        next_path=next_path,
        provider_path=f"/login/openid{query}" if _browser_login(request).has_provider else None,
        user=user,
        problem=problem,
    )


def _browser_login(request: Request) -> BrowserLogin:
    login: BrowserLogin = request.app.service.access.management.browser_login
    return login


def _next_path(parameters: Query) -> str:
    """Returns the parameter `next` if it is a path of this registry; otherwise the path of the home page. Raises
    RequestInvalid if there are several parameters `next`."""
    text = parameters.one("next")
    try:
        return local_path(text, HOME_PATH)
    except RequestInvalid:  # for example, the path is too long
        return HOME_PATH


router.routes.extend(_forms.routes)

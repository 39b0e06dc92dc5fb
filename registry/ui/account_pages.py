"""The pages to log in and out, and the choice of the language."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from registry.admin.browser_login import BrowserLogin
from registry.admin.cookies import SESSION_COOKIE
from registry.asgi import unauthenticated_actor
from registry.auth.token.login_sessions import SESSION_SECONDS
from registry.request import RequestInvalid
from registry.ui.languages import LANGUAGES, translatable
from registry.ui.page_route import (
    LANGUAGE_COOKIE,
    LOGIN_PATH,
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
from storage.errors import Denied, TooManyRequests, Unauthorized

HOME_PATH: Final = "/ui/"
LOGOUT_PATH: Final = "/ui/logout"
LANGUAGE_PATH: Final = "/ui/language"
_LANGUAGE_SECONDS: Final = 365 * 86400
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,2000}|/")
"""Matches a path of this registry, and no text that a browser takes for a URL of another host. Browsers read `//` and
`/\\` as the beginning of a host name, and ignore tabs and line feeds (URL Standard, 4.4)."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)


@router.get(LOGIN_PATH)
async def login_form(request: Request) -> Response:
    """Shows the form to log in. The query can have `next`, the path to which the reader returns."""
    return await _login_page(request, 200, _local_path(query_of(request).one("next")))


@_forms.post(LOGIN_PATH)
async def log_in(request: Request) -> Response:
    """Logs in with a user name and a password. Sets the session cookie and returns to the path `next` of the form, or
    shows the form again."""
    form = await read_form(request)
    user, password, next_path = form.one("user") or "", form.one("password") or "", _local_path(form.one("next"))
    retry_after = None
    if not user or not password:
        status, problem = 400, translatable("Fill in both fields.")
    else:
        try:
            session = await _start_session(request, user, password)
        except Unauthorized:
            # Not 401, which needs a challenge (RFC 9110, 15.5.2): browsers open a dialog of their own for that.
            status, problem = 403, translatable("The user name or the password is wrong.")
        except TooManyRequests as error:
            status, problem = 429, translatable("Too many attempts. Wait a while, and then try again.")
            retry_after = error.retry_after
        else:
            done = redirect(next_path)
            cookies_of(request).set(done, SESSION_COOKIE, session, SESSION_SECONDS)
            return done
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
        login: BrowserLogin = request.app.service.access.management.browser_login
        await login.end(cookies.session, unauthenticated_actor(request.scope))
    response = redirect(HOME_PATH)
    cookies.delete(response, SESSION_COOKIE)
    return response


@_forms.post(LANGUAGE_PATH)
async def choose_language(request: Request) -> Response:
    """Keeps the language that the reader chose, in a cookie, and returns to the page. Raises RequestInvalid."""
    form = await read_form(request)
    language = form.one("language")
    if language not in LANGUAGES:
        raise RequestInvalid("there is no such language here")
    response = redirect(_local_path(form.one("next")))
    is_https = cookies_of(request).origin.startswith("https:")
    response.set_cookie(
        LANGUAGE_COOKIE, language, _LANGUAGE_SECONDS, path="/", secure=is_https, httponly=True, samesite="lax"
    )
    return response


async def _start_session(request: Request, user: str, password: str) -> str:
    """Returns the text of a new session, which replaces the browser's present one. Raises the errors of
    `BrowserLogin.with_password`."""
    login: BrowserLogin = request.app.service.access.management.browser_login
    actor = unauthenticated_actor(request.scope)
    return await login.with_password(user, password, actor, replaces=cookies_of(request).session)


async def _login_page(request: Request, status: int, next_path: str, user: str = "", problem: str = "") -> Response:
    """Returns the page with the form. `user`: what stands in its first field. `problem`: what went wrong."""
    if caller_of(request).is_registry_open:
        raise Denied("there are no accounts yet, so nobody can log in")
    has_provider = request.app.service.access.components.openid_login is not None
    return await page_response(
        request,
        "login.html",
        status_code=status,
        next_path=next_path,
        provider_path=f"/login/openid?next={quote(next_path, safe='/')}" if has_provider else None,
        user=user,
        problem=problem,
    )


def _local_path(path: str | None) -> str:
    """Returns `path` if it is one of this registry; the home page otherwise."""
    return path if path is not None and _LOCAL_PATH.fullmatch(path) else HOME_PATH


router.include_router(_forms)

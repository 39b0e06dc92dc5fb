"""The route classes of the web pages, and functions for their handlers. The routes identify the visitor, limit how many
pages are rendered at a time, and answer an error with a page.

Pages identify the visitor by the session cookie alone. They ignore an Authorization header, which is for programs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from registry.admin.browser_login import LOGIN_PAGE_PATH, form_page_path
from registry.admin.caller import Caller, make_caller, require_admin, require_login
from registry.admin.cookies import SESSION_COOKIE, BrowserCookies, cookie_value
from registry.admin.management_route import audit_denial
from registry.asgi import Scope, Send, client_address, raw_path, unauthenticated_actor
from registry.client_addresses import visitor_key
from registry.clients.registry_address import RegistryAddress
from registry.http.error_statuses import FormInvalid, FormTooLarge, status_of
from registry.http.query import Query
from registry.request import RequestContext, current_request, enter_request, leave_request
from registry.ui.languages import negotiate_language, translatable
from registry.ui.pages import Pages
from storage.access import AccountHidden
from storage.errors import Denied, NameHidden, RegistryError, StorageFailed, TooManyRequests, Unauthorized

T = TypeVar("T")
log = logging.getLogger("registry.pages")

LANGUAGE_COOKIE: Final = "entrepot-language"
MAX_FORM_BYTES: Final = 16 * 1024
"""Largest size of a form in bytes, unless the handler passes another `max_bytes`."""
_FORM_TYPE: Final = "application/x-www-form-urlencoded"
PAGE_HEADERS: Final = {
    "cache-control": "no-store",
    # Scripts, styles and images must come from this registry, and must not be inline. In the layout, `htmx-config`
    # turns off the functions of htmx that this policy forbids.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # With `no-referrer`, browsers would send `Origin: null` with a form, and `check_same_origin` would refuse the form.
    "referrer-policy": "same-origin",
    "vary": "Accept-Language, Cookie",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_ERROR_TEXTS: Final = {
    400: (translatable("This request was refused"), translatable("It is not valid, or does not fit what is stored.")),
    403: (translatable("Not allowed"), translatable("Your account may not see or do this.")),
    404: (
        translatable("Nothing is here"),
        translatable("It does not exist, or your account may not see it."),
    ),
    405: (translatable("Not possible here"), translatable("This registry does not support it.")),
    413: (translatable("Too long"), translatable("What was sent is longer than this registry accepts.")),
    429: (translatable("Too many requests"), translatable("Wait a moment, and then load the page again.")),
    500: (
        translatable("This registry failed"),
        translatable("The log of the server says why, under the id of this request."),
    ),
    503: (translatable("Busy"), translatable("The server cannot answer now. Load the page again in a moment.")),
    507: (translatable("The disk is full"), translatable("Pulls still work. Nothing can be stored.")),
}
"""Title and text of an error page, by HTTP status. Other statuses have the texts of 400 if below 500, else of 500."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page: who sends it, and how.

    - `caller`: the visitor's account and rights; None: the visitor is not identified yet.
    - `language`: a key of `LANGUAGES`. `path`: the path and query of the request, as the browser sent them.
    - `is_session_over`: whether the session of the browser's cookie is no longer valid. The visitor is then anonymous.
    - `is_from_htmx`: whether the script htmx sends the request, to replace a part of the page in the browser."""

    caller: Caller | None
    language: str
    path: str
    is_session_over: bool = False
    is_from_htmx: bool = False


def visit_of(request: Request) -> Visit:
    """Returns the visit that `PageRoute` has stored for a request."""
    visit: Visit = request.state.visit
    return visit


def caller_of(request: Request) -> Caller:
    """Returns the account and rights of the visitor, who must be identified already."""
    caller = visit_of(request).caller
    assert caller is not None, "a page is made only after its visitor is known"
    return caller


async def admin_of(request: Request) -> Caller:
    """Returns the visitor if the visitor is an admin. Raises Unauthorized, Denied."""
    return await require_admin(await require_login(caller_of(request)))


def query_of(request: Request) -> Query:
    """Returns the parameters in the query. Raises RequestInvalid."""
    return Query(request.scope.get("query_string", b""))


@asynccontextmanager
async def page_slot(request: Request) -> AsyncIterator[None]:
    """Waits for a *slot* (the permit to render a page), and holds it inside the `async with` block. Raises
    TooManyRequests if too many pages are pending (`PageLimits`)."""
    async with request.app.pages.limits.rendering_slot(_page_limits_key(visit_of(request), request.scope)):
        yield


async def receive_form(
    request: Request, check: Callable[[Request], Awaitable[T]], max_bytes: int = MAX_FORM_BYTES
) -> tuple[T, Query]:
    """Receives a form that needs rights. `check` raises an error if the visitor lacks the rights. It is called before
    the form is received, and again when the form has arrived, because the rights may have changed. Returns the result
    of the second call, and the fields of the form. Raises the errors of `check` and `read_form`."""
    await check(request)
    form = await read_form(request, max_bytes)
    return await check(request), form


async def read_form(request: Request, max_bytes: int = MAX_FORM_BYTES) -> Query:
    """Returns the fields of a form. Checks no rights: use `receive_form` for a form that needs rights. The route should
    be a `FormRoute`. `max_bytes`: the largest size of the form.
    When the form has arrived, identifies the visitor again: later calls of `caller_of` and of the registry use the new
    rights. Raises HTTPException (403) if a page of another site sent the form. Raises FormInvalid, FormTooLarge or
    RequestInvalid if the form cannot be read. Raises ClientDisconnect if the client disconnects during the transfer."""
    cookies_of(request).check_same_origin()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM_TYPE:
        raise FormInvalid(f"the body has to be {_FORM_TYPE}")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise FormTooLarge(f"the form has more than {max_bytes} bytes")
    if len(body) <= MAX_FORM_BYTES:
        form = Query(bytes(body))
    else:
        form = await asyncio.to_thread(Query, bytes(body))  # parsing takes tens of milliseconds
    request.state.visit = await _identify(request)
    current_request().principal = caller_of(request).principal
    return form


def cookies_of(request: Request) -> BrowserCookies:
    """Returns the object that reads and sets the browser's cookies."""
    return BrowserCookies(request, request.app.service.access.management.public_url)


def image_host(request: Request) -> str:
    """Returns the host and port with which image names of this registry begin, such as `localhost:5000`."""
    return RegistryAddress(cookies_of(request).origin).host


class PageRoute(APIRoute):
    """A route of a page. If the visitor has to log in, `form_pages` determines the page that is shown after the login:

    - If `form_pages` is empty: the requested page.
    - If the page that sent the form is in `form_pages`: this page.
    - Otherwise: the first page in `form_pages`."""

    form_pages: ClassVar[Sequence[str]] = ()
    """The paths of the pages with the form that this route receives."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns a handler that calls FastAPI's handler of the route. The returned handler identifies the visitor,
        applies the limits of pages, turns errors into pages, and records a denied request in the audit log. It raises
        ClientDisconnect if the client disconnects before its form has arrived."""
        run_handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request.state.visit = _unidentified_visit(request.scope)
            try:
                request.app.service.pages.cross_site.check(request.scope)
                visit = request.state.visit = await _identify(request)
                with _registry_calls_as(visit, request.scope):
                    response = await self._run(request, run_handler)
            except ClientDisconnect:  # the client is gone, so no error page is rendered
                raise
            except Exception as error:
                if isinstance(error, Denied | AccountHidden | NameHidden):
                    audit_denial(request, "page")
                response = await _error_response(request, error, self.form_pages)
            if request.state.visit.is_session_over:
                cookies_of(request).delete(response, SESSION_COOKIE)
            return response

        return handle

    async def _run(self, request: Request, handler: Callable[[Request], Coroutine[Any, Any, Response]]) -> Response:
        """Runs FastAPI's handler while it holds a slot."""
        async with page_slot(request):
            return await handler(request)


class SlotlessRoute(PageRoute):
    """A route whose handler first waits for slow work, such as a search. The handler runs without a slot. It acquires a
    slot itself before it renders a page (`page_slot`)."""

    async def _run(self, request: Request, handler: Callable[[Request], Coroutine[Any, Any, Response]]) -> Response:
        return await handler(request)


class FormRoute(SlotlessRoute):
    """A route that receives a form. Its handler runs without a slot, because a form can arrive slowly, and hashing a
    password takes long. If there is no page at the path of the route, use a subclass that sets `form_pages`."""


async def page_response(request: Request, template: str, *, status_code: int = 200, **values: object) -> Response:
    """Renders a template and returns the page. `values`: values for the template. They override the values for the
    layout (`_layout_values`). Raises the errors of rendering."""
    pages: Pages = request.app.pages
    visit = visit_of(request)
    body = await pages.renderer.render(template, visit.language, {**_layout_values(request, visit), **values})
    return Response(body, status_code, PAGE_HEADERS, "text/html; charset=utf-8")


def redirect(path: str) -> Response:
    """Returns a redirect (303) to a path of this registry. The browser loads this path with GET."""
    return RedirectResponse(
        path, 303, {name: PAGE_HEADERS[name] for name in ("cache-control", "referrer-policy", "vary")}
    )


def redirect_with_query(request: Request, path: str, *names: str) -> Response:
    """Returns a redirect to `path`. It keeps the parameters `names` of the request's query, and drops all others.
    Raises RequestInvalid if the query cannot be parsed."""
    query = query_of(request)
    kept = [(name, value) for name in names for value in query.all(name)]
    return redirect(f"{path}?{urlencode(kept)}" if kept else path)


async def send_too_many_page(pages: Pages, scope: Scope, send: Send, error: TooManyRequests) -> None:
    """Answers a request with 429 and the error page for too many requests. A refusal must be cheap, so this page is
    rendered only once for each language."""
    body = await _too_many_page(pages, _language(scope))
    headers = {**PAGE_HEADERS, "content-type": "text/html; charset=utf-8", "retry-after": str(error.retry_after)}
    headers["content-length"] = str(len(body))
    raw = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 429, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _identify(request: Request) -> Visit:
    """Identifies the visitor by the session cookie. Without a valid session, the visitor is anonymous. Raises the
    errors of the store."""
    management = request.app.service.access.management
    cookies, actor = cookies_of(request), unauthenticated_actor(request.scope)
    is_session_over = False
    try:
        principal = await management.authenticator.authenticate((), actor, cookies.session)
    except Unauthorized:
        principal, is_session_over = await management.authenticator.authenticate((), actor), True
    caller = make_caller(request, principal.for_pages())  # pages admit anonymous visitors, unlike the API
    return Visit(
        caller,
        _language(request.scope),
        _path_of(request.scope),
        is_session_over,
        is_from_htmx=request.headers.get("hx-request") == "true",
    )


def _unidentified_visit(scope: Scope) -> Visit:
    return Visit(None, _language(scope), _path_of(scope))


def _language(scope: Scope) -> str:
    """Returns the language that the visitor chose, or that the browser prefers if the visitor chose none."""
    accepted = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")
    return negotiate_language(cookie_value(scope, LANGUAGE_COOKIE), accepted)


def _path_of(scope: Scope) -> str:
    query = scope.get("query_string", b"")
    return (raw_path(scope) + (b"?" + query if query else b"")).decode("ascii", "replace")


def _page_limits_key(visit: Visit, scope: Scope) -> str:
    """Returns the text that identifies the visitor in `PageLimits`: the account or, if there is none, the network of
    the client."""
    address = client_address(scope)
    return visitor_key(None, address) if visit.caller is None else visit.caller.principal.visitor_key_at(address)


@contextmanager
def _registry_calls_as(visit: Visit, scope: Scope) -> Iterator[None]:
    """A context manager: inside the `with` block, all calls on the registry are made with the visitor's rights."""
    assert visit.caller is not None
    actor = visit.caller.actor
    token = enter_request(RequestContext(visit.caller.principal, "", client_address(scope), actor.request_id))
    try:
        yield
    finally:
        leave_request(token)


def _layout_values(request: Request, visit: Visit) -> dict[str, object]:
    """Returns the values that the layout of every page needs."""
    caller = visit.caller
    is_named = caller is not None and not caller.principal.is_anonymous
    return {
        "account": caller.principal.name if caller is not None and is_named else None,
        "is_admin": caller is not None and caller.rights.admin,
        "is_registry_open": caller is not None and caller.is_registry_open,  # whether there are no accounts yet
        "is_session_over": visit.is_session_over,
        # The path that the browser loads after a change of the language. The path of a POST may have no page.
        "here": "/ui/" if request.method != "GET" else visit.path,
        "version": request.app.version,
        "section": "",
    }


async def _error_response(request: Request, error: Exception, form_pages: Sequence[str]) -> Response:
    """Returns the page about an error, or a redirect to the login page if the visitor has to log in. Acquires a slot to
    render the page. `form_pages`: see `PageRoute`. Logs an error whose status is 500 or above."""
    visit = visit_of(request)
    if isinstance(error, Unauthorized) and (visit.caller is None or visit.caller.principal.is_anonymous):
        return _login_redirect(
            visit, form_page_path(request.headers.get("referer", ""), form_pages) if form_pages else visit.path
        )
    if isinstance(error, TooManyRequests):
        return await _too_many_response(request, error)
    request_id = unauthenticated_actor(request.scope).request_id
    status = _page_status(error)
    if status >= 500:
        needs_traceback = not isinstance(error, RegistryError) or isinstance(error, StorageFailed)
        log.error("page %s failed with %d: %s", request_id, status, error, exc_info=error if needs_traceback else None)
    try:
        async with page_slot(request):
            response = await page_response(
                request, "error.html", status_code=status, **_error_values(status, error, request_id)
            )
    except TooManyRequests as refusal:
        response = await _too_many_response(request, refusal)
    except Exception:
        log.exception("the page about the error of request %s failed", request_id)
        response = Response("The registry failed; its log says why.\n", 500, PAGE_HEADERS, "text/plain; charset=utf-8")
    return response


async def _too_many_response(request: Request, error: TooManyRequests) -> Response:
    """Returns the page that `send_too_many_page` sends."""
    body = await _too_many_page(request.app.pages, visit_of(request).language)
    headers = {**PAGE_HEADERS, "retry-after": str(error.retry_after)}
    return Response(body, 429, headers, "text/html; charset=utf-8")


async def _too_many_page(pages: Pages, language: str) -> bytes:
    return await pages.cached_error_page(language, lambda: _values_without_visitor(429))


def _login_redirect(visit: Visit, page: str) -> Response:
    """Returns a redirect to the login page. After the login, the visitor returns to the path `page`. A response to htmx
    has the header hx-redirect, because htmx would put the target of an HTTP redirect into a part of the old page."""
    path = f"{LOGIN_PAGE_PATH}?next={quote(page, safe='/')}"
    return Response(headers={**PAGE_HEADERS, "hx-redirect": path}) if visit.is_from_htmx else redirect(path)


def _page_status(error: Exception) -> int:
    if isinstance(error, Unauthorized):
        return 403  # the visitor has an account, so another login is no help
    if isinstance(error, RegistryError):
        return status_of(error)
    return error.status_code if isinstance(error, HTTPException) else 500


def _error_values(status: int, error: Exception, request_id: str) -> dict[str, object]:
    """Returns the values of the error page. Only a page with a status below 500 shows the message of the error."""
    title, explanation = _ERROR_TEXTS.get(status) or _ERROR_TEXTS[500 if status >= 500 else 400]
    message = ""
    if status < 500:
        message = error.message if isinstance(error, RegistryError) else str(getattr(error, "detail", ""))
    return {"status": status, "title": title, "explanation": explanation, "message": message, "request_id": request_id}


def _values_without_visitor(status: int) -> dict[str, object]:
    """Returns the values of an error page and of its layout. They are the same for all visitors."""
    title, explanation = _ERROR_TEXTS[status]
    layout = {"account": None, "is_admin": False, "is_registry_open": False, "is_session_over": False, "here": "/ui/"}
    texts = {"status": status, "title": title, "explanation": explanation, "message": "", "request_id": ""}
    return {**layout, "version": "", "section": "", **texts}

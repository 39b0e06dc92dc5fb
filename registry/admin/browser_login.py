"""Logins with a browser. Pages and routes call this module; it contains no HTML and no JSON.

`BrowserLogin` starts and ends sessions. A session begins with the account's password, or with a login at the OpenID
provider. The *text* of a session is the secret in the session cookie. An *attempt* is the state of an unfinished login
at the provider; the browser keeps it, encrypted, in another cookie. `login_problem` returns what a page shows after a
failed login. `local_path` checks the path to which the browser goes after the login. If a visitor who is not logged in
sends a form, the browser goes after the login to the page that has the form; `form_page_path` returns that path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from registry.auth.assembly import AuthComponents
from registry.auth.external.openid_login import AuthorizationResponse, LoginResult, OpenIDLogin
from registry.http.error_statuses import PathUnknown, status_of
from registry.request import RequestInvalid
from storage.content import Actor
from storage.errors import Denied, RegistryError, TooManyRequests, Unauthorized

log = logging.getLogger(__name__)
LOGIN_PAGE_PATH: Final = "/ui/login"
"""The path of the login page, if the registry has pages for people."""

_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
"""Matches a path of this registry, but no text that a browser would read as a URL of another host. Browsers read `//`
and `/\\` as the beginning of a host name, and ignore tabs and line feeds (URL Standard, 4.4)."""


@dataclass(frozen=True, slots=True)
class LoginProblem:
    """What a page shows after a failed login. `status`: the HTTP status of the page. `text`: explains the problem; it
    is not escaped for HTML. `retry_after`: the number of seconds after which the person may try again; None: at any
    time."""

    status: int
    text: str
    retry_after: int | None = None


class BrowserLogin:
    """Starts and ends sessions, for one process and its event loop. `is_registry_open` returns whether the registry
    requires no login, because it has no accounts yet."""

    def __init__(self, auth: AuthComponents, is_registry_open: Callable[[], bool]) -> None:
        self._verifier = auth.credential_verifier
        self._sessions = auth.login_sessions
        self._openid = auth.openid_login
        self._is_registry_open = is_registry_open

    @property
    def has_provider(self) -> bool:
        """Whether people can log in at an OpenID provider."""
        return self._openid is not None

    async def start_with_password(self, user: str, password: str, by: Actor, *, replaces: str | None = None) -> str:
        """Checks a password and starts a session. As in the API, failed logins are throttled and written to the audit
        log. Returns the text of the session.

        `by` describes the browser. `replaces`: the text of the browser's present session, which ends if the login
        succeeds; None: the browser has no session. Raises Unauthorized for a wrong user name or password, for a
        disabled account, and for a token instead of a password. Raises Denied if the registry has no accounts. Raises
        TooManyRequests after too many failed logins, or if too many passwords wait to be hashed. Raises StorageFull,
        StorageFailed.
        """
        if self._is_registry_open():
            raise Denied("this registry has no accounts yet; nobody needs a login")
        identity = await self._verifier.verify_password(user, password, by)
        if replaces is not None:
            await self._sessions.end(replaces, by)
        return await self._sessions.start(identity, "password", by)

    async def begin_at_provider(self, redirect_uri: str, return_path: str) -> tuple[str, str]:
        """Starts a login at the OpenID provider, as `OpenIDLogin.begin` does. `redirect_uri`: the URL of this registry
        to which the provider redirects the browser. `return_path`: the path to which the browser goes after the login.
        Returns the URL of the provider's login page, and the encrypted attempt for the cookie. Raises PathUnknown if
        there is no provider."""
        return await self._provider_login().begin(redirect_uri, return_path)

    async def finish_at_provider(
        self, response: AuthorizationResponse, sealed: str, by: Actor, *, replaces: str | None = None
    ) -> LoginResult:
        """Finishes a login at the OpenID provider, as `OpenIDLogin.finish` does. `sealed`: the encrypted attempt from
        the cookie. `by` and `replaces`: as for `start_with_password`. Raises PathUnknown if there is no provider."""
        result = await self._provider_login().finish(response, sealed, by)
        if replaces is not None:
            await self._sessions.end(replaces, by)
        return result

    async def end(self, session: str, by: Actor) -> None:
        """Ends the session with the text `session`. Does nothing if there is no such session. Raises StorageFull,
        StorageFailed."""
        await self._sessions.end(session, by)

    def _provider_login(self) -> OpenIDLogin:
        if self._openid is None:
            raise PathUnknown("this registry has no OpenID provider")
        return self._openid


def login_problem(error: RegistryError) -> LoginProblem:
    """Returns what a page shows after a login that failed with `error`. Logs the error if its status is 500 or
    above."""
    if isinstance(error, Unauthorized):
        # 401 would need a challenge (RFC 9110, 15.5.2), for which browsers open their own login dialog.
        return LoginProblem(403, "The user name or the password is not right.")
    status = status_of(error)
    if status >= 500:
        log.error("a login with a browser failed with status %d: %s", status, error)
    text = f"{error.message[:1].upper()}{error.message[1:]}."
    return LoginProblem(status, text, error.retry_after if isinstance(error, TooManyRequests) else None)


def local_path(text: str | None, default: str) -> str:
    """Returns `text` if it is a path of this registry, and `default` if `text` is empty or None. Raises RequestInvalid
    for any other text, because a login must not lead to another site."""
    if not text:
        return default
    if not _LOCAL_PATH.fullmatch(text):
        raise RequestInvalid("next has to be a path of this registry, such as /api/docs")
    return text


def form_page_path(referer: str, form_pages: Sequence[str]) -> str:
    """Returns the path and query of the page from which the visitor has sent a form. `form_pages`: the paths of the
    pages that have the form. `referer`: the value of the header `Referer`, in which browsers send the URL of the page.
    If `referer` names none of `form_pages`, returns the first of them."""
    try:
        url = urlsplit(referer)
        path = local_path(f"{url.path}?{url.query}" if url.query else url.path, form_pages[0])
    except (ValueError, RequestInvalid):  # the value is no URL, or the login page would not accept its path
        return form_pages[0]
    return path if url.path in form_pages else form_pages[0]

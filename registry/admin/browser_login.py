"""Logins with a browser. Pages and routes call this module; it contains no HTML and no JSON.

`BrowserLogin` starts and ends sessions. A session begins with the account's password, or with a login at the OpenID
provider. The *text* of a session is the secret in the session cookie. An *attempt* is the state of an unfinished login
at the provider. Another cookie contains the encrypted attempt.

`login_problem` returns what a page shows after a failed login. After a successful login, the browser goes to a path of
this registry, which `local_path` checks. If the visitor had sent a form without being logged in, `form_page_path`
returns the path of the page with the form.
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
"""The path of the login page. Only a registry with web pages has a login page."""

_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,1000}|/")
"""Matches a path of this registry. Does not match a text that a browser would read as a URL of another host: browsers
read a host name after `//` or `/\\`, and ignore tabs and line feeds (URL Standard, 4.4)."""


@dataclass(frozen=True, slots=True)
class LoginProblem:
    """What a page shows after a failed login.

    - `status`: the HTTP status of the page.
    - `text`: an explanation of the problem, not escaped for HTML.
    - `retry_after`: how many seconds the visitor has to wait before the next login; None: the visitor need not wait."""

    status: int
    text: str
    retry_after: int | None = None


class BrowserLogin:
    """Starts and ends sessions. Used from one event loop. `is_registry_open` returns True while the registry has no
    accounts; it then requires no login."""

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
        """Checks a password, starts a session, and returns the text of the session. Throttles failed logins, and writes
        them to the audit log.

        `by`: the browser. `replaces`: the text of the browser's present session; a successful login ends this session.
        None: the browser has no session. Raises:

        - Unauthorized: the user name or password is wrong, the account is disabled, or `password` is a token.
        - Denied: the registry has no accounts.
        - TooManyRequests: too many logins have failed, or too many passwords wait to be hashed.
        - StorageFull, StorageFailed."""
        if self._is_registry_open():
            raise Denied("this registry has no accounts yet; nobody needs a login")
        identity = await self._verifier.verify_password(user, password, by)
        if replaces is not None:
            await self._sessions.end(replaces, by)
        return await self._sessions.start(identity, "password", by)

    async def begin_at_provider(self, redirect_uri: str, return_path: str) -> tuple[str, str]:
        """Starts a login at the OpenID provider: see `OpenIDLogin.begin`. Returns the URL of the provider's login page,
        and the encrypted attempt for the cookie.

        `redirect_uri`: the URL of this registry to which the provider redirects the browser. `return_path`: the path to
        which the browser goes after the login. Raises PathUnknown if there is no provider."""
        return await self._provider_login().begin(redirect_uri, return_path)

    async def finish_at_provider(
        self, response: AuthorizationResponse, sealed_attempt: str, by: Actor, *, replaces: str | None = None
    ) -> LoginResult:
        """Finishes a login at the OpenID provider: see `OpenIDLogin.finish`. `sealed_attempt`: the encrypted attempt
        from the cookie. `by` and `replaces`: see `start_with_password`. Raises PathUnknown if there is no provider."""
        result = await self._provider_login().finish(response, sealed_attempt, by)
        if replaces is not None:
            await self._sessions.end(replaces, by)
        return result

    async def end(self, session_text: str, by: Actor) -> None:
        """Ends the session with the text `session_text`. Does nothing if there is no such session. Raises StorageFull,
        StorageFailed."""
        await self._sessions.end(session_text, by)

    def _provider_login(self) -> OpenIDLogin:
        if self._openid is None:
            raise PathUnknown("this registry has no OpenID provider")
        return self._openid


def login_problem(error: RegistryError) -> LoginProblem:
    """Returns what a page shows after a login that failed with `error`. Logs an error with a status of 500 or above."""
    if isinstance(error, Unauthorized):
        # Not 401, because it requires a challenge (RFC 9110, 15.5.2), and browsers show a login dialog for a challenge.
        return LoginProblem(403, "The user name or the password is not right.")
    status = status_of(error)
    if status >= 500:
        log.error("a login with a browser failed with status %d: %s", status, error)
    text = f"{error.message[:1].upper()}{error.message[1:]}."
    return LoginProblem(status, text, error.retry_after if isinstance(error, TooManyRequests) else None)


def local_path(text: str | None, default: str) -> str:
    """Returns `text` if it is a path of this registry. Returns `default` if `text` is empty or None. Raises
    RequestInvalid for any other text, because a login must not redirect to another host."""
    if not text:
        return default
    if not _LOCAL_PATH.fullmatch(text):
        raise RequestInvalid("`next` has to be a path of this registry, such as /api/docs")
    return text


def form_page_path(referer: str, form_pages: Sequence[str]) -> str:
    """Returns the path and query of the page from which the visitor has sent a form. `form_pages`: the paths of all
    pages with this form. `referer`: the value of the `Referer` header, in which the browser sends the URL of the page.
    If its path is not in `form_pages`, returns the first path in `form_pages`."""
    try:
        url = urlsplit(referer)
        path = local_path(f"{url.path}?{url.query}" if url.query else url.path, form_pages[0])
    except (ValueError, RequestInvalid):  # no URL, or no path that `local_path` accepts
        return form_pages[0]
    return path if url.path in form_pages else form_pages[0]

"""Browser cookies of the login, and the check against cross-site request forgery.

Sources: RFC 6265bis, 4.1.3 (`__Host-`) and 5.6.7 (SameSite); Fetch Metadata; RFC 6454 (Origin).

Over https, the cookie names begin with `__Host-`. Browsers let only this host set such a cookie, and only over https.
Another host of the domain, or an attacker on plain http, cannot replace the cookie.

The cookies are SameSite=Lax. The browser sends them when it follows a link or a redirect from another site to the
registry. It does not send them when a page of another site sends a POST request or embeds a resource of the registry.
They cannot be Strict: the browser would not send them when the OpenID provider redirects it back to the registry. As a
second defence, `check_same_origin` refuses changes that come from another site.
"""

from __future__ import annotations

from typing import Final

from fastapi import HTTPException, Request, Response

from registry.asgi import Scope
from registry.http.www_authenticate import base_url_of

SESSION_COOKIE: Final = "entrepot-session"
"""Name of the cookie that holds the login session."""
ATTEMPT_COOKIE: Final = "entrepot-login"
"""Name of the cookie that holds the state of a login at the OpenID provider until the provider redirects the browser
back."""
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""HTTP methods that change nothing (RFC 9110, 9.2.1)."""
_HOST_PREFIX: Final = "__Host-"
_COOKIES_KEY: Final = "entrepot.cookies"
"""The key in the ASGI scope of a request under which `separate_cookies` stores the values of the Cookie headers."""


def separate_cookies(scope: Scope) -> None:
    """Hides the Cookie headers of a request from FastAPI: moves them to another key of the ASGI scope, where
    `cookie_value` reads them. The server calls this function before FastAPI gets the request.

    FastAPI would parse all cookies of every request (`Request.cookies`) with the standard library's `http.cookies`,
    which in Python 3.11 needs quadratic time for backslash escapes (CVE-2024-7592). 30 KB of escapes block the event
    loop for seconds."""
    headers = scope["headers"]
    scope[_COOKIES_KEY] = [value for name, value in headers if name == b"cookie"]
    scope["headers"] = [header for header in headers if header[0] != b"cookie"]


def cookie_value(scope: Scope, name: str) -> str:
    """Returns the value of a cookie of the request, or an empty string if the request has no such cookie. If the
    request has several cookies of this name, returns the value of the last: browsers send the cookie with the shortest
    path last (RFC 6265, 5.4), and this registry sets the path `/`.

    Does not resolve backslash escapes; RFC 6265, 4.1.1, has none. The time is linear in the length of the headers."""
    encoded_name, last_value = name.encode("ascii"), b""
    for header in scope.get(_COOKIES_KEY, ()):
        for pair in header.split(b";"):
            cookie_name, _, value = pair.partition(b"=")
            # Removes spaces and tabs, but no other white space. In a name that begins with other white space, browsers
            # do not see the prefix `__Host-`. Another host of the domain can therefore set a cookie with such a name.
            # The cookie must not count as `__Host-…`.
            if cookie_name.strip(b" \t") == encoded_name:
                last_value = value.strip(b" \t")
    is_quoted = len(last_value) >= 2 and last_value[:1] == last_value[-1:] == b'"'
    return (last_value[1:-1] if is_quoted else last_value).decode("latin-1")


class BrowserCookies:
    """Reads the cookies of one request and sets cookies on its response. `public_url` is the registry's URL for
    clients; None if the settings do not give it."""

    def __init__(self, request: Request, public_url: str | None) -> None:
        host = request.headers.get("host")
        raw_host = None if host is None else host.encode("latin-1")
        self._request = request
        self._request_origin = base_url_of(request.scope, raw_host).decode("ascii")
        """The origin to which the browser sent the request, computed from the request's scheme and Host header."""
        self.origin = public_url or self._request_origin
        """The origin (scheme, host, port) at which browsers reach the registry, such as
        `https://registry.example.com`."""

    @property
    def session(self) -> str | None:
        """The value of the session cookie; None if it is missing or empty."""
        return self.read(SESSION_COOKIE) or None

    def read(self, name: str) -> str:
        """Returns a cookie's value, or an empty string if the request has no such cookie. Over https, reads only the
        cookie with the prefix `__Host-`."""
        return cookie_value(self._request.scope, self._name(name))

    def set(self, response: Response, name: str, value: str, seconds: float) -> None:
        """Sets a cookie that expires after `seconds`, is sent to this host only, and is hidden from scripts
        (HttpOnly)."""
        response.set_cookie(
            self._name(name),
            value,
            max_age=int(seconds),
            path="/",
            secure=self._is_https,
            httponly=True,
            samesite="lax",
        )

    def delete(self, response: Response, name: str) -> None:
        """Makes the browser delete a cookie: sets an empty cookie that has expired."""
        self.set(response, name, "", 0)

    def check_same_origin(self) -> None:
        """Raises HTTPException (403) for a request that may change something, unless a page of this registry has sent
        the request. Requests with one of `SAFE_METHODS` are not checked.

        The header Sec-Fetch-Site says whether the page and the registry have the same origin. Over plain http, browsers
        omit this header; then the header Origin names the page's origin. A request with neither header is refused.
        """
        if self._request.method in SAFE_METHODS:
            return
        site = self._request.headers.get("sec-fetch-site")
        if site is not None:
            is_same_origin = site == "same-origin"
        else:
            # Accepts `_request_origin` for people who reach the registry at another address than `public_url`.
            is_same_origin = self._request.headers.get("origin") in (self.origin, self._request_origin)
        if not is_same_origin:
            raise HTTPException(403, "with a browser session, only a page of this registry may change something")

    @property
    def _is_https(self) -> bool:
        """Whether the browser reaches the registry over https."""
        return self.origin.startswith("https:")

    def _name(self, name: str) -> str:
        """Returns the cookie's name in the browser: over https, with the prefix `__Host-`."""
        return _HOST_PREFIX + name if self._is_https else name

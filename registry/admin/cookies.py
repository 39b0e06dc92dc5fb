"""Cookies of browsers, and the check that a change comes from a page of this registry.

Sources: RFC 6265bis, 4.1.3 (`__Host-`) and 5.6.7 (SameSite); Fetch Metadata; RFC 6454 (Origin).

Over https the names begin with `__Host-`: then neither another host of the same domain nor an attacker who injects a
page over plain http can replace a cookie. The cookies are SameSite=Lax, not Strict: the OpenID provider redirects the
browser back here, and with Strict the first page after that would not get the session. With Lax, browsers do not send
them with a POST of another site nor with what its pages load; `check_same_origin` checks every change as well.
"""

from __future__ import annotations

from typing import Final

from fastapi import HTTPException, Request, Response

from registry.http.challenge import base_url_of

SESSION_COOKIE: Final = "entrepot-session"
ATTEMPT_COOKIE: Final = "entrepot-login"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HOST_ONLY: Final = "__Host-"


class BrowserCookies:
    """The cookies of one request. `public_url` is the registry's address for clients, if it is set."""

    def __init__(self, request: Request, public_url: str | None) -> None:
        host = request.headers.get("host")
        self._request = request
        self._address = base_url_of(request.scope, None if host is None else host.encode("latin-1")).decode("ascii")
        self.origin = public_url or self._address
        """The registry's address as the browser has it, such as `https://registry.example.com`."""

    @property
    def session(self) -> str | None:
        """The login session that the request shows, if any."""
        return self.read(SESSION_COOKIE) or None

    def read(self, name: str) -> str:
        """Returns a cookie's value, or an empty text. A cookie that was set under the other scheme does not count."""
        return self._request.cookies.get(self._name(name), "")

    def set(self, response: Response, name: str, value: str, seconds: float) -> None:
        """Sets a cookie for this host alone, out of reach of scripts."""
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
        """Makes the browser delete a cookie."""
        self.set(response, name, "", 0)

    def check_same_origin(self) -> None:
        """Raises HTTPException unless a change comes from a page of this registry.

        Browsers name the origin in Sec-Fetch-Site, and over plain http only in Origin. A request with neither is
        refused.
        """
        if self._request.method in SAFE_METHODS:
            return
        site = self._request.headers.get("sec-fetch-site")
        own = {self.origin, self._address}
        if site != "same-origin" if site is not None else self._request.headers.get("origin") not in own:
            raise HTTPException(403, "in a session, only a page of this registry changes something here")

    @property
    def _is_https(self) -> bool:
        return self.origin.startswith("https:")

    def _name(self, name: str) -> str:
        return _HOST_ONLY + name if self._is_https else name

"""What a browser keeps for this registry, and from which page it comes.

Sources: RFC 6265bis, 4.1.3 (`__Host-`) and 5.6.7 (SameSite); Fetch Metadata; RFC 6454 (Origin).

Over https the cookies' names begin with `__Host-`, so no other host of the same domain, and nobody on the way who makes
a page come by plain http, can put one of theirs in their place. They are SameSite=Lax, not Strict: one comes back from
the provider by a redirect that another site began, and with Strict the first page after it would not know of the login.
Lax sends them with no POST of another site and with nothing that its pages load; what changes something is checked here
as well.
"""

from __future__ import annotations

from typing import Final

from fastapi import HTTPException, Request, Response

from registry.http.challenge import base_url_of

SESSION_COOKIE: Final = "entrepot-session"
ATTEMPT_COOKIE: Final = "entrepot-login"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HOST_ONLY: Final = "__Host-"


def origin_of(request: Request, public_url: str | None) -> str:
    """This registry's address as the browser has it: `https://registry.example.com`."""
    return public_url or _address_of(request)


def read_session(request: Request, public_url: str | None) -> str | None:
    """The session that a request shows; None: none."""
    return read_cookie(request, SESSION_COOKIE, public_url) or None


def read_cookie(request: Request, name: str, public_url: str | None) -> str:
    """Empty: there is none. One of the other scheme's name does not count."""
    return request.cookies.get(_cookie_name(request, name, public_url), "")


def set_cookie(
    request: Request, response: Response, name: str, value: str, seconds: float, public_url: str | None
) -> None:
    """Makes the browser keep a cookie, for this host alone and out of reach of scripts."""
    secure = _is_https(request, public_url)
    response.set_cookie(
        _cookie_name(request, name, public_url),
        value,
        max_age=int(seconds),
        path="/",
        secure=secure,
        httponly=True,
        samesite="lax",
    )


def delete_cookie(request: Request, response: Response, name: str, public_url: str | None) -> None:
    """Makes the browser forget it."""
    set_cookie(request, response, name, "", 0, public_url)


def check_same_origin(request: Request, public_url: str | None) -> None:
    """Whether what changes something comes from a page of this registry. Browsers say so in Sec-Fetch-Site, over plain
    http in Origin alone; what says neither shows no session. Raises HTTPException."""
    if request.method in _SAFE_METHODS:
        return
    site = request.headers.get("sec-fetch-site")
    own = {origin_of(request, public_url), _address_of(request)}
    if site != "same-origin" if site is not None else request.headers.get("origin") not in own:
        raise HTTPException(403, "in a session, only a page of this registry changes something here")


def _address_of(request: Request) -> str:
    host = request.headers.get("host")
    return base_url_of(request.scope, None if host is None else host.encode("latin-1")).decode("ascii")


def _is_https(request: Request, public_url: str | None) -> bool:
    return origin_of(request, public_url).startswith("https:")


def _cookie_name(request: Request, name: str, public_url: str | None) -> str:
    return _HOST_ONLY + name if _is_https(request, public_url) else name

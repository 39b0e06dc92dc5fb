"""Refuses requests that a web page of another site makes a browser send.

Any page can make a browser send requests, even to a registry on the browser's own machine or network. The header
Sec-Fetch-Site says whether the page belongs to another site. Over plain HTTP to another machine, browsers omit
Sec-Fetch-Site, and only Origin names the page's site. Registry clients send neither header. Two kinds of requests are
refused:

- A request from a page of another site, if the method is not GET or HEAD. The browser's preflight request (OPTIONS) is
  refused too.
- A request with a Host header that is no known name of the registry, if a browser on the registry's machine sends it
  while there are no accounts. This prevents DNS rebinding: a page can make its own host name resolve to this machine.
  The browser then treats the registry as the page's own site, and would let the page read all content.

Sources: Fetch Metadata Request Headers; RFC 6454 (Origin); Fetch, "CORS protocol"; RFC 6761, 6.3 (localhost).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

from registry.asgi import Header, Scope, client_address
from registry.client_addresses import is_loopback_address
from registry.http.namespaces import hosts_of, without_port
from storage.errors import Denied
from storage.names import shown

BROWSER_HEADERS: Final = frozenset({b"origin", b"sec-fetch-site", b"accept-language"})
"""A browser sends at least one of these headers with every request. Registry clients send none of them."""
_READS: Final = ("GET", "HEAD")
_OWN_SITE: Final = frozenset({b"same-origin", b"none"})
"""Values of Sec-Fetch-Site for a request from a page of the registry itself, and for a request that no page caused, for
example because the user typed a URL."""


class CrossSiteCheck:
    """Refuses requests that a page of another site may have made a browser send.

    `public_url`: the registry's URL for clients; None: the setting is not set. `hosts`: further host names of the
    registry. `has_no_accounts`: returns True until the registry has an account. Until then, every client may do
    everything."""

    def __init__(self, public_url: str | None, hosts: Collection[str], has_no_accounts: Callable[[], bool]) -> None:
        self._public_netloc = _netloc(public_url or "")
        self._hosts = {host.lower() for host in hosts} | hosts_of(public_url)
        self._has_no_accounts = has_no_accounts

    def check(self, scope: Scope) -> None:
        """Raises Denied for a request that a page of another site may have caused. `scope`: the ASGI scope of the
        request. Does nothing if the request has none of `BROWSER_HEADERS`. The response cache
        (`registry.http.answer_cache`) answers without this check, so it must not answer a request with one of
        these headers."""
        browser_headers = [header for header in scope["headers"] if header[0] in BROWSER_HEADERS]
        if not browser_headers:
            return
        host = _first_value(scope["headers"], b"host").decode("latin-1").lower()
        if scope["method"] not in _READS:
            self._check_site(browser_headers, host)
        if is_loopback_address(client_address(scope)) and not self._is_own_host(host) and self._has_no_accounts():
            raise Denied(
                f"a browser on this machine asks for {shown(host)}, which is no known name of this registry; use "
                "localhost or the registry's IP address, or set public_url"
            )

    def _check_site(self, browser_headers: Sequence[Header], host: str) -> None:
        """Raises Denied if a page of another site caused the request. `browser_headers`: the request's headers that are
        in `BROWSER_HEADERS`. `host`: the request's Host."""
        origins = {value.decode("latin-1").lower() for name, value in browser_headers if name == b"origin"}
        fetch_sites = {value.strip().lower() for name, value in browser_headers if name == b"sec-fetch-site"}
        if fetch_sites:
            # The origin `null`, for example of a sandboxed page, is never the registry's own.
            is_own_site = fetch_sites <= _OWN_SITE and "null" not in origins
        else:
            own_netlocs = {_netloc(f"//{host}"), self._public_netloc} - {""}
            is_own_site = all(_netloc(origin) in own_netlocs for origin in origins)
        if not is_own_site:
            raise Denied(
                "a page of another site may not change anything in this registry; if this registry sent "
                "the page, set public_url to the URL that browsers use"
            )

    def _is_own_host(self, host: str) -> bool:
        """Returns whether `host` is a known name of the registry: a configured name, an IP address, or a local name."""
        name = without_port(host)
        return host in self._hosts or name in self._hosts or _is_address(name) or is_local_name(name)


def is_local_name(name: str) -> bool:
    """Returns whether a host name is `localhost` or ends in `.localhost`. Browsers do not ask a name server for such a
    name (RFC 6761, 6.3), so DNS rebinding is not possible with it."""
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    """Returns whether a host is an IP address. DNS rebinding is not possible with an IP address."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _netloc(url: str) -> str:
    """Returns the host and the port of a URL, without the port if it is 80 or 443. Returns an empty string for the
    origin `null` and for a text that cannot be parsed."""
    try:
        return urlsplit(url).netloc.lower().removesuffix(":80").removesuffix(":443")
    except ValueError:
        return ""


def _first_value(headers: Sequence[Header], name: bytes) -> bytes:
    """Returns the first value of a header. Returns an empty value if the header is missing."""
    return next((value for key, value in headers if key == name), b"")

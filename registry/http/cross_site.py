"""Refuses requests that a page of another site makes a browser send.

A browser sends the requests of any page, also to a registry on its own machine or network. It names the page's site: in
Sec-Fetch-Site, and over plain http to other machines in Origin alone. Registry clients send neither.

- A request that changes something is refused if it comes from a page of another site, and so is the browser's preflight
  for it.
- A page can point its own host name at this machine (DNS rebinding); the browser then takes the registry for the page's
  own site. So while there are no accounts, a browser on this machine is refused if it uses a host name that is not
  known to be the registry's.

Sources: Fetch Metadata Request Headers; RFC 6454 (Origin); Fetch, "CORS protocol"; RFC 6761, 6.3 (localhost).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

from registry.client_addresses import is_loopback
from registry.http.asgi import Header
from registry.http.exchange import Exchange
from registry.http.namespaces import hosts_of, without_port
from storage.errors import Denied
from storage.names import shown

BROWSER_HEADERS: Final = frozenset({b"origin", b"sec-fetch-site", b"accept-language"})
"""Headers of which a browser sends at least one with every request. Registry clients send none of them."""
_READS: Final = ("GET", "HEAD")
_OWN_SITE: Final = frozenset({b"same-origin", b"none"})


class CrossSiteCheck:
    """`public_url`: the registry's address as clients see it, if it is set. `hosts`: further host names of it.
    `is_open` returns whether there are no accounts yet."""

    def __init__(self, public_url: str | None, hosts: Collection[str], is_open: Callable[[], bool]) -> None:
        self._public = _netloc(public_url or "")
        self._hosts = {host.lower() for host in hosts} | hosts_of(public_url)
        self._is_open = is_open

    def check(self, exchange: Exchange) -> None:
        """Raises Denied. The response cache is not used for requests with these headers, so none escapes the check."""
        sent = [header for header in exchange.scope["headers"] if header[0] in BROWSER_HEADERS]
        if not sent:
            return
        host = _first(exchange.scope["headers"], b"host").decode("latin-1").lower()
        if exchange.method not in _READS:
            self._check_site(sent, host)
        if is_loopback(exchange.address) and not self._is_known(host) and self._is_open():
            raise Denied(
                f"a browser on this machine asks for {shown(host)}, which is not known to be this registry; use its "
                "IP address or localhost, or set public_url"
            )

    def _check_site(self, sent: Sequence[Header], host: str) -> None:
        origins = {value.decode("latin-1").lower() for name, value in sent if name == b"origin"}
        site = {value.strip().lower() for name, value in sent if name == b"sec-fetch-site"}
        if site:
            own = site <= _OWN_SITE and "null" not in origins
        else:
            known = {_netloc(f"//{host}"), self._public} - {""}
            own = all(_netloc(origin) in known for origin in origins)
        if not own:
            raise Denied(
                "a page of another site may change nothing here; if it is one of this registry's own, set public_url "
                "to the address that browsers use"
            )

    def _is_known(self, host: str) -> bool:
        name = without_port(host)
        return host in self._hosts or name in self._hosts or _is_address(name) or is_local_name(name)


def is_local_name(name: str) -> bool:
    """Returns whether a name is resolved without a name server."""
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    """Returns whether a host is an IP address, so that no name server can redirect it."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _netloc(url: str) -> str:
    """Returns a URL's host and port, without a default port; empty for `null` and for text that cannot be parsed."""
    try:
        return urlsplit(url).netloc.lower().removesuffix(":80").removesuffix(":443")
    except ValueError:
        return ""


def _first(headers: Sequence[Header], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")

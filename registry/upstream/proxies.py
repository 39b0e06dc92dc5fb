"""The proxy for an address, from the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, in either case.

Both HTTP libraries are told here, so that they cannot differ. As in curl and Go, NO_PROXY lists hosts, domains and
`host:port`, networks as `10.0.0.0/8`, or `*`; as in Go, and so in docker, loopback addresses never go to a proxy.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from registry.upstream.addresses import origin
from storage.errors import UpstreamUnavailable


class Proxies:
    """Reads the environment once, when made."""

    def __init__(self) -> None:
        self._by_scheme = getproxies_environment()
        self._spared = [entry.strip().lower() for entry in self._by_scheme.get("no", "").split(",") if entry.strip()]

    def of(self, url: str) -> str | None:
        """The proxy's address; None: straight there. Raises UpstreamUnavailable for a proxy of a kind not known."""
        scheme, host, port = origin(url)
        proxy = self._by_scheme.get(scheme) or self._by_scheme.get("all")
        if not proxy or _is_loopback(host) or any(_matches(entry, host, port) for entry in self._spared):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise UpstreamUnavailable(
                f"the environment names a {urlsplit(proxy).scheme} proxy; only http and https proxies are supported"
            )
        return proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _matches(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY is about that host."""
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name, colon, number = entry.rpartition(":")
        name = (name if colon and number.isdigit() else entry).lstrip("*").lstrip(".")
        if colon and number.isdigit() and int(number) != port:
            return False
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        shown = f"[{host}]" if ":" in host else host
        return entry in (f"{shown}:{port}", shown)  # and what cannot be read is left out, as curl and Go do

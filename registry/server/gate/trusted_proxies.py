"""Takes client, scheme and host from the headers of trusted reverse proxies: X-Forwarded-For, -Proto and -Host.

Any client can send these headers, so they count only on connections from the addresses in the settings. Each proxy
appends the address of its peer to X-Forwarded-For. So the client is, from the right, the first address that is not a
trusted proxy's; the client itself may have made up what stands left of it. `Forwarded` (RFC 7239) is ignored: a proxy
that sets one of the two headers would let the client's other one through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from registry.client_addresses import plain_address
from registry.server.http1.request_head import is_host
from registry.server.http1.response_head import Headers

IpNetwork = IPv4Network | IPv6Network

_CACHED_VALUES = 4096
"""Values of X-Forwarded-For whose client is cached."""
_CACHED_LENGTH = 200
"""Longer values are not cached. In bytes."""
_SCHEMES = {b"http": "http", b"https": "https"}


class TrustedProxies:
    """The proxies in some networks."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._networks: Sequence[IpNetwork] = tuple(networks)
        self._clients: dict[bytes, str | None] = {}  # by X-Forwarded-For, which is slow to parse

    def trusts(self, address: str) -> bool:
        """Returns whether the peer at that address is one of them."""
        try:
            return self._is_trusted(ip_address(plain_address(address)))
        except ValueError:
            return False

    def apply(self, scope: Any, headers: Headers) -> None:
        """Sets a request's `client`, `scheme` and Host to what a trusted proxy's headers say. Malformed values change
        nothing. Of several values of -Proto and -Host the last counts: the nearest proxy wrote it."""
        forwarded = [(name, value) for name, value in headers if name.startswith(b"x-forwarded-")]
        if not forwarded:
            return
        client = self._client(b",".join([value for name, value in forwarded if name == b"x-forwarded-for"]))
        if client is not None:
            scope["client"] = (client, 0)
        scheme = _SCHEMES.get(_last(forwarded, b"x-forwarded-proto").lower())
        if scheme is not None:
            scope["scheme"] = scheme
        host = _last(forwarded, b"x-forwarded-host")
        if host and is_host(host):
            headers[:] = [header for header in headers if header[0] != b"host"] + [(b"host", host)]

    def _client(self, addresses: bytes) -> str | None:
        if len(addresses) > _CACHED_LENGTH:
            return self._find_client(addresses)
        if addresses not in self._clients:
            if len(self._clients) >= _CACHED_VALUES:
                self._clients.clear()
            self._clients[addresses] = self._find_client(addresses)
        return self._clients[addresses]

    def _find_client(self, addresses: bytes) -> str | None:
        """Returns the client's address; None if there is none. Addresses left of a malformed one are ignored."""
        found = None
        for text in reversed(addresses.split(b",")):
            address = _read(text.strip())
            if address is None:
                break
            found = str(address)
            if not self._is_trusted(address):
                break
        return found

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _last(headers: Headers, wanted: bytes) -> bytes:
    """Returns the last value of a header, which may have several lines (RFC 9110, 5.3)."""
    for name, value in reversed(headers):
        if name == wanted:
            return value.rpartition(b",")[2].strip()
    return b""


def _read(text: bytes) -> IPv4Address | IPv6Address | None:
    """Parses an address as proxies write it: perhaps with a port, an IPv6 one perhaps in brackets. None: malformed."""
    shown = text.decode("latin-1")
    if shown.startswith("["):
        shown = shown[1:].partition("]")[0]
    elif shown.count(":") == 1:
        shown = shown.partition(":")[0]
    try:
        return None if "%" in shown else ip_address(plain_address(shown))
    except ValueError:
        return None

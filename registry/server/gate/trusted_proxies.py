"""Proxies before this server, and what they say of the client: X-Forwarded-For, -Proto and -Host.

Anybody can send these headers, so they count only on a connection from an address in the settings. Each proxy appends
to X-Forwarded-For whom it heard from; from the right, the first address that is no proxy of ours is the client, and
what stands left of it is the client's own invention. `Forwarded` (RFC 7239) means nothing here: were both read, a proxy
that sets one would let the client's other one through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from registry.client_addresses import plain_address
from registry.server.http1.request_head import is_host
from registry.server.http1.response_head import Headers

IpNetwork = IPv4Network | IPv6Network

_CACHED_VALUES, _CACHED_LENGTH = 4096, 200  # so many values, if they have no more bytes than that
_SCHEMES = {b"http": "http", b"https": "https"}


class TrustedProxies:
    """Those at the addresses of some networks."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._networks: Sequence[IpNetwork] = tuple(networks)
        self._clients: dict[bytes, str | None] = {}  # by what X-Forwarded-For said: reading it takes long

    def trusts(self, address: str) -> bool:
        """Whether the peer at that address is one of them."""
        try:
            return self._ours(ip_address(plain_address(address)))
        except ValueError:
            return False

    def apply(self, scope: Any, headers: Headers) -> None:
        """Puts what a proxy of ours said of the client into a request's `client`, `scheme` and Host. What is not well
        formed changes nothing; of several values of -Proto and -Host the last counts, which the nearest proxy wrote."""
        told = [(name, value) for name, value in headers if name.startswith(b"x-forwarded-")]
        if not told:
            return
        client = self._client(b",".join([value for name, value in told if name == b"x-forwarded-for"]))
        if client is not None:
            scope["client"] = (client, 0)
        scheme = _SCHEMES.get(_last(told, b"x-forwarded-proto").lower())
        if scheme is not None:
            scope["scheme"] = scheme
        host = _last(told, b"x-forwarded-host")
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
        """None: they say nothing. Something that is no address ends the row: what stands left of it cannot be told."""
        found = None
        for text in reversed(addresses.split(b",")):
            address = _read(text.strip())
            if address is None:
                break
            found = str(address)
            if not self._ours(address):
                break
        return found

    def _ours(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _last(headers: Headers, wanted: bytes) -> bytes:
    """A header's last value, however many lines they came in (RFC 9110, 5.3)."""
    for name, value in reversed(headers):
        if name == wanted:
            return value.rpartition(b",")[2].strip()
    return b""


def _read(text: bytes) -> IPv4Address | IPv6Address | None:
    """An address as proxies write it: with its port, perhaps, and an IPv6 one in brackets, perhaps."""
    shown = text.decode("latin-1")
    if shown.startswith("["):
        shown = shown[1:].partition("]")[0]
    elif shown.count(":") == 1:
        shown = shown.partition(":")[0]
    try:
        return None if "%" in shown else ip_address(plain_address(shown))
    except ValueError:
        return None

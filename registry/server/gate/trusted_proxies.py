"""Reads the client, scheme and host of a request from the X-Forwarded headers of a reverse proxy: X-Forwarded-For,
X-Forwarded-Proto and X-Forwarded-Host.

Any client can send these headers. So the server uses them only on connections from trusted proxies, whose addresses
are in the settings.

Each proxy appends the address of its peer to the end of X-Forwarded-For. The client's address is therefore the
last address that does not belong to a trusted proxy. The server ignores all addresses before the client's address,
because the client could have invented them.

The server ignores the header `Forwarded` (RFC 7239). A proxy that sets the X-Forwarded headers passes on `Forwarded` as
the client sent it, so a client could forge its address there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from registry.client_addresses import plain_address
from registry.server.http1.request_head import has_only_host_characters
from registry.server.http1.response_head import Headers

IpNetwork = IPv4Network | IPv6Network

MAX_FORWARDED_ADDRESSES = 50
"""Largest number of addresses that the server reads from the end of X-Forwarded-For. Each proxy in front of the server
adds one. Parsing the thousands of addresses that fit into a request would block the event loop for 100 ms."""
_MAX_CACHED_VALUES = 4096
"""Largest number of entries of the cache that maps a value of X-Forwarded-For to the client's address."""
_MAX_CACHED_VALUE_BYTES = 200
"""A longer value of X-Forwarded-For is not cached."""
_SCHEMES = {b"http": "http", b"https": "https"}
"""Valid values of X-Forwarded-Proto, and the ASGI scheme for each."""


class TrustedProxies:
    """The trusted reverse proxies. A proxy is trusted if its address is in one of `networks`."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._networks: Sequence[IpNetwork] = tuple(networks)
        self._cached_clients: dict[bytes, str | None] = {}  # value of X-Forwarded-For -> client's address

    def trusts(self, address: str) -> bool:
        """Returns whether the peer at `address` is a trusted proxy. Returns False if `address` is not an IP address."""
        # A socket for IPv6 reports the IPv4 address 192.0.2.1 as ::ffff:192.0.2.1. `plain_address` removes the prefix.
        try:
            return self._is_trusted(ip_address(plain_address(address)))
        except ValueError:
            return False

    def apply(self, scope: Any, headers: Headers) -> None:
        """Sets `client` and `scheme` in a request's ASGI `scope`, and the Host header in `headers`, to the values in
        the X-Forwarded headers. Call it only for requests from a trusted proxy.

        Ignores missing and malformed values. If X-Forwarded-Proto or X-Forwarded-Host has several values, uses the last
        value, which the nearest proxy wrote.
        """
        forwarded = [(name, value) for name, value in headers if name.startswith(b"x-forwarded-")]
        if not forwarded:
            return
        client = self._client_address(b",".join([value for name, value in forwarded if name == b"x-forwarded-for"]))
        if client is not None:
            scope["client"] = (client, 0)  # the port is unknown
        scheme = _SCHEMES.get(_last_value(forwarded, b"x-forwarded-proto").lower())
        if scheme is not None:
            scope["scheme"] = scheme
        host = _last_value(forwarded, b"x-forwarded-host")
        if host and has_only_host_characters(host):
            headers[:] = [header for header in headers if header[0] != b"host"] + [(b"host", host)]

    def _client_address(self, addresses: bytes) -> str | None:
        """Returns the same as `_find_client_address`, from the cache where possible."""
        if len(addresses) > _MAX_CACHED_VALUE_BYTES:
            return self._find_client_address(addresses)
        if addresses not in self._cached_clients:
            if len(self._cached_clients) >= _MAX_CACHED_VALUES:
                self._cached_clients.clear()
            self._cached_clients[addresses] = self._find_client_address(addresses)
        return self._cached_clients[addresses]

    def _find_client_address(self, addresses: bytes) -> str | None:
        """Returns the client's address in a value of X-Forwarded-For; None if the last address in the value is
        malformed or missing.

        Reads the addresses from the end of the value. Stops after `MAX_FORWARDED_ADDRESSES` addresses, or at a
        malformed address. The client's address is the first address that is read and belongs to no trusted proxy. If
        all addresses that are read belong to trusted proxies, it is the address that is read last."""
        client_address = None
        # `rsplit` leaves the surplus addresses unsplit, in an additional first element. The slice drops this element.
        for text in reversed(addresses.rsplit(b",", MAX_FORWARDED_ADDRESSES)[-MAX_FORWARDED_ADDRESSES:]):
            address = _parse_address(text.strip())
            if address is None:
                break
            client_address = str(address)
            if not self._is_trusted(address):
                break
        return client_address

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _last_value(headers: Headers, header_name: bytes) -> bytes:
    """Returns the last value of a header, or an empty value if the header is missing. A header can have several lines,
    and several values in a line, separated by commas (RFC 9110, 5.3)."""
    for name, value in reversed(headers):
        if name == header_name:
            return value.rpartition(b",")[2].strip()
    return b""


def _parse_address(text: bytes) -> IPv4Address | IPv6Address | None:
    """Parses an address as proxies write it: a port can follow it, and an IPv6 address can be in brackets. Returns None
    if `text` is malformed."""
    host = text.decode("latin-1")
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        # An address with a zone, such as fe80::1%eth0, counts as malformed.
        return None if "%" in host else ip_address(plain_address(host))
    except ValueError:
        return None

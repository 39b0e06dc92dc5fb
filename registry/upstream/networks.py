"""The network an address belongs to, and the addresses that a redirect or a token service may be at.

Whoever answers for an upstream writes its redirects and challenges. Without a rule they could make this server ask
services that only this server can reach: on its own machine, in its private network, or its cloud's metadata service.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from storage.errors import UpstreamUnavailable

log = logging.getLogger(__name__)

LOGGED = 100
"""Refused places that are logged, the most: an upstream chooses their names."""


class Network(Enum):
    """What can reach an address."""

    PUBLIC = "public"
    PRIVATE = "private"
    LINK_LOCAL = "link-local"
    LOOPBACK = "loopback"
    SPECIAL = "special-purpose"
    """Multicast, unspecified (0.0.0.0 is this machine on Linux), broadcast, documentation, reserved."""


NetworkOf = Callable[[str], Network]

_PRIVATE = [
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15"),
        *("fc00::/7", "fec0::/10"),
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.ip_network("::/96")


def network_of(address: str) -> Network:
    """The network of an IP address. An IPv6 address that carries an IPv4 one is in the network of that."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and (inner := _inner(found)) is not None:
        found = inner
    if found.is_loopback:
        return Network.LOOPBACK
    if found.is_link_local:
        return Network.LINK_LOCAL
    if any(found.version == network.version and found in network for network in _PRIVATE):
        return Network.PRIVATE
    special = found.is_multicast or found.is_reserved or found.is_unspecified or not found.is_global
    return Network.SPECIAL if special or found in _LOCAL_NAT64 else Network.PUBLIC


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to it go to: mapped, 6to4, NAT64, or compatible (RFC 4291, 3056, 6052)."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    low = int(address) & 0xFFFFFFFF
    if address in _NAT64 or (address in _COMPATIBLE and low > 1):
        return ipaddress.IPv4Address(low)
    return None


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a request may connect: to public addresses, to those in `network`, and to the `listed` hosts and ports.
    `network` is None where the settings name the address: then anywhere."""

    network: Network | None
    listed: frozenset[tuple[str, int]] = frozenset()

    def after(self, network: Network) -> Reach:
        """Where the next request may connect, once a host in `network` has answered this one: a redirect may stay in
        the network of the first host, and leads nowhere but to public addresses once it has left it."""
        if self.network is None:
            return replace(self, network=network)
        return self if network is self.network else replace(self, network=Network.PUBLIC)

    def anywhere(self, host: str, port: int) -> bool:
        """Any address of this host will do."""
        return self.network is None or (host.strip("[]").rstrip(".").lower(), port) in self.listed

    def allows(self, network: Network) -> bool:
        return network in (Network.PUBLIC, self.network) and network is not Network.SPECIAL


ANYWHERE = Reach(None)


class Gate:
    """One upstream's rule for the addresses that are connected to."""

    def __init__(self, name: str, network_of: NetworkOf = network_of) -> None:
        self._name = name
        self._network_of = network_of
        self._logged: set[tuple[str, int]] = set()

    def network(self, address: str | None) -> Network:
        """Of a host that has answered; None: its address is not known, which counts as public."""
        try:
            return self._network_of(address) if address else Network.PUBLIC
        except ValueError:
            return Network.PUBLIC

    def allowed(self, reach: Reach, host: str, port: int, addresses: Sequence[str]) -> list[str]:
        """Those of a host's addresses that may be connected to. Raises UpstreamUnavailable: none."""
        if reach.anywhere(host, port):
            return list(addresses)
        found = {address: self._network_of(address) for address in addresses}
        allowed = [address for address, network in found.items() if reach.allows(network)]
        if found and not allowed:
            raise self._refusal(host, port, *next(iter(found.items())))
        return allowed

    def by_proxy(self, reach: Reach, host: str, port: int) -> None:
        """A proxy resolves names, so only addresses can be checked here. Raises UpstreamUnavailable."""
        if (address := literal(host)) is not None:
            self.allowed(reach, host, port, [address])

    def by_name(self, host: str) -> Network:
        """What is known of a host behind a proxy."""
        return self.network(literal(host))

    def _refusal(self, host: str, port: int, address: str, network: Network) -> UpstreamUnavailable:
        if (host, port) not in self._logged and len(self._logged) < LOGGED:
            self._logged.add((host, port))
            log.warning(
                "upstream %s sends us on to %s:%d, whose address %s is %s: that is not asked. If it is right, add "
                "%r to the upstream's redirects (a token service: its address to realms)",
                self._name,
                host,
                port,
                address,
                network.value,
                f"{host}:{port}",
            )
        return UpstreamUnavailable(
            f"the upstream {self._name} sends us on to an address that is not public; the server's log says which"
        )


def literal(host: str) -> str | None:
    """The address that a host in a URL is, in any spelling that resolvers take (`127.1`, `0x7f000001`); None: it is a
    name."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None

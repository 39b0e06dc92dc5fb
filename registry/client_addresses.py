"""Converts IP addresses of clients to the forms that limits and logs use, and recognises loopback addresses."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

_MAPPED_PREFIX: Final = "::ffff:"
"""An IPv6 socket reports an IPv4 client as this prefix and the IPv4 address: `::ffff:192.0.2.1` (RFC 4291, 2.5.5.2)."""
_MAPPED_BYTES: Final = bytes(10) + b"\xff\xff"
"""`_MAPPED_PREFIX` in binary form. A binary address has 16 bytes: this prefix and the 4 bytes of the IPv4 address."""


def plain_address(address: str) -> str:
    """Returns `192.0.2.1` for `::ffff:192.0.2.1`. Returns every other address unchanged."""
    ipv4 = address[len(_MAPPED_PREFIX) :]
    return ipv4 if address.startswith(_MAPPED_PREFIX) and "." in ipv4 else address


def network_of(address: str) -> str:
    """Returns the network of an IP address. For limits, each such network counts as one client.

    - For an IPv6 address: the /64 network, such as `2001:db8::/64`. A client can choose the last 64 bits freely.
    - For an IPv4 address, such as `192.0.2.1` or `::ffff:192.0.2.1`: the IPv4 address itself.
    - For any other text: the text."""
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return address
    if packed.startswith(_MAPPED_BYTES):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return f"{socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))}/64"


def site_of(address: str) -> str:
    """Returns the *site* of an IP address: the network that an internet provider may have given to one customer. The
    site is the /48 network of an IPv6 address (RFC 6177), or the /24 network of an IPv4 address. Returns any other text
    unchanged."""
    network = network_of(address)
    try:
        if ":" in network:
            packed = socket.inet_pton(socket.AF_INET6, network.partition("/")[0])
            return f"{socket.inet_ntop(socket.AF_INET6, packed[:6] + bytes(10))}/48"
        packed = socket.inet_pton(socket.AF_INET, network)
        return f"{socket.inet_ntop(socket.AF_INET, packed[:3] + bytes(1))}/24"
    except (OSError, ValueError):
        return network


def visitor_key(account: str | None, address: str) -> str:
    """Returns the key under which limits count a client. The key names the client's account. For an anonymous client
    (`account` is None), the key is the network of the IP address (`network_of`)."""
    return network_of(address) if account is None else f"account {account}"


def is_loopback_address(address: str) -> bool:
    """Returns whether `address` is a loopback IP address, such as `127.0.0.1`. Returns False for host names, including
    `localhost`."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_loopback_host(host: str) -> bool:
    """Returns whether `host` is a loopback IP address or the name `localhost`."""
    return host == "localhost" or is_loopback_address(host)

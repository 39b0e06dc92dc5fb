"""Addresses of clients, as limits and logs want them."""

from __future__ import annotations

import ipaddress
import socket

_MAPPED = "::ffff:"


def plain_address(address: str) -> str:
    """An IPv4 client's address as such, where a socket for IPv6 says `::ffff:192.0.2.1` (RFC 4291, 2.5.5.2)."""
    inner = address[len(_MAPPED) :]
    return inner if address.startswith(_MAPPED) and "." in inner else address


def network_of(address: str) -> str:
    """Whose address it is, for limits: an IPv4 address itself; of an IPv6 address the first 64 bits, since a client
    has all the others to choose from. What is no address stays as it is."""
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):
        return address
    return f"{packed[:8].hex(':', 2)}::/64"


def is_loopback(address: str) -> bool:
    """Returns whether `address` is an IP address of the loopback interface."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_loopback_host(host: str) -> bool:
    """Returns whether a URL's host is this machine: a loopback address, or `localhost`."""
    return host == "localhost" or is_loopback(host)

"""Converts client IP addresses to the forms that limits, logs and access checks use."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

_MAPPED_PREFIX: Final = "::ffff:"
"""An IPv6 socket reports an IPv4 client as this prefix and the IPv4 address: `::ffff:192.0.2.1` (RFC 4291, 2.5.5.2)."""
_MAPPED_BYTES: Final = bytes(10) + b"\xff\xff"
"""The same prefix in the binary form of an address."""


def plain_address(address: str) -> str:
    """Returns `192.0.2.1` for `::ffff:192.0.2.1`, the form in which an IPv6 socket reports an IPv4 client. Returns
    every other address unchanged."""
    ipv4 = address[len(_MAPPED_PREFIX) :]
    return ipv4 if address.startswith(_MAPPED_PREFIX) and "." in ipv4 else address


def network_of(address: str) -> str:
    """Returns the network by which limits count a client: for IPv4 the address itself, for IPv6 its /64 network, such
    as `2001:db8::/64`, because a client can choose the other 64 bits freely.

    An IPv4 address in IPv6 form counts as IPv4. Returns text that is no address unchanged."""
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        return address
    if packed.startswith(_MAPPED_BYTES):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return f"{socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))}/64"


def is_loopback(address: str) -> bool:
    """Returns whether `address` is a loopback IP address, such as `127.0.0.1`. Returns False for a host name."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_loopback_host(host: str) -> bool:
    """Returns whether the host in a URL is this machine: a loopback address, or the name `localhost`."""
    return host == "localhost" or is_loopback(host)

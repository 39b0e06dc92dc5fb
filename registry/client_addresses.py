"""Client addresses, in the forms that limits, logs and access checks use."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

_MAPPED_PREFIX: Final = "::ffff:"
_MAPPED_BYTES: Final = bytes(10) + b"\xff\xff"


def plain_address(address: str) -> str:
    """Returns an IPv4 client's address in its own form, where an IPv6 socket reports `::ffff:192.0.2.1` (RFC 4291,
    2.5.5.2)."""
    inner = address[len(_MAPPED_PREFIX) :]
    return inner if address.startswith(_MAPPED_PREFIX) and "." in inner else address


def network_of(address: str) -> str:
    """Returns the network that limits count for an address: an IPv4 address itself, the /64 of an IPv6 address, since
    a client can choose the other 64 bits freely. An IPv4 address in IPv6 form is one of IPv4. Text that is no address
    is returned unchanged."""
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
    """Returns whether `address` is an IP address of this machine's loopback interface. A host name never is."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_loopback_host(host: str) -> bool:
    """Returns whether a URL's host is this machine: a loopback address or `localhost`."""
    return host == "localhost" or is_loopback(host)

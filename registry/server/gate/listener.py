"""Opens the listening socket, and defines the options for its connections. The socket and the options are created once,
before any worker is forked."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from registry.server.gate.certificates import Certificates
from registry.server.gate.per_address_limit import PerAddressLimit
from registry.server.gate.trusted_proxies import TrustedProxies

BACKLOG = 2048
"""Largest number of new connections that the kernel queues until a worker accepts them. The kernel's setting
net.core.somaxconn can lower this number."""

_BRACKETED_HOST_PORT = re.compile(r"\[([^\[\]]+)\]:(\d{1,5})")
"""An IPv6 address in brackets, and a port."""
_HOST_PORT = re.compile(r"([^:\[\]\s/]*):(\d{1,5})")
"""A host name, an IPv4 address or nothing, and a port."""


class ListenError(Exception):
    """The server cannot listen on an address.

    - `message` says in one line why, and what to do.
    - `used_address` is the IP address and port if another socket uses them; otherwise None.
    - `forbidden_port` is the port if this process has no permission to use it; otherwise None."""

    def __init__(self, message: str, *, used_address: str | None = None, forbidden_port: int | None = None) -> None:
        self.message = message
        self.used_address = used_address
        self.forbidden_port = forbidden_port
        super().__init__(message)


def bind(listen: str) -> socket.socket:
    """Returns a TCP socket that listens on `listen`, which has the form HOST:PORT. Raises ListenError.

    Examples: `127.0.0.1:5000`; `[::1]:5000`; `:5000` for all IPv4 addresses. With port 0 the system chooses a free
    port.

    Call this function before the workers are forked, so that a port in use is an error before any worker starts. The
    function calls bind(2) and listen(2), because bind(2) alone does not find every port in use. On Linux, several
    sockets with SO_REUSEADDR can be bound to the same port while none of them listens. After one of them has called
    listen(2), listen(2) fails for the others. Clients that connect before the workers are ready wait in the kernel's
    queue.
    """
    host, port = _split(listen)
    family, address = _look_up(host, port, listen)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # With this option, a socket on `[::]` accepts IPv4 clients as well. The system's default can be different.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ListenError(
            _explain(error, listen, host, port),
            used_address=_address_text(address) if error.errno == errno.EADDRINUSE else None,
            forbidden_port=port if error.errno in (errno.EACCES, errno.EPERM) else None,
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Returns the address that a socket listens on, such as `127.0.0.1:5000` or `[::1]:5000`."""
    return _address_text(sock.getsockname())


def overlaps(listen: str, used: str) -> bool:
    """Returns True if the addresses `listen` and `used` (each HOST:PORT) overlap: while a socket listens on one of
    them, no socket can listen on the other. Two addresses overlap if the ports are the same, and the hosts are the same
    or one of the hosts stands for all addresses. Compares only the texts: does not notice if two different host names
    lead to one address. Returns False if a text is malformed, or if a port is 0."""
    try:
        (host, port), (used_host, used_port) = _split(listen), _split(used)
    except ListenError:
        return False
    if port != used_port or port == 0:
        return False
    hosts = {host or "0.0.0.0", used_host or "0.0.0.0"}
    if len(hosts) == 1 or "::" in hosts:  # `bind` lets a socket on `[::]` accept IPv4 clients as well
        return True
    return "0.0.0.0" in hosts and not any(":" in text for text in hosts)  # 0.0.0.0 stands for IPv4 addresses only


def _address_text(address: Sequence[object]) -> str:
    """Returns the text of a socket address of Python's module `socket`, such as `[::1]:5000`."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _split(listen: str) -> tuple[str, int]:
    """Returns host and port. An empty host stands for all IPv4 addresses. Raises ListenError for malformed text."""
    match = _BRACKETED_HOST_PORT.fullmatch(listen) or _HOST_PORT.fullmatch(listen)
    if match is None or int(match[2]) > 65535:
        hint = " (an IPv6 address goes into brackets)" if listen.count(":") > 1 and "[" not in listen else ""
        raise ListenError(f"cannot listen on {listen!r}: write HOST:PORT, such as 127.0.0.1:5000 or [::1]:5000{hint}")
    return match[1], int(match[2])


def _look_up(host: str, port: int, listen: str) -> tuple[int, tuple[object, ...]]:
    """Returns the address family and the socket address of a host. Raises ListenError for an unknown host. `listen` is
    HOST:PORT, for the error's message."""
    try:
        address_infos = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {listen}: no address is known for the host {host!r}") from error
    # A host such as `localhost` can have an IPv4 and an IPv6 address. Clients such as docker try the IPv4 address
    # first.
    address_infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return address_infos[0][0], address_infos[0][4]


def _explain(error: OSError, listen: str, host: str, port: int) -> str:
    """Returns the text of a ListenError: why bind(2) or listen(2) failed, and what to do."""
    url_host = f"[{host}]" if ":" in host else host
    if error.errno == errno.EADDRINUSE:
        return (
            f"cannot listen on {listen}: the port is in use by another program; "
            f"stop that one or choose another port, for example --listen {url_host}:{port % 65535 + 1}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"cannot listen on {listen}: no permission for port {port} (ports below 1024 need special rights); "
            f"choose another, for example --listen {url_host}:5000"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"cannot listen on {listen}: this machine has no such address; "
            f"--listen 0.0.0.0:{port} listens on all IPv4 addresses that it has"
        )
    return f"cannot listen on {listen}: {error.strerror or error}"


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """The options for the connections that a listening socket accepts. They are created before the fork, because all
    workers share the per-address limit."""

    certificates: Certificates | None = None
    """The TLS certificate. If None, the socket speaks plain HTTP."""
    proxies: TrustedProxies | None = None
    """The reverse proxies whose X-Forwarded headers the server uses. If None, the server ignores these headers."""
    per_address_limit: PerAddressLimit | None = None
    """The limit of connections for each client address. If None, there is no such limit."""

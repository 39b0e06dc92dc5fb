"""Two protocols between systemd and a service. With sd_notify(3), the service reports its state to systemd. With
sd_listen_fds(3), systemd passes listening sockets to the service."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

_FIRST_DESCRIPTOR = 3
"""The first file descriptor that systemd passes."""


class Notifier:
    """Reports the state of the server to the service manager."""

    def __init__(self, address: str | None) -> None:
        """`address`: the value of the environment variable NOTIFY_SOCKET. None or empty: no service manager asks for
        reports, and the methods do nothing."""
        # "@" stands for the zero byte with which the name of an abstract socket begins (unix(7)).
        self._address = "\0" + address[1:] if address and address.startswith("@") else address

    def report_ready(self, status: str) -> None:
        """Reports that the server is ready: after its start, after a reload and after a restart."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def report_reloading(self) -> None:
        """Reports that a reload or a restart has begun. Call `report_ready` when the reload or restart has ended."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def report_stopping(self) -> None:
        """Reports that the server stops."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), self._address)


def take_activated_sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """Returns the TCP sockets that systemd has opened for this process; an empty list if there are none. Removes the
    variables of the protocol from `environment`, so that child processes do not see them. Raises OSError or ValueError
    if systemd has passed a descriptor that is not a listening TCP socket."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return [listening_socket(descriptor) for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))]


def listening_socket(descriptor: int) -> socket.socket:
    """Returns the socket with this file descriptor. Makes the socket non-blocking. Programs that this process executes
    do not inherit the socket. Raises OSError or ValueError if the descriptor is not a listening TCP socket."""
    sock = socket.socket(fileno=descriptor)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"the descriptor {descriptor} is no TCP socket")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"the socket with the descriptor {descriptor} does not listen")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock

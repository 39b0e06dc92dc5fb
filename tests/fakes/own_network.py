"""Gives a test its own network namespace, in which every port is free and firewall rules do not affect the host."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
"""Flag of unshare(2) and setns(2): the network namespace."""
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Moves the calling thread into a new network namespace until the block ends. The namespace has only a loopback
    device, which is up. Threads and processes that are started in the block are in the same namespace. Needs root.

    Start no `ForkedProcess` in the block: the first one starts a fork server, which would stay in this namespace after
    the block.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    previous_namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _raise_on_error(libc.unshare(_CLONE_NEWNET))
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
            yield
        finally:
            _raise_on_error(libc.setns(previous_namespace, _CLONE_NEWNET))
    finally:
        os.close(previous_namespace)


def _raise_on_error(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

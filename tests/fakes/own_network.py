"""A network of a test's own, in which every port is free and rules of a firewall disturb nobody."""

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
    """Moves the calling thread into a new network namespace, in which only the loopback device is there and up. The
    threads and processes that it starts until the end of the block are in it as well. Needs root.

    Start no `ForkedProcess` in the block: their parent process lives on, and would stay in this network.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _raise_on_error(libc.unshare(_CLONE_NEWNET))
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))
            yield
        finally:
            _raise_on_error(libc.setns(before, _CLONE_NEWNET))
    finally:
        os.close(before)


def _raise_on_error(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

"""Calls to Linux and its C library that Python does not offer. On other systems they do nothing."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import sys
import termios
from typing import cast

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 2 * 1024 * 1024
"""Twice what is received at once. Larger blocks of memory go back to the system when they are freed."""
_MOST_FILES = 1 << 20
_BYTES_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in struct tcp_info
_INT = struct.Struct("@i")
_BYTEARRAY_OF_SIZE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)


def die_with_parent(parent: int) -> bool:
    """Asks the kernel to kill this process when the thread that forked it ends. Returns False if `parent`, the pid of
    the parent before the fork, is gone already.

    To be called in the child right after the fork. The signal is SIGKILL, which ends a worker with a blocked event loop
    too; what was acknowledged survives it. See prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


def tune_malloc() -> None:
    """Makes malloc reuse blocks of the size of a read instead of mapping and unmapping each. See mallopt(3)."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 8 * _LARGE_BLOCK)


def uninitialized_bytearray(size: int) -> bytearray:
    """Returns a bytearray without setting its bytes to 0, for memory that is filled before it is read."""
    return cast(bytearray, _BYTEARRAY_OF_SIZE(None, size))


def raise_file_limit() -> None:
    """Raises the soft limit of open files to the hard one, but not above a million: some containers have a hard limit
    of a billion, and the kernel's tables would grow with the number of clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            return  # some systems refuse their own hard limit; the soft one suffices to run


def file_limit() -> int:
    """Returns how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, _MOST_FILES)


def count_open_files() -> int:
    """Returns how many files this process has open; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    except OSError:
        return 0


def unacknowledged_bytes(sock: socket.socket) -> int:
    """Returns how many sent bytes the other side has not acknowledged yet. See tcp(7), SIOCOUTQ. Raises OSError."""
    (count,) = _INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
    return int(count)


def tcp_progress(sock: socket.socket | None) -> tuple[int, int]:
    """Returns how many sent bytes the other side has acknowledged, and how many it has not; (0, 0) if unknown. See
    tcp(7), TCP_INFO."""
    if sys.platform != "linux" or sock is None:
        return 0, 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return _BYTES_ACKED.unpack(info)[0], unacknowledged_bytes(sock)
    except (OSError, struct.error):  # gone already
        return 0, 0

"""Functions that call the kernel and the C library: for processes, memory, open files and TCP connections.

On systems other than Linux, a function that needs Linux does nothing, or returns the value that means "unknown".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import sys
import termios
from typing import cast

# Constants of Linux and its C library, which Python does not offer
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 2 * 1024 * 1024
"""malloc maps each block of at least this size separately, and unmaps the block when it is freed. The size must be
larger than the largest buffer for a read from a socket, so that malloc reuses the memory of these buffers."""
_TRIM_THRESHOLD_BYTES = 8 * _MMAP_THRESHOLD_BYTES
"""If the free memory at the end of the heap exceeds this size, malloc returns it to the system."""
_MAX_FILES = 1 << 20
"""The highest limit of open files that `raise_file_limit` sets and `file_limit` returns."""
_BYTES_ACKED = struct.Struct("@120xQ")  # the field tcpi_bytes_acked in the kernel's struct tcp_info
_TCP_ESTABLISHED = 1
"""The value of tcpi_state, the first byte of struct tcp_info, while neither end has closed the connection."""
_INT = struct.Struct("@i")
_new_bytearray = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)


def die_with_parent(parent: int) -> bool:
    """Asks the kernel to kill this process with SIGKILL when the thread that forked this process ends. See prctl(2).

    Call it in the child right after the fork. `parent` is the parent's pid. Returns False if the parent has already
    ended: the caller must then exit, because the kernel will not kill this process. SIGKILL also ends a process whose
    event loop is blocked. No acknowledged write is lost, because the server acknowledges a write only after the data is
    on the disk.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


def tune_malloc() -> None:
    """Makes malloc keep and reuse freed blocks smaller than `_MMAP_THRESHOLD_BYTES`. This saves the time of mapping and
    unmapping memory. See mallopt(3)."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # the C library musl has no mallopt
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


def uninitialized_bytearray(size: int) -> bytearray:
    """Returns a bytearray of `size` bytes with arbitrary content. Use it for memory that is written before it is read.
    Unlike `bytearray(size)`, it spends no time on setting all bytes to 0."""
    return cast(bytearray, _new_bytearray(None, size))


def raise_file_limit() -> None:
    """Raises the process's soft limit of open files to its hard limit, but not above `_MAX_FILES`. With the hard limit
    of a billion that some containers have, the kernel's table of open files could grow too large. Changes nothing if
    the system refuses the change."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_soft_limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < new_soft_limit:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_soft_limit, hard))
        except (ValueError, OSError):
            return  # some systems refuse their own hard limit; the server can run with the old soft limit


def file_limit() -> int:
    """Returns how many files this process may have open: its soft limit, or `_MAX_FILES` if the soft limit is
    higher."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_FILES if soft == resource.RLIM_INFINITY else min(soft, _MAX_FILES)


def count_open_files() -> int:
    """Returns how many file descriptors this process has open; 0 on systems without /proc."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1  # listing the directory opens one more descriptor
    except OSError:
        return 0


def unacknowledged_bytes(sock: socket.socket) -> int:
    """Returns how many bytes were written to a TCP socket but are not acknowledged yet by the peer's kernel. See
    tcp(7), SIOCOUTQ (the same number as TIOCOUTQ). Raises OSError if the socket is closed."""
    if sock.fileno() < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    (count,) = _INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
    return int(count)


def tcp_progress(sock: socket.socket | None) -> tuple[int, int]:
    """Returns two numbers of bytes: those that the peer's kernel has acknowledged since the connection was opened, and
    those that were written to the socket but are not acknowledged yet. Returns (0, 0) if `sock` is closed or None, the
    kernel is too old, or the system is not Linux. See tcp(7), TCP_INFO."""
    if sys.platform != "linux" or sock is None:
        return 0, 0
    try:
        tcp_info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return _BYTES_ACKED.unpack(tcp_info)[0], unacknowledged_bytes(sock)
    except (OSError, ValueError, struct.error):  # closed (uvloop raises ValueError), or the kernel lacks the field
        return 0, 0


def is_tcp_ending(sock: socket.socket | None) -> bool:
    """Returns whether one end of a TCP connection has shut down its sending side, or has reset or closed the
    connection. Returns False if `sock` is closed or None, the kernel is too old, or the system is not Linux. See
    tcp(7), TCP_INFO."""
    if sys.platform != "linux" or sock is None:
        return False
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED
    except (OSError, ValueError, IndexError):
        return False

"""Opens and reads files that the kernel has cached, without ever waiting for the disk.

A call takes one or two microseconds, so the event loop can make the call itself. If a call would have to wait for the
disk, the call returns None. The caller then opens or reads the file in a thread, which takes fifty times as long. See
openat2(2), RESOLVE_CACHED (Linux 5.12), and preadv2(2), RWF_NOWAIT.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable

_SYS_OPENAT2 = 437
"""Number of the system call openat2 on x86-64, ARM64 and most other architectures."""
_RESOLVE_CACHED = 0x20
"""Flag of openat2: fail with EAGAIN instead of waiting for the disk."""
_UNSUPPORTED_ERRNOS = (errno.ENOSYS, errno.EINVAL, errno.EPERM)
"""Errors of openat2: ENOSYS if the kernel has no openat2, EINVAL if the kernel's openat2 does not know the flag, EPERM
if a sandbox forbids openat2."""


class _OpenHow(ctypes.Structure):
    """The C type `struct open_how` (openat2(2))."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class CachedOpener:
    """Opens files below one directory for reading, if the kernel has cached their names and inodes."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Opens the directory. Raises OSError."""
        self._how = _OpenHow(os.O_RDONLY | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
        self._syscall = _load_syscall()
        """The C function syscall(2); None if openat2 is not available."""
        self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Closes the directory. After this, `open` returns None for every file."""
        self._syscall = None
        os.close(self._directory_fd)

    def open(self, path: str) -> int | None:
        """Opens the file at `path`, relative to the directory, and returns its descriptor. Returns None if the call
        would have to wait for the disk, if a signal interrupts the call, or if openat2 is not available. Raises
        FileNotFoundError, or another OSError of openat2."""
        if self._syscall is None:
            return None
        fd = self._syscall(
            _SYS_OPENAT2, self._directory_fd, os.fsencode(path), ctypes.byref(self._how), ctypes.sizeof(self._how)
        )
        if fd >= 0:
            return fd
        error = ctypes.get_errno()
        if error in _UNSUPPORTED_ERRNOS:
            self._syscall = None
        elif error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error), path)
        return None


def _load_syscall() -> Callable[..., int] | None:
    """Returns the C function syscall(2), or None on a system other than Linux."""
    if sys.platform != "linux":
        return None
    # PyDLL does not release the interpreter's lock (GIL) during the call. The call never waits, and takes less time
    # than releasing the lock would take.
    syscall = ctypes.PyDLL(None, use_errno=True).syscall
    syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    syscall.restype = ctypes.c_long
    return syscall


def read_cached(fd: int, offset: int, length: int) -> bytes | None:
    """Returns `length` bytes of the file, starting at `offset`. Returns None if the kernel has not cached all these
    bytes, if the file has fewer bytes, or on a system other than Linux. Raises OSError."""
    if sys.platform != "linux":
        return None
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise
    # The kernel stops at the first page that is not cached, so `count` may be less than `length`.
    return bytes(buffer) if count == length else None

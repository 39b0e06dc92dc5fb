"""Opens and reads files that the kernel has cached, without ever waiting for the disk.

Such a call takes a microsecond or two, so it runs on the event loop. Only calls that would wait go to a thread, which
costs fifty times as much. See openat2(2), RESOLVE_CACHED (Linux 5.12), and preadv2(2), RWF_NOWAIT.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable

_SYS_OPENAT2 = 437  # on every architecture but Alpha, where the kernel then answers ENOSYS
_RESOLVE_CACHED = 0x20
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.EPERM)
"""Errors of an older kernel, of one that knows openat2 but not the flag, and of a sandbox that refuses openat2."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class CachedOpener:
    """Opens files in one directory for reading, if the kernel has their names cached."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises OSError."""
        self._how = _OpenHow(os.O_RDONLY | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
        self._call = _openat2()
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        self._call = None
        os.close(self._directory)

    def open(self, path: str) -> int | None:
        """Returns a file descriptor, or None if opening the file would or might wait. Raises OSError."""
        if self._call is None:
            return None
        fd = self._call(
            _SYS_OPENAT2, self._directory, os.fsencode(path), ctypes.byref(self._how), ctypes.sizeof(self._how)
        )
        if fd >= 0:
            return fd
        error = ctypes.get_errno()
        if error in _LACKING:
            self._call = None
        elif error not in (errno.EAGAIN, errno.EINTR):
            raise OSError(error, os.strerror(error), path)
        return None


def _openat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    # PyDLL keeps the interpreter's lock: the call does not wait, and releasing the lock would cost more.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    call.restype = ctypes.c_long
    return call


def read_cached(fd: int, offset: int, length: int) -> bytes | None:
    """Returns `length` bytes at `offset`, or None if they are not all cached or the file ends before. Raises
    OSError."""
    if sys.platform != "linux":
        return None
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise
    # The call ends early at the first page that is not cached.
    return bytes(buffer) if count == length else None

"""The few things we ask of Linux and its C library that Python has no name for. Elsewhere each is a quiet no-op."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from typing import cast

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE = 8 * 1024 * 1024
_UNFILLED = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyByteArray_FromStringAndSize", ctypes.pythonapi)
)


def die_with_parent(parent: int) -> bool:
    """Asks the kernel to kill this process when the thread that forked it ends. False: `parent` is gone already.

    To be called in a child right after the fork, with the pid of the parent taken before it. The signal is SIGKILL: a
    worker whose loop is stuck must go as well, and what was acknowledged survives that. See prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == parent


def keep_large_blocks() -> None:
    """Lets malloc keep blocks of a read's size instead of mapping and unmapping each one. See mallopt(3)."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def resident_bytes() -> int:
    """What this process has in memory. 0: nobody tells."""
    try:
        with open("/proc/self/statm", "rb") as counts:
            return int(counts.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def give_memory_back() -> None:
    """Returns freed memory to the system: malloc keeps what lies between blocks in use. Takes some milliseconds, and
    not the interpreter's lock. See malloc_trim(3)."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def fresh_memory(size: int) -> bytearray:
    """`bytearray(size)` without the zeros: for memory that is filled before anybody sees it."""
    return cast(bytearray, _UNFILLED(None, size))


def raise_file_limit() -> None:
    """Takes all the file descriptors this process may have: each connection and each open blob needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return  # some systems promise more than they give; what we have is enough to run

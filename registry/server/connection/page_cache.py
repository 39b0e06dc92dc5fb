"""A file mapped into memory: which parts of it the kernel has there, and those parts to be sent from.

mincore(2) tells without touching anything. preadv2's RWF_NOWAIT would tell as well, but where a page is missing it
starts a read-ahead, of megabytes perhaps, and handing that to a busy disk takes as long as a read: event loops stood
still for up to 0.4 s. cachestat(2) takes a sixth of mincore's time, but counts pages that are still being read.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from mmap import MAP_SHARED, PAGESIZE
from typing import NamedTuple

_PROT_READ = 1
_MADV_DONTNEED = 4
_PYBUF_READ = 0x100
_FAILED = ctypes.c_void_p(-1).value
_VIEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class _Calls(NamedTuple):
    mmap: Callable[..., int | None]
    munmap: Callable[..., int]
    mincore: Callable[..., int]
    madvise: Callable[..., int]


class MappedFile:
    """Of the part of a file from `start` to `stop`. Made only where the system tells: see `of`."""

    def __init__(self, calls: _Calls, address: int, base: int, length: int) -> None:
        self._calls = calls
        self._address = address
        self._base = base
        self._length = length
        self._view: memoryview = _VIEW(address, length, _PYBUF_READ)
        self._released = base

    @classmethod
    def of(cls, fd: int, start: int, stop: int) -> MappedFile | None:
        """None where nobody can tell: not Linux, a file system without mappings, or a file of another owner, for whom
        the kernel says that all of it is in memory."""
        calls = _calls()
        if calls is None or os.geteuid() not in (0, os.fstat(fd).st_uid):
            return None
        base = start // PAGESIZE * PAGESIZE
        address = calls.mmap(None, stop - base, _PROT_READ, MAP_SHARED, fd, base)
        if address is None or address == _FAILED:
            return None
        return cls(calls, address, base, stop - base)

    def count(self, at: int, stop: int) -> int:
        """How many bytes from `at` on, up to `stop`, are in memory without a gap."""
        first = (at - self._base) // PAGESIZE
        pages = -(-(stop - self._base) // PAGESIZE) - first
        found = ctypes.create_string_buffer(pages)
        if self._calls.mincore(self._address + first * PAGESIZE, pages * PAGESIZE, found):
            return 0
        missing = found.raw.find(b"\0")
        return stop - at if missing < 0 else max((first + missing) * PAGESIZE + self._base - at, 0)

    def view(self, at: int, stop: int) -> memoryview:
        """Those bytes, for a system call to read and for nothing else: a page that cannot be had fails the call with
        EFAULT, but kills a process that touches it. To be released before `close`."""
        return self._view[at - self._base : stop - self._base]

    def release(self, at: int) -> None:
        """What lies before `at` will not be viewed again: its pages count as this process's memory no more."""
        stop = at // PAGESIZE * PAGESIZE
        if stop > self._released:
            start = self._released - self._base
            self._calls.madvise(self._address + start, stop - self._released, _MADV_DONTNEED)
            self._released = stop

    def close(self) -> None:
        """To be called once."""
        self._view.release()
        self._calls.munmap(self._address, self._length)


@cache
def _calls() -> _Calls | None:
    if sys.platform != "linux":
        return None
    # PyDLL: none of them waits, so the interpreter's lock need not be let go and fought for.
    library = ctypes.PyDLL(None)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return _Calls(library.mmap, library.munmap, library.mincore, library.madvise)

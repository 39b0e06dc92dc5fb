"""Determines which parts of a file are in the kernel's page cache (`MappedFile`).

The system call mincore(2) reports which pages of a mapping are in the page cache, and changes nothing. Two other system
calls are unsuitable:

- preadv2(2) with RWF_NOWAIT starts to read missing pages. On a busy disk, this blocked event loops for up to 0.4 s.
- cachestat(2) also counts pages that are still being read from the disk.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from mmap import MAP_SHARED, PAGESIZE
from typing import NamedTuple

# Constants of the C library and of Python's C API
_PROT_READ = 1
_MADV_DONTNEED = 4
_PYBUF_READ = 0x100
_MAP_FAILED = ctypes.c_void_p(-1).value
_new_memoryview = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class _LibraryCalls(NamedTuple):
    """The functions of the C library that `MappedFile` calls."""

    mmap: Callable[..., int | None]
    munmap: Callable[..., int]
    mincore: Callable[..., int]
    madvise: Callable[..., int]


class MappedFile:
    """A read-only memory mapping of a part of a file. Create it with `try_map`. All offsets are in bytes from the start
    of the file."""

    def __init__(self, calls: _LibraryCalls, address: int, map_start: int, length: int) -> None:
        """`address`: where the mapping begins in memory. `map_start`: offset of the first mapped byte. `length`: the
        size of the mapping in bytes."""
        self._calls = calls
        self._address = address
        self._map_start = map_start
        self._length = length
        self._view: memoryview = _new_memoryview(address, length, _PYBUF_READ)
        self._released_up_to = map_start  # offset up to which `release_before` has released the pages

    @classmethod
    def try_map(cls, fd: int, start: int, stop: int) -> MappedFile | None:
        """Maps the bytes from `start` to `stop` of an open file. Returns None in three cases:

        - The system is not Linux.
        - The file system does not support mappings.
        - The file belongs to another user, and this process does not run as root. For such a file, mincore reports
          that all pages are in the page cache."""
        calls = _library_calls()
        if calls is None or os.geteuid() not in (0, os.fstat(fd).st_uid):
            return None
        map_start = start // PAGESIZE * PAGESIZE  # a mapping must begin at a page
        address = calls.mmap(None, stop - map_start, _PROT_READ, MAP_SHARED, fd, map_start)
        if address is None or address == _MAP_FAILED:
            return None
        return cls(calls, address, map_start, stop - map_start)

    def resident_prefix(self, offset: int, stop: int) -> int:
        """Returns how many bytes, beginning at `offset`, are in the page cache without a gap. Does not count bytes at
        or after `stop`. Returns 0 if mincore fails."""
        first_page = (offset - self._map_start) // PAGESIZE
        page_count = -(-(stop - self._map_start) // PAGESIZE) - first_page  # -(-a // b) is a / b rounded up
        residency = ctypes.create_string_buffer(page_count)  # one byte for each page; 0 if the page is missing
        if self._calls.mincore(self._address + first_page * PAGESIZE, page_count * PAGESIZE, residency):
            return 0
        missing = residency.raw.find(b"\0")
        return stop - offset if missing < 0 else max((first_page + missing) * PAGESIZE + self._map_start - offset, 0)

    def view(self, start: int, stop: int) -> memoryview:
        """Returns a view of the bytes from `start` to `stop`, which you can pass to a system call. Release the view
        before you call `close`.

        Never read the view in Python: if the disk cannot read a page, the signal SIGBUS kills the process. A system
        call only fails with EFAULT in this case.
        """
        return self._view[start - self._map_start : stop - self._map_start]

    def release_before(self, offset: int) -> None:
        """Releases the pages before `offset`: they no longer count as memory of this process, but stay in the page
        cache. A later view can include these pages."""
        stop = offset // PAGESIZE * PAGESIZE
        if stop > self._released_up_to:
            start = self._released_up_to - self._map_start
            self._calls.madvise(self._address + start, stop - self._released_up_to, _MADV_DONTNEED)
            self._released_up_to = stop

    def close(self) -> None:
        """Unmaps the file. Call this method once, and call no method afterwards."""
        self._view.release()
        self._calls.munmap(self._address, self._length)


@cache
def _library_calls() -> _LibraryCalls | None:
    """Returns the functions of the C library; None if the system is not Linux."""
    if sys.platform != "linux":
        return None
    # Unlike CDLL, PyDLL keeps the interpreter's lock (GIL) during a call. This saves time. None of these calls blocks.
    library = ctypes.PyDLL(None)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return _LibraryCalls(library.mmap, library.munmap, library.mincore, library.madvise)

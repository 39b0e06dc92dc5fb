"""A file mapped into memory: which parts of it the kernel has there, and those parts to be sent from.

mincore(2) tells without touching anything. preadv2's RWF_NOWAIT would tell as well, but where a page is missing it
starts a read-ahead, of megabytes perhaps, and handing that to a busy disk takes as long as a read: event loops stood
still for up to 0.4 s. cachestat(2) takes a sixth of mincore's time, but counts pages that are still being read.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from mmap import MAP_SHARED, PAGESIZE
from typing import NamedTuple

READ_PIECE_BYTES = 2 * 1024 * 1024
"""Bytes a thread reads in for one sender before other senders get their turn with it."""
READ_AHEAD_BYTES = 8 * 1024 * 1024
"""How far threads read ahead of the sender, at the most."""
_READ_BUFFER_BYTES = 64 * 1024

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
    def try_map(cls, fd: int, start: int, stop: int) -> MappedFile | None:
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

    def count_resident(self, at: int, stop: int) -> int:
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


class ReadAhead:
    """Has threads read a file into the kernel's memory, one piece at a time, no further ahead than need be."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, file: int, stop: int, then: Callable[[BaseException | None], None]
    ) -> None:
        """Up to `stop`. `then` is called after each piece, with what went wrong."""
        self._loop = loop
        self._file = _reopen(file)
        self._stop = stop
        self._then = then
        self._reads = False
        self._closed = False
        self.to = 0  # read in so far: up to here

    def read(self, at: int) -> None:
        """Reads a piece from `at`; where a thread is at work already, that piece comes first."""
        if not self._reads:
            self._start(at)

    def follow(self, at: int) -> None:
        """Reads on, for a sender that has come to `at`."""
        if not self._reads and self.to < min(self._stop, at + READ_AHEAD_BYTES):
            self._start(self.to)

    def close(self) -> None:
        """`then` is not called any more. To be called once."""
        self._closed = True
        if not self._reads:
            os.close(self._file)

    def _start(self, at: int) -> None:
        stop = min(at + READ_PIECE_BYTES, self._stop)
        future = self._loop.run_in_executor(None, _read_in, self._file, at, stop)
        self._reads = True
        future.add_done_callback(partial(self._on_end, stop))

    def _on_end(self, stop: int, future: asyncio.Future[None]) -> None:
        self._reads = False
        error = None if future.cancelled() else future.exception()
        if self._closed:
            os.close(self._file)
        elif not future.cancelled():
            self.to = stop
            self._then(error)


def _read_in(file: int, at: int, stop: int) -> None:
    """Reads that part of the file, for nothing but the kernel to have it in memory."""
    buffer = bytearray(min(_READ_BUFFER_BYTES, stop - at))
    buffers = [buffer] * -(-(stop - at) // len(buffer))  # over and over into the same: one call, little memory
    while at < stop and (count := os.preadv(file, buffers, at)):
        at += count


def _reopen(file: int) -> int:
    """The same file, opened anew: the kernel tells from what each opening reads what it should read ahead."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(file)

"""The kernel's page cache: which parts of a file are in it, and reading files into it ahead of time.

mincore(2), on a mapping, tells which pages are in memory without side effects. preadv2 with RWF_NOWAIT would tell as
well, but starts a read-ahead for a missing page, and passing that to a busy disk blocked event loops for up to 0.4 s.
cachestat(2) takes a sixth of mincore's time, but counts pages that are still being read.
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
"""Bytes that a thread reads for one sender before other senders get their turn."""
READ_AHEAD_BYTES = 8 * 1024 * 1024
"""How many bytes threads read ahead of the sender at most."""
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
    """A memory mapping of a part of a file. To be made by `try_map`."""

    def __init__(self, calls: _Calls, address: int, base: int, length: int) -> None:
        self._calls = calls
        self._address = address
        self._base = base
        self._length = length
        self._view: memoryview = _VIEW(address, length, _PYBUF_READ)
        self._released = base

    @classmethod
    def try_map(cls, fd: int, start: int, stop: int) -> MappedFile | None:
        """Maps the bytes from `start` to `stop`. Returns None where mincore does not tell what is in memory: not Linux,
        a file system without mappings, or a file of another owner, which is always reported as in memory."""
        calls = _calls()
        if calls is None or os.geteuid() not in (0, os.fstat(fd).st_uid):
            return None
        base = start // PAGESIZE * PAGESIZE
        address = calls.mmap(None, stop - base, _PROT_READ, MAP_SHARED, fd, base)
        if address is None or address == _FAILED:
            return None
        return cls(calls, address, base, stop - base)

    def count_resident(self, at: int, stop: int) -> int:
        """Returns how many bytes from `at` on, up to `stop`, are in memory without a gap."""
        first = (at - self._base) // PAGESIZE
        pages = -(-(stop - self._base) // PAGESIZE) - first
        found = ctypes.create_string_buffer(pages)
        if self._calls.mincore(self._address + first * PAGESIZE, pages * PAGESIZE, found):
            return 0
        missing = found.raw.find(b"\0")
        return stop - at if missing < 0 else max((first + missing) * PAGESIZE + self._base - at, 0)

    def view(self, at: int, stop: int) -> memoryview:
        """Returns a view of the bytes from `at` to `stop`, to pass to a system call. To be released before `close`.

        Must not be read by this process: a page that cannot be read makes a system call fail with EFAULT, but kills a
        process that touches it.
        """
        return self._view[at - self._base : stop - self._base]

    def release(self, at: int) -> None:
        """Releases the pages before `at`, which will not be viewed again: they no longer count as this process's
        memory."""
        stop = at // PAGESIZE * PAGESIZE
        if stop > self._released:
            start = self._released - self._base
            self._calls.madvise(self._address + start, stop - self._released, _MADV_DONTNEED)
            self._released = stop

    def close(self) -> None:
        """Unmaps the file. To be called once."""
        self._view.release()
        self._calls.munmap(self._address, self._length)


@cache
def _calls() -> _Calls | None:
    if sys.platform != "linux":
        return None
    # PyDLL keeps the interpreter's lock: none of these calls blocks.
    library = ctypes.PyDLL(None)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return _Calls(library.mmap, library.munmap, library.mincore, library.madvise)


class ReadAhead:
    """Has threads read a file into the page cache, one piece at a time, a bounded distance ahead of its sender."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, file: int, stop: int, then: Callable[[BaseException | None], None]
    ) -> None:
        """Reads up to `stop`. `then` is called after each piece, with the error if there was one."""
        self._loop = loop
        self._file = _reopen(file)
        self._stop = stop
        self._then = then
        self._reads = False
        self._closed = False
        self.to = 0
        """The file was read up to here."""

    def read(self, at: int) -> None:
        """Starts to read a piece from `at`, unless a thread is reading one already."""
        if not self._reads:
            self._start(at)

    def follow(self, at: int) -> None:
        """Reads on for a sender that has reached `at`."""
        if not self._reads and self.to < min(self._stop, at + READ_AHEAD_BYTES):
            self._start(self.to)

    def close(self) -> None:
        """Ends the reading; `then` is not called any more. To be called once."""
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
    """Reads a part of the file, so that it is in the page cache."""
    buffer = bytearray(min(_READ_BUFFER_BYTES, stop - at))
    buffers = [buffer] * -(-(stop - at) // len(buffer))  # the same one again and again: one call, little memory
    while at < stop and (count := os.preadv(file, buffers, at)):
        at += count


def _reopen(file: int) -> int:
    """Opens the same file anew. The kernel decides for each open file by itself how far to read ahead."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(file)

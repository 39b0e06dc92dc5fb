"""Reads files into the kernel's page cache before they are sent, so that sending does not wait for the disk
(`ReadAhead`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

READ_PIECE_BYTES = 2 * 1024 * 1024
"""Size of a *piece*: the part of a file that a thread reads before it may read a piece of another file."""
READ_AHEAD_BYTES = 8 * 1024 * 1024
"""The next piece is read if it begins less than this many bytes after the byte that is sent next."""
_READ_BUFFER_BYTES = 64 * 1024
"""Size of the buffer into which a file is read. Nothing uses the content of the buffer."""


class ReadAhead:
    """Reads a file into the page cache, in pieces, a limited distance ahead of the code that sends the file. A thread
    of the event loop's default executor reads one piece at a time."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        file: int,
        end_offset: int,
        on_piece_read: Callable[[BaseException | None], None],
    ) -> None:
        """`file` is a file descriptor, which this object does not close. The file is read up to the offset
        `end_offset`. `on_piece_read` is called in the event loop after each piece: with the error if the piece could
        not be read, otherwise with None."""
        self._loop = loop
        self._file = _reopen(file)  # another descriptor, which this object closes
        self._end_offset = end_offset
        self._on_piece_read = on_piece_read
        self._is_reading = False
        self._closed = False
        self.read_up_to = 0
        """Offset at which the last piece ends, whether or not it could be read; 0 before the first piece."""

    def start_reading(self, offset: int) -> None:
        """Starts to read a piece at `offset`. Does nothing if a thread is reading a piece already."""
        if not self._is_reading:
            self._start_piece(offset)

    def keep_ahead_of(self, sender_offset: int) -> None:
        """Starts to read the next piece if it begins less than `READ_AHEAD_BYTES` after `sender_offset`, the offset of
        the next byte to send. Does nothing if a thread is reading a piece already, or after the last piece."""
        if not self._is_reading and self.read_up_to < min(self._end_offset, sender_offset + READ_AHEAD_BYTES):
            self._start_piece(self.read_up_to)

    def close(self) -> None:
        """Stops reading after the piece that a thread is reading now. No calls of `on_piece_read` follow. Call this
        method once."""
        self._closed = True
        if not self._is_reading:
            os.close(self._file)

    def _start_piece(self, offset: int) -> None:
        end_offset = min(offset + READ_PIECE_BYTES, self._end_offset)
        future = self._loop.run_in_executor(None, _read_into_cache, self._file, offset, end_offset)
        self._is_reading = True
        future.add_done_callback(partial(self._on_read_end, end_offset))

    def _on_read_end(self, end_offset: int, future: asyncio.Future[None]) -> None:
        self._is_reading = False
        error = None if future.cancelled() else future.exception()
        if self._closed:
            os.close(self._file)
        elif not future.cancelled():
            self.read_up_to = end_offset
            self._on_piece_read(error)


def _read_into_cache(file: int, offset: int, end_offset: int) -> None:
    """Reads the file from `offset` to `end_offset`, so that the kernel keeps these bytes in the page cache."""
    buffer = bytearray(min(_READ_BUFFER_BYTES, end_offset - offset))
    # All entries of the list are the same small buffer, so one system call can read the whole piece with little memory.
    buffers = [buffer] * -(-(end_offset - offset) // len(buffer))
    while offset < end_offset and (count := os.preadv(file, buffers, offset)):
        offset += count


def _reopen(file: int) -> int:
    """Opens the file of a descriptor again, and returns the new descriptor. If the file cannot be opened again, returns
    a duplicate of the descriptor.

    The kernel adapts its own read-ahead to each open file description (open(2)). Reads on a new description do not
    change the kernel's read-ahead for the sender."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(file)

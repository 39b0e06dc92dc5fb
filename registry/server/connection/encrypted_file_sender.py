"""Sends files over TLS. The event loop's TLS cannot use sendfile, so the bytes pass through the memory of the process.

A sender sends a file in small pieces, because a client that receives slowly must not take much memory. It reads a piece
only after the transport has encrypted the previous piece. The pieces of all connections share a memory budget. The
*share* of a sender is the part of the budget that the sender uses now.

The event loop's thread reads each piece from the kernel's page cache, because to pass such a small piece from another
thread takes longer than to read it. If the pages are not in the page cache, other threads first read them from the disk
(`ReadAhead`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from registry.server.connection.context import ConnectionContext
from registry.server.connection.file_sender import FileTruncated
from registry.server.connection.flow_control import ClientDisconnected
from registry.server.connection.read_ahead import ReadAhead
from registry.server.server_log import log
from storage.data_dir.mapped_file import MappedFile

PIECE_BYTES = 64 * 1024
"""Size of a piece."""
RESERVED_BYTES = 2 * PIECE_BYTES
"""How many bytes of the budget a sender uses while it sends a piece: the size of two pieces. The transport's buffer of
encrypted bytes can still contain the previous piece, because `FlowControl.flush` does not wait for this buffer."""


class EncryptedFileSender:
    """Sends a file, or a part of one, to one client over TLS. Create an object for each call of `run`."""

    is_blocked = False
    """Whether the sender itself waits until the socket is writable, as `FileSender` does without TLS. Always False over
    TLS, because the transport writes to the socket. The connection then finds out from the transport's write buffer and
    the kernel's TCP state whether it waits for the client."""

    def __init__(self, context: ConnectionContext, file: int, before_write: Callable[[int], None]) -> None:
        """`file` is a file descriptor open for reading. The sender does not close it. Before the sender gives bytes to
        the transport, it calls `before_write` with their number."""
        self._context = context
        self._file = file
        self._before_write = before_write
        self._share = context.worker.piece_memory.new_share()
        self._share.on_cut = self._cut_off
        self._sending: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        """The error that was passed to `end`; None: `end` was not called."""
        self._mapped_file: MappedFile | None = None
        """Tells which bytes of the file are in the page cache. None: it is unknown which bytes are."""
        self._read_ahead: ReadAhead | None = None
        """Reads the file in threads. None until the sender needs a page that is not in memory."""
        self._just_read_up_to = 0
        """Offset up to which a thread has read the file for this sender. `_count_in_memory` counts the bytes before
        this offset as in memory, and does not check the page cache. If memory is scarce, the kernel may have dropped
        the pages of these bytes again. The event loop may then wait for the disk itself, but threads do not read the
        same bytes again and again in vain."""
        self._reading: asyncio.Future[None] | None = None
        """Done when a thread has read the bytes for which the sender waits. None: the sender waits for no thread."""
        self.unsent_bytes = 0
        """How many bytes of the file the transport has not got yet."""

    def unacknowledged(self) -> int:
        """Returns 0. The connection never calls this, because `is_blocked` is always False."""
        return 0

    async def run(self, head: bytes, offset: int, count: int) -> None:
        """Sends the bytes `head`, and then `count` bytes of the file from `offset`; `count` must not be 0. Returns when
        the transport has encrypted all these bytes and has begun to write the last ones to the socket.

        After an error or a cancellation the response is incomplete, so the caller has to close the connection. Raises:

        - ClientDisconnected if the connection is lost, or if the client receives too slowly while other clients wait
          for memory.
        - TooManyRequests if this client waits too long for memory (`new_piece_memory`).
        - FileTruncated if the file is too short.
        - OSError if the file cannot be read.
        - the error that is passed to `end`."""
        self.unsent_bytes = count
        self._mapped_file = MappedFile.try_map(self._file, offset, offset + count)
        self._sending = self._context.worker.loop.create_task(self._send(head, offset, offset + count))
        try:
            await self._sending
        except asyncio.CancelledError:
            if self._error is not None:  # `end` has cancelled the task
                raise self._error from None
            raise
        finally:
            self._share.close()
            if self._mapped_file is not None:
                self._mapped_file.close()
            if self._read_ahead is not None:
                self._read_ahead.close()

    def end(self, error: BaseException) -> None:
        """Stops `run` and makes it raise `error`. Does nothing if `run` has ended or was stopped already."""
        if self._error is None and self._sending is not None:
            self._error = error
            self._sending.cancel()

    async def _send(self, head: bytes, offset: int, end_offset: int) -> None:
        transport, flow = self._context.transport, self._context.flow
        reread_offset: int | None = None
        while offset < end_offset:
            count = await self._wait_for_disk(offset, end_offset)
            # The sender holds no share while it waits for the disk: a slow disk must not count as a slow client.
            if not self._share.try_grow(RESERVED_BYTES):
                await self._share.grow(RESERVED_BYTES)
                if offset != reread_offset and not self._is_resident(offset, count):
                    # The kernel has dropped the pages during the wait for memory. Read them again, but only once for
                    # each piece, because the kernel can drop them again and again.
                    reread_offset, self._just_read_up_to = offset, 0
                    self._share.close()
                    continue
            piece = os.pread(self._file, count, offset)
            if not piece:
                raise FileTruncated(f"the file ends at byte {offset}, {end_offset - offset} bytes too early")
            offset += len(piece)
            self.unsent_bytes -= len(piece)
            self._before_write(len(head) + len(piece))
            transport.write(head + piece)
            head = b""
            await asyncio.sleep(0)  # the transport writes to the socket, and other connections get their turn
            await flow.flush()
            self._share.close()  # gives the bytes back to the budget; the share can grow again
            # `discards_writes` is also True if the client has shut down only its sending side. After the last piece,
            # such a shutdown is no error, because the client may have received everything. So after the last piece,
            # only `is_closing` counts.
            is_disconnected = flow.discards_writes() if offset < end_offset else transport.is_closing()
            if is_disconnected:
                raise ClientDisconnected

    def _cut_off(self) -> None:
        """Closes the connection, because its client receives too slowly while other clients wait for memory."""
        log.info("connection aborted: the client receives a blob too slowly while others wait for memory")
        self._share.close()
        self._context.transport.abort()
        self.end(ClientDisconnected())

    # Reading the file

    async def _wait_for_disk(self, offset: int, end_offset: int) -> int:
        """Waits until bytes at `offset` can be read without waiting for the disk. Returns the number of these bytes, at
        most `PIECE_BYTES`. If the file was truncated, a read can return fewer bytes."""
        piece_end = min(end_offset, offset + PIECE_BYTES)
        while not (count := self._count_in_memory(offset, piece_end)):
            self._reading = self._context.worker.loop.create_future()
            if self._read_ahead is None:
                self._read_ahead = ReadAhead(self._context.worker.loop, self._file, end_offset, self._on_part_read)
            self._read_ahead.start_reading(offset)
            await self._reading
            self._reading = None
            self._just_read_up_to = self._read_ahead.read_up_to
        if self._read_ahead is not None:
            self._read_ahead.keep_ahead_of(offset + count)
        return count

    def _count_in_memory(self, offset: int, end_offset: int) -> int:
        """Returns how many bytes from `offset` to `end_offset` can be read without waiting for the disk."""
        if offset < self._just_read_up_to:
            return min(end_offset, self._just_read_up_to) - offset
        if self._read_ahead is not None:
            # Leave the first read of each page to a thread, even if the page is in the page cache (because the kernel
            # has read ahead). The first read of such a page can make the kernel read ahead further, which takes time.
            end_offset = min(end_offset, self._read_ahead.read_up_to)
        if offset >= end_offset or self._mapped_file is None:
            return 0
        return self._mapped_file.resident_prefix(offset, end_offset)

    def _is_resident(self, offset: int, count: int) -> bool:
        """Returns whether `count` bytes from `offset` are in the page cache."""
        return self._mapped_file is not None and self._mapped_file.resident_prefix(offset, offset + count) == count

    def _on_part_read(self, error: BaseException | None) -> None:
        """Called when a thread has read a part of the file (`error` is None), or when `error` stopped it."""
        if self._reading is not None and not self._reading.done():
            if error is None:
                self._reading.set_result(None)
            else:
                self._reading.set_exception(error)

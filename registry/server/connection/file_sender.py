"""Sends files to sockets. The kernel copies the bytes, and the event loop does not wait for the disk.

To clients on other machines the sender sends a file by sendfile(2), which passes the pages of the kernel's page cache
to the network card. To clients on this machine, such as a reverse proxy, it sends a file from a memory mapping. The
mapping costs one more copy of each byte. But to a local client, sendfile passes on only 16 pages at a time, so the
client often sleeps and is woken. Measured CPU seconds per GiB: with sendfile 0.46 for the server and 0.24 for the
client, from a mapping 0.27 and 0.14.

sendfile blocks the calling thread if a page is not in memory, even with a non-blocking socket. So the sender sends the
file in slices, and asks the kernel before each slice which pages are in memory. As soon as some pages are missing,
threads read the rest of the file ahead of the sender, and the sender sends only the bytes that the threads have read.
The threads' reads also clear the kernel's read-ahead marks. At a marked page, sendfile would start to read from the
disk.

The sender uses a duplicate (dup) of the connection's socket for two reasons: uvloop refuses `add_writer` for a
descriptor that a transport owns, and the duplicate stays valid when the transport is closed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from registry.server.connection.flow_control import ClientDisconnected
from registry.server.connection.read_ahead import ReadAhead
from registry.server.kernel import unacknowledged_bytes
from storage.data_dir.mapped_file import MappedFile

SEND_SLICE_BYTES = 2 * 1024 * 1024
"""Largest size of a slice. The sender sends one slice in each iteration of the event loop. A slice takes about 0.5 ms,
in which the other connections wait."""
_MAPPED_RELEASE_BYTES = 2 * 1024 * 1024
"""After this many bytes are sent from a mapping, the sender releases their pages. Released pages no longer count as
memory of this process."""
_UNREACHABLE_ERRORS = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
"""Errors of a connection that Python does not report as ConnectionError."""


def is_local_peer(sock: socket.socket) -> bool:
    """Returns whether the socket's peer is on this machine. Returns False if the connection is closed."""
    if sock.family == socket.AF_UNIX:
        return True
    try:
        peer = str(sock.getpeername()[0])
        return peer.startswith("127.") or peer == sock.getsockname()[0]
    except (OSError, ValueError):  # the connection is closed; uvloop raises ValueError
        return False


class FileTruncated(Exception):
    """The file ends before the last byte that was to be sent."""


class FileSender:
    """Sends a file, or a part of one, to one client. Create an object for each call of `run`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        file: int,
        on_sent: Callable[[int], None],
        *,
        is_local: bool | None = None,
    ) -> None:
        """`sock` is the connection's socket, and `file` is a file descriptor open for reading. The sender closes
        neither. Each time the kernel has accepted some bytes, the sender calls `on_sent` with their number. `is_local`:
        whether the client is on this machine; None: the sender finds out from the socket's addresses."""
        self._loop = loop
        self._sock = sock  # `run` replaces it with a duplicate
        self._file = file
        self._on_sent = on_sent
        self._outcome: asyncio.Future[BaseException | None] = loop.create_future()
        """Done when the sending has ended. The result is the error that ended the sending; None if there was none."""
        self._unsent_head = b""
        # Offsets in the file: of the next byte to send, and after the last byte to send.
        self._next_offset = self._end_offset = 0
        self._read_ahead: ReadAhead | None = None
        """Reads the file in threads. None until the sender needs a page that is not in memory."""
        self._mapped_file: MappedFile | None = None
        self._uses_mapping = is_local_peer(sock) if is_local is None else is_local
        """Whether the sender sends the file from the mapping. If False, or if there is no mapping, it uses sendfile."""
        self._released_up_to = 0  # offset up to which the mapping's pages were released
        # Offset up to which a thread has read the file for this sender. The sender sends the bytes before this offset
        # even if the kernel has dropped their pages. If the sender waited until a thread has read the
        # dropped pages again, threads could read the same bytes again and again while memory is scarce.
        self._just_read_up_to = 0
        self.is_blocked = False
        """Whether the sender waits until the event loop reports that the socket is writable. The sender waits after
        each slice except the last. If the socket's buffer still has space, the wait ends in the event loop's next
        iteration. If the client receives slowly, the wait is long."""

    @property
    def unsent_bytes(self) -> int:
        """How many bytes of the file the kernel has not accepted yet."""
        return self._end_offset - self._next_offset

    def unacknowledged(self) -> int:
        """Returns the number of sent bytes that the client's kernel has not acknowledged yet."""
        return unacknowledged_bytes(self._sock)

    async def run(self, head: bytes, offset: int, count: int) -> None:
        """Sends the bytes `head`, and then `count` bytes of the file from `offset`. Returns when the kernel has
        accepted all of them.

        Raises ClientDisconnected if the connection fails, FileTruncated if the file is too short, OSError if the file
        cannot be read, and the error that is passed to `end`. After an error or a cancellation the response is
        incomplete, so the caller has to close the connection.
        """
        self._unsent_head = head
        self._next_offset, self._end_offset = offset, offset + count
        self._sock = _duplicate(self._sock)
        try:
            self._mapped_file = MappedFile.try_map(self._file, offset, offset + count)
            self._released_up_to = offset
            # A mapping has zeros after the end of the file, which the sender must not send. So it uses sendfile if the
            # file is too short: sendfile stops at the end of the file.
            self._uses_mapping = self._uses_mapping and os.fstat(self._file).st_size >= self._end_offset
            self._continue_sending()
            error = await self._outcome
        finally:
            self.end()
            self._sock.close()
            if self._mapped_file is not None:
                self._mapped_file.close()
            if self._read_ahead is not None:
                self._read_ahead.close()
        if error is not None:
            raise error

    def end(self, error: BaseException | None = None) -> None:
        """Stops the sending: makes `run` raise `error`, or return if `error` is None. Does nothing if the sending has
        ended already."""
        self._set_blocked(False)
        if not self._outcome.done():
            self._outcome.set_result(error)

    def _continue_sending(self) -> None:
        """Sends at most one slice. Then ends the sending if all bytes are sent or an error has occurred. Otherwise this
        method is called again: when the socket is writable, or when a thread has read the next part of the file."""
        try:
            self._send_head()
            wait_for_client = self._send_slice()
        except BlockingIOError:
            wait_for_client = True
        except Exception as error:
            self.end(ClientDisconnected() if _is_connection_error(error) else error)
            return
        if self._next_offset == self._end_offset and not self._unsent_head:
            self.end()
        else:
            self._set_blocked(wait_for_client)

    def _send_head(self) -> None:
        if self._unsent_head:
            # With MSG_MORE the kernel sends the head in one packet with the file's first bytes.
            sent = self._sock.send(self._unsent_head, socket.MSG_MORE)
            self._on_sent(sent)
            self._unsent_head = self._unsent_head[sent:]

    def _send_slice(self) -> bool:
        """Sends bytes of the file that are in memory. Returns True if the sender then has to wait until the socket is
        writable. Returns False if it has to wait until a thread has read the next bytes from the disk."""
        if self._unsent_head:
            return True  # the head must be sent completely before the file
        count = self._count_in_memory(min(self._end_offset, self._next_offset + SEND_SLICE_BYTES))
        if count == 0:
            self._start_read_ahead()
            return False
        sent = self._send(count)
        if sent == 0:
            raise FileTruncated(
                f"the file ends at byte {self._next_offset}, {self._end_offset - self._next_offset} bytes too early"
            )
        self._next_offset += sent
        self._on_sent(sent)
        if self._read_ahead is not None:
            self._read_ahead.keep_ahead_of(self._next_offset)
        return True

    def _send(self, count: int) -> int:
        """Sends up to `count` bytes of the file. Returns how many the kernel has accepted; 0 at the end of the file."""
        if self._uses_mapping and self._mapped_file is not None:
            try:
                return self._send_mapped(self._mapped_file, count)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                # The file was truncated, or the disk cannot read it. sendfile sends 0 bytes in the first case, and
                # raises an error in the second.
                self._uses_mapping = False
        return os.sendfile(self._sock.fileno(), self._file, self._next_offset, count)

    def _send_mapped(self, mapped: MappedFile, count: int) -> int:
        with mapped.view(self._next_offset, self._next_offset + count) as view:
            sent = self._sock.send(view)
        if self._next_offset + sent - self._released_up_to >= _MAPPED_RELEASE_BYTES:
            self._released_up_to = self._next_offset + sent
            mapped.release_before(self._released_up_to)
        return sent

    def _count_in_memory(self, end_offset: int) -> int:
        """Returns how many of the next bytes can be sent without waiting for the disk, counted at most up to the offset
        `end_offset`."""
        if self._next_offset < self._just_read_up_to:
            return min(end_offset, self._just_read_up_to) - self._next_offset
        if self._read_ahead is not None:
            end_offset = min(end_offset, self._read_ahead.read_up_to)
        if self._next_offset >= end_offset:
            return 0
        if self._mapped_file is not None:
            return self._mapped_file.resident_prefix(self._next_offset, end_offset)
        # Without a mapping the sender cannot ask the kernel. It sends only bytes that threads have read.
        return end_offset - self._next_offset if self._read_ahead is not None else 0

    def _start_read_ahead(self) -> None:
        if self._read_ahead is None:
            self._read_ahead = ReadAhead(self._loop, self._file, self._end_offset, self._on_part_read)
        self._read_ahead.start_reading(self._next_offset)

    def _on_part_read(self, error: BaseException | None) -> None:
        """Called when a thread stops reading a part of the file. `error`: the error that stopped the thread; None: the
        thread has read the part."""
        if self._outcome.done() or self._read_ahead is None:
            return
        if error is not None:
            self.end(error)
        elif self.is_blocked:  # the client is slower than the disk
            self._read_ahead.keep_ahead_of(self._next_offset)
        else:  # the sender waits for this part
            self._just_read_up_to = self._read_ahead.read_up_to
            self._continue_sending()

    def _set_blocked(self, is_blocked: bool) -> None:
        """Starts (True) or stops (False) waiting until the socket is writable."""
        if is_blocked and not self.is_blocked:
            self._loop.add_writer(self._sock, self._continue_sending)
        elif self.is_blocked and not is_blocked:
            self._loop.remove_writer(self._sock)
        self.is_blocked = is_blocked


def _duplicate(sock: socket.socket) -> socket.socket:
    """Returns a second socket object, with a descriptor of its own, for the same connection."""
    descriptor = os.dup(sock.fileno())
    return socket.socket(sock.family, sock.type, sock.proto, fileno=descriptor)


def _is_connection_error(error: Exception) -> bool:
    """Returns True for an error of the connection, False for an error of the file."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _UNREACHABLE_ERRORS

"""Flow control of one connection (`FlowControl`): stops reading from the client, and lets senders wait while the
transport's write buffer is full."""

from __future__ import annotations

import asyncio

from registry.server.kernel import is_tcp_ending

TLS_BUFFER_BYTES = 64 * 1024
"""High-water mark of a TLS transport's write buffer. It is low, because a TLS transport has a second buffer, for
encrypted bytes."""


class ClientDisconnected(OSError):
    """The response cannot be sent, because the client or the server has closed the connection. ASGI 2.4 requires that
    `send` raises an OSError in this case."""


class FlowControl:
    """Stops and resumes both directions of one connection. Reading stops while it is *paused*, *blocked* or both:

    - The caller pauses reading, usually until the application has taken the received bytes of a body.
    - The caller blocks reading while pipelined requests wait for the response to an earlier request."""

    def __init__(self, transport: asyncio.Transport, *, is_tls: bool) -> None:
        self._transport = transport
        self._is_tls = is_tls
        if is_tls:
            self._set_write_limits()
        self._read_paused = False
        self._read_blocked = False
        self._is_reading = True
        self._stop_count = 0
        """Number of times that reading has stopped."""
        self._checked_stop_count = 0
        """The value of `_stop_count` at the last call of `has_stayed_stopped`; 0 if the connection was reading then."""
        self.write_paused = False
        """True from the time at which the transport's write buffer exceeds its high-water mark until it falls to its
        low-water mark."""
        self._writable = asyncio.Event()
        self._writable.set()

    def discards_writes(self) -> bool:
        """Returns whether the transport discards further writes, because the connection is being closed.

        A TLS connection is closed as soon as the client shuts down its sending side. The transport's `is_closing` can
        be late to report this, so over TLS this method also asks the kernel."""
        if self._transport.is_closing():
            return True
        return self._is_tls and is_tcp_ending(self._transport.get_extra_info("socket"))

    async def drain(self) -> None:
        """Waits until `write_paused` is False."""
        await self._writable.wait()

    async def flush(self) -> None:
        """Waits until the transport's write buffer is empty or the connection is lost. Without TLS, the kernel then has
        all written bytes. With TLS, the last bytes can still be in the transport's buffer for encrypted bytes."""
        if self._transport.is_closing() or not self._transport.get_write_buffer_size():
            return
        # Makes `drain` wait for an empty buffer. The high-water mark for TLS is 1, because with 0 a TLS transport would
        # pause writing even when its buffer is empty.
        self._transport.set_write_buffer_limits(1 if self._is_tls else 0, 0)
        try:
            await self.drain()
        finally:
            if not self._transport.is_closing():
                self._set_write_limits()

    def _set_write_limits(self) -> None:
        self._transport.set_write_buffer_limits(TLS_BUFFER_BYTES if self._is_tls else None)

    def pause_reading(self) -> None:
        """Stops reading from the socket. May be called repeatedly."""
        self._read_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        """Ends the pause: reads from the socket again, unless reading is blocked. May be called repeatedly."""
        self._read_paused = False
        self._update_reading()

    def block_reading(self) -> None:
        """Stops reading from the socket until `unblock_reading` is called. May be called repeatedly."""
        self._read_blocked = True
        self._update_reading()

    def unblock_reading(self) -> None:
        """Ends the block: reads from the socket again, unless reading is paused. May be called repeatedly."""
        self._read_blocked = False
        self._update_reading()

    def _update_reading(self) -> None:
        is_reading = not (self._read_paused or self._read_blocked)
        if is_reading != self._is_reading:
            self._is_reading = is_reading
            if is_reading:
                self._transport.resume_reading()
            else:
                self._stop_count += 1
                self._transport.pause_reading()

    def has_stayed_stopped(self) -> bool:
        """Returns whether reading has been stopped the whole time since the last call of this method. The first call
        returns False."""
        before, self._checked_stop_count = self._checked_stop_count, 0 if self._is_reading else self._stop_count
        return before > 0 and before == self._checked_stop_count

    def pause_writing(self) -> None:
        """Makes `drain` wait. The transport calls this when its write buffer exceeds its high-water mark."""
        if not self.write_paused:
            self.write_paused = True
            self._writable.clear()

    def resume_writing(self) -> None:
        """Lets `drain` return. The transport calls this when its write buffer falls to its low-water mark, and the
        protocol object when the connection is lost."""
        if self.write_paused:
            self.write_paused = False
            self._writable.set()

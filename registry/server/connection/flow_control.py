"""Flow control of one connection: pauses reading, and makes writers wait while the transport's buffer is full."""

from __future__ import annotations

import asyncio


class ClientDisconnected(OSError):
    """The client closed the connection, or the server gave it up. ASGI 2.4 asks for an OSError."""


class FlowControl:
    """Whether a connection's transport reads, and whether it takes more to write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._read_paused = False
        self.write_paused = False
        """The transport holds more than its high-water mark."""
        self._writable = asyncio.Event()
        self._writable.set()

    async def drain(self) -> None:
        """Waits until the transport takes more, or the connection is lost."""
        await self._writable.wait()

    def pause_reading(self) -> None:
        """Stops reading from the socket. May be called repeatedly."""
        if not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Reads from the socket again. May be called repeatedly."""
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Makes `drain` wait. Called when the transport's buffer goes over its high-water mark."""
        if not self.write_paused:
            self.write_paused = True
            self._writable.clear()

    def resume_writing(self) -> None:
        """Lets `drain` return. Called when the transport's buffer falls below its low-water mark, and on the end."""
        if self.write_paused:
            self.write_paused = False
            self._writable.set()

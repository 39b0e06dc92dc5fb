"""A server's end of an HTTP/1.1 connection, written without an HTTP library. It counts the bytes that it has handed to
its socket, and can break off a response in many ways.

HTTP libraries do not support this, because a real server must not do it. The connection supports only the requests that
tests need: those with Content-Length or without a body.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from .request_log import RecordedRequest

MAX_HEAD = 64 << 10  # bytes
SLICE = 256 << 10
"""Largest number of bytes that are handed to the socket at once."""
TURN_BYTES = 4 << 20
"""After this many bytes, a connection lets the event loop run other connections."""
TICK = 0.01
"""Seconds between two slices of a connection with a limited rate."""
ARRIVAL_TIMEOUT = 30.0  # seconds


class PeerGone(Exception):
    """The client has closed the connection, or does not send HTTP."""


class ConnectionDropped(Exception):
    """A fault ends the response early."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset


@dataclass(frozen=True)
class HubRequest:
    """A complete request. Header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """Returns the parameters of the query. For a repeated parameter, the last value counts."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def form(self) -> dict[str, str]:
        return dict(parse_qsl(self.body.decode("latin-1"), keep_blank_values=True))


class HubConnection:
    """A connection from a client."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._buffer = bytearray()
        self._next_send = 0.0
        self._turn_bytes = 0
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_send_buffer(self, size: int) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    async def request(self) -> HubRequest | None:
        """Returns the next request; None if the client closes the connection after a complete request. Raises
        PeerGone."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise PeerGone
            if not await self._more():
                if self._buffer:
                    raise PeerGone
                return None
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for name, _, value in (line.partition(":") for line in lines):
            # docker sends an Accept header for each media type. Together they form a list (RFC 9110, section 5.3).
            key = name.strip().lower()
            headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < end + 4 + length:
            if not await self._more():
                raise PeerGone
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        del self._buffer[: end + 4 + length]
        words = first.split(" ")
        if len(words) != 3 or "transfer-encoding" in headers:
            raise PeerGone
        return HubRequest(words[0], words[1], headers, body)

    async def _more(self) -> bool:
        """Adds received bytes to the buffer. Returns False at the end of the stream. Raises PeerGone."""
        try:
            data = await self._loop.sock_recv(self._sock, MAX_HEAD)
        except OSError as error:
            raise PeerGone from error
        self._buffer += data
        return bool(data)

    async def send(self, data: bytes | memoryview, record: RecordedRequest | None = None, rate: float = 0.0) -> None:
        """Hands all bytes to the socket. Adds the number of bytes that the socket has accepted to `record.sent`.
        `rate`: bytes per second; 0: no limit. Raises PeerGone."""
        view = memoryview(data)
        while view:
            piece = view[:SLICE]
            if rate:
                piece = view[: max(1, min(SLICE, int(rate * TICK)))]
                await self._pace()
            try:
                sent_size = self._sock.send(piece)
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:
                raise PeerGone from error
            view = view[sent_size:]
            if record is not None:
                record.first_byte = record.first_byte or time.monotonic()
                record.sent += sent_size
            if rate:
                self._next_send += sent_size / rate
            self._turn_bytes += sent_size
            if self._turn_bytes >= TURN_BYTES:
                self._turn_bytes = 0
                await asyncio.sleep(0)

    async def _pace(self) -> None:
        # After a timer that was late, the connection sends faster until it has made up for the delay. It does not make
        # up for a time in which it had nothing to send.
        now = time.monotonic()
        self._next_send = max(self._next_send, now - 3 * TICK)
        if self._next_send > now:
            await asyncio.sleep(self._next_send - now)

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_writer(self._sock, wake)
        try:
            await ready
        finally:
            self._loop.remove_writer(self._sock)

    async def wait(self, release: asyncio.Event) -> None:
        """Waits until `release` is set. Raises PeerGone if the client closes the connection before."""
        while not release.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(TICK):
                    await release.wait()
            try:
                if not self._sock.recv(1, socket.MSG_PEEK):
                    raise PeerGone
            except BlockingIOError:
                pass
            except OSError as error:
                raise PeerGone from error

    async def wait_until_received(self) -> None:
        """Waits until the client's kernel has received all sent bytes, so that a reset of the connection destroys none
        of them."""
        deadline = time.monotonic() + ARRIVAL_TIMEOUT
        while time.monotonic() < deadline:
            unsent = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
            if not struct.unpack("i", unsent)[0]:
                return
            await asyncio.sleep(0.001)

    def close(self, *, reset: bool = False) -> None:
        with contextlib.suppress(OSError):
            if reset:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

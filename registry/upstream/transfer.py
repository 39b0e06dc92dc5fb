"""The download of one span of a blob (`BlobTransfer`), and the reading of a response's body (`SocketBody`).

A *span* is a byte range of a blob. A thread reads the span from a socket and passes it to a *sink*, the receiver that
the mirror provides. Another thread can end the transfer, which interrupts the read.

`SocketBody` reads the body into existing memory as it arrives. urllib3 cannot do that: its `readinto` waits until the
memory is full, and its `read1` allocates that much memory for each TLS record. Therefore the body is read from the
`http.client` response below urllib3's.

`range_header` and `response_span` handle byte ranges (RFC 9110, 14).
"""

from __future__ import annotations

import http.client
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from urllib3 import HTTPResponse
from urllib3.util.ssltransport import SSLTransport

from registry.mirror.upstream_client import BlobSink, RangesUnsupported
from registry.upstream.destinations import loggable_origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.upstream_responses import parse_count
from storage.content import Span
from storage.errors import RangeInvalid, UpstreamUnavailable

Connection = socket.socket | SSLTransport
"""A socket, or an SSLTransport without a method `shutdown`: urllib3 uses one for TLS inside TLS, which an https proxy
before an https endpoint needs."""
CallOnLoop = Callable[..., Any]
"""Schedules a call on the event loop, from any thread: `call(function, *arguments)`."""


class SinkRaised(Exception):
    """Carries an exception of the sink (`error`) past the handlers of network errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class TransferAbandoned(Exception):
    """The transfer was ended by `BlobTransfer.abandon`."""


class BlobTransfer:
    """The download of one span to the sink. One thread runs it; any other thread may call `abandon`."""

    def __init__(
        self, endpoint: str, span: Span, sink: BlobSink, attempt: EndpointAttempt, call_on_loop: CallOnLoop
    ) -> None:
        """`endpoint` is the URL that is passed to the sink. `attempt` receives reports on how the endpoint responds;
        they are made on the event loop, through `call_on_loop`."""
        self.endpoint = endpoint
        self.span = span
        self.is_running = False
        """Whether a thread has started the transfer."""
        self.sink_called = False
        """Whether the sink was called, so that it may have bytes."""
        self.received_bytes = 0
        self.is_in_sink = False
        """Whether a call of the sink runs now."""
        self._sink = sink
        self._attempt = attempt
        self._call_on_loop = call_on_loop
        self._socket: Connection | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def abandon(self) -> None:
        """Ends the transfer from another thread: its next step raises TransferAbandoned. Interrupts a read that waits
        for the upstream."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with suppress(OSError):  # closed already
                    socket.socket.shutdown(_tcp_socket(self._socket), socket.SHUT_RDWR)

    def use_socket(self, connection: Connection | None) -> None:
        """Sets the socket that the thread reads from; None: there is no connection. Raises TransferAbandoned."""
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise TransferAbandoned

    def forget_socket(self) -> None:
        """Forgets the socket, because another transfer may use it next. `abandon` then leaves it alone."""
        with self._lock:
            self._socket = None

    # Reports to the `EndpointAttempt`

    def on_sent(self) -> None:
        """Called on the event loop when the request is sent."""
        self._attempt.on_sent()

    def on_headers(self, status: int) -> None:
        """Called in the thread when the endpoint has responded."""
        self._call_on_loop(self._attempt.on_headers, status)

    def on_connection_failed(self) -> None:
        """Called in the thread when no connection could be made."""
        self._call_on_loop(self._attempt.on_connection_failed)

    def begin(self, start: int, stop: int, size: int) -> None:
        """Tells the sink that bytes `start` to `stop` (exclusive) follow, of a blob of `size` bytes. Called in the
        thread. Raises TransferAbandoned, SinkRaised."""
        with self._lock:
            if self._abandoned:
                raise TransferAbandoned
            self.sink_called = True
        with self._calling_sink():
            self._sink.begin(self.endpoint, start, stop, size)

    def take(self, offset: int, data: memoryview) -> None:
        """Passes `data`, which begins at `offset` in the blob, to the sink. Called in the thread. Raises
        TransferAbandoned, SinkRaised."""
        if self._abandoned:
            raise TransferAbandoned
        with self._calling_sink():
            self._sink.take(offset, data)
        self.received_bytes += len(data)

    @contextmanager
    def _calling_sink(self) -> Iterator[None]:
        self.is_in_sink = True
        try:
            yield
        except BaseException as error:
            raise SinkRaised(error) from None
        finally:
            self.is_in_sink = False


def _tcp_socket(connection: Connection) -> socket.socket:
    """Returns the TCP socket below the TLS layers. Only the thread that reads may use the TLS layers, so another thread
    has to shut down the TCP socket."""
    while isinstance(connection, SSLTransport):
        connection = connection.socket
    return connection


_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The end of a chunked body after its last data byte: the end of that chunk, and the zero-length chunk (RFC 9112,
7.1)."""


class SocketBody:
    """The body of a response, of at most `length` bytes."""

    def __init__(self, response: HTTPResponse, length: int) -> None:
        self._response = response
        self._remaining_bytes = length
        self._states_length = response.length_remaining == length
        """Whether the response states this length, so that the body ends after its last byte."""
        raw = response._fp
        if not isinstance(raw, http.client.HTTPResponse) or response.connection is None:
            raise TypeError("urllib3's response has an unexpected structure")
        self._raw = raw
        self._chunked = bool(raw.chunked)
        self._socket: socket.socket | None = response.connection.sock
        self._poll = select.poll()
        if self._socket is not None:
            self._poll.register(self._socket, select.POLLIN)

    def read_into(self, memory: memoryview) -> int:
        """Waits for bytes, then reads the bytes that have arrived into `memory`. Returns their number; 0 at the end of
        the body. Raises OSError, http.client.HTTPException, and urllib3's HTTPError."""
        memory = memory[: self._remaining_bytes]
        file, max_bytes = self._raw.fp, len(memory)
        if self._chunked:
            # http.client limits the length of a chunk-size line; urllib3's own reader does not.
            data = self._raw.read1(max_bytes)
            count = len(data)
            memory[:count] = data
        elif file is None:
            return 0
        else:
            # Under TLS, each read returns at most 16 KiB, so more reads follow while bytes are ready.
            read, poll = file.readinto1, self._poll.poll
            count = read(memory) or 0
            while 0 < count < max_bytes and poll(0):
                try:
                    more = read(memory[count:])
                except OSError:
                    break  # the bytes read before are valid; the next call of `read_into` raises the error
                if not more:
                    break
                count += more
        self._remaining_bytes -= count
        return count

    def finish(self) -> None:
        """Gives the connection back to the pool if the body was read to its end. Otherwise closes it. Does not wait."""
        has_ended = self._consume_last_chunk() if self._chunked else self._states_length
        if self._remaining_bytes or not has_ended:
            self.discard()
            return
        self._raw.close()  # closes the response only; the connection stays open unless the server closes it
        self._response.release_conn()

    def _consume_last_chunk(self) -> bool:
        """Reads the end of a chunked body, and returns whether it had already arrived. Does not wait for it, because
        that wait could not be interrupted, and a new connection costs less."""
        file, sock = self._raw.fp, self._socket
        if file is None or sock is None:
            return False
        timeout = sock.gettimeout()
        sock.settimeout(0)
        try:
            if not file.peek(len(_LAST_CHUNK)).startswith(_LAST_CHUNK):
                return False
            file.read(len(_LAST_CHUNK))  # consumes the peeked bytes
            return True
        except (OSError, ValueError):
            return False
        finally:
            sock.settimeout(timeout)

    def discard(self) -> None:
        """Closes the connection, which is in an unknown state and must not be reused."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def range_header(span: Span) -> str | None:
    """Returns the value of the `Range` header for a span (RFC 9110, 14.1.2); None if the span is the whole blob. A span
    with a negative start is the end of the blob: `bytes=-500` means the last 500 bytes."""
    if span.start < 0:
        return f"bytes={span.start}"
    if span.start == 0 and not span.stop:
        return None
    return f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"


def response_span(response: HTTPResponse, span: Span, url: str) -> tuple[int, int, int]:
    """Returns the start and the exclusive stop of the bytes in the response, and the size of the whole blob. `span` is
    what was requested. Raises RangesUnsupported if the upstream sends the whole blob instead, and UpstreamUnavailable
    if it sends another range, compressed bytes, or no length."""
    server = loggable_origin(url)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UpstreamUnavailable(f"{server} compresses the blob, which was not asked for")
    if response.status == 206:
        content_range = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if content_range is None:
            raise UpstreamUnavailable(f"{server} sends a part of the blob without saying which")
        start, stop, size = int(content_range[1]), int(content_range[2]) + 1, int(content_range[3])
        length = parse_count(response.headers.get("content-length"))
    else:
        length = parse_count(response.headers.get("content-length"))
        if length is None:
            raise UpstreamUnavailable(f"{server} does not say how long the blob is")
        if span.start != 0 or (span.stop is not None and span.stop < length):
            raise RangesUnsupported
        start, stop, size = 0, length, length
    try:
        requested = span.to_offsets(size) if size or span.start or span.stop else (0, 0)
    except RangeInvalid:
        requested = (-1, -1)  # equals no range of a response
    if (start, stop) != requested or stop > size or (response.status == 206 and length not in (None, stop - start)):
        raise UpstreamUnavailable(f"{server} sends another part of the blob than the one asked for")
    return start, stop, size

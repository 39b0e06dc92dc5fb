"""The download of one span of a blob (`BlobTransfer`), and the reading of a response's body (`SocketBody`).

A *span* is a byte range of a blob. An *endpoint* is one of the URLs of an upstream registry. `BlobClient` runs each
transfer in a thread, which reads the span from a socket and passes it to a *sink*: an object of the mirror that
receives the bytes. Any other thread can abandon the transfer, even while the transfer waits for bytes.

`SocketBody` copies the bytes that have arrived into a buffer of the caller. It reads from the `http.client` response
that urllib3's response wraps, because urllib3's `readinto` waits until the buffer is full, and urllib3's `read1`
allocates memory of the size of the buffer for each TLS record.

`range_header` and `response_span` convert between spans and the headers of range requests (RFC 9110, 14).
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
"""A socket. An https endpoint behind an https proxy needs TLS inside TLS, for which urllib3 uses SSLTransport."""
CallOnLoop = Callable[..., Any]
"""A function that schedules a call on the event loop, from any thread: `call_on_loop(function, *arguments)`."""


class SinkRaised(Exception):
    """The sink raised the exception `error`. This wrapper distinguishes the exception from errors of the network."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class TransferAbandoned(Exception):
    """The thread of a transfer must stop, because `BlobTransfer.abandon` was called."""


class BlobTransfer:
    """The download of one span to a sink. One thread runs it, and any other thread may call `abandon`."""

    def __init__(
        self,
        endpoint: str,
        span: Span,
        sink: BlobSink,
        attempt: EndpointAttempt,
        call_on_loop: CallOnLoop,
        expected_size: int | None = None,
    ) -> None:
        """Starts nothing.

        - `endpoint`: the URL of the endpoint, which the transfer passes to the sink.
        - `attempt` receives reports on how the endpoint responds, by calls on the event loop.
        - `call_on_loop` schedules these calls.
        - `expected_size`: the size of the whole blob in bytes, for a response that does not state the size. None: a
          response without the size is an error."""
        self.endpoint = endpoint
        self.span = span
        self.expected_size = expected_size
        self.has_started = False
        """Whether a thread has started the transfer."""
        self.sink_called = False
        """True after the first call of the sink. The sink may have received bytes then."""
        self.received_bytes = 0
        """Number of bytes that were passed to the sink."""
        self.is_in_sink = False
        """Whether a call of the sink is running."""
        self._sink = sink
        self._attempt = attempt
        self._call_on_loop = call_on_loop
        self._socket: Connection | None = None
        """The socket that `abandon` shuts down; None while the transfer uses no socket."""
        self._abandoned = False
        """Whether `abandon` was called."""
        self._lock = threading.Lock()
        """Protects `_socket` and `_abandoned`."""

    def abandon(self) -> None:
        """Stops the transfer, from another thread. Shuts down the socket of the transfer, which interrupts a read that
        waits for the upstream. After that, `begin_request`, `set_socket`, `begin` and `take` raise TransferAbandoned.
        Does not interrupt a running call of the sink."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with suppress(OSError):  # the socket is closed already
                    socket.socket.shutdown(_tcp_socket(self._socket), socket.SHUT_RDWR)

    def begin_request(self) -> None:
        """Must be called before the thread sends a request. Calls `forget_socket`. Raises TransferAbandoned if
        `abandon` was called."""
        self.forget_socket()
        self._raise_if_abandoned()

    def _raise_if_abandoned(self) -> None:
        """Raises TransferAbandoned if `abandon` was called."""
        if self._abandoned:
            raise TransferAbandoned

    def set_socket(self, connection: Connection) -> None:
        """Sets the socket that `abandon` shuts down. Must be called before the thread reads from it. Raises
        TransferAbandoned if `abandon` was called."""
        with self._lock:
            self._socket = connection
            self._raise_if_abandoned()

    def forget_socket(self) -> None:
        """Makes `abandon` shut down no socket. Must be called before another transfer can use the connection."""
        with self._lock:
            self._socket = None

    def on_send(self) -> None:
        """Reports that the request to the endpoint is about to be sent. Must be called on the event loop."""
        self._attempt.on_send()

    def on_headers(self, status: int) -> None:
        """Reports that the endpoint has responded with this status. Must be called in the thread."""
        self._call_on_loop(self._attempt.on_headers, status)

    def on_oversized_head(self) -> None:
        """Reports that the endpoint has responded with a head that has too many or too long lines, which http.client
        refuses. Must be called in the thread."""
        self._call_on_loop(self._attempt.on_working)

    def on_connection_failed(self) -> None:
        """Reports that no connection to the endpoint could be made. Must be called in the thread."""
        self._call_on_loop(self._attempt.on_connection_failed)

    def begin(self, start: int, stop: int, size: int) -> None:
        """Tells the sink that the bytes from offset `start` to offset `stop` (exclusive) of a blob of `size` bytes
        follow. Must be called in the thread. Raises TransferAbandoned, SinkRaised."""
        with self._lock:
            self._raise_if_abandoned()
            self.sink_called = True
        with self._calling_sink():
            self._sink.begin(self.endpoint, start, stop, size)

    def take(self, offset: int, data: memoryview) -> None:
        """Passes `data` to the sink. `offset`: the offset in the blob of the first byte of `data`. Must be called in
        the thread. Raises TransferAbandoned, SinkRaised."""
        self._raise_if_abandoned()
        with self._calling_sink():
            self._sink.take(offset, data)
        self.received_bytes += len(data)

    @contextmanager
    def _calling_sink(self) -> Iterator[None]:
        """Context manager for a call of the sink. Sets `is_in_sink`, and converts an exception of the sink to
        SinkRaised."""
        self.is_in_sink = True
        try:
            yield
        except BaseException as error:
            raise SinkRaised(error) from None
        finally:
            self.is_in_sink = False


def _tcp_socket(connection: Connection) -> socket.socket:
    """Returns the socket of the TCP connection, which may be an `ssl.SSLSocket`. A thread that does not read from the
    socket must shut it down with `socket.socket.shutdown`. It must not call `SSLSocket.shutdown`, which also changes
    the TLS state that the reading thread uses."""
    while isinstance(connection, SSLTransport):
        connection = connection.socket
    return connection


_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The bytes that follow the data of a chunked body: the end of the last chunk with data, and a chunk of length zero
(RFC 9112, 7.1)."""


class SocketBody:
    """The body of a response, which is read once. When all bytes are read, or after an error, the caller must call
    `finish` or `discard`."""

    def __init__(self, response: HTTPResponse, length: int) -> None:
        """`length` is the number of bytes to read."""
        self._response = response
        self._remaining_bytes = length
        self.is_length_assumed = has_unknown_length(response) and response.status == 200
        """Whether `length` is only the expected size of the blob, because a response with the status 200 states no
        length. If so, call `has_ended` after `length` bytes to check this size."""
        self._is_end_known = response.length_remaining == length
        """Whether the response states that its body ends after `length` bytes."""
        raw = response._fp
        if not isinstance(raw, http.client.HTTPResponse) or response.connection is None:
            raise TypeError("urllib3's response has an unexpected structure")
        self._raw = raw
        self.is_chunked = bool(raw.chunked)
        """True if the response has a chunked body. A complete chunked body ends with a chunk of length zero (RFC 9112,
        7.1). If the connection ends before this chunk, the body is incomplete."""
        self._socket: socket.socket | None = response.connection.sock
        self._poll = select.poll()
        if self._socket is not None:
            self._poll.register(self._socket, select.POLLIN)

    def read_into(self, memory: memoryview) -> int:
        """Waits until bytes have arrived, and reads those that fit into `memory`. Returns the number of bytes that were
        read; 0 if the body has ended or `length` bytes were read before. Raises OSError, http.client.HTTPException,
        and urllib3's HTTPError."""
        memory = memory[: self._remaining_bytes]
        file, max_bytes = self._raw.fp, len(memory)
        if self.is_chunked:
            # http.client limits the length of the line with the size of a chunk. urllib3 does not limit it.
            data = self._raw.read1(max_bytes)
            count = len(data)
            memory[:count] = data
        elif file is None:
            return 0
        else:
            # With TLS, one read returns at most 16 KiB. So the loop reads on until `memory` is full or no bytes wait.
            read, poll = file.readinto1, self._poll.poll
            count = read(memory) or 0
            while 0 < count < max_bytes and poll(0):
                try:
                    more_count = read(memory[count:])
                except OSError:
                    break  # the bytes that were read before are returned; the next `read_into` raises the error
                if not more_count:
                    break
                count += more_count
        self._remaining_bytes -= count
        return count

    def has_ended(self) -> bool:
        """Returns whether a body of unknown length ends after `length` bytes, which must have been read. Waits until
        the body ends or another byte arrives. Raises the errors of `read_into`."""
        if self.is_chunked:
            return not self._raw.read1(1)
        return self._raw.fp is None or not self._raw.fp.read1(1)

    def finish(self) -> None:
        """If the body was read to its end, gives the connection back to the pool. Otherwise closes the connection. Does
        not wait for bytes."""
        is_at_end = self._consume_last_chunk() if self.is_chunked else self._is_end_known
        if self._remaining_bytes or not is_at_end:
            self.discard()
            return
        self._raw.close()  # closes only the response, unless the server wants the connection closed
        self._response.release_conn()

    def _consume_last_chunk(self) -> bool:
        """If the end of a chunked body has arrived, reads it and returns True. Otherwise returns False. Does not wait:
        `abandon` could not interrupt the wait, because `BlobClient` calls `forget_socket` before `finish`."""
        file, sock = self._raw.fp, self._socket
        if file is None:  # `has_ended` has read the end
            return True
        if sock is None:
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
        """Closes the connection. No other request may use the connection, because it may still receive bytes of the
        body."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def range_header(span: Span) -> str | None:
    """Returns the value of the `Range` header that requests a span (RFC 9110, 14.1.2). For a span with a negative
    start, requests the end of the blob: `bytes=-500` means the last 500 bytes. Returns None for `Span(0)`,
    which is the whole blob, and for `Span(0, 0)`, which is the whole of an empty blob."""
    if span.start < 0:
        return f"bytes={span.start}"
    if span.start == 0 and not span.stop:
        return None
    return f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"


def has_unknown_length(response: HTTPResponse) -> bool:
    """Returns whether the response has no valid `Content-Length`."""
    return parse_count(response.headers.get("content-length")) is None


def response_span(
    response: HTTPResponse, span: Span, url: str, expected_size: int | None = None
) -> tuple[int, int, int]:
    """Checks that a response from `url` contains the requested `span`. Returns the start and the exclusive stop of the
    span in the blob, and the size of the whole blob. `expected_size`: the size of the whole blob, for a response that
    states no length; None: not known.

    Raises RangesUnsupported if the response contains the whole blob, but `span` is only a part of it. Raises
    UpstreamUnavailable in these cases:

    - The response contains another part of the blob, or does not state which part it contains.
    - The response is compressed.
    - A response with the status 200 states no length, and `expected_size` is None.
    - A response with the status 200 states no length, and is an HTML page. Such a page is probably an error page."""
    server = loggable_origin(url)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UpstreamUnavailable(f"{server} compresses the blob, although the request does not allow it")
    if response.status == 206:
        content_range = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if content_range is None:
            raise UpstreamUnavailable(f"{server} sends a part of the blob without saying which")
        start, stop, size = int(content_range[1]), int(content_range[2]) + 1, int(content_range[3])
        length = parse_count(response.headers.get("content-length"))
    else:
        length = parse_count(response.headers.get("content-length"))
        if length is None and not response.headers.get("content-type", "").lower().startswith("text/html"):
            length = expected_size
        if length is None:
            raise UpstreamUnavailable(f"{server} does not say how long the blob is")
        if span.start != 0 or (span.stop is not None and span.stop < length):
            raise RangesUnsupported
        start, stop, size = 0, length, length
    # `to_offsets` raises RangeInvalid for every span of an empty blob.
    is_whole_empty_blob = size == 0 and not span.start and not span.stop
    try:
        requested = (0, 0) if is_whole_empty_blob else span.to_offsets(size)
    except RangeInvalid:
        requested = (-1, -1)  # the blob has no bytes in `span`, so no response is right
    if (start, stop) != requested or stop > size or (response.status == 206 and length not in (None, stop - start)):
        raise UpstreamUnavailable(f"{server} sends another part of the blob than the one asked for")
    return start, stop, size

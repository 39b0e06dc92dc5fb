"""One span of a blob on its way from a socket to a sink (`BlobTransfer`).

`SocketBody` reads a response's body into existing memory as it arrives. urllib3's `readinto` waits until the memory is
full, and `read1` allocates all of it for each TLS record, so the body is read one layer below, on urllib3's
connections. `registry.upstream.transport` reports the socket, so that another thread can interrupt the read.

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
"""With an https proxy before an https endpoint, urllib3 wraps TLS in TLS: an SSLTransport, which has no `shutdown`."""
CallOnLoop = Callable[..., Any]


class SinkRaised(Exception):
    """Carries the sink's exception past the handlers of network errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class TransferAbandoned(Exception):
    """The transfer was cancelled."""


class BlobTransfer:
    """One span on its way to the sink. Another thread can end it."""

    def __init__(
        self, endpoint: str, span: Span, sink: BlobSink, attempt: EndpointAttempt, call_on_loop: CallOnLoop
    ) -> None:
        """`call_on_loop` schedules a call on the event loop."""
        self.endpoint = endpoint
        self.span = span
        self.sending = False
        """Whether a thread runs the transfer."""
        self.begun = False
        """Whether the sink was called."""
        self.received = 0
        self.in_sink = False
        self._sink = sink
        self._attempt = attempt
        self._call_on_loop = call_on_loop
        self._socket: Connection | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def abandon(self) -> None:
        """Ends the transfer. Interrupts a read that waits for the upstream."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with suppress(OSError):  # closed already
                    socket.socket.shutdown(_below_tls(self._socket), socket.SHUT_RDWR)

    def on_socket(self, connection: Connection | None) -> None:
        """Sets the socket that the thread reads from now on. Raises TransferAbandoned."""
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise TransferAbandoned

    def forget_socket(self) -> None:
        """Forgets the socket, which another transfer may use from now on."""
        with self._lock:
            self._socket = None

    # The endpoint's state, passed on to the `EndpointAttempt`.

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
        """Announces the span to the sink. Called in the thread. Raises TransferAbandoned, SinkRaised."""
        with self._lock:
            if self._abandoned:
                raise TransferAbandoned
            self.begun = True
        with self._calling_sink():
            self._sink.begin(self.endpoint, start, stop, size)

    def take(self, offset: int, data: memoryview) -> None:
        """Passes bytes to the sink. Called in the thread. Raises TransferAbandoned, SinkRaised."""
        if self._abandoned:
            raise TransferAbandoned
        with self._calling_sink():
            self._sink.take(offset, data)
        self.received += len(data)

    @contextmanager
    def _calling_sink(self) -> Iterator[None]:
        self.in_sink = True
        try:
            yield
        except BaseException as error:
            raise SinkRaised(error) from None
        finally:
            self.in_sink = False


def _below_tls(connection: Connection) -> socket.socket:
    """Returns the TCP socket that the thread waits on. The TLS layers above it, SSLSocket's own `shutdown` included,
    belong to that thread."""
    while isinstance(connection, SSLTransport):
        connection = connection.socket
    return connection


_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The end of a chunked body after its last data byte: the end of that chunk, and the zero-length chunk (RFC 9112,
7.1)."""


class SocketBody:
    """A response's body, of `length` bytes at most."""

    def __init__(self, response: HTTPResponse, length: int) -> None:
        self._response = response
        self._left = length
        self._whole = response.length_remaining == length
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
        """Waits for bytes, then reads what has arrived into `memory`. Returns the number of bytes; 0 at the end. Raises
        OSError, http.client.HTTPException, and urllib3's HTTPError."""
        memory = memory[: self._left]
        file, want = self._raw.fp, len(memory)
        if self._chunked:
            # Not urllib3's reader, which accepts a chunk-size line of any length.
            data = self._raw.read1(want)
            count = len(data)
            memory[:count] = data
        elif file is None:
            return 0
        else:
            # Under TLS, each read returns at most 16 KiB.
            read, ready = file.readinto1, self._poll.poll
            count = read(memory) or 0
            while 0 < count < want and ready(0):
                try:
                    more = read(memory[count:])
                except OSError:
                    break  # the next read raises it; the bytes read before are valid
                if not more:
                    break
                count += more
        self._left -= count
        return count

    def finish(self) -> None:
        """Gives the connection back to the pool if the body was read to its end; else closes it. Does not wait."""
        ended = self._last_chunk_is_here() if self._chunked else self._whole
        if self._left or not ended:
            self.discard()
            return
        self._raw.close()  # closes the response; the connection stays open if the server keeps it
        self._response.release_conn()

    def _last_chunk_is_here(self) -> bool:
        """Returns whether the end of a chunked body has arrived together with its last bytes. Does not wait for it:
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
        """Closes the connection."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def range_header(span: Span) -> str | None:
    """Returns the `Range` header for a span (RFC 9110, 14.1.2); None: the whole blob."""
    if span.start < 0:
        return f"bytes={span.start}"
    if span.start == 0 and not span.stop:
        return None
    return f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"


def response_span(response: HTTPResponse, span: Span, url: str) -> tuple[int, int, int]:
    """Returns start and stop of the response's bytes, and the blob's size. Raises RangesUnsupported, or
    UpstreamUnavailable if the response is not what was requested."""
    where = loggable_origin(url)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UpstreamUnavailable(f"{where} compresses the blob, which was not asked for")
    if response.status == 206:
        named = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if named is None:
            raise UpstreamUnavailable(f"{where} sends a part of the blob without saying which")
        start, stop, size = int(named[1]), int(named[2]) + 1, int(named[3])
        length = parse_count(response.headers.get("content-length"))
    else:
        length = parse_count(response.headers.get("content-length"))
        if length is None:
            raise UpstreamUnavailable(f"{where} does not say how long the blob is")
        if span.start != 0 or (span.stop is not None and span.stop < length):
            raise RangesUnsupported
        start, stop, size = 0, length, length
    try:
        wanted = span.to_offsets(size) if size or span.start or span.stop else (0, 0)
    except RangeInvalid:
        wanted = (-1, -1)
    if (start, stop) != wanted or stop > size or (response.status == 206 and length not in (None, stop - start)):
        raise UpstreamUnavailable(f"{where} sends another part of the blob than the one asked for")
    return start, stop, size

"""One span of a blob on its way to a sink, and the way to end it from outside its thread.

A response's body read into memory that is there already, as it comes. On urllib3's connections and pools.

urllib3's `readinto` waits until the memory is full, and `read1` allocates all of it for each record of TLS. So the body
is read one layer below. `registry.upstream.transport` tells which socket that is, so that another thread can end the
waiting.

Parts of a blob: what to ask for, and whether an answer brings just that (RFC 9110, 14).
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
"""To an https endpoint by an https proxy, urllib3 puts TLS inside TLS: a SSLTransport, which cannot be shut down."""
CallOnLoop = Callable[..., Any]


class SinkRaised(Exception):
    """Carries what the sink raised past those who look for a network's errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class TransferAbandoned(Exception):
    """Nobody waits for this transfer any more."""


class BlobTransfer:
    """One span on its way, and the way to end it from outside its thread."""

    def __init__(
        self, endpoint: str, span: Span, sink: BlobSink, attempt: EndpointAttempt, call_on_loop: CallOnLoop
    ) -> None:
        """`tell` has something called on the event loop."""
        self.endpoint = endpoint
        self.span = span
        self.sending = False
        """A thread is at it."""
        self.begun = False
        """The sink was called."""
        self.received = 0
        self.in_sink = False
        self._sink = sink
        self._attempt = attempt
        self._call_on_loop = call_on_loop
        self._socket: Connection | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def abandon(self) -> None:
        """Ends it: what waits for the other end wakes at once."""
        with self._lock:
            self._abandoned = True
            if self._socket is not None:
                with suppress(OSError):  # it is closed already
                    socket.socket.shutdown(_below_tls(self._socket), socket.SHUT_RDWR)

    def on_socket(self, connection: Connection | None) -> None:
        """The socket that is waited on from now on. Raises Abandoned."""
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise TransferAbandoned

    def forget_socket(self) -> None:
        """There is no socket to shut down any more: it may be another's from now on."""
        with self._lock:
            self._socket = None

    # What the endpoint does, as its `EndpointAttempt` is told.

    def on_sent(self) -> None:
        self._attempt.on_sent()

    def on_headers(self, status: int) -> None:
        """Called in the thread."""
        self._call_on_loop(self._attempt.on_headers, status)

    def on_connection_failed(self) -> None:
        """Called in the thread."""
        self._call_on_loop(self._attempt.on_connection_failed)

    def begin(self, start: int, stop: int, size: int) -> None:
        with self._lock:
            if self._abandoned:
                raise TransferAbandoned
            self.begun = True
        with self._calling_sink():
            self._sink.begin(self.endpoint, start, stop, size)

    def take(self, offset: int, data: memoryview) -> None:
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
    """The socket that the thread waits on. What lies above it, SSLSocket's own `shutdown` included, belongs to that
    thread."""
    while isinstance(connection, SSLTransport):
        connection = connection.socket
    return connection


_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""What follows the bytes of a chunked body: the end of its last chunk, and the chunk that says so (RFC 9112, 7.1)."""


class SocketBody:
    """What follows a response's headers, at most `length` bytes of it."""

    def __init__(self, response: HTTPResponse, length: int) -> None:
        self._response = response
        self._left = length
        self._whole = response.length_remaining == length
        raw = response._fp
        if not isinstance(raw, http.client.HTTPResponse) or response.connection is None:
            raise TypeError("urllib3's response is built in another way than it was")
        self._raw = raw
        self._chunked = bool(raw.chunked)
        self._socket: socket.socket | None = response.connection.sock
        self._poll = select.poll()
        if self._socket is not None:
            self._poll.register(self._socket, select.POLLIN)

    def read_into(self, memory: memoryview) -> int:
        """Waits for bytes, then takes what has come, as far as it goes in; 0: there are no more. Raises what a socket
        raises, http.client.HTTPException, and urllib3's HTTPError."""
        memory = memory[: self._left]
        file, want = self._raw.fp, len(memory)
        if self._chunked:
            # Not urllib3's own: it takes a line of any length for a chunk's size.
            data = self._raw.read1(want)
            count = len(data)
            memory[:count] = data
        elif file is None:
            return 0
        else:
            # Under TLS this goes round for each 16 KiB.
            read, ready = file.readinto1, self._poll.poll
            count = read(memory) or 0
            while 0 < count < want and ready(0):
                try:
                    more = read(memory[count:])
                except OSError:
                    break  # told by the next read; what came before counts
                if not more:
                    break
                count += more
        self._left -= count
        return count

    def finish(self) -> None:
        """Gives the connection back for the next request when the body was read to its end; else closes it. Waits for
        nothing."""
        ended = self._last_chunk_is_here() if self._chunked else self._whole
        if self._left or not ended:
            self.discard()
            return
        self._raw.close()  # of a response: its connection stays open, if the server lets it
        self._response.release_conn()

    def _last_chunk_is_here(self) -> bool:
        """Whether the end of a chunked body has come with its last bytes. It is not waited for: nobody could end that
        waiting, and a new connection costs less."""
        file, sock = self._raw.fp, self._socket
        if file is None or sock is None:
            return False
        patience = sock.gettimeout()
        sock.settimeout(0)
        try:
            if not file.peek(len(_LAST_CHUNK)).startswith(_LAST_CHUNK):
                return False
            file.read(len(_LAST_CHUNK))  # of what was peeked at
            return True
        except (OSError, ValueError):
            return False
        finally:
            sock.settimeout(patience)

    def discard(self) -> None:
        """Closes the connection."""
        connection = self._response.connection
        self._response.close()
        if connection is not None:
            connection.close()
        self._response.release_conn()


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def range_header(span: Span) -> str | None:
    """The `Range` to send (RFC 9110, 14.1.2); None: the whole blob is wanted."""
    if span.start < 0:
        return f"bytes={span.start}"
    if span.start == 0 and not span.stop:
        return None
    return f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"


def response_span(response: HTTPResponse, span: Span, url: str) -> tuple[int, int, int]:
    """Start and stop of what the response brings, and the blob's size. Raises RangesUnsupported, UpstreamUnavailable:
    it is not what was asked for."""
    where = loggable_origin(url)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UpstreamUnavailable(f"{where} compresses the blob, which was not asked for")
    if response.status == 206:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if told is None:
            raise UpstreamUnavailable(f"{where} sends a part of the blob without saying which")
        start, stop, size = int(told[1]), int(told[2]) + 1, int(told[3])
        length = parse_count(response.headers.get("content-length"))
    else:
        length = parse_count(response.headers.get("content-length"))
        if length is None:
            raise UpstreamUnavailable(f"{where} does not say how long the blob is")
        if span.start != 0 or (span.stop is not None and span.stop < length):
            raise RangesUnsupported
        start, stop, size = 0, length, length
    try:
        wanted = span.within(size) if size or span.start or span.stop else (0, 0)
    except RangeInvalid:
        wanted = (-1, -1)
    if (start, stop) != wanted or stop > size or (response.status == 206 and length not in (None, stop - start)):
        raise UpstreamUnavailable(f"{where} sends another part of the blob than the one asked for")
    return start, stop, size

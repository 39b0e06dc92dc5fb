"""One span of a blob on its way to a sink, and the way to end it from outside its thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from urllib3.util.ssltransport import SSLTransport

from registry.mirror.source import Sink
from registry.upstream.endpoints import Trial
from storage.content import Span

Connection = socket.socket | SSLTransport
"""To an https endpoint by an https proxy, urllib3 puts TLS inside TLS: a SSLTransport, which cannot be shut down."""
Tell = Callable[..., Any]


class SinkRaised(Exception):
    """Carries what the sink raised past those who look for a network's errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Abandoned(Exception):
    """Nobody waits for this transfer any more."""


class Transfer:
    """One span on its way, and the way to end it from outside its thread."""

    def __init__(self, endpoint: str, span: Span, sink: Sink, trial: Trial, tell: Tell) -> None:
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
        self._trial = trial
        self._tell = tell
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

    def hold(self, connection: Connection | None) -> None:
        """The socket that is waited on from now on. Raises Abandoned."""
        with self._lock:
            self._socket = connection
            if self._abandoned:
                raise Abandoned

    def release(self) -> None:
        """There is no socket to shut down any more: it may be another's from now on."""
        with self._lock:
            self._socket = None

    # What the endpoint does, as its `Trial` is told.

    def sent(self) -> None:
        self._trial.sent()

    def headers(self, status: int) -> None:
        """Called in the thread."""
        self._tell(self._trial.headers, status)

    def no_connection(self) -> None:
        """Called in the thread."""
        self._tell(self._trial.no_connection)

    def begin(self, start: int, stop: int, size: int) -> None:
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self.begun = True
        with self._calling_sink():
            self._sink.begin(self.endpoint, start, stop, size)

    def take(self, offset: int, data: memoryview) -> None:
        if self._abandoned:
            raise Abandoned
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

"""Keep-alive connections to a registry, served by one thread. Each connection has at most one request in flight."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from bench.errors import TrialFailed
from bench.system.servers import HOST

CONNECT_TIMEOUT = 30.0  # seconds
HEAD_END = b"\r\n\r\n"


class Connections:
    """A set of connections, identified by their file descriptors. A context manager that closes them."""

    def __init__(self, port: int, *, head_only: bool = False) -> None:
        """`head_only`: all requests are HEAD requests, so that responses have no body."""
        self._port, self._head_only = port, head_only
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._partial: dict[int, bytes] = {}
        self._sent_at: dict[int, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets.values():
            each.close()
        self._poll.close()

    def open(self, source: str = HOST) -> int:
        """Opens a connection from the address `source`."""
        opened = socket.create_connection((HOST, self._port), CONNECT_TIMEOUT, (source, 0))
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(opened, select.EPOLLIN)
        self._sockets[opened.fileno()] = opened
        return opened.fileno()

    def send(self, connection: int, request: bytes) -> None:
        """Sends a request. The connection must have no request in flight."""
        self._sent_at[connection] = time.perf_counter()
        self._sockets[connection].send(request)

    def responses(self, timeout: float) -> Iterator[tuple[int, bytes, float]]:
        """Waits for at most `timeout` seconds, then yields each complete response with its connection and latency.
        Raises TrialFailed when the server closes a connection."""
        for connection, _ in self._poll.poll(timeout):
            received = self._sockets[connection].recv(65536)
            if not received:
                raise TrialFailed("the server closed a connection")
            answer = self._partial.pop(connection, b"") + received
            if self._is_complete(answer):
                yield connection, answer, time.perf_counter() - self._sent_at[connection]
            else:
                self._partial[connection] = answer

    def _is_complete(self, answer: bytes) -> bool:
        if self._head_only:
            return answer.endswith(HEAD_END)
        head, end, body = answer.partition(HEAD_END)
        return bool(end) and len(body) >= _content_length(head)


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0

"""Taking connections from the one listening socket that all workers share.

One connection per turn of the loop: asyncio and libuv take all that wait, so the first worker to wake would get a whole
burst, and a client's sixteen connections would be served by one core. A worker that is busy comes back later and so
takes fewer. The socket stays with every worker, so nothing that waits in it is lost when one of them dies.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from registry.server.logs import log

# How long to take no connections when the system has no descriptors or memory left for them.
_PAUSE_SECONDS = 0.5


class Acceptor:
    """Accepts on one socket until `close`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, connection: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._connection = connection
        self._greetings: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Takes no more connections; closes this process's copy of the socket."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was quicker, or the client left
        except OSError as error:
            log.error("cannot take connections for %g s: %s", _PAUSE_SECONDS, error)
            self._loop.remove_reader(self._sock)
            self._timer = self._loop.call_later(_PAUSE_SECONDS, self._resume)
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._connection, sock)
        except OSError:
            sock.close()  # gone before we could say anything
